// The Gumbel activation, the rescaling of a finished gradient, and the histogram of labels.
#include "elementwise.h"
#include "fixed_columns.cuh"

namespace gol {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// --- Gumbel activation -------------------------------------------------------------------------------
template <class T>
__global__ void __launch_bounds__(kThreads)
    gumbel_activation(const T* logits, const T* grad_output, T* output, int64_t numel, bool aligned,
                      const __grid_constant__ GumbelLink<Number<T>, false> link) {
  using N = Number<T>;
  constexpr int V = Vector<T>::kSize;
  const N unit = static_cast<N>(link.unit);
  const auto value = [&](N z, N upstream) {
    const N log2_p = link.log2_probability(z), p = exp2(log2_p);
    if (grad_output == nullptr) return p;
    return select(differs(z, link.clip(z)), N(0), minus(p * log2_p) * unit) * upstream;
  };
  for (int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * V; first < numel;
       first += int64_t{gridDim.x} * kThreads * V) {
    if (!aligned || first + V > numel) {
      for (int64_t i = first; i < first + V && i < numel; ++i) {
        const N upstream = grad_output == nullptr ? N(1) : to_number(grad_output[i]);
        output[i] = from_number<T>(value(to_number(logits[i]), upstream));
      }
      continue;
    }
    N z[V], upstream[V] = {};
    unpack(load_streaming(logits + first), z);
    if (grad_output != nullptr) unpack(load_streaming(grad_output + first), upstream);
#pragma unroll
    for (int j = 0; j < V; ++j) z[j] = value(z[j], upstream[j]);
    store(output + first, pack<T>(z));
  }
}

// --- rescaling ---------------------------------------------------------------------------------------
template <class T>
__global__ void __launch_bounds__(kThreads)
    scale_grad(T* grad, const Number<T>* first, const Number<T>* second, int split,
               const __grid_constant__ FixedColumns columns) {
  using N = Number<T>;
  constexpr int V = Vector<T>::kSize;
  const N left = *first, right = *second;
  if (left == N(1) && right == N(1)) return;
  const int id = blockIdx.x * kThreads + threadIdx.x;
  if (id >= columns.threads) return;
  FixedVector<V> place(columns, id);
  N factor[V];
#pragma unroll
  for (int j = 0; j < V; ++j) factor[j] = place.column_of(j) < split ? left : right;
  for (; place.row < columns.num_rows; place.advance(columns)) {
    T* at = grad + place.element();
    if (place.crosses() && place.row + 1 == columns.num_rows) {
      for (int j = 0; j < place.split; ++j)
        at[j] = from_number<T>(to_number(at[j]) * (place.column + j < split ? left : right));
      continue;
    }
    N x[V];
    unpack(load_streaming(at), x);
#pragma unroll
    for (int j = 0; j < V; ++j) x[j] *= factor[j];
    store(at, pack<T>(x));
  }
}

// --- labels ------------------------------------------------------------------------------------------
constexpr int kBins = 8192;  // a block counts by itself where the classes fit; whole numbers add in any order

__global__ void __launch_bounds__(kThreads) label_counts(const __grid_constant__ LabelCountsArgs a) {
  __shared__ unsigned int bins[kBins];
  const bool fits = a.num_classes < kBins;
  for (int64_t c = threadIdx.x; fits && c <= a.num_classes; c += kThreads) bins[c] = 0;
  __syncthreads();
  auto* counts = reinterpret_cast<unsigned long long*>(a.counts);
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < a.num_labels;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t label = a.labels[i];
    if (label < 0 || label > a.num_classes || label == a.ignore_index) continue;
    if (fits) atomicAdd(&bins[label], 1u);
    else atomicAdd(&counts[label], 1ull);
  }
  __syncthreads();
  for (int64_t c = threadIdx.x; fits && c <= a.num_classes; c += kThreads)
    if (bins[c] > 0) atomicAdd(&counts[c], static_cast<unsigned long long>(bins[c]));
}

bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
int vector_size(DType dtype) { return dtype == DType::kFloat64 ? 2 : dtype == DType::kFloat32 ? 4 : 8; }

}  // namespace

cudaError_t launch_gumbel_activation(const GumbelActivationArgs& a, cudaStream_t stream) {
  return for_dtype(a.dtype, [&](auto* storage) {
    using T = std::remove_pointer_t<decltype(storage)>;
    constexpr int64_t kPerBlock = int64_t{kThreads} * Vector<T>::kSize, kMaxBlocks = 1 << 20;
    const int64_t blocks = (a.numel + kPerBlock - 1) / kPerBlock;
    return launch(gumbel_activation<T>, blocks < kMaxBlocks ? blocks : kMaxBlocks, kThreads, stream,
                  static_cast<const T*>(a.logits), static_cast<const T*>(a.grad_output),
                  static_cast<T*>(a.output), a.numel,
                  is_aligned(a.logits) && is_aligned(a.grad_output) && is_aligned(a.output),
                  GumbelLink<Number<T>, false>(a.link_options));
  });
}

bool scale_grad_fits(const ScaleGradArgs& a) {
  return is_aligned(a.grad) && FixedColumns::fits(a.num_rows, a.num_columns, vector_size(a.dtype));
}

cudaError_t launch_scale_grad(const ScaleGradArgs& a, cudaStream_t stream) {
  return for_dtype(a.dtype, [&](auto* storage) {
    using T = std::remove_pointer_t<decltype(storage)>;
    using N = Number<T>;
    constexpr int kBlocks = 8;  // on a multiprocessor
    const FixedColumns columns(a.num_rows, a.num_columns, Vector<T>::kSize,
                               int64_t{num_multiprocessors()} * kBlocks * kThreads);
    return launch(scale_grad<T>, (columns.threads + kThreads - 1) / kThreads, kThreads, stream,
                  static_cast<T*>(a.grad), static_cast<const N*>(a.first), static_cast<const N*>(a.second),
                  static_cast<int>(a.split), columns);
  });
}

cudaError_t launch_label_counts(const LabelCountsArgs& a, cudaStream_t stream) {
  constexpr int64_t kPerBlock = 16 * kThreads, kMaxBlocks = 64;
  const int64_t blocks = (a.num_labels + kPerBlock - 1) / kPerBlock;
  return launch(label_counts, blocks < kMaxBlocks ? blocks : kMaxBlocks, kThreads, stream, a);
}

}  // namespace cuda
}  // namespace gol
