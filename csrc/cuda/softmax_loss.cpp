// gol_kernels::softmax_{loss,grad}_native on CUDA.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cmath>

#include "../registration.h"
#include "rows.h"
#include "softmax.h"

namespace gol {
namespace cuda {
namespace {

// Whether fp32 will do, with room for the exponentials that Seesaw's factors multiply.
bool fits(const Rows& rows, const SoftmaxOptions& o) {
  return rows.dtype == DType::kFloat64 || o.reweight != SoftmaxReweight::kSeesaw ||
         seesaw_fits_float32(o.p, o.q, o.eps, 60);
}

// *table: what args->table points to, unless the prologue makes it.
void set_reweight(const RowArguments& a, const SoftmaxOptions& o, SoftmaxArgs* args, at::Tensor* table,
                  Prologue* prologue) {
  args->reweight = o.reweight;
  if (o.reweight == SoftmaxReweight::kPrior) {
    *table = o.class_table->to(number_of(a.logits)).contiguous();
    args->table = table->const_data_ptr();
  } else if (o.reweight == SoftmaxReweight::kSeesaw) {
    args->q = std::fmax(o.q, 0.0);
    args->log2_eps = std::log2(o.eps);
    prologue->class_counts = *o.class_table;
    prologue->num_powers = args->num_softmax;
    prologue->p = o.p;
  }
}

// Fills loss and grad, as far as they are not null. upstream_losses: the gradients of the two losses, or
// null.
void run(const RowArguments& a, const SoftmaxOptions& o, const at::Tensor* upstream_losses, at::Tensor* loss,
         at::Tensor* grad, Rows* rows) {
  SoftmaxArgs args{};
  at::Tensor table, upstreams[2];
  Prologue prologue;
  args.num_softmax = static_cast<int>(a.logits.size(1)) - (o.objectness ? 2 : 0);
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
  set_rows(*rows, grad, prologue.reduces_loss, &args);
  for (int k = 0; k < 2 && loss != nullptr; ++k) args.loss[k] = loss[k].mutable_data_ptr();
  C10_CUDA_CHECK(launch_softmax(args, c10::cuda::getCurrentCUDAStream()));
}

LossResults softmax_loss(const RowArguments& a, const SoftmaxOptions& o, bool compute_grad) {
  const c10::cuda::CUDAGuard guard(a.logits.device());
  Rows rows = prepare_rows(a);
  if (!fits(rows, o)) {
    const auto [classes, objectness, grad] = softmax_loss(in_float64(a), o, compute_grad);
    return {classes.to(at::kFloat), objectness.to(at::kFloat), grad.to(a.logits.scalar_type())};
  }
  at::Tensor loss[2] = {empty_loss(rows, a.reduction), empty_loss(rows, a.reduction)};
  at::Tensor grad = empty_grad(rows, compute_grad);
  run(a, o, nullptr, loss, compute_grad ? &grad : nullptr, &rows);
  return {loss[0], loss[1], grad};
}

at::Tensor softmax_grad(const RowArguments& a, const SoftmaxOptions& o, const at::Tensor& grad_classes,
                        const at::Tensor& grad_objectness) {
  const c10::cuda::CUDAGuard guard(a.logits.device());
  Rows rows = prepare_rows(a);
  if (!fits(rows, o)) {
    return softmax_grad(in_float64(a), o, grad_classes, grad_objectness).to(a.logits.scalar_type());
  }
  const at::Tensor upstream_losses[2] = {grad_classes, grad_objectness};
  at::Tensor grad = empty_grad(rows, true);
  run(a, o, upstream_losses, nullptr, &grad, &rows);
  return grad;
}

}  // namespace

void register_softmax(torch::Library& m) { implement_softmax(m, softmax_loss, softmax_grad); }

}  // namespace cuda
}  // namespace gol
