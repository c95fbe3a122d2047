#include "rows.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <cmath>

#include "../checks.h"

namespace gol {
namespace cuda {

at::ScalarType number_of(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

Reals reals(at::Tensor* t) {
  switch (t->scalar_type()) {
    case at::kFloat:
    case at::kDouble:
    case at::kLong: *t = t->contiguous(); break;
    default: *t = t->to(at::kDouble).contiguous();
  }
  const auto type = t->scalar_type();
  return {t->const_data_ptr(), type == at::kFloat    ? RealType::kFloat32
                               : type == at::kDouble ? RealType::kFloat64
                                                     : RealType::kInt64};
}

Rows prepare_rows(const RowArguments& a) {
  Rows rows{};
  rows.dtype = dtype_of(a.op, a.logits);
  rows.logits = a.logits.stride(1) == 1 || a.logits.size(1) == 1 ? a.logits : a.logits.contiguous();
  rows.labels = a.labels.to(at::kLong).contiguous();
  rows.workspace = at::empty({sizeof(Workspace)}, a.logits.options().dtype(at::kByte));
  RowArgs& args = rows.args;
  args.num_rows = a.logits.size(0);
  args.labels = rows.labels.const_data_ptr<int64_t>();
  args.num_classes = a.num_classes;
  args.ignore_index = a.ignore_index;
  args.scale = a.scale;
  args.mean = a.reduction == "mean";
  args.workspace = static_cast<Workspace*>(rows.workspace.mutable_data_ptr());
  if (a.row_weights.has_value()) {
    rows.row_weights = a.row_weights->to(number_of(a.logits)).contiguous();
    args.row_weights = rows.row_weights.const_data_ptr();
  }
  if (a.avg_factor.has_value()) {
    rows.avg_factor = *a.avg_factor;
    args.avg_factor = reals(&rows.avg_factor);
  }
  return rows;
}

RowArguments in_float64(RowArguments a) {
  a.logits = a.logits.to(at::kDouble);
  return a;
}

Upstream upstream(const char* op, at::Tensor* grad_loss, const Rows& rows) {
  const int64_t n = rows.args.num_rows;
  TORCH_CHECK_VALUE(grad_loss->numel() == 1 || (grad_loss->dim() == 1 && grad_loss->size(0) == n), op,
                    ": the loss's gradient must be one number or [", n, "], got ", grad_loss->sizes());
  TORCH_CHECK_VALUE(grad_loss->device() == rows.logits.device(), op, ": the loss's gradient is on ",
                    grad_loss->device(), ", logits on ", rows.logits.device());
  *grad_loss = grad_loss->to(number_of(rows.logits));
  return {grad_loss->const_data_ptr(), grad_loss->numel() == 1 ? 0 : grad_loss->stride(0)};
}

bool seesaw_fits_float32(double p, double q, double eps, double max_bits) {
  constexpr double kCountBits = 40;
  return p * kCountBits <= max_bits && q * -std::log2(eps) <= max_bits;
}

void multiply_weights(Rows* rows, const at::Tensor& factor) {
  rows->row_weights = (rows->row_weights.defined() ? rows->row_weights.mul(factor) : factor).contiguous();
  rows->args.row_weights = rows->row_weights.const_data_ptr();
}

at::Tensor run_prologue(Rows* rows, Prologue what) {
  const bool counts = what.rare.defined() || (rows->args.mean && rows->args.avg_factor.data == nullptr);
  at::Tensor powers;
  if (!counts && !what.reduces_loss && what.num_powers == 0 && !what.codes_rows) return powers;
  rows->args.num_counts = counts ? prologue_blocks(rows->args.num_rows) : 0;
  PrologueArgs args{};
  args.rows = rows->args;
  args.is_double = rows->dtype == DType::kFloat64;
  if (what.rare.defined()) args.rare = what.rare.const_data_ptr<bool>();
  if (what.num_powers > 0) {
    powers = at::empty({what.num_powers}, rows->logits.options().dtype(number_of(rows->logits)));
    args.class_counts = reals(&what.class_counts);
    args.num_powers = what.num_powers;
    args.p = what.p;
    args.power = powers.mutable_data_ptr();
  }
  if (what.codes_rows) {
    const int64_t bytes = args.is_double ? sizeof(CodedRow<double>) : sizeof(CodedRow<float>);
    rows->coded_rows = at::empty({rows->args.num_rows * bytes}, rows->workspace.options());
    args.coded_rows = rows->coded_rows.mutable_data_ptr();
    args.num_columns = static_cast<int>(rows->logits.size(1));
  }
  C10_CUDA_CHECK(launch_prologue(args, c10::cuda::getCurrentCUDAStream()));
  return powers;
}

at::Tensor empty_loss(const Rows& rows, c10::string_view reduction) {
  const auto options = rows.logits.options().dtype(number_of(rows.logits));
  return reduction == "none" ? at::empty({rows.args.num_rows}, options) : at::empty({}, options);
}

at::Tensor empty_grad(const Rows& rows, bool compute_grad) {
  if (!compute_grad) return at::empty({0}, rows.logits.options());
  return at::empty(rows.logits.sizes(), rows.logits.options(), at::MemoryFormat::Contiguous);
}

}  // namespace cuda
}  // namespace gol
