// The CPU kernels as plain structs and function pointers: no torch headers, one table for each
// instruction set, so that the machine that runs chooses, not the one that builds.
#pragma once

#include <cstdint>

#include "../loss_math.h"

namespace gol {
namespace cpu {

enum class DType { kFloat32, kFloat64, kBFloat16, kFloat16 };
enum class Link { kGumbel, kSigmoid };
// EQL (CVPR 2020) and DropLoss (AAAI 2021) drop negatives of rare classes; which ones, is the row's
// business alone, and reaches the inner loop as one bit for each column.
enum class Drop { kNone, kForeground, kForegroundAndSampledBackground };

struct BernoulliArgs {
  DType dtype;
  const void* logits;  // [N, K], rows row_stride elements apart
  int64_t row_stride;
  void* grad;               // [N, K] contiguous, or null: the loss alone
  int64_t num_columns;      // K
  int64_t num_classes;      // C; label C is background. A label below K has a positive column
  const int64_t* labels;    // [N]
  const double* row_scale;  // [N]; 0: the row does not exist, NaN: its loss and gradient are NaN
  double* row_loss;         // [N], unscaled
  Link link;
  GumbelSlope gumbel_slope;
  LinkOptions link_options;
  Drop drop;
  const uint64_t* rare;  // bit c set: class c is rare; K bits and 64 bits of padding
  uint32_t keep_limit;   // a background row keeps a rare class's negative when its draw is below
  uint64_t seed, offset;
};

struct SoftmaxArgs {
  DType dtype;
  const void* logits;  // [N, K]: num_classes softmax columns, then (object, background) if objectness
  int64_t row_stride;
  void* grad;                      // [N, K] contiguous, or null
  int64_t num_columns;             // K
  int64_t num_softmax;             // columns of the softmax: K, or K - 2 with objectness
  const int64_t* labels;           // [N]; a label >= num_softmax has no class term
  const double* row_scale;         // [N], of the class term
  const double* objectness_scale;  // [N], of the objectness term
  double* row_loss;                // [N], unscaled
  double* row_objectness;          // [N], unscaled; null without objectness
  // Seesaw: n_c^p over its maximum [num_softmax], float (double for kFloat64), at least 2^-60 (2^-900).
  // Null: plain softmax.
  const void* power;
  double q, log2_eps;
};

struct GumbelActivationArgs {
  DType dtype;
  const void* logits;       // [numel] contiguous
  const void* grad_output;  // null: write p = exp(-exp(-z/T)); else grad_output * dp/dz
  void* output;
  LinkOptions link_options;
};

// Rows [begin, end). scratch belongs to the calling thread and begins at a cache line.
struct KernelTable {
  const char* name;
  void (*bernoulli)(const BernoulliArgs&, int64_t begin, int64_t end, uint64_t* scratch);  // K/64 + 3 words
  void (*softmax)(const SoftmaxArgs&, int64_t begin, int64_t end, double* scratch);        // 2 K + 32 doubles
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
// "generic", "avx2" or "avx512"; throws std::invalid_argument for what this machine cannot run.
void set_capability(const char* name);

}  // namespace cpu
}  // namespace gol
