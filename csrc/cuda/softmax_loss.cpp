// gol_kernels::softmax_{loss,grad}_native on CUDA.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cmath>
#include <limits>

#include "../registration.h"
#include "rows.h"
#include "softmax.h"

namespace gol {
namespace cuda {
namespace {

// The arguments that the softmax ops have beside the rows', under the names of the op schemas.
struct Options {
  const OptionalTensor& class_table;
  c10::string_view reweight;
  double p, q, eps;
  bool objectness;
};

// With room for the exponentials that the factors multiply.
bool fits_float32(const Options& o) {
  return o.reweight != "seesaw" || seesaw_fits_float32(o.p, o.q, o.eps, 60);
}

void set_columns(const RowArguments& a, const Options& o, SoftmaxArgs* args) {
  const int64_t k = a.logits.size(1);
  TORCH_CHECK_VALUE(k >= (o.objectness ? 2 : 0) && k <= std::numeric_limits<int>::max(), a.op,
                    ": logits must have two columns for objectness and fewer than 2^31, got ",
                    a.logits.sizes());
  args->num_columns = static_cast<int>(k);
  args->num_softmax = args->num_columns - (o.objectness ? 2 : 0);
}

// *table: what args->table points to, unless the prologue makes it.
void set_reweight(const RowArguments& a, const Options& o, SoftmaxArgs* args, at::Tensor* table,
                  Prologue* prologue) {
  const int64_t c = args->num_softmax;
  if (o.reweight == "none") {
    args->reweight = SoftmaxReweight::kNone;
  } else if (o.reweight == "prior") {
    TORCH_CHECK_VALUE(o.class_table.has_value() && o.class_table->sizes() == at::IntArrayRef({c}), a.op,
                      ": reweight 'prior' needs class_table, a tensor of [", c, "]");
    check_device(a.op, "class_table", *o.class_table, a.logits);
    args->reweight = SoftmaxReweight::kPrior;
    *table = o.class_table->to(number_of(a.logits)).contiguous();
    args->table = table->const_data_ptr();
  } else if (o.reweight == "seesaw") {
    check_counts(a.op, o.class_table, c, a.logits);
    args->reweight = SoftmaxReweight::kSeesaw;
    args->q = std::fmax(o.q, 0.0);
    args->log2_eps = std::log2(o.eps);
    prologue->class_counts = *o.class_table;
    prologue->num_powers = c;
    prologue->p = o.p;
  } else {
    TORCH_CHECK_VALUE(false, a.op, ": unknown reweight '", o.reweight, "'");
  }
}

// Fills loss and grad, as far as they are not null. upstream_losses: the gradients of the two losses, or
// null.
void run(const RowArguments& a, const Options& o, const at::Tensor* upstream_losses, at::Tensor* loss,
         at::Tensor* grad, Rows* rows) {
  SoftmaxArgs args{};
  at::Tensor table, upstreams[2];
  Prologue prologue;
  set_columns(a, o, &args);
  set_reweight(a, o, &args, &table, &prologue);
  for (int k = 0; k < 2 && upstream_losses != nullptr; ++k) {
    upstreams[k] = upstream_losses[k];
    args.upstream[k] = upstream(a.op, &upstreams[k], *rows);
  }
  if (a.logits.size(0) == 0) {
    for (int k = 0; k < 2 && loss != nullptr; ++k) loss[k].zero_();
    return;
  }
  prologue.reduces_loss = loss != nullptr && a.reduction != "none";
  const at::Tensor powers = run_prologue(rows, prologue);
  if (powers.defined()) args.table = powers.const_data_ptr();
  args.rows = rows->args;
  args.dtype = rows->dtype;
  args.logits = rows->logits.const_data_ptr();
  args.row_stride = rows->logits.stride(0);
  args.grad = grad != nullptr ? grad->mutable_data_ptr() : nullptr;
  for (int k = 0; k < 2 && loss != nullptr; ++k) args.loss[k] = loss[k].mutable_data_ptr();
  args.reduces_loss = prologue.reduces_loss;
  C10_CUDA_CHECK(launch_softmax(args, c10::cuda::getCurrentCUDAStream()));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> softmax_loss(
    const at::Tensor& logits, const at::Tensor& labels, const OptionalTensor& row_weights,
    const OptionalTensor& avg_factor, const OptionalTensor& class_table, c10::string_view reweight, double p,
    double q, double eps, bool objectness, int64_t num_classes, int64_t ignore_index,
    c10::string_view reduction, double scale, bool validate, bool compute_grad) {
  const RowArguments a{"softmax_loss", logits,       labels,    row_weights, avg_factor,
                       num_classes,    ignore_index, reduction, scale,       validate};
  const Options options{class_table, reweight, p, q, eps, objectness};
  const c10::cuda::CUDAGuard guard(logits.device());
  Rows rows = prepare_rows(a);
  if (rows.dtype != DType::kFloat64 && !fits_float32(options)) {
    const auto [classes, background, grad] =
        softmax_loss(logits.to(at::kDouble), labels, row_weights, avg_factor, class_table, reweight, p, q,
                     eps, objectness, num_classes, ignore_index, reduction, scale, false, compute_grad);
    return {classes.to(at::kFloat), background.to(at::kFloat), grad.to(logits.scalar_type())};
  }
  at::Tensor loss[2] = {empty_loss(rows, reduction), empty_loss(rows, reduction)};
  at::Tensor grad = empty_grad(rows, compute_grad);
  run(a, options, nullptr, loss, compute_grad ? &grad : nullptr, &rows);
  return {loss[0], loss[1], grad};
}

at::Tensor softmax_grad(const at::Tensor& grad_classes, const at::Tensor& grad_objectness,
                        const at::Tensor& logits, const at::Tensor& labels, const OptionalTensor& row_weights,
                        const OptionalTensor& avg_factor, const OptionalTensor& class_table,
                        c10::string_view reweight, double p, double q, double eps, bool objectness,
                        int64_t num_classes, int64_t ignore_index, c10::string_view reduction, double scale,
                        bool validate) {
  const RowArguments a{"softmax_grad", logits,       labels,    row_weights, avg_factor,
                       num_classes,    ignore_index, reduction, scale,       validate};
  const Options options{class_table, reweight, p, q, eps, objectness};
  const c10::cuda::CUDAGuard guard(logits.device());
  Rows rows = prepare_rows(a);
  if (rows.dtype != DType::kFloat64 && !fits_float32(options)) {
    const at::Tensor grad = softmax_grad(grad_classes, grad_objectness, logits.to(at::kDouble), labels,
                                         row_weights, avg_factor, class_table, reweight, p, q, eps,
                                         objectness, num_classes, ignore_index, reduction, scale, false);
    return grad.to(logits.scalar_type());
  }
  const at::Tensor upstream_losses[2] = {grad_classes, grad_objectness};
  at::Tensor grad = empty_grad(rows, true);
  run(a, options, upstream_losses, nullptr, &grad, &rows);
  return grad;
}

}  // namespace

void register_softmax(torch::Library& m) {
  m.impl("softmax_loss_native", softmax_loss);
  m.impl("softmax_grad_native", softmax_grad);
}

}  // namespace cuda
}  // namespace gol
