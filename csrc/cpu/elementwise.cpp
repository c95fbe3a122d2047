// gol_kernels::gumbel_activation{,_grad}_native, scale_grad__native and label_counts_native on the CPU.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "../registration.h"
#include "kernels.h"

namespace gol {
namespace cpu {
namespace {

void gumbel_activation(const GumbelActivationArgs& args, at::Device) {
  const KernelTable& table = kernels_for(args.dtype);
  constexpr int64_t kGrain = 16384;  // elements
  at::parallel_for(0, args.numel, kGrain,
                   [&](int64_t begin, int64_t end) { table.gumbel_activation(args, begin, end); });
}

// Nothing is moved where both are 1, as they are after a plain loss.backward().
void scale_grad(const at::Tensor& grad, const at::Tensor& first, const at::Tensor& second, int64_t split) {
  const auto scale = [&](int64_t begin, int64_t length, const at::Tensor& factor) {
    if (length != 0 && factor.item<double>() != 1) grad.narrow(1, begin, length).mul_(factor);
  };
  scale(0, split, first);
  scale(split, grad.size(1) - split, second);
}

void label_counts(const at::Tensor& labels, int64_t ignore_index, at::Tensor* counts) {
  int64_t* const count = counts->mutable_data_ptr<int64_t>();
  const int64_t* const label = labels.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < labels.numel(); ++i) {
    if (label[i] >= 0 && label[i] < counts->numel() && label[i] != ignore_index) ++count[label[i]];
  }
}

}  // namespace

void register_elementwise(torch::Library& m) {
  implement_elementwise(m, gumbel_activation, scale_grad, label_counts);
}

}  // namespace cpu
}  // namespace gol
