// The Bernoulli losses, and what goes with them, as their launchers take them.
#pragma once

#include "kernels.h"

namespace gol {
namespace cuda {

struct BernoulliArgs {
  RowArgs rows;
  const void* coded_rows;  // by the prologue
  const void* upstream;    // the gradient of the loss, one Number; null: 1
  DType dtype;
  const void* logits;  // [N, K], rows row_stride elements apart
  int64_t row_stride;
  void* grad;  // [N, K] contiguous; null: the loss alone
  int num_columns;
  void* loss;                // Number; null: the gradient alone
  bool reduces_loss;         // loss is one number, else [N]
  double* statistics;        // [2, K]; null: none
  void* partial_statistics;  // scratch for them
  Link link;
  LinkOptions link_options;
  Reweight reweight;
  // bool or uint8 [K] for kEQL (rare), kDrop (rare), kFederated (kept), kACSL (groups); Number [2, K] for
  // kWeights; Number [K] for kSeesaw, the prologue's powers.
  const void* class_table;
  const uint8_t* row_groups;  // [N] for kACSL
  double logit_threshold;     // kACSL: negatives of foreground rows from here on are kept
  // (seed, offset) of kDrop, drawn on the device: a replayed graph draws them anew.
  const int64_t* rng;
  double q, log2_eps, logit_eps;  // kSeesaw; logit_eps: where the link's probability is eps
};

// Bytes of partial_statistics for args whose other fields are set.
int64_t partial_statistics_bytes(const BernoulliArgs&);
cudaError_t launch_bernoulli(const BernoulliArgs&, cudaStream_t);

}  // namespace cuda
}  // namespace gol
