// gol_kernels::softmax_{loss,grad}_native on the CPU.
#include <cmath>

#include "../registration.h"
#include "power_table.h"
#include "rows.h"

namespace gol {
namespace cpu {
namespace {

struct RowLosses {
  std::vector<double> classes, objectness;
};

RowLosses run(const Rows& rows, const std::vector<double>& class_scale,
              const std::vector<double>& objectness_scale, const SoftmaxOptions& o, at::Tensor* grad) {
  const int64_t n = rows.logits.size(0), k = rows.logits.size(1);
  RowLosses losses{std::vector<double>(n), std::vector<double>(o.objectness ? n : 0)};
  SoftmaxArgs args{};
  set_rows(rows, grad, &args);
  args.stream = exceeds_caches(rows.logits);
  args.num_softmax = o.objectness ? k - 2 : k;
  args.row_scale = class_scale.data();
  args.objectness_scale = objectness_scale.data();
  args.row_loss = losses.classes.data();
  args.row_objectness = o.objectness ? losses.objectness.data() : nullptr;
  PowerTable power;
  double other_bits = 0;
  if (o.reweight == SoftmaxReweight::kSeesaw) {
    power = seesaw_powers(*o.class_table, args.num_softmax, o.p);
    args.power = power.data(rows.dtype);
    args.q = std::fmax(o.q, 0.0);
    args.eps = o.eps;
    other_bits = -args.q * std::log2(o.eps);
  } else if (o.reweight == SoftmaxReweight::kPrior) {
    power = priors(*o.class_table);
    args.prior = power.data(rows.dtype);
  }
  if (rows.dtype != DType::kFloat64 && !power.fits_float32(other_bits)) {
    return in_float64(rows, grad, [&](const Rows& wide, at::Tensor* wide_grad) {
      return run(wide, class_scale, objectness_scale, o, wide_grad);
    });
  }
  const KernelTable& table = kernels_for(rows.dtype);
  parallel_ranges<double>(n, kRowGrain, k + 32, [&](int64_t begin, int64_t end, double* scratch) {
    table.softmax(args, begin, end, scratch);
  });
  return losses;
}

LossResults softmax_loss(const RowArguments& a, const SoftmaxOptions& o, bool compute_grad) {
  const Rows rows = prepare_rows(a);
  at::Tensor grad = empty_grad(rows, compute_grad);
  const auto losses = run(rows, rows.scale, rows.scale, o, compute_grad ? &grad : nullptr);
  const at::Tensor class_loss = reduce_rows(rows, losses.classes, a.reduction);
  return {class_loss,
          o.objectness ? reduce_rows(rows, losses.objectness, a.reduction) : at::zeros_like(class_loss),
          grad};
}

at::Tensor softmax_grad(const RowArguments& a, const SoftmaxOptions& o, const at::Tensor& grad_classes,
                        const at::Tensor& grad_objectness) {
  const Rows rows = prepare_rows(a);
  at::Tensor grad = empty_grad(rows, true);
  run(rows, scaled_by(rows.scale, grad_classes), scaled_by(rows.scale, grad_objectness), o, &grad);
  return grad;
}

}  // namespace

void register_softmax(torch::Library& m) { implement_softmax(m, softmax_loss, softmax_grad); }

}  // namespace cpu
}  // namespace gol
