// A power of two for each class, Seesaw's n^p or a prior, as the kernels take it.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "kernels.h"

namespace gol {
namespace cpu {

class PowerTable {
 public:
  PowerTable() = default;
  // 2^(bits - their maximum), at least 2^-900 unless it is 0.
  explicit PowerTable(std::vector<double> bits);
  // In the kernel's number type.
  const void* data(DType dtype) const {
    return dtype == DType::kFloat64 ? static_cast<const void*>(in_double_.data()) : in_float_.data();
  }
  // Whether fp32 holds the powers, and others of as many bits as given, with room for what they multiply;
  // else all is to be done in fp64.
  bool fits_float32(double other_bits = 0) const { return lowest_ >= -kMaxBits && other_bits <= kMaxBits; }

 private:
  static constexpr double kMaxBits = 60;
  std::vector<double> in_double_;
  std::vector<float> in_float_;
  double lowest_ = 0;
};

// n^p of the first c classes; p <= 0 counts as 0. class_counts [c] or longer, of any real dtype.
PowerTable seesaw_powers(const at::Tensor& class_counts, int64_t c, double p);
// exp(log_prior).
PowerTable priors(const at::Tensor& log_prior);

}  // namespace cpu
}  // namespace gol
