// What goes with the losses and is not one, as its launchers take it.
#pragma once

#include "kernels.h"

namespace gol {
namespace cuda {

cudaError_t launch_gumbel_activation(const GumbelActivationArgs&, cudaStream_t);

// Columns [0, split) of a dense [N, K] times first, the others times second; reads and writes nothing of it
// where both are 1.
struct ScaleGradArgs {
  DType dtype;
  void* grad;
  int64_t num_rows, num_columns, split;
  const void *first, *second;  // one Number each
};
bool scale_grad_fits(const ScaleGradArgs&);  // 16-byte vectors, no fewer columns than one
cudaError_t launch_scale_grad(const ScaleGradArgs&, cudaStream_t);

// counts[c] += the labels that are c, for c in [0, num_classes]; other labels and ignore_index do not count.
struct LabelCountsArgs {
  const int64_t* labels;
  int64_t num_labels, num_classes, ignore_index;
  int64_t* counts;
};
cudaError_t launch_label_counts(const LabelCountsArgs&, cudaStream_t);

}  // namespace cuda
}  // namespace gol
