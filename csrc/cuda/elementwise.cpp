// gol_kernels::gumbel_activation{,_grad}_native, scale_grad__native and label_counts_native on CUDA.
#include "elementwise.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../registration.h"
#include "rows.h"

namespace gol {
namespace cuda {
namespace {

at::Tensor run_activation(const char* op, const at::Tensor& logits, const at::Tensor* grad_output,
                          const LinkOptions& options) {
  check_floating(op, logits);
  if (grad_output != nullptr) {
    TORCH_CHECK_VALUE(grad_output->sizes() == logits.sizes(), op, ": grad_output must be ", logits.sizes(),
                      " like logits, got ", grad_output->sizes());
    check_device(op, "grad_output", *grad_output, logits);
  }
  const c10::cuda::CUDAGuard guard(logits.device());
  const at::Tensor z = logits.contiguous();
  at::Tensor upstream, output = at::empty_like(z, at::MemoryFormat::Contiguous);
  if (grad_output != nullptr) upstream = grad_output->to(z.scalar_type()).contiguous();
  if (z.numel() == 0) return output;
  const GumbelActivationArgs args{dtype_of(z),
                                  z.const_data_ptr(),
                                  upstream.defined() ? upstream.const_data_ptr() : nullptr,
                                  output.mutable_data_ptr(),
                                  z.numel(),
                                  options};
  C10_CUDA_CHECK(launch_gumbel_activation(args, c10::cuda::getCurrentCUDAStream()));
  return output;
}

at::Tensor gumbel_activation(const at::Tensor& logits, double temperature, double clip_min, double clip_max) {
  return run_activation("gumbel_activation", logits, nullptr, {temperature, clip_min, clip_max, 0.0});
}

at::Tensor gumbel_activation_grad(const at::Tensor& grad_output, const at::Tensor& logits, double temperature,
                                  double clip_min, double clip_max) {
  return run_activation("gumbel_activation_grad", logits, &grad_output,
                        {temperature, clip_min, clip_max, 0.0});
}

void scale_grad_(const at::Tensor& grad, const at::Tensor& first, const at::Tensor& second, int64_t split) {
  constexpr const char* kOp = "scale_grad_";
  check_floating(kOp, grad);
  TORCH_CHECK_VALUE(grad.dim() == 2 && split >= 0 && split <= grad.size(1), kOp,
                    ": grad must be [N, K] and split lie in [0, K], got ", grad.sizes(), " and ", split);
  TORCH_CHECK_VALUE(first.numel() == 1 && second.numel() == 1, kOp,
                    ": the factors must be one number each, got ", first.sizes(), " and ", second.sizes());
  check_device(kOp, "first", first, grad);
  check_device(kOp, "second", second, grad);
  const c10::cuda::CUDAGuard guard(grad.device());
  if (grad.numel() == 0) return;
  const at::Tensor left = first.to(number_of(grad)), right = second.to(number_of(grad));
  const ScaleGradArgs args{dtype_of(grad), grad.mutable_data_ptr(), grad.size(0),          grad.size(1),
                           split,          left.const_data_ptr(),   right.const_data_ptr()};
  if (grad.is_contiguous() && scale_grad_fits(args)) {
    C10_CUDA_CHECK(launch_scale_grad(args, c10::cuda::getCurrentCUDAStream()));
    return;
  }
  grad.narrow(1, 0, split).mul_(left);
  grad.narrow(1, split, grad.size(1) - split).mul_(right);
}

at::Tensor label_counts(const at::Tensor& labels, int64_t num_classes, int64_t ignore_index, bool validate) {
  check_labels("label_counts", labels, num_classes, ignore_index, validate);
  const c10::cuda::CUDAGuard guard(labels.device());
  at::Tensor counts = at::zeros({num_classes + 1}, labels.options().dtype(at::kLong));
  if (labels.numel() == 0) return counts;
  const at::Tensor dense = labels.to(at::kLong).contiguous();
  const LabelCountsArgs args{dense.const_data_ptr<int64_t>(), dense.numel(), num_classes, ignore_index,
                             counts.mutable_data_ptr<int64_t>()};
  C10_CUDA_CHECK(launch_label_counts(args, c10::cuda::getCurrentCUDAStream()));
  return counts;
}

}  // namespace

void register_elementwise(torch::Library& m) {
  m.impl("gumbel_activation_native", gumbel_activation);
  m.impl("gumbel_activation_grad_native", gumbel_activation_grad);
  m.impl("scale_grad__native", scale_grad_);
  m.impl("label_counts_native", label_counts);
}

}  // namespace cuda
}  // namespace gol
