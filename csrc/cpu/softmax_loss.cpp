// gol_kernels::softmax_{loss,grad}_native and label_counts_native on the CPU.
#include <torch/library.h>

#include <algorithm>
#include <cmath>

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

// What fp32 holds of n^p over its maximum, and of the compensation factor, with room for exponentials; a
// table or an option beyond it is worked on in fp64.
constexpr double kMaxBits32 = 60, kMaxBits64 = 900;

double compensation_bits(const Options& o) { return std::fmax(o.q, 0.0) * -std::log2(o.eps); }

// p * log2(max(n, 1)) - its maximum, for each class.
std::vector<double> power_bits(const char* op, const OptionalTensor& class_counts, double p, int64_t c) {
  TORCH_CHECK_VALUE(class_counts.has_value() && class_counts->dim() == 1 && class_counts->size(0) >= c, op,
                    ": seesaw needs class_counts of [", c, "] or more");
  const at::Tensor counts = class_counts->to(at::kDouble).contiguous();
  const double* n = counts.const_data_ptr<double>();
  std::vector<double> bits(c);
  double highest = 0;
  for (int64_t j = 0; j < c; ++j) {
    bits[j] = std::fmax(p, 0.0) * std::log2(std::fmax(n[j], 1.0));
    highest = std::fmax(highest, bits[j]);
  }
  for (double& b : bits) b = std::fmax(b - highest, -kMaxBits64);
  return bits;
}

RowLosses run(const RowArguments& a, const Rows& rows, const std::vector<double>& class_scale,
              const std::vector<double>& objectness_scale, const Options& o,
              const OptionalTensor& class_counts, at::Tensor* grad) {
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
  args.q = std::fmax(o.q, 0.0);
  args.log2_eps = std::log2(o.eps);
  const bool fp64 = rows.dtype == DType::kFloat64;
  std::vector<double> power64;
  std::vector<float> power32;
  if (o.reweight == "seesaw") {
    power64 = power_bits(a.op, class_counts, o.p, args.num_softmax);
    const double lowest = power64.empty() ? 0 : *std::min_element(power64.begin(), power64.end());
    if (!fp64 && std::fmax(-lowest, compensation_bits(o)) > kMaxBits32) {
      const Rows wide{rows.logits.to(at::kDouble), rows.labels, rows.scale, DType::kFloat64};
      at::Tensor wide_grad = empty_grad(wide, grad != nullptr);
      losses = run(a, wide, class_scale, objectness_scale, o, class_counts,
                   grad != nullptr ? &wide_grad : nullptr);
      if (grad != nullptr) grad->copy_(wide_grad);
      return losses;
    }
    for (double& b : power64) b = std::exp2(b);
    power32.assign(power64.begin(), power64.end());
    args.power = fp64 ? static_cast<const void*>(power64.data()) : power32.data();
  } else {
    TORCH_CHECK_VALUE(o.reweight == "none", a.op, ": unknown reweight '", o.reweight, "'");
  }
  const KernelTable& table = fp64 ? kGenericKernels : kernels();
  parallel_rows<double>(n, 2 * k + 32, [&](int64_t begin, int64_t end, double* scratch) {
    table.softmax(args, begin, end, scratch);
  });
  return losses;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> softmax_loss(
    const at::Tensor& logits, const at::Tensor& labels, const OptionalTensor& row_weights,
    const OptionalTensor& avg_factor, const OptionalTensor& class_counts, c10::string_view reweight, double p,
    double q, double eps, bool objectness, int64_t num_classes, int64_t ignore_index,
    c10::string_view reduction, double scale, bool validate, bool compute_grad) {
  const RowArguments a{"softmax_loss", logits,       labels,    row_weights, avg_factor,
                       num_classes,    ignore_index, reduction, scale,       validate};
  const Rows rows = prepare_rows(a);
  at::Tensor grad = empty_grad(rows, compute_grad);
  const auto losses = run(a, rows, rows.scale, rows.scale, {reweight, p, q, eps, objectness}, class_counts,
                          compute_grad ? &grad : nullptr);
  const at::Tensor class_loss = reduce_rows(rows, losses.classes, reduction);
  return {class_loss,
          objectness ? reduce_rows(rows, losses.objectness, reduction) : at::zeros_like(class_loss), grad};
}

at::Tensor softmax_grad(const at::Tensor& grad_classes, const at::Tensor& grad_objectness,
                        const at::Tensor& logits, const at::Tensor& labels, const OptionalTensor& row_weights,
                        const OptionalTensor& avg_factor, const OptionalTensor& class_counts,
                        c10::string_view reweight, double p, double q, double eps, bool objectness,
                        int64_t num_classes, int64_t ignore_index, c10::string_view reduction, double scale,
                        bool validate) {
  const RowArguments a{"softmax_grad", logits,       labels,    row_weights, avg_factor,
                       num_classes,    ignore_index, reduction, scale,       validate};
  const Rows rows = prepare_rows(a);
  at::Tensor grad = empty_grad(rows, true);
  run(a, rows, scaled_by(rows.scale, grad_classes), scaled_by(rows.scale, grad_objectness),
      {reweight, p, q, eps, objectness}, class_counts, &grad);
  return grad;
}

at::Tensor label_counts(const at::Tensor& labels, int64_t num_classes, int64_t ignore_index, bool validate) {
  const at::Tensor checked = checked_labels("label_counts", labels, num_classes, ignore_index, validate);
  at::Tensor counts = at::zeros({num_classes + 1}, checked.options());
  int64_t* count = counts.mutable_data_ptr<int64_t>();
  const int64_t* label = checked.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < checked.numel(); ++i) {
    if (label[i] >= 0 && label[i] <= num_classes && label[i] != ignore_index) ++count[label[i]];
  }
  return counts;
}

}  // namespace

TORCH_LIBRARY_IMPL(gol_kernels, CPU, m) {
  m.impl("softmax_loss_native", softmax_loss);
  m.impl("softmax_grad_native", softmax_grad);
  m.impl("label_counts_native", label_counts);
}

}  // namespace cpu
}  // namespace gol
