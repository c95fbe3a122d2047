// Softmax cross-entropy of rows of any kind: any width, any alignment, fp64. A block for each row, which is
// read once for the sum, once more for Seesaw's, and once for the gradient. And the choice between this
// kernel and the one in registers.
#include "softmax_row.cuh"

namespace gol {
namespace cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kTurn = 4;  // columns that a thread loads before it uses one of them
constexpr int kStep = kTurn * kThreads;

template <class T, SoftmaxReweight kReweight> struct GeneralRow {
  using N = Number<T>;
  using Threads = RowThreads<kWarps, N>;
  static constexpr bool kPrior = kReweight == SoftmaxReweight::kPrior;
  static constexpr bool kSeesaw = kReweight == SoftmaxReweight::kSeesaw;

  // Columns of a thread; in the place of what is not one of the others' stand -inf, and 0 in the table.
  template <bool kTable> struct Turn {
    N logit[kTurn], table[kTurn];
    int end, label;  // both counted from the first column

    __device__ __forceinline__ Turn(int end_, int label_, const T* logits, const N* of_table)
        : end(end_), label(label_) {
#pragma unroll
      for (int k = 0; k < kTurn; ++k) logit[k] = has(k) ? to_number(logits[k * kThreads]) : N(-INFINITY);
#pragma unroll
      for (int k = 0; k < kTurn; ++k) table[k] = kTable && has(k) ? of_table[k * kThreads] : N(0);
#pragma unroll
      for (int k = 0; k < kTurn; ++k)
        if constexpr (kPrior) logit[k] += table[k];
    }
    __device__ __forceinline__ bool has(int k) const { return k * kThreads < end && k * kThreads != label; }
  };

  const SoftmaxArgs& args;
  const T* z;
  int label;
  N highest, x_label;  // x_j = log2(e) (z_j - highest), with the prior
  N rest, at_label;    // the other columns' weighted exponentials, and the label's
  SeesawRow<N> seesaw;

  __device__ GeneralRow(const SoftmaxArgs& a, const T* z_, int label_)
      : args(a), z(z_), label(label_), seesaw(N(1), N(0), N(0)) {
    // Every thread's maximum, and its sum relative to that (Milakov and Gimelshein 2018, Online normalizer
    // calculation for softmax, algorithm 3, a turn at a time).
    N m = N(-INFINITY), sum = 0;
    for_others<kPrior>([&](const auto& turn, int) {
      const N before = m;
#pragma unroll
      for (N v : turn.logit) m = vmax(m, v);
      const N base = m == N(-INFINITY) ? N(0) : m;  // -inf less itself would be NaN
      sum *= exp2((before - base) * N(kLog2E));
#pragma unroll
      for (N v : turn.logit) sum += exp2((v - base) * N(kLog2E));
    });
    const N z_label = label_logit();
    highest = Threads::template max<0>(vmax(m, z_label));
    rest = Threads::template sum<1>(sum * exp2((m - highest) * N(kLog2E)));
    x_label = x(z_label);
    at_label = exp2(x_label);
    if constexpr (kSeesaw) {
      const N threshold = vmax(x_label, log2(rest + at_label) + N(args.log2_eps));
      seesaw = SeesawRow<N>(table(label), N(args.q), threshold);
      sum = 0;
      for_others<true>([&](const auto& turn, int) {
#pragma unroll
        for (int k = 0; k < kTurn; ++k) sum += weighted(turn.logit[k], turn.table[k]);
      });
      rest = Threads::template sum<2>(sum);
    }
  }

  __device__ N table(int j) const { return static_cast<const N*>(args.table)[j]; }
  __device__ N label_logit() const {
    const N v = to_number(z[label]);
    if constexpr (!kPrior) return v;
    // The label's prior less itself is NaN if it is infinite.
    return v + table(label) + (table(label) - table(label));
  }
  __device__ N x(N logit) const { return (logit - highest) * N(kLog2E); }

  // Of another column: its exponential, with Seesaw's mitigation and compensation of one exponent.
  __device__ N weighted(N logit, N power) const {
    const N bits = x(logit);
    if constexpr (!kSeesaw) return exp2(bits);
    const N compensated = fma(seesaw.q, vmax(bits - seesaw.threshold, N(0)), bits);
    return exp2(compensated) * seesaw.mitigation(power);
  }

  // body(turn, first) for the thread's columns first, first + kThreads, ..., without the label.
  template <bool kTable, class Body> __device__ __forceinline__ void for_others(const Body& body) const {
    const T* logits = z + Threads::index();
    const N* of_table = static_cast<const N*>(args.table) + (kTable ? Threads::index() : 0);
    for (int first = Threads::index(); first < args.num_softmax; first += kStep) {
      body(Turn<kTable>(args.num_softmax - first, label - first, logits, of_table), first);
      logits += kStep;
      if constexpr (kTable) of_table += kStep;
    }
  }

  __device__ void write(T* grad, N scale) const {
    const N ratio = scale / (rest + at_label);
    for_others<kPrior || kSeesaw>([&](const auto& turn, int first) {
      N slope[kTurn];
#pragma unroll
      for (int k = 0; k < kTurn; ++k) slope[k] = weighted(turn.logit[k], turn.table[k]) * ratio;
#pragma unroll
      for (int k = 0; k < kTurn; ++k)
        if (turn.has(k)) grad[first + k * kThreads] = from_number<T>(slope[k]);
    });
    if (Threads::index() == 0) grad[label] = from_number<T>(-rest * ratio);
  }
};

template <class T, SoftmaxReweight kReweight>
__global__ void __launch_bounds__(kThreads) softmax_general(const __grid_constant__ SoftmaxArgs a) {
  using N = Number<T>;
  using Ends = RowEnds<T, int64_t, kThreads>;
  __shared__ typename Ends::Shared shared_ends;
  const N factor = static_cast<N>(batch_factor(a.rows));
  Ends ends(a, &shared_ends);
  for (int64_t i = blockIdx.x; i < a.rows.num_rows; i += gridDim.x) {
    const Row<N> row = read_row<N>(a.rows, i, factor);
    const N scale = row.scale(), class_scale = scale * read<N>(a.upstream[0], i);
    const bool foreground = row.label >= 0 && row.label < a.num_softmax;
    const T* z = static_cast<const T*>(a.logits) + i * a.row_stride;
    T* grad = a.grad == nullptr ? nullptr : static_cast<T*>(a.grad) + i * a.num_columns;
    LossParts<N> loss{N(0), N(0)};
    if (foreground && scale != N(0)) {
      const GeneralRow<T, kReweight> columns(a, z, row.label);
      loss = class_loss(columns.rest, columns.at_label, [&] { return columns.x_label; });
      if (grad != nullptr) columns.write(grad, class_scale);
    } else if (grad != nullptr) {
      for (int j = threadIdx.x; j < a.num_softmax; j += kThreads)
        grad[j] = from_number<T>(class_scale * N(0));
    }
    if (threadIdx.x < kWarp) ends.add(i, scale, foreground, loss);
  }
  ends.finish();
}

// A row's logits and its gradient begin at the same place of a vector.
bool fits_registers(const SoftmaxArgs& a) {
  const int64_t size = a.dtype == DType::kFloat32 ? 4 : 2;
  const auto unlike = reinterpret_cast<uintptr_t>(a.logits) - reinterpret_cast<uintptr_t>(a.grad);
  const bool alike = unlike % 16 == 0 && (a.row_stride - a.num_columns) * size % 16 == 0;
  return a.dtype != DType::kFloat64 && a.num_softmax <= kMaxRegisterColumns && (a.grad == nullptr || alike) &&
         a.rows.num_rows < int64_t{1} << 30 && a.row_stride < int64_t{1} << 31;
}

}  // namespace

cudaError_t launch_softmax(const SoftmaxArgs& a, cudaStream_t stream) {
  if (fits_registers(a)) {
    return for_dtype<false>(a.dtype, [&](auto* storage) {
      return launch_softmax_registers<std::remove_pointer_t<decltype(storage)>>(a, stream);
    });
  }
  return for_dtype(a.dtype, [&](auto* storage) {
    using T = std::remove_pointer_t<decltype(storage)>;
    const auto run = [&](auto* kernel) {
      return launch(kernel, resident_blocks(kernel, kThreads, a.rows.num_rows, 1), kThreads, stream, a);
    };
    switch (a.reweight) {
      case SoftmaxReweight::kPrior: return run(softmax_general<T, SoftmaxReweight::kPrior>);
      case SoftmaxReweight::kSeesaw: return run(softmax_general<T, SoftmaxReweight::kSeesaw>);
      default: return run(softmax_general<T, SoftmaxReweight::kNone>);
    }
  });
}

}  // namespace cuda
}  // namespace gol
