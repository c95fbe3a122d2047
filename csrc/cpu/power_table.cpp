#include "power_table.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace gol {
namespace cpu {
namespace {

std::vector<double> as_doubles(const at::Tensor& table) {
  const at::Tensor dense = table.to(at::kDouble).contiguous();
  return std::vector<double>(dense.const_data_ptr<double>(), dense.const_data_ptr<double>() + dense.numel());
}

}  // namespace

PowerTable::PowerTable(std::vector<double> bits) : in_double_(std::move(bits)), in_float_(in_double_.size()) {
  double highest = -std::numeric_limits<double>::infinity();
  for (const double b : in_double_) highest = std::fmax(highest, b);
  for (double& b : in_double_) {
    lowest_ = std::fmin(lowest_, b - highest);
    b = std::exp2(std::isinf(b) ? b : std::max(b - highest, -900.0));  // NaN stays
  }
  std::copy(in_double_.begin(), in_double_.end(), in_float_.begin());
}

PowerTable seesaw_powers(const at::Tensor& class_counts, int64_t c, double p) {
  std::vector<double> bits = as_doubles(class_counts.narrow(0, 0, c));
  for (double& b : bits) b = std::fmax(p, 0.0) * std::log2(std::max(b, 1.0));
  return PowerTable(std::move(bits));
}

PowerTable priors(const at::Tensor& log_prior) {
  std::vector<double> bits = as_doubles(log_prior);
  for (double& b : bits) b *= kLog2E;
  return PowerTable(std::move(bits));
}

}  // namespace cpu
}  // namespace gol
