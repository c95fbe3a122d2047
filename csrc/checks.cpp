#include "checks.h"

#include <limits>

namespace gol {
namespace {

// A table that the reweighting needs: of this shape and, where one is given, type, on the logits' device.
void check_table(const RowArguments& a, c10::string_view reweight, const char* name,
                 const OptionalTensor& table, at::IntArrayRef shape,
                 std::optional<at::ScalarType> dtype = std::nullopt) {
  const bool fits = table.has_value() && table->sizes() == shape;
  TORCH_CHECK_VALUE(fits && table->scalar_type() == dtype.value_or(table->scalar_type()), a.op,
                    ": reweight '", reweight, "' needs ", name, ", a tensor of ",
                    dtype.has_value() ? c10::str(*dtype, " ") : "", shape);
  check_device(a.op, name, *table, a.logits);
}

// Seesaw's class_table, the counts of c classes or more.
void check_counts(const RowArguments& a, const OptionalTensor& table, int64_t c) {
  TORCH_CHECK_VALUE(table.has_value() && table->dim() == 1 && table->size(0) >= c, a.op,
                    ": seesaw needs class_table, the counts of [", c, "] or more classes");
  check_device(a.op, "class_table", *table, a.logits);
}

}  // namespace

DType dtype_of(const char* op, const at::Tensor& logits) {
  switch (logits.scalar_type()) {
    case at::kFloat: return DType::kFloat32;
    case at::kDouble: return DType::kFloat64;
    case at::kBFloat16: return DType::kBFloat16;
    case at::kHalf: return DType::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, op, ": logits must be float32, float64, bfloat16 or float16, got ",
                       logits.scalar_type());
  }
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

void check_rows(const RowArguments& a) {
  dtype_of(a.op, a.logits);
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

Link link_of(const char* op, c10::string_view link, c10::string_view slope, c10::string_view reweight) {
  const bool released = slope == "released", is_gumbel = link == "gumbel";
  TORCH_CHECK_VALUE(released || slope == "straight_through" || slope == "zero_outside", op,
                    ": unknown slope '", slope, "'");
  TORCH_CHECK_VALUE(is_gumbel || link == "sigmoid" || link == "probit", op, ": unknown link '", link, "'");
  const bool has_released = reweight == "none" || reweight == "eql" || reweight == "drop";
  TORCH_CHECK_VALUE(!released || (is_gumbel && has_released), op,
                    ": slope 'released' exists for link 'gumbel' and reweight 'none', 'eql' or 'drop', got "
                    "link '",
                    link, "' and reweight '", reweight, "'");
  if (is_gumbel) return released ? Link::kGumbelReleased : Link::kGumbel;
  return link == "sigmoid" ? Link::kSigmoid : Link::kProbit;
}

Reweight reweight_of(const RowArguments& a, c10::string_view reweight, const OptionalTensor& class_table,
                     const OptionalTensor& row_table, const OptionalTensor& rng) {
  const int64_t n = a.logits.size(0), k = a.logits.size(1);
  if (reweight == "none") return Reweight::kNone;
  if (reweight == "seesaw") {
    check_counts(a, class_table, k);
    return Reweight::kSeesaw;
  }
  if (reweight == "weights") {
    check_table(a, reweight, "class_table", class_table, {2, k});
    return Reweight::kWeights;
  }
  if (reweight == "acsl") {
    check_table(a, reweight, "class_table", class_table, {k}, at::kByte);
    check_table(a, reweight, "row_table", row_table, {n}, at::kByte);
    return Reweight::kACSL;
  }
  TORCH_CHECK_VALUE(reweight == "eql" || reweight == "drop" || reweight == "federated", a.op,
                    ": unknown reweight '", reweight, "'");
  check_table(a, reweight, "class_table", class_table, {k}, at::kBool);
  if (reweight != "drop") return reweight == "eql" ? Reweight::kEQL : Reweight::kFederated;
  TORCH_CHECK_VALUE(rng.has_value() && rng->numel() == 2 && rng->scalar_type() == at::kLong, a.op,
                    ": DropLoss needs rng, an int64 tensor of (seed, offset)");
  check_device(a.op, "rng", *rng, a.logits);
  return Reweight::kDrop;
}

SoftmaxReweight softmax_reweight_of(const RowArguments& a, c10::string_view reweight,
                                    const OptionalTensor& class_table, bool objectness) {
  const int64_t k = a.logits.size(1), c = objectness ? k - 2 : k;
  TORCH_CHECK_VALUE(c >= 0 && k <= std::numeric_limits<int>::max(), a.op,
                    ": logits must have two columns for objectness and fewer than 2^31, got ",
                    a.logits.sizes());
  if (reweight == "none") return SoftmaxReweight::kNone;
  if (reweight == "prior") {
    check_table(a, reweight, "class_table", class_table, {c});
    return SoftmaxReweight::kPrior;
  }
  TORCH_CHECK_VALUE(reweight == "seesaw", a.op, ": unknown reweight '", reweight, "'");
  check_counts(a, class_table, c);
  return SoftmaxReweight::kSeesaw;
}

}  // namespace gol
