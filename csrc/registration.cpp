// The ops' signatures in the order of their schemas, once for all backends.
#include "registration.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <utility>

#include "checks.h"

namespace gol {
namespace {

// The arguments that a loss op and its gradient have in common, in their order, become two structs.
template <class Options> using Unpacked = std::pair<RowArguments, Options>;
template <class Options, class... Arguments> using Unpack = Unpacked<Options>(const char* op, Arguments...);

Unpacked<BernoulliOptions> unpack_bernoulli(
    const char* op, const at::Tensor& logits, const at::Tensor& labels, const OptionalTensor& row_weights,
    const OptionalTensor& avg_factor, const OptionalTensor& class_table, const OptionalTensor& row_table,
    const OptionalTensor& rng, c10::string_view link, double temperature, double clip_min, double clip_max,
    c10::string_view slope, c10::string_view reweight, double p, double q, double eps, double logit_threshold,
    int64_t num_classes, int64_t ignore_index, c10::string_view reduction, double scale, bool validate) {
  const RowArguments a{op,          logits,       labels,    row_weights, avg_factor,
                       num_classes, ignore_index, reduction, scale,       validate};
  check_rows(a);
  const LinkOptions link_options{temperature, clip_min, clip_max, slope == "straight_through" ? 1.0 : 0.0};
  return {a,
          {class_table, row_table, rng, link_of(op, link, slope, reweight), link_options,
           reweight_of(a, reweight, class_table, row_table, rng), p, q, eps, logit_threshold}};
}

Unpacked<SoftmaxOptions> unpack_softmax(const char* op, const at::Tensor& logits, const at::Tensor& labels,
                                        const OptionalTensor& row_weights, const OptionalTensor& avg_factor,
                                        const OptionalTensor& class_table, c10::string_view reweight,
                                        double p, double q, double eps, bool objectness, int64_t num_classes,
                                        int64_t ignore_index, c10::string_view reduction, double scale,
                                        bool validate) {
  const RowArguments a{op,          logits,       labels,    row_weights, avg_factor,
                       num_classes, ignore_index, reduction, scale,       validate};
  check_rows(a);
  return {a, {class_table, softmax_reweight_of(a, reweight, class_table, objectness), p, q, eps, objectness}};
}

// A loss op: unpack's arguments, then flags.
template <class Options, class... Arguments, class... Flags>
void implement_loss(torch::Library& m, const char* op, Unpack<Options, Arguments...>* unpack,
                    LossResults (*loss)(const RowArguments&, const Options&, Flags...)) {
  m.impl(c10::str(op, "_native").c_str(), [=](Arguments... arguments, Flags... flags) {
    const auto [rows, options] = unpack(op, arguments...);
    return loss(rows, options, flags...);
  });
}

// A gradient op: the gradients of the losses, then unpack's arguments.
template <class Options, class... Arguments, class... Upstream>
void implement_grad(torch::Library& m, const char* op, Unpack<Options, Arguments...>* unpack,
                    at::Tensor (*grad)(const RowArguments&, const Options&, Upstream...)) {
  m.impl(c10::str(op, "_native").c_str(), [=](Upstream... upstream, Arguments... arguments) {
    const auto [rows, options] = unpack(op, arguments...);
    return grad(rows, options, upstream...);
  });
}

// grad_output: null for the activation.
at::Tensor run_activation(const char* op, const at::Tensor& logits, const at::Tensor* grad_output,
                          const LinkOptions& options, GumbelActivation* run) {
  const DType dtype = dtype_of(op, logits);
  const at::Tensor z = logits.contiguous();
  at::Tensor upstream, output = at::empty_like(z, at::MemoryFormat::Contiguous);
  if (grad_output != nullptr) {
    TORCH_CHECK_VALUE(grad_output->sizes() == logits.sizes(), op, ": grad_output must be ", logits.sizes(),
                      " like logits, got ", grad_output->sizes());
    check_device(op, "grad_output", *grad_output, logits);
    upstream = grad_output->to(z.scalar_type()).contiguous();
  }
  if (z.numel() == 0) return output;
  run({dtype, z.const_data_ptr(), upstream.defined() ? upstream.const_data_ptr() : nullptr,
       output.mutable_data_ptr(), z.numel(), options},
      z.device());
  return output;
}

void check_scale_grad(const at::Tensor& grad, const at::Tensor& first, const at::Tensor& second,
                      int64_t split) {
  constexpr const char* kOp = "scale_grad_";
  dtype_of(kOp, grad);
  TORCH_CHECK_VALUE(grad.dim() == 2 && split >= 0 && split <= grad.size(1), kOp,
                    ": grad must be [N, K] and split lie in [0, K], got ", grad.sizes(), " and ", split);
  TORCH_CHECK_VALUE(first.numel() == 1 && second.numel() == 1, kOp,
                    ": the factors must be one number each, got ", first.sizes(), " and ", second.sizes());
  check_device(kOp, "first", first, grad);
  check_device(kOp, "second", second, grad);
}

}  // namespace

void implement_bernoulli(torch::Library& m, BernoulliLoss* loss, BernoulliGrad* grad) {
  implement_loss(m, "bernoulli_loss", unpack_bernoulli, loss);
  implement_grad(m, "bernoulli_grad", unpack_bernoulli, grad);
}

void implement_softmax(torch::Library& m, SoftmaxLoss* loss, SoftmaxGrad* grad) {
  implement_loss(m, "softmax_loss", unpack_softmax, loss);
  implement_grad(m, "softmax_grad", unpack_softmax, grad);
}

void implement_elementwise(torch::Library& m, GumbelActivation* gumbel_activation, ScaleGrad* scale_grad,
                           LabelCounts* label_counts) {
  m.impl("gumbel_activation_native",
         [=](const at::Tensor& logits, double temperature, double clip_min, double clip_max) {
           return run_activation("gumbel_activation", logits, nullptr, {temperature, clip_min, clip_max, 0.0},
                                 gumbel_activation);
         });
  m.impl("gumbel_activation_grad_native", [=](const at::Tensor& grad_output, const at::Tensor& logits,
                                              double temperature, double clip_min, double clip_max) {
    return run_activation("gumbel_activation_grad", logits, &grad_output,
                          {temperature, clip_min, clip_max, 0.0}, gumbel_activation);
  });
  m.impl("scale_grad__native",
         [=](const at::Tensor& grad, const at::Tensor& first, const at::Tensor& second, int64_t split) {
           check_scale_grad(grad, first, second, split);
           if (grad.numel() != 0) scale_grad(grad, first, second, split);
         });
  m.impl("label_counts_native",
         [=](const at::Tensor& labels, int64_t num_classes, int64_t ignore_index, bool validate) {
           check_labels("label_counts", labels, num_classes, ignore_index, validate);
           at::Tensor counts = at::zeros({num_classes + 1}, labels.options().dtype(at::kLong));
           if (labels.numel() != 0) label_counts(labels.to(at::kLong).contiguous(), ignore_index, &counts);
           return counts;
         });
}

}  // namespace gol
