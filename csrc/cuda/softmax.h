// The softmax family on a GPU: what its launcher takes.
#pragma once

#include "kernels.h"

namespace gol {
namespace cuda {

struct SoftmaxArgs {
  RowArgs rows;
  DType dtype;
  const void* logits;  // [N, K]: num_softmax columns of the softmax, then (object, background) or nothing
  int64_t row_stride;
  void* grad;       // [N, K] contiguous, or null
  int num_columns;  // K
  int num_softmax;  // a label from here on has no class term
  SoftmaxReweight reweight;
  const void* table;   // Number [num_softmax]: what is added to the logits, or Seesaw's powers (PrologueArgs)
  double q, log2_eps;  // of Seesaw, q >= 0
  Upstream upstream[2];  // of the classes' loss and of objectness
  void* loss[2];         // Number: of the classes and of objectness; null: the gradient alone
  bool reduces_loss;     // loss is one number, else [N]
};

// Overwrites all of grad and loss. Where loss is one number, the prologue went before.
cudaError_t launch_softmax(const SoftmaxArgs&, cudaStream_t);

// The fast one of its two kernels, for fp32, bf16 and fp16 rows that registers hold. One translation unit for
// each type, which compile side by side.
constexpr int kMaxRegisterColumns = 32768;
template <class T> cudaError_t launch_softmax_registers(const SoftmaxArgs&, cudaStream_t);

}  // namespace cuda
}  // namespace gol
