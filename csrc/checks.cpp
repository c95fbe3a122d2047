#include "checks.h"

namespace gol {

void check_floating(const char* op, const at::Tensor& logits) {
  const auto type = logits.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf,
                   op, ": logits must be float32, float64, bfloat16 or float16, got ", type);
}

void check_labels(const char* op, const at::Tensor& labels, int64_t num_classes, int64_t ignore_index,
                  bool validate) {
  TORCH_CHECK_TYPE(labels.scalar_type() == at::kLong || labels.scalar_type() == at::kInt, op,
                   ": labels must be int64 or int32, got ", labels.scalar_type());
  TORCH_CHECK_VALUE(labels.dim() == 1, op, ": labels must be [N], got ", labels.sizes());
  if (!validate) return;
  const at::Tensor on_host = labels.to(at::kCPU, at::kLong).contiguous();
  const int64_t* label = on_host.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < on_host.numel(); ++i) {
    TORCH_CHECK_VALUE((label[i] >= 0 && label[i] <= num_classes) || label[i] == ignore_index, op,
                      ": labels must lie in [0, ", num_classes, "] or be ignore_index (", ignore_index,
                      "), got ", label[i], " in row ", i);
  }
}

void check_device(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& logits) {
  TORCH_CHECK_VALUE(tensor.device() == logits.device(), op, ": ", name, " is on ", tensor.device(),
                    ", logits on ", logits.device());
}

void check_table(const char* op, const char* name, const OptionalTensor& table, at::IntArrayRef shape,
                 at::ScalarType dtype, c10::string_view reweight, const at::Tensor& logits) {
  TORCH_CHECK_VALUE(table.has_value() && table->sizes() == shape && table->scalar_type() == dtype, op,
                    ": reweight '", reweight, "' needs ", name, ", a tensor of ", dtype, " ", shape);
  check_device(op, name, *table, logits);
}

void check_counts(const char* op, const OptionalTensor& table, int64_t c, const at::Tensor& logits) {
  TORCH_CHECK_VALUE(table.has_value() && table->dim() == 1 && table->size(0) >= c, op,
                    ": seesaw needs class_table, the counts of [", c, "] or more classes");
  check_device(op, "class_table", *table, logits);
}

void check_rows(const RowArguments& a) {
  check_floating(a.op, a.logits);
  TORCH_CHECK_VALUE(a.logits.dim() == 2, a.op, ": logits must be [N, K], got ", a.logits.sizes());
  const int64_t n = a.logits.size(0);
  TORCH_CHECK_VALUE(a.labels.dim() == 1 && a.labels.size(0) == n, a.op, ": labels must be [", n,
                    "] like the rows of logits, got ", a.labels.sizes());
  TORCH_CHECK_VALUE(a.num_classes >= 0 && a.num_classes <= a.logits.size(1), a.op,
                    ": num_classes must lie in [0, ", a.logits.size(1), "], the columns of logits, got ",
                    a.num_classes);
  TORCH_CHECK_VALUE(a.reduction == "mean" || a.reduction == "sum" || a.reduction == "none", a.op,
                    ": reduction must be mean, sum or none, got '", a.reduction, "'");
  if (a.row_weights.has_value())
    TORCH_CHECK_VALUE(a.row_weights->dim() == 1 && a.row_weights->size(0) == n, a.op,
                      ": row_weights must be [", n, "], got ", a.row_weights->sizes());
  if (a.avg_factor.has_value())
    TORCH_CHECK_VALUE(a.avg_factor->numel() == 1, a.op, ": avg_factor must be one number, got ",
                      a.avg_factor->sizes());
  check_device(a.op, "labels", a.labels, a.logits);
  if (a.row_weights.has_value()) check_device(a.op, "row_weights", *a.row_weights, a.logits);
  if (a.avg_factor.has_value()) check_device(a.op, "avg_factor", *a.avg_factor, a.logits);
  check_labels(a.op, a.labels, a.num_classes, a.ignore_index, a.validate);
}

}  // namespace gol
