// What the launchers of the CUDA kernels take, as plain structs: no torch headers, so that the kernels
// compile fast and run under any host.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

// Apart from the CPU kernels, which use the same formulas in the same library.
#define GOL_ISA device
#include "../loss_math.h"

namespace gol {
namespace cuda {

// Numbers in device memory of a type that the caller chose; null: there are none.
enum class RealType { kFloat32, kFloat64, kInt64 };
struct Reals {
  const void* data;
  RealType type;
};

// What a block of the prologue found among its labels.
struct BatchCounts {
  int64_t counted;     // not ignored
  int64_t foreground;  // in [0, num_classes)
  int64_t rare;        // of these, of rare classes
};

constexpr int kMaxPrologueBlocks = 32;
constexpr int kMaxLossBlocks = 4096;

// Device memory of one call, uninitialised: calls on several streams share nothing.
struct Workspace {
  BatchCounts counts[kMaxPrologueBlocks];
  double partial_loss[2][kMaxLossBlocks];  // of each block; the second is Seesaw's objectness
  unsigned int arrived;                    // blocks that wrote theirs; the prologue sets it to 0
};

// The rows of a batch. "Number" is float, and double for kFloat64.
struct RowArgs {
  int64_t num_rows;
  const int64_t* labels;    // [N]; legal are 0..num_classes
  const void* row_weights;  // Number [N]; null: 1
  int64_t num_classes;      // the label of background
  int64_t ignore_index;
  double scale;
  bool mean;         // divides by avg_factor, or without one by the number of rows not ignored
  Reals avg_factor;  // one number
  int num_counts;    // of workspace->counts, 0 without a prologue that counts
  Workspace* workspace;
};

// The gradient of the loss, by which the gradient of each row is multiplied; null: 1.
struct Upstream {
  const void* data;  // Number
  int64_t stride;    // 0: one for all rows
};

// A row of a Bernoulli loss, read by each of its hundred and more vectors.
template <class Number> struct alignas(2 * sizeof(Number)) CodedRow {
  int positive;   // the column of its label, -1: none
  Number weight;  // 0: the row does not exist; NaN: its label is illegal
};

// The one small kernel before the others: it sets arrived to 0, counts labels, makes Seesaw's table and codes
// rows.
struct PrologueArgs {
  RowArgs rows;        // num_counts of blocks count labels
  const bool* rare;    // [num_classes] for BatchCounts::rare; null: none
  Reals class_counts;  // for Seesaw
  int64_t num_powers;  // of class_counts; 0: no table
  double p;
  bool is_double;  // Number is
  void* power;  // Number [num_powers]: max(n, 1)^p over the largest of them, at least 2^-120 (double: 2^-900)
  void* coded_rows;  // CodedRow<Number> [N]; null: none
  int num_columns;   // K, for coded_rows
};

int prologue_blocks(int64_t num_rows);  // for RowArgs::num_counts
cudaError_t launch_prologue(const PrologueArgs&, cudaStream_t);

}  // namespace cuda
}  // namespace gol
