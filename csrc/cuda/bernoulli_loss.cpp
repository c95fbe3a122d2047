// gol_kernels::bernoulli_{loss,grad}_native on CUDA.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cmath>
#include <limits>

#include "../registration.h"
#include "bernoulli.h"
#include "rows.h"

namespace gol {
namespace cuda {
namespace {

// The logit at which the link's probability is p.
double inverse_link(const BernoulliArgs& args, double p) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  if (args.link == Link::kSigmoid) return std::log(p) - std::log1p(-p);
  if (args.link != Link::kProbit) return -args.link_options.temperature * std::log(-std::log(p));
  const ProbitLink<double> link(LinkOptions{1.0, -kInfinity, kInfinity, 0.0});
  double low = -40, high = 40;  // of a function that has no formula
  for (int i = 0; i < 50; ++i) {
    const double middle = (low + high) / 2;
    (link.log2_probability(middle) < std::log2(p) ? low : high) = middle;
  }
  return high;
}

// What args points to.
struct Tables {
  at::Tensor class_table, row_table, rng;
};

void set_reweight(const RowArguments& a, const BernoulliOptions& o, BernoulliArgs* args, Tables* tables,
                  Prologue* prologue) {
  args->reweight = o.reweight;
  if (o.reweight == Reweight::kNone) return;
  if (o.reweight == Reweight::kSeesaw) {
    args->q = o.q;
    args->log2_eps = std::log2(o.eps);
    args->logit_eps = inverse_link(*args, o.eps);
    prologue->class_counts = *o.class_table;
    prologue->num_powers = a.logits.size(1);
    prologue->p = o.p;
    return;
  }
  const bool weights = o.reweight == Reweight::kWeights;
  tables->class_table = (weights ? o.class_table->to(number_of(a.logits)) : *o.class_table).contiguous();
  args->class_table = tables->class_table.const_data_ptr();
  if (o.reweight == Reweight::kACSL) {
    tables->row_table = o.row_table->contiguous();
    args->row_groups = tables->row_table.const_data_ptr<uint8_t>();
    args->logit_threshold = o.logit_threshold;
  } else if (o.reweight == Reweight::kDrop) {
    tables->rng = o.rng->contiguous();
    args->rng = tables->rng.const_data_ptr<int64_t>();
    prologue->rare = tables->class_table;
  }
}

// Whether fp32 will do: Seesaw's factors are multiplied by numbers near 1.
bool fits(const Rows& rows, const BernoulliOptions& o) {
  return rows.dtype == DType::kFloat64 || o.reweight != Reweight::kSeesaw ||
         seesaw_fits_float32(o.p, o.q, o.eps, 120);
}

// Fills loss, grad and statistics, as far as they are not null. upstream: the gradient of the loss, or null.
void run(const RowArguments& a, const BernoulliOptions& o, const at::Tensor* upstream_loss, at::Tensor* loss,
         at::Tensor* grad, at::Tensor* statistics, Rows* rows) {
  constexpr int64_t kMost = 1 << 30;
  TORCH_CHECK_VALUE(a.logits.size(0) < kMost && a.logits.size(1) < kMost, a.op,
                    ": logits must have fewer than 2^30 rows and columns, got ", a.logits.sizes());
  BernoulliArgs args{};
  Tables tables;
  Prologue prologue;
  args.link = o.link;
  args.link_options = o.link_options;
  set_reweight(a, o, &args, &tables, &prologue);
  at::Tensor one_upstream;
  if (upstream_loss != nullptr) {
    one_upstream = *upstream_loss;
    const Upstream upstream_of_rows = upstream(a.op, &one_upstream, *rows);
    if (upstream_of_rows.stride == 0) args.upstream = upstream_of_rows.data;
    else multiply_weights(rows, one_upstream);
  }
  if (a.logits.numel() == 0) {
    if (loss != nullptr) loss->zero_();
    if (statistics != nullptr) statistics->zero_();
    return;
  }
  prologue.reduces_loss = loss != nullptr && a.reduction != "none";
  prologue.codes_rows = true;
  const at::Tensor powers = run_prologue(rows, prologue);
  if (powers.defined()) args.class_table = powers.const_data_ptr();
  set_rows(*rows, grad, prologue.reduces_loss, &args);
  args.coded_rows = rows->coded_rows.const_data_ptr();
  args.loss = loss != nullptr ? loss->mutable_data_ptr() : nullptr;
  at::Tensor partial;
  if (statistics != nullptr) {
    args.statistics = statistics->mutable_data_ptr<double>();
    partial = at::empty({partial_statistics_bytes(args)}, rows->workspace.options());
    args.partial_statistics = partial.mutable_data_ptr();
  }
  C10_CUDA_CHECK(launch_bernoulli(args, c10::cuda::getCurrentCUDAStream()));
}

LossResults bernoulli_loss(const RowArguments& a, const BernoulliOptions& o, bool compute_grad,
                           bool compute_statistics) {
  const c10::cuda::CUDAGuard guard(a.logits.device());
  Rows rows = prepare_rows(a);
  if (!fits(rows, o)) {
    const auto [loss, grad, statistics] = bernoulli_loss(in_float64(a), o, compute_grad, compute_statistics);
    return {loss.to(at::kFloat), grad.to(a.logits.scalar_type()), statistics};
  }
  at::Tensor loss = empty_loss(rows, a.reduction), grad = empty_grad(rows, compute_grad);
  at::Tensor statistics = at::empty({0}, a.logits.options().dtype(at::kDouble));
  if (compute_statistics) statistics = at::empty({2, a.logits.size(1)}, statistics.options());
  run(a, o, nullptr, &loss, compute_grad ? &grad : nullptr, compute_statistics ? &statistics : nullptr,
      &rows);
  return {loss, grad, statistics};
}

at::Tensor bernoulli_grad(const RowArguments& a, const BernoulliOptions& o, const at::Tensor& grad_loss) {
  const c10::cuda::CUDAGuard guard(a.logits.device());
  Rows rows = prepare_rows(a);
  if (!fits(rows, o)) {
    return bernoulli_grad(in_float64(a), o, grad_loss).to(a.logits.scalar_type());
  }
  at::Tensor grad = empty_grad(rows, true);
  run(a, o, &grad_loss, nullptr, &grad, nullptr, &rows);
  return grad;
}

}  // namespace

void register_bernoulli(torch::Library& m) { implement_bernoulli(m, bernoulli_loss, bernoulli_grad); }

}  // namespace cuda
}  // namespace gol
