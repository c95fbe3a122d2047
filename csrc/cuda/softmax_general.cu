// Softmax cross-entropy of rows of any kind: any width, any alignment, fp64. A block for each row, which is
// read once for the sum, once more for Seesaw's, and once for the gradient. And the choice between this
// kernel and the one in registers.
#include "softmax_row.cuh"

namespace gol {
namespace cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;

template <class T> struct GeneralRow {
  using N = Number<T>;
  using Threads = RowThreads<kWarps, N>;
  const SoftmaxArgs& args;
  const T* z;
  int label;
  N highest, x_label;  // x_j = log2(e) (z_j - highest), with the prior
  N rest, at_label;    // the other columns' weighted exponentials, and the label's
  SeesawRow<N> seesaw;

  __device__ GeneralRow(const SoftmaxArgs& a, const T* z_, int label_)
      : args(a), z(z_), label(label_), seesaw(N(1), N(0), N(0)) {
    // Every thread's maximum, and its sum relative to that.
    N m = N(-INFINITY), sum = 0;
    for_others([&](int j) {
      const N v = logit(j);
      if (v > m) {
        sum *= exp2((m - v) * N(kLog2E));
        m = v;
      }
      if (v != N(-INFINITY)) sum += exp2((v - m) * N(kLog2E));
    });
    highest = Threads::template max<0>(vmax(m, logit(label)));
    const N shift = m == N(-INFINITY) ? N(0) : exp2((m - highest) * N(kLog2E));
    rest = Threads::template sum<1>(sum * shift);
    x_label = x(label);
    at_label = exp2(x_label);
    if (args.reweight != SoftmaxReweight::kSeesaw) return;
    const N threshold = vmax(x_label, log2(rest + at_label) + N(args.log2_eps));
    seesaw = SeesawRow<N>(table(label), N(args.q), threshold);
    sum = 0;
    for_others([&](int j) { sum += weighted(j); });
    rest = Threads::template sum<2>(sum);
  }

  __device__ N table(int j) const { return static_cast<const N*>(args.table)[j]; }
  __device__ N logit(int j) const {
    const N v = to_number(z[j]);
    if (args.reweight != SoftmaxReweight::kPrior) return v;
    // The label's prior less itself is NaN if it is infinite.
    return v + table(j) + (j == label ? table(j) - table(j) : N(0));
  }
  __device__ N x(int j) const { return (logit(j) - highest) * N(kLog2E); }

  __device__ N weighted(int j) const {
    const N exponential = exp2(x(j));
    if (args.reweight != SoftmaxReweight::kSeesaw) return exponential;
    return exponential * seesaw.mitigation(table(j)) * seesaw.compensation(x(j));
  }

  template <class Body> __device__ void for_others(const Body& body) const {
    for (int j = Threads::index(); j < args.num_softmax; j += kThreads) {
      if (j != label) body(j);
    }
  }

  __device__ void write(T* grad, N scale) const {
    const N ratio = scale / (rest + at_label);
    for_others([&](int j) { grad[j] = from_number<T>(weighted(j) * ratio); });
    if (Threads::index() == 0) grad[label] = from_number<T>(-rest * ratio);
  }
};

template <class T>
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
      const GeneralRow<T> columns(a, z, row.label);
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
    const auto kernel = softmax_general<std::remove_pointer_t<decltype(storage)>>;
    return launch(kernel, resident_blocks(kernel, kThreads, a.rows.num_rows, 1), kThreads, stream, a);
  });
}

}  // namespace cuda
}  // namespace gol
