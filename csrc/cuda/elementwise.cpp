// gol_kernels::gumbel_activation{,_grad}_native, scale_grad__native and label_counts_native on CUDA.
#include "elementwise.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../checks.h"
#include "../registration.h"
#include "rows.h"

namespace gol {
namespace cuda {
namespace {

void gumbel_activation(const GumbelActivationArgs& args, at::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  C10_CUDA_CHECK(launch_gumbel_activation(args, c10::cuda::getCurrentCUDAStream()));
}

void scale_grad(const at::Tensor& grad, const at::Tensor& first, const at::Tensor& second, int64_t split) {
  const c10::cuda::CUDAGuard guard(grad.device());
  const at::Tensor left = first.to(number_of(grad)), right = second.to(number_of(grad));
  const ScaleGradArgs args{
      dtype_of("scale_grad_", grad), grad.mutable_data_ptr(), grad.size(0), grad.size(1), split,
      left.const_data_ptr(),         right.const_data_ptr()};
  if (grad.is_contiguous() && scale_grad_fits(args)) {
    C10_CUDA_CHECK(launch_scale_grad(args, c10::cuda::getCurrentCUDAStream()));
    return;
  }
  grad.narrow(1, 0, split).mul_(left);
  grad.narrow(1, split, grad.size(1) - split).mul_(right);
}

void label_counts(const at::Tensor& labels, int64_t ignore_index, at::Tensor* counts) {
  const c10::cuda::CUDAGuard guard(labels.device());
  const LabelCountsArgs args{labels.const_data_ptr<int64_t>(), labels.numel(), counts->numel() - 1,
                             ignore_index, counts->mutable_data_ptr<int64_t>()};
  C10_CUDA_CHECK(launch_label_counts(args, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

void register_elementwise(torch::Library& m) {
  implement_elementwise(m, gumbel_activation, scale_grad, label_counts);
}

}  // namespace cuda
}  // namespace gol
