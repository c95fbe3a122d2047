// The CPU kernels as plain structs and function pointers: no torch headers, one table for each
// instruction set, so that the machine that runs chooses, not the one that builds.
#pragma once

#include <cstdint>

#include "../loss_math.h"

namespace gol {
namespace cpu {

using gol::DType;
using gol::GumbelActivationArgs;
using gol::Link;
// What becomes of a row's negatives. The reweightings of the papers are pairs of these, one for foreground
// rows and one for background rows.
enum class Terms {
  kAll,
  kMasked,    // those in the row's mask are dropped
  kSampled,   // those in the row's mask are dropped unless their draw is below keep_limit (DropLoss)
  kAbove,     // those with a logit above logit_limit are kept (ACSL)
  kWeighted,  // each is multiplied by its column's weight
  kSeesaw,    // each is multiplied by Seesaw's factors
};

struct BernoulliArgs {
  DType dtype;
  const void* logits;  // [N, K], rows row_stride elements apart
  int64_t row_stride;
  void* grad;               // [N, K] contiguous, or null
  int64_t num_columns;      // K
  int64_t num_classes;      // C; label C is background. A label below K has a positive column
  const int64_t* labels;    // [N]
  const double* row_scale;  // [N]; 0: the row does not exist, NaN: its loss and gradient are NaN
  double* row_loss;         // [N], unscaled
  Link link;
  LinkOptions link_options;
  Terms foreground, background;
  const double* positive_weight;  // [N], of the row's positive; null: 1
  // Masks of mask_words each, K bits and 64 bits of padding; a row has mask row_mask[row], null: the first.
  const uint64_t* masks;
  int64_t mask_words;
  const uint8_t* row_mask;
  uint32_t keep_limit;
  uint64_t seed, offset;
  double logit_limit;
  // Tables [K] are of double for kFloat64, else of float.
  const void* weight;  // of the negatives
  const void* power;   // Seesaw: n_c^p over its maximum, at least 2^-60 (kFloat64: 2^-900)
  double q, eps;
  // Statistics: null, or what the sums over rows of row_weight |d row_loss / d z| are made of.
  const double* row_weight;  // [N]
  double* positive_slope;    // [N]: of the row's positive, without the row's weight
  double* negative_sums;     // [K]: added to, negatives
};

// 64-bit words of scratch that a call of the kernel needs: a row of logits, of gradient and of sums, and a
// mask.
constexpr int64_t bernoulli_scratch(int64_t num_columns) {
  return 3 * (num_columns + 15) + num_columns / 64 + 3;
}

struct SoftmaxArgs {
  DType dtype;
  const void* logits;  // [N, K]: num_classes softmax columns, then (object, background) if objectness
  int64_t row_stride;
  void* grad;                      // [N, K] contiguous, or null
  bool stream;                     // grad is to be written past the caches
  int64_t num_columns;             // K
  int64_t num_softmax;             // columns of the softmax: K, or K - 2 with objectness
  const int64_t* labels;           // [N]; a label >= num_softmax has no class term
  const double* row_scale;         // [N], of the class term
  const double* objectness_scale;  // [N], of the objectness term
  double* row_loss;                // [N], unscaled
  double* row_objectness;          // [N], unscaled; null without objectness
  // Tables [num_softmax], over their maximum: float, at least 2^-60 (kFloat64: double, 2^-900). Null: not
  // used.
  const void* power;  // Seesaw: n_c^p
  double q, eps;
  const void* prior;  // every exponential is multiplied by its class's
};

// Rows [begin, end). scratch belongs to the calling thread and begins at a cache line.
struct KernelTable {
  const char* name;
  void (*bernoulli)(const BernoulliArgs&, int64_t begin, int64_t end, uint64_t* scratch);
  void (*softmax)(const SoftmaxArgs&, int64_t begin, int64_t end, double* scratch);  // K + 32 doubles
  void (*gumbel_activation)(const GumbelActivationArgs&, int64_t begin, int64_t end);
};

extern const KernelTable kGenericKernels;
#if defined(__x86_64__)
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
#endif

// The table in use: the best this machine runs, no better than what torch itself uses
// (ATEN_CPU_CAPABILITY lowers both), unless set_capability chose another.
const KernelTable& kernels();
// The table for logits of this type: fp64 exists in plain C++ alone, it is the kernel of gradient checks.
const KernelTable& kernels_for(DType dtype);
// "generic", "avx2" or "avx512"; throws std::invalid_argument for what this machine cannot run.
void set_capability(const char* name);
// What is taken for the size of the last cache, at first this machine's; returns what it was.
int64_t set_last_cache(int64_t bytes);

}  // namespace cpu
}  // namespace gol
