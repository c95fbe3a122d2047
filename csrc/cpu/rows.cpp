// Besides what rows.h declares: gol_kernels::scale_grad__native on the CPU.
#include "rows.h"

#include <cmath>
#include <limits>

#include "../registration.h"

namespace gol {
namespace cpu {
namespace {

DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble: return DType::kFloat64;
    case at::kBFloat16: return DType::kBFloat16;
    case at::kHalf: return DType::kFloat16;
    default: return DType::kFloat32;
  }
}

// Nothing is moved where both are 1, as they are after a plain loss.backward().
void scale_grad_(const at::Tensor& grad, const at::Tensor& first, const at::Tensor& second, int64_t split) {
  const auto scale = [&](int64_t begin, int64_t length, const at::Tensor& factor) {
    if (length != 0 && factor.item<double>() != 1) grad.narrow(1, begin, length).mul_(factor);
  };
  scale(0, split, first);
  scale(split, grad.size(1) - split, second);
}

}  // namespace

Rows prepare_rows(const RowArguments& a) {
  check_rows(a);
  const int64_t n = a.logits.size(0);
  Rows rows{a.logits.stride(1) == 1 || a.logits.size(1) == 1 ? a.logits : a.logits.contiguous(),
            a.labels.to(at::kLong).contiguous(), std::vector<double>(n), std::vector<double>(n),
            dtype_of(a.logits)};

  at::Tensor weights;
  if (a.row_weights.has_value()) weights = a.row_weights->to(at::kDouble).contiguous();
  const double* weight = weights.defined() ? weights.const_data_ptr<double>() : nullptr;
  const int64_t* label = rows.labels.const_data_ptr<int64_t>();
  int64_t counted = 0;
  for (int64_t i = 0; i < n; ++i) counted += label[i] != a.ignore_index;

  double factor = a.scale;
  if (a.reduction == "mean") {
    const double denominator =
        a.avg_factor.has_value() ? a.avg_factor->item<double>() : static_cast<double>(counted);
    if (denominator != 0) factor /= denominator;  // nothing to average over: the sum, which is 0
  }
  for (int64_t i = 0; i < n; ++i) {
    const bool legal = label[i] >= 0 && label[i] <= a.num_classes;
    const double w = weight == nullptr ? 1.0 : weight[i];
    rows.weight[i] = legal && label[i] != a.ignore_index ? w : 0.0;
    rows.scale[i] = label[i] == a.ignore_index ? 0.0
                    : legal                    ? w * factor
                                               : std::numeric_limits<double>::quiet_NaN();
  }
  return rows;
}

std::vector<double> scaled_by(const std::vector<double>& scale, const at::Tensor& grad_loss) {
  const at::Tensor upstream = grad_loss.to(at::kDouble).expand({static_cast<int64_t>(scale.size())});
  std::vector<double> product(scale.size());
  const auto access = upstream.accessor<double, 1>();
  for (size_t i = 0; i < scale.size(); ++i) product[i] = scale[i] * access[static_cast<int64_t>(i)];
  return product;
}

at::Tensor reduce_rows(const Rows& rows, const std::vector<double>& row_loss, c10::string_view reduction) {
  const auto options = rows.logits.options().dtype(rows.dtype == DType::kFloat64 ? at::kDouble : at::kFloat);
  const int64_t n = static_cast<int64_t>(row_loss.size());
  if (reduction != "none") {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (rows.scale[i] != 0) total += rows.scale[i] * row_loss[i];
    }
    return at::full({}, total, options);
  }
  at::Tensor losses = at::empty({n}, options.dtype(at::kDouble));
  double* loss = losses.mutable_data_ptr<double>();
  for (int64_t i = 0; i < n; ++i) loss[i] = rows.scale[i] != 0 ? rows.scale[i] * row_loss[i] : 0.0;
  return losses.to(options.dtype());
}

at::Tensor empty_grad(const Rows& rows, bool compute_grad) {
  if (!compute_grad) return at::empty({0}, rows.logits.options());
  return at::empty(rows.logits.sizes(), rows.logits.options(), at::MemoryFormat::Contiguous);
}

void register_rows(torch::Library& m) { m.impl("scale_grad__native", scale_grad_); }

}  // namespace cpu
}  // namespace gol
