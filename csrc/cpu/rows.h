// What every loss does before and after its kernel: the factor of each row, sums over rows.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <vector>

#include "../arguments.h"
#include "kernels.h"

namespace gol {
namespace cpu {

struct Rows {
  at::Tensor logits;           // [N, K], dense in the last dimension
  at::Tensor labels;           // [N] int64 contiguous
  std::vector<double> scale;   // [N] weight / denominator; 0 ignored, NaN for an illegal label
  std::vector<double> weight;  // [N] 0 ignored or illegal, 1 without row_weights
  DType dtype;
};

Rows prepare_rows(const RowArguments& a);
// The fields that the arguments of all kernels have. grad: null for the loss alone.
template <class Args> void set_rows(const Rows& rows, at::Tensor* grad, Args* args) {
  args->dtype = rows.dtype;
  args->logits = rows.logits.const_data_ptr();
  args->row_stride = rows.logits.stride(0);
  args->grad = grad != nullptr ? grad->mutable_data_ptr() : nullptr;
  args->num_columns = rows.logits.size(1);
  args->labels = rows.labels.const_data_ptr<int64_t>();
}
// Whether the logits and their gradient are so large that what is read first is gone from the last cache when
// all is done: writing past the caches is faster then.
bool exceeds_caches(const at::Tensor& logits);
// scale[i] *= grad_loss, a 0-d tensor or one number for each row.
std::vector<double> scaled_by(const std::vector<double>& scale, const at::Tensor& grad_loss);
// sum_i scale_i * row_loss_i in row order (whatever the number of threads), or each of them.
at::Tensor reduce_rows(const Rows& rows, const std::vector<double>& row_loss, c10::string_view reduction);
// [N, K] for the gradient, or an empty tensor.
at::Tensor empty_grad(const Rows& rows, bool compute_grad);

// The same rows in float64: body(wide rows, wide gradient or null), whose result is returned.
template <class Body> auto in_float64(const Rows& rows, at::Tensor* grad, const Body& body) {
  const Rows wide{rows.logits.to(at::kDouble), rows.labels, rows.scale, rows.weight, DType::kFloat64};
  at::Tensor wide_grad = empty_grad(wide, grad != nullptr);
  auto result = body(wide, grad != nullptr ? &wide_grad : nullptr);
  if (grad != nullptr) grad->copy_(wide_grad);
  return result;
}

constexpr int64_t kRowGrain = 16;  // rows for a thread; one of 1204 columns takes about a microsecond

// [0, count) in parallel: body(begin, end, scratch) with a scratch of its own for each call.
template <class Scratch, class Body>
void parallel_ranges(int64_t count, int64_t grain, int64_t scratch_size, const Body& body) {
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    constexpr size_t kLine = 64;  // bytes; scratch begins at a cache line
    std::vector<Scratch> scratch(scratch_size + kLine / sizeof(Scratch));
    const auto past = reinterpret_cast<uintptr_t>(scratch.data()) % kLine;
    body(begin, end, scratch.data() + (past == 0 ? 0 : (kLine - past) / sizeof(Scratch)));
  });
}

}  // namespace cpu
}  // namespace gol
