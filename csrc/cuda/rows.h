// What every loss does before its kernel: the rows as the kernels take them, the prologue.
#pragma once

#include <ATen/core/Tensor.h>

#include "../arguments.h"
#include "kernels.h"

namespace gol {
namespace cuda {

// What a T is worked on in: float64 for float64, else float32.
at::ScalarType number_of(const at::Tensor& t);

// args points into the tensors; their memory may be freed as soon as the kernel is launched.
struct Rows {
  at::Tensor logits;  // [N, K], dense in the last dimension
  at::Tensor labels;  // [N] int64 contiguous
  at::Tensor row_weights, avg_factor, workspace;
  at::Tensor coded_rows;  // by the prologue
  DType dtype;
  RowArgs args;
};

Rows prepare_rows(const RowArguments& a);
RowArguments in_float64(RowArguments a);
// The fields that the arguments of all losses have. grad: null for the loss alone.
template <class Args> void set_rows(const Rows& rows, const at::Tensor* grad, bool reduces_loss, Args* args) {
  args->rows = rows.args;
  args->dtype = rows.dtype;
  args->logits = rows.logits.const_data_ptr();
  args->row_stride = rows.logits.stride(0);
  args->num_columns = static_cast<int>(rows.logits.size(1));
  args->grad = grad != nullptr ? grad->mutable_data_ptr() : nullptr;
  args->reduces_loss = reduces_loss;
}

// Of any real type; other types than RealType's are converted in *t, which must outlive the launch.
Reals reals(at::Tensor* t);
// Of a 0-d tensor or one number for each row. *grad_loss is converted in place.
Upstream upstream(const char* op, at::Tensor* grad_loss, const Rows& rows);

// Whether fp32 holds Seesaw's factors, powers of counts and of eps, in so many bits. The counts themselves
// are not read on the host: they are taken to be below 2^40.
bool seesaw_fits_float32(double p, double q, double eps, double max_bits);

// Multiplies the rows' weights by one number each.
void multiply_weights(Rows* rows, const at::Tensor& factor);

struct Prologue {
  bool reduces_loss = false;  // the kernel will call reduce_loss
  at::Tensor rare;            // bool [C] contiguous: BatchCounts::rare is needed, not only ::foreground
  at::Tensor class_counts;    // [num_powers] or longer, for Seesaw
  int64_t num_powers = 0;
  double p = 0;
  bool codes_rows = false;  // fills rows->coded_rows
};
// Launches the prologue on the current stream where any of it is needed. Returns Seesaw's powers.
at::Tensor run_prologue(Rows* rows, Prologue what);

// Results, uninitialised: 0-d or [N]; and [N, K] for the gradient, or an empty tensor.
at::Tensor empty_loss(const Rows& rows, c10::string_view reduction);
at::Tensor empty_grad(const Rows& rows, bool compute_grad);

}  // namespace cuda
}  // namespace gol
