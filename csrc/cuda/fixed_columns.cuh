// Fixed columns: how a flat kernel walks a dense [N, K].
//
// K elements need not be a whole number of 16-byte vectors of V, but R = V / gcd(K, V) rows are: R K / V
// "slots". A thread takes the vectors of one slot, in one block of R rows after the other. Every vector is
// aligned, whatever K is, and a thread sees the same V columns again and again: tables of the classes stay in
// its registers, and so do sums over a column.
#pragma once

#include <numeric>

#include "common.cuh"

namespace gol {
namespace cuda {

struct FixedColumns {
  int num_rows, num_columns;
  int rows;  // R
  int slots;
  int threads;  // slots times the blocks of R rows in work at a time
  int stride;   // rows of these blocks

  // As many threads as fit on the device at a time, or as there are vectors.
  FixedColumns(int64_t n, int64_t k, int vector, int64_t resident_threads)
      : num_rows(static_cast<int>(n)), num_columns(static_cast<int>(k)) {
    rows = vector / std::gcd(num_columns, vector);
    slots = static_cast<int>(rows * k / vector);
    const int64_t blocks = (n + rows - 1) / rows, fit = resident_threads / slots;
    const int phases = static_cast<int>(fit < 1 ? 1 : fit < blocks ? fit : blocks);
    threads = slots * phases;
    stride = rows * phases;
  }
  // Indices must not overflow on their way past the end, nor the slots be more than kMaxLossBlocks blocks.
  static bool fits(int64_t n, int64_t k, int vector) {
    return k >= vector && k < (1 << 20) && n < (1 << 30) && n * k / vector < (1 << 30);
  }
};

// A thread's vector: V elements from (row, column) on.
template <int V> struct FixedVector {
  int index, row, column;
  int split;  // elements before the next row begins; V or more: all of them

  __device__ __forceinline__ FixedVector(const FixedColumns& f, int thread) : index(thread) {
    const int block = thread / f.slots, first = (thread - block * f.slots) * V;
    const int row_in_block = first / f.num_columns;
    row = block * f.rows + row_in_block;
    column = first - row_in_block * f.num_columns;
    split = f.num_columns - column;
  }
  __device__ __forceinline__ void advance(const FixedColumns& f) {
    row += f.stride;
    index += f.threads;
  }
  // Of the tensor's elements.
  __device__ __forceinline__ int64_t element() const { return int64_t{index} * V; }
  __device__ __forceinline__ bool crosses() const { return split < V; }
  __device__ __forceinline__ int column_of(int j) const { return j < split ? column + j : j - split; }
};

}  // namespace cuda
}  // namespace gol
