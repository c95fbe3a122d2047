// What all CUDA kernels share: number types, 16-byte vectors, rows, and the reduction of the loss.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels.h"

namespace gol {
namespace cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The type in which a T in memory is worked on.
template <class T> using Number = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ float to_number(float x) { return x; }
__device__ __forceinline__ double to_number(double x) { return x; }
__device__ __forceinline__ float to_number(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_number(__half x) { return __half2float(x); }

template <class T> __device__ __forceinline__ T from_number(Number<T> x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(x);
  else if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
  else return x;
}

// --- 16 bytes of T -----------------------------------------------------------------------------
template <class T> struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T element[kSize];
};

// Read once: neither cache keeps it.
template <class T> __device__ __forceinline__ Vector<T> load_streaming(const T* p) {
  const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(p));
  return *reinterpret_cast<const Vector<T>*>(&bits);
}

template <class T> __device__ __forceinline__ void store(T* p, const Vector<T>& v) {
  const uint4 bits = *reinterpret_cast<const uint4*>(&v);
#if defined(__CUDA_ARCH__)
  // Of an assignment the compiler at times makes four stores.
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(bits.x),
               "r"(bits.y), "r"(bits.z), "r"(bits.w)
               : "memory");
#else
  *reinterpret_cast<uint4*>(p) = bits;
#endif
}

template <class T> __device__ __forceinline__ void unpack(const Vector<T>& v, Number<T>* x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // the upper half of a float: one instruction each
    const auto* pair = reinterpret_cast<const uint32_t*>(&v);
#pragma unroll
    for (int j = 0; j < Vector<T>::kSize; j += 2) {
      x[j] = __uint_as_float(pair[j / 2] << 16);
      x[j + 1] = __uint_as_float(pair[j / 2] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int j = 0; j < Vector<T>::kSize; ++j) x[j] = to_number(v.element[j]);
  }
}

// Two numbers of 16 bits are rounded by one instruction.
template <class T> __device__ __forceinline__ Vector<T> pack(const Number<T>* x) {
  Vector<T> v;
#pragma unroll
  for (int j = 0; j < Vector<T>::kSize; j += sizeof(T) == 2 ? 2 : 1) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
      reinterpret_cast<__nv_bfloat162*>(v.element)[j / 2] = __floats2bfloat162_rn(x[j], x[j + 1]);
    else if constexpr (std::is_same_v<T, __half>)
      reinterpret_cast<__half2*>(v.element)[j / 2] = __floats2half2_rn(x[j], x[j + 1]);
    else v.element[j] = x[j];
  }
  return v;
}

// --- sums ----------------------------------------------------------------------------------------
// Over a warp, in every lane; always in the same order.
template <class N> __device__ __forceinline__ N warp_sum(N x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

template <class N> __device__ __forceinline__ N warp_max(N x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = vmax(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

// Over a block of whole warps, in every thread.
__device__ inline double block_sum(double x) {
  __shared__ double of_warp[kWarp];
  x = warp_sum(x);
  __syncthreads();  // of_warp may still be read for the sum before
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = x;
  __syncthreads();
  double total = 0;
  for (unsigned w = 0; w < blockDim.x / kWarp; ++w) total += of_warp[w];
  return total;
}

// loss[k] = the sum of part[k] over all threads of the grid, in a fixed order: the block that arrives last
// adds what all blocks have written. Every thread of every block calls it.
template <int kSums, class N>
__device__ void reduce_loss(const double (&part)[kSums], N* const (&loss)[kSums], Workspace* workspace) {
  __shared__ bool is_last;
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    const double sum = block_sum(part[k]);
    if (threadIdx.x == 0) workspace->partial_loss[k][blockIdx.x] = sum;
  }
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(&workspace->arrived, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    double sum = 0;
    for (unsigned b = threadIdx.x; b < gridDim.x; b += blockDim.x)
      sum += __ldcg(&workspace->partial_loss[k][b]);
    sum = block_sum(sum);
    if (threadIdx.x == 0) *loss[k] = static_cast<N>(sum);
  }
}

// --- rows ------------------------------------------------------------------------------------------
__device__ inline double read(const Reals& x, int64_t i) {
  switch (x.type) {
    case RealType::kFloat32: return static_cast<const float*>(x.data)[i];
    case RealType::kFloat64: return static_cast<const double*>(x.data)[i];
    default: return static_cast<double>(static_cast<const int64_t*>(x.data)[i]);
  }
}

// What the prologue counted in the whole batch. Called by whole warps.
__device__ inline BatchCounts batch_counts(const RowArgs& a) {
  BatchCounts c{0, 0, 0};
  const int lane = threadIdx.x % kWarp;
  if (lane < a.num_counts) c = a.workspace->counts[lane];
  return {warp_sum(c.counted), warp_sum(c.foreground), warp_sum(c.rare)};
}

// By what the loss of a row of weight 1 is multiplied. Called by whole warps.
__device__ inline double batch_factor(const RowArgs& a) {
  if (!a.mean) return a.scale;
  const double denominator =
      a.avg_factor.data != nullptr ? read(a.avg_factor, 0) : static_cast<double>(batch_counts(a).counted);
  return denominator == 0 ? a.scale : a.scale / denominator;  // nothing to average over: the sum, which is 0
}

// The loss of a row is scale() times its unscaled loss. Scale 0: the row does not exist, whatever its
// logits are. Scale NaN: its label is illegal.
template <class N> struct Row {
  int label;  // -1 where the row is ignored or illegal
  N weight, factor;
  __device__ __forceinline__ N scale() const { return weight * factor; }
};

// What is read of a row; a loop can do so a turn ahead.
template <class N> struct RowInput {
  int64_t label;
  N weight;
};
template <class N> __device__ __forceinline__ RowInput<N> load_row(const RowArgs& a, int64_t row) {
  return {a.labels[row], a.row_weights == nullptr ? N(1) : static_cast<const N*>(a.row_weights)[row]};
}

// factor: batch_factor.
template <class N>
__device__ __forceinline__ Row<N> make_row(const RowArgs& a, const RowInput<N>& input, N factor) {
  const bool ignored = input.label == a.ignore_index;
  const bool legal = static_cast<uint64_t>(input.label) <= static_cast<uint64_t>(a.num_classes);
  const bool exists = legal && !ignored;
  return {exists ? static_cast<int>(input.label) : -1, exists ? input.weight : N(0),
          legal || ignored ? factor : static_cast<N>(NAN)};
}
template <class N> __device__ __forceinline__ Row<N> read_row(const RowArgs& a, int64_t row, N factor) {
  return make_row(a, load_row<N>(a, row), factor);
}

template <class N> __device__ __forceinline__ N read(const Upstream& u, int64_t row) {
  return u.data == nullptr ? N(1) : static_cast<const N*>(u.data)[row * u.stride];
}

// --- launching -----------------------------------------------------------------------------------
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                   Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

// Multiprocessors of the current device.
inline int num_multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count > 0 ? count : 1;
}

// Calls body(T*), for the type behind dtype; fp64 = false leaves kFloat64 out.
template <bool fp64 = true, class Body> cudaError_t for_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32: return body(static_cast<float*>(nullptr));
    case DType::kBFloat16: return body(static_cast<__nv_bfloat16*>(nullptr));
    case DType::kFloat16: return body(static_cast<__half*>(nullptr));
    default:
      if constexpr (fp64) return body(static_cast<double*>(nullptr));
      else return cudaErrorInvalidValue;
  }
}

}  // namespace cuda
}  // namespace gol
