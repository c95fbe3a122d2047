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

// The arguments that the Bernoulli ops have beside the rows', under the names of the op schemas.
struct Options {
  const OptionalTensor &class_table, &row_table, &rng;
  c10::string_view link;
  double temperature, clip_min, clip_max;
  c10::string_view slope, reweight;
  double p, q, eps, logit_threshold;
};

void set_link(const char* op, const Options& o, BernoulliArgs* args) {
  const bool released = o.slope == "released", straight_through = o.slope == "straight_through";
  TORCH_CHECK_VALUE(released || straight_through || o.slope == "zero_outside", op, ": unknown slope '",
                    o.slope, "'");
  args->link_options = {o.temperature, o.clip_min, o.clip_max, straight_through ? 1.0 : 0.0};
  if (o.link == "gumbel") args->link = released ? Link::kGumbelReleased : Link::kGumbel;
  else if (o.link == "sigmoid") args->link = Link::kSigmoid;
  else if (o.link == "probit") args->link = Link::kProbit;
  else TORCH_CHECK_VALUE(false, op, ": unknown link '", o.link, "'");
  const bool has_released = o.reweight == "none" || o.reweight == "eql" || o.reweight == "drop";
  TORCH_CHECK_VALUE(
      !released || (o.link == "gumbel" && has_released), op,
      ": slope 'released' exists for link 'gumbel' and reweight 'none', 'eql' or 'drop', got link '", o.link,
      "' and reweight '", o.reweight, "'");
}

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

void set_reweight(const RowArguments& a, const Options& o, BernoulliArgs* args, Tables* tables,
                  Prologue* prologue) {
  const int64_t n = a.logits.size(0), k = a.logits.size(1);
  const auto check_class_table = [&](at::ScalarType dtype) {
    check_table(a.op, "class_table", o.class_table, {k}, dtype, o.reweight, a.logits);
    tables->class_table = o.class_table->contiguous();
  };
  if (o.reweight == "none") {
    args->reweight = Reweight::kNone;
  } else if (o.reweight == "eql" || o.reweight == "drop" || o.reweight == "federated") {
    check_class_table(at::kBool);
    args->reweight = o.reweight == "eql"    ? Reweight::kEQL
                     : o.reweight == "drop" ? Reweight::kDrop
                                            : Reweight::kFederated;
  } else if (o.reweight == "acsl") {
    check_class_table(at::kByte);
    check_table(a.op, "row_table", o.row_table, {n}, at::kByte, o.reweight, a.logits);
    args->reweight = Reweight::kACSL;
    tables->row_table = o.row_table->contiguous();
    args->row_groups = tables->row_table.const_data_ptr<uint8_t>();
    args->logit_threshold = o.logit_threshold;
  } else if (o.reweight == "weights") {
    TORCH_CHECK_VALUE(o.class_table.has_value() && o.class_table->sizes() == at::IntArrayRef({2, k}), a.op,
                      ": reweight 'weights' needs class_table, a tensor of [2, ", k, "]");
    check_device(a.op, "class_table", *o.class_table, a.logits);
    args->reweight = Reweight::kWeights;
    tables->class_table = o.class_table->to(number_of(a.logits)).contiguous();
  } else if (o.reweight == "seesaw") {
    check_counts(a.op, o.class_table, k, a.logits);
    args->reweight = Reweight::kSeesaw;
    args->q = o.q;
    args->log2_eps = std::log2(o.eps);
    args->logit_eps = inverse_link(*args, o.eps);
    prologue->class_counts = *o.class_table;
    prologue->num_powers = k;
    prologue->p = o.p;
  } else {
    TORCH_CHECK_VALUE(false, a.op, ": unknown reweight '", o.reweight, "'");
  }
  if (args->reweight == Reweight::kDrop) {
    TORCH_CHECK_VALUE(o.rng.has_value() && o.rng->numel() == 2 && o.rng->scalar_type() == at::kLong, a.op,
                      ": DropLoss needs rng, an int64 tensor of (seed, offset)");
    check_device(a.op, "rng", *o.rng, a.logits);
    tables->rng = o.rng->contiguous();
    args->rng = tables->rng.const_data_ptr<int64_t>();
    prologue->rare = tables->class_table;
  }
  if (tables->class_table.defined()) args->class_table = tables->class_table.const_data_ptr();
}

// The factors are multiplied by numbers near 1.
bool fits_float32(const Options& o) {
  return o.reweight != "seesaw" || seesaw_fits_float32(o.p, o.q, o.eps, 120);
}

void run(const RowArguments& a, const Options& o, const at::Tensor* upstream_loss, at::Tensor* loss,
         at::Tensor* grad, at::Tensor* statistics, Rows* rows);

void run_in_float64(const RowArguments& a, const Options& o, const at::Tensor* upstream_loss,
                    at::Tensor* loss, at::Tensor* grad, at::Tensor* statistics) {
  const at::Tensor logits = a.logits.to(at::kDouble);
  const RowArguments wide{a.op,          logits,         a.labels,    a.row_weights, a.avg_factor,
                          a.num_classes, a.ignore_index, a.reduction, a.scale,       false};
  Rows rows = prepare_rows(wide);
  at::Tensor wide_loss = empty_loss(rows, a.reduction), wide_grad = empty_grad(rows, grad != nullptr);
  run(wide, o, upstream_loss, loss != nullptr ? &wide_loss : nullptr, grad != nullptr ? &wide_grad : nullptr,
      statistics, &rows);
  if (loss != nullptr) loss->copy_(wide_loss);
  if (grad != nullptr) grad->copy_(wide_grad);
}

// Fills loss, grad and statistics, as far as they are not null. upstream: the gradient of the loss, or null.
void run(const RowArguments& a, const Options& o, const at::Tensor* upstream_loss, at::Tensor* loss,
         at::Tensor* grad, at::Tensor* statistics, Rows* rows) {
  if (rows->dtype != DType::kFloat64 && !fits_float32(o))
    return run_in_float64(a, o, upstream_loss, loss, grad, statistics);
  constexpr int64_t kMost = 1 << 30;
  TORCH_CHECK_VALUE(a.logits.size(0) < kMost && a.logits.size(1) < kMost, a.op,
                    ": logits must have fewer than 2^30 rows and columns, got ", a.logits.sizes());
  BernoulliArgs args{};
  Tables tables;
  Prologue prologue;
  set_link(a.op, o, &args);
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
  args.rows = rows->args;
  args.coded_rows = rows->coded_rows.const_data_ptr();
  args.dtype = rows->dtype;
  args.logits = rows->logits.const_data_ptr();
  args.row_stride = rows->logits.stride(0);
  args.num_columns = static_cast<int>(rows->logits.size(1));
  args.grad = grad != nullptr ? grad->mutable_data_ptr() : nullptr;
  args.loss = loss != nullptr ? loss->mutable_data_ptr() : nullptr;
  args.reduces_loss = prologue.reduces_loss;
  at::Tensor partial;
  if (statistics != nullptr) {
    args.statistics = statistics->mutable_data_ptr<double>();
    partial = at::empty({partial_statistics_bytes(args)}, rows->workspace.options());
    args.partial_statistics = partial.mutable_data_ptr();
  }
  C10_CUDA_CHECK(launch_bernoulli(args, c10::cuda::getCurrentCUDAStream()));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> bernoulli_loss(
    const at::Tensor& logits, const at::Tensor& labels, const OptionalTensor& row_weights,
    const OptionalTensor& avg_factor, const OptionalTensor& class_table, const OptionalTensor& row_table,
    const OptionalTensor& rng, c10::string_view link, double temperature, double clip_min, double clip_max,
    c10::string_view slope, c10::string_view reweight, double p, double q, double eps, double logit_threshold,
    int64_t num_classes, int64_t ignore_index, c10::string_view reduction, double scale, bool validate,
    bool compute_grad, bool compute_statistics) {
  const RowArguments a{"bernoulli_loss", logits,       labels,    row_weights, avg_factor,
                       num_classes,      ignore_index, reduction, scale,       validate};
  const Options options{class_table, row_table, rng, link, temperature, clip_min,       clip_max,
                        slope,       reweight,  p,   q,    eps,         logit_threshold};
  const c10::cuda::CUDAGuard guard(logits.device());
  Rows rows = prepare_rows(a);
  at::Tensor loss = empty_loss(rows, reduction), grad = empty_grad(rows, compute_grad);
  at::Tensor statistics = at::empty({0}, logits.options().dtype(at::kDouble));
  if (compute_statistics) statistics = at::empty({2, logits.size(1)}, statistics.options());
  run(a, options, nullptr, &loss, compute_grad ? &grad : nullptr, compute_statistics ? &statistics : nullptr,
      &rows);
  return {loss, grad, statistics};
}

at::Tensor bernoulli_grad(const at::Tensor& grad_loss, const at::Tensor& logits, const at::Tensor& labels,
                          const OptionalTensor& row_weights, const OptionalTensor& avg_factor,
                          const OptionalTensor& class_table, const OptionalTensor& row_table,
                          const OptionalTensor& rng, c10::string_view link, double temperature,
                          double clip_min, double clip_max, c10::string_view slope, c10::string_view reweight,
                          double p, double q, double eps, double logit_threshold, int64_t num_classes,
                          int64_t ignore_index, c10::string_view reduction, double scale, bool validate) {
  const RowArguments a{"bernoulli_grad", logits,       labels,    row_weights, avg_factor,
                       num_classes,      ignore_index, reduction, scale,       validate};
  const Options options{class_table, row_table, rng, link, temperature, clip_min,       clip_max,
                        slope,       reweight,  p,   q,    eps,         logit_threshold};
  const c10::cuda::CUDAGuard guard(logits.device());
  Rows rows = prepare_rows(a);
  at::Tensor grad = empty_grad(rows, true);
  run(a, options, &grad_loss, nullptr, &grad, nullptr, &rows);
  return grad;
}

}  // namespace

void register_bernoulli(torch::Library& m) {
  m.impl("bernoulli_loss_native", bernoulli_loss);
  m.impl("bernoulli_grad_native", bernoulli_grad);
}

}  // namespace cuda
}  // namespace gol
