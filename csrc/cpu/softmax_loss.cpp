// gol_kernels::softmax_{loss,grad}_native and label_counts_native on the CPU.
#include <cmath>

#include "../registration.h"
#include "power_table.h"
#include "rows.h"

namespace gol {
namespace cpu {
namespace {

struct Options {
  c10::string_view reweight;
  double p, q, eps;
  bool objectness;
};

struct RowLosses {
  std::vector<double> classes, objectness;
};

RowLosses run(const RowArguments& a, const Rows& rows, const std::vector<double>& class_scale,
              const std::vector<double>& objectness_scale, const Options& o,
              const OptionalTensor& class_table, at::Tensor* grad) {
  const int64_t n = rows.logits.size(0), k = rows.logits.size(1);
  RowLosses losses{std::vector<double>(n), std::vector<double>(o.objectness ? n : 0)};
  SoftmaxArgs args{};
  args.dtype = rows.dtype;
  args.logits = rows.logits.const_data_ptr();
  args.row_stride = rows.logits.stride(0);
  args.grad = grad != nullptr ? grad->mutable_data_ptr() : nullptr;
  args.num_columns = k;
  args.num_softmax = o.objectness ? k - 2 : k;
  args.labels = rows.labels.const_data_ptr<int64_t>();
  args.row_scale = class_scale.data();
  args.objectness_scale = objectness_scale.data();
  args.row_loss = losses.classes.data();
  args.row_objectness = o.objectness ? losses.objectness.data() : nullptr;
  const bool fp64 = rows.dtype == DType::kFloat64;
  PowerTable power;
  double other_bits = 0;
  if (o.reweight == "seesaw") {
    check_counts(a.op, class_table, args.num_softmax, a.logits);
    power = seesaw_powers(*class_table, args.num_softmax, o.p);
    args.power = power.data(rows.dtype);
    args.q = std::fmax(o.q, 0.0);
    args.eps = o.eps;
    other_bits = -args.q * std::log2(o.eps);
  } else if (o.reweight == "prior") {
    TORCH_CHECK_VALUE(class_table.has_value() && class_table->dim() == 1 && class_table->size(0) == k, a.op,
                      ": reweight 'prior' needs class_table, a tensor of [", k, "]");
    power = priors(*class_table);
    args.prior = power.data(rows.dtype);
  } else {
    TORCH_CHECK_VALUE(o.reweight == "none", a.op, ": unknown reweight '", o.reweight, "'");
  }
  if (!fp64 && !power.fits_float32(other_bits)) {
    return in_float64(rows, grad, [&](const Rows& wide, at::Tensor* wide_grad) {
      return run(a, wide, class_scale, objectness_scale, o, class_table, wide_grad);
    });
  }
  const KernelTable& table = fp64 ? kGenericKernels : kernels();
  parallel_ranges<double>(n, kRowGrain, 2 * k + 32, [&](int64_t begin, int64_t end, double* scratch) {
    table.softmax(args, begin, end, scratch);
  });
  return losses;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> softmax_loss(
    const at::Tensor& logits, const at::Tensor& labels, const OptionalTensor& row_weights,
    const OptionalTensor& avg_factor, const OptionalTensor& class_table, c10::string_view reweight, double p,
    double q, double eps, bool objectness, int64_t num_classes, int64_t ignore_index,
    c10::string_view reduction, double scale, bool validate, bool compute_grad) {
  const RowArguments a{"softmax_loss", logits,       labels,    row_weights, avg_factor,
                       num_classes,    ignore_index, reduction, scale,       validate};
  const Rows rows = prepare_rows(a);
  at::Tensor grad = empty_grad(rows, compute_grad);
  const auto losses = run(a, rows, rows.scale, rows.scale, {reweight, p, q, eps, objectness}, class_table,
                          compute_grad ? &grad : nullptr);
  const at::Tensor class_loss = reduce_rows(rows, losses.classes, reduction);
  return {class_loss,
          objectness ? reduce_rows(rows, losses.objectness, reduction) : at::zeros_like(class_loss), grad};
}

at::Tensor softmax_grad(const at::Tensor& grad_classes, const at::Tensor& grad_objectness,
                        const at::Tensor& logits, const at::Tensor& labels, const OptionalTensor& row_weights,
                        const OptionalTensor& avg_factor, const OptionalTensor& class_table,
                        c10::string_view reweight, double p, double q, double eps, bool objectness,
                        int64_t num_classes, int64_t ignore_index, c10::string_view reduction, double scale,
                        bool validate) {
  const RowArguments a{"softmax_grad", logits,       labels,    row_weights, avg_factor,
                       num_classes,    ignore_index, reduction, scale,       validate};
  const Rows rows = prepare_rows(a);
  at::Tensor grad = empty_grad(rows, true);
  run(a, rows, scaled_by(rows.scale, grad_classes), scaled_by(rows.scale, grad_objectness),
      {reweight, p, q, eps, objectness}, class_table, &grad);
  return grad;
}

at::Tensor label_counts(const at::Tensor& labels, int64_t num_classes, int64_t ignore_index, bool validate) {
  check_labels("label_counts", labels, num_classes, ignore_index, validate);
  const at::Tensor dense = labels.to(at::kLong).contiguous();
  at::Tensor counts = at::zeros({num_classes + 1}, dense.options());
  int64_t* count = counts.mutable_data_ptr<int64_t>();
  const int64_t* label = dense.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < dense.numel(); ++i) {
    if (label[i] >= 0 && label[i] <= num_classes && label[i] != ignore_index) ++count[label[i]];
  }
  return counts;
}

}  // namespace

void register_softmax(torch::Library& m) {
  m.impl("softmax_loss_native", softmax_loss);
  m.impl("softmax_grad_native", softmax_grad);
  m.impl("label_counts_native", label_counts);
}

}  // namespace cpu
}  // namespace gol
