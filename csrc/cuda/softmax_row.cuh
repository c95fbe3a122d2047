// What both softmax kernels share: the threads of a row, and what is to do when its columns are summed.
#pragma once

#include "common.cuh"
#include "softmax.h"

namespace gol {
namespace cuda {

// The threads that share a row: a warp, or kWarps warps that are the whole block.
template <int kWarps, class N> struct RowThreads {
  static constexpr int kThreads = kWarps * kWarp;
  static __device__ __forceinline__ int index() { return threadIdx.x % kThreads; }

  // In every thread, in a fixed order. Two reductions in a row have different slots: when all threads have
  // arrived at the second, none still reads the first's.
  template <int kSlot> static __device__ __forceinline__ N sum(N x) {
    x = warp_sum(x);
    if constexpr (kWarps > 1) x = combine<kSlot>(x, [](N a, N b) { return a + b; });
    return x;
  }
  template <int kSlot> static __device__ __forceinline__ N max(N x) {
    x = warp_max(x);
    if constexpr (kWarps > 1) x = combine<kSlot>(x, [](N a, N b) { return vmax(a, b); });
    return x;
  }

 private:
  template <int kSlot, class Op> static __device__ __forceinline__ N combine(N x, const Op& op) {
    __shared__ N of_warp[kWarps];
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = x;
    __syncthreads();
    x = of_warp[0];
#pragma unroll 4  // 16 at once would take the registers of a wide row
    for (int w = 1; w < kWarps; ++w) x = op(x, of_warp[w]);
    return x;
  }
};

// A loss: linear + log(1 + argument).
template <class N> struct LossParts {
  N linear, argument;
};

// log(1 + rest / at_label), where at_label = 2^bits() may have underflowed.
template <class N, class Bits>
__device__ __forceinline__ LossParts<N> class_loss(N rest, N at_label, const Bits& bits) {
  constexpr bool kIsFloat = std::is_same_v<N, float>;
  constexpr int kFewBits = kIsFloat ? 100 : 900;
  constexpr N kMany = kIsFloat ? N(0x1p100) : N(0x1p900);
  if (at_label >= N(1) / kMany) return {N(0), quotient(rest, at_label)};
  // Then rest holds the exponential of a higher logit, weighted by 2^-60 or more: beside it the 1 is nothing.
  return {N(-kLn2) * (bits() + N(kFewBits)), rest * kMany};
}

// Two-way cross-entropy of (object, background): with u the logit of the other less that of the label,
// softplus(u) = max(u, 0) + log(1 + exp(-|u|)), and the slopes are sigmoid(u) for the other, its negative
// for the label.
template <class N> struct Objectness {
  LossParts<N> loss;
  N slope_object;

  __device__ __forceinline__ Objectness(N object, N background, bool foreground) {
    const N u = foreground ? background - object : object - background;
    const N w = exp(-std::fabs(u));
    const N p = quotient(u < N(0) ? w : N(1), N(1) + w);
    loss = {vmax(u, N(0)), w};
    slope_object = foreground ? -p : p;
  }
};

// The ends of rows: their losses' logarithms, and the objectness pair. An end takes one thread, so a warp
// lets up to 32 rows wait and then ends them together, one in each lane.
template <class T, class Index, int kThreads> class RowEnds {
  using N = Number<T>;
  struct Row {
    Index index;
    bool foreground;
    N scale;
    LossParts<N> class_loss;
  };

 public:
  struct Shared {
    Row waiting[kThreads / kWarp][kWarp];
    double total[2][kThreads];  // of the losses of each thread's rows
  };

  __device__ __forceinline__ RowEnds(const SoftmaxArgs& a, Shared* shared) : args_(a), shared_(*shared) {
    shared_.total[0][threadIdx.x] = shared_.total[1][threadIdx.x] = 0;
  }

  // By all lanes alike. class_loss of a row without class term is {0, 0}.
  __device__ __forceinline__ void add(Index row, N scale, bool foreground, const LossParts<N>& class_loss) {
    if (threadIdx.x % kWarp == 0)
      shared_.waiting[threadIdx.x / kWarp][count_] = {row, foreground, scale, class_loss};
    if (++count_ == kWarp) end_all();
  }

  // By all threads of the block, also those whose warps added nothing.
  __device__ void finish() {
    end_all();
    if (args_.loss[0] == nullptr || !args_.reduces_loss) return;
    const double total[2] = {shared_.total[0][threadIdx.x], shared_.total[1][threadIdx.x]};
    N* const loss[2] = {static_cast<N*>(args_.loss[0]), static_cast<N*>(args_.loss[1])};
    reduce_loss(total, loss, args_.rows.workspace);
  }

 private:
  __device__ void end_all() {
    __syncwarp();
    const int lane = threadIdx.x % kWarp;
    if (lane < count_) {
      const Row row = shared_.waiting[threadIdx.x / kWarp][lane];
      const LossParts<N> of_objectness = end_objectness(row);
      if (args_.loss[0] != nullptr) {
        add_loss(0, row, row.class_loss);
        add_loss(1, row, of_objectness);
      }
    }
    __syncwarp();
    count_ = 0;
  }

  __device__ LossParts<N> end_objectness(const Row& row) const {
    const int column = args_.num_softmax;
    if (column == args_.num_columns) return {N(0), N(0)};
    const T* z = static_cast<const T*>(args_.logits) + int64_t{row.index} * args_.row_stride;
    const Objectness<N> o(to_number(z[column]), to_number(z[column + 1]), row.foreground);
    if (args_.grad != nullptr) {
      T* grad = static_cast<T*>(args_.grad) + int64_t{row.index} * args_.num_columns;
      const N scale = row.scale * read<N>(args_.upstream[1], row.index);
      const N slope = scale == N(0) ? N(0) : scale * o.slope_object;
      grad[column] = from_number<T>(slope);
      grad[column + 1] = from_number<T>(-slope);
    }
    return o.loss;
  }

  __device__ void add_loss(int which, const Row& row, const LossParts<N>& parts) {
    const N loss = row.scale == N(0) ? N(0) : row.scale * (parts.linear + std::log1p(parts.argument));
    if (args_.reduces_loss) shared_.total[which][threadIdx.x] += loss;
    else static_cast<N*>(args_.loss[which])[row.index] = loss;
  }

  const SoftmaxArgs& args_;
  Shared& shared_;
  int count_ = 0;  // of waiting rows
};

// Blocks that the device runs at once, but no more than have rows.
template <class Kernel>
int64_t resident_blocks(Kernel* kernel, int threads, int64_t rows, int rows_per_block) {
  int per_multiprocessor = 1;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, threads, 0);
  const int64_t needed = (rows + rows_per_block - 1) / rows_per_block;
  int64_t blocks = int64_t{per_multiprocessor} * num_multiprocessors();
  blocks = blocks < kMaxLossBlocks ? blocks : kMaxLossBlocks;
  blocks = blocks < needed ? blocks : needed;
  return blocks < 1 ? 1 : blocks;
}

}  // namespace cuda
}  // namespace gol
