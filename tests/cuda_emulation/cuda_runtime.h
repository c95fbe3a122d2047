// CUDA on one CPU thread: what csrc/cuda uses of it, so that its sources, unchanged, can be compiled by a C++
// compiler and run where there is no GPU. Blocks run one after the other. The threads of a block are fibers
// that yield at barriers, shuffles and votes, so indices, shared memory and the order of stores are those of
// a GPU; a collective that not all threads reach is reported. Between two of them the threads run one after
// the other, in some blocks backwards: what a thread reads of another without a barrier in between is wrong in
// one of the two orders. Special functions err as much as a GPU's may. Memory order and speed are not emulated.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "special_functions.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulation {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = size_t{128} << 10;

// Reached by `expected` threads, it lets them pass and is a barrier anew.
struct Barrier {
  unsigned expected = 0, arrived = 0, generation = 0;
};

struct Warp {
  Barrier barrier;
  const char* collective = nullptr;   // of the lanes that have arrived
  uint64_t exchanged[2][kWarp] = {};  // by a barrier's generation: a lane may be one collective ahead
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done = false;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  unsigned running = 0;
  bool progress = false;
  bool backwards = false;
  const char* error = nullptr;
  ucontext_t scheduler;
};

inline Block block;

inline void yield() { swapcontext(&block.fibers[block.running].context, &block.scheduler); }

inline void wait(Barrier& barrier) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    block.progress = true;
  }
  while (barrier.generation == generation) yield();
}

// The values that the lanes of this thread's warp hand in.
inline const uint64_t* exchange(const char* collective, uint64_t value) {
  Warp& warp = block.warps[threadIdx.x / kWarp];
  if (warp.barrier.arrived == 0) warp.collective = collective;
  if (std::strcmp(warp.collective, collective) != 0)
    block.error = "the lanes of a warp are in different collectives";
  uint64_t* const exchanged = warp.exchanged[warp.barrier.generation % 2];
  exchanged[threadIdx.x % kWarp] = value;
  wait(warp.barrier);
  return exchanged;
}

template <class T> T shuffle(const char* collective, T value, unsigned lane) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const uint64_t* const exchanged = exchange(collective, bits);
  std::memcpy(&value, &exchanged[lane < kWarp ? lane : threadIdx.x % kWarp], sizeof(T));
  return value;
}

template <class Body> void run_fiber(unsigned high, unsigned low) {
  (*reinterpret_cast<const Body*>(uint64_t{high} << 32 | low))();
  block.fibers[block.running].done = true;
  block.progress = true;
}

// Runs body once for each thread of a block.
template <class Body> void run_block(const Body& body) {
  const unsigned threads = blockDim.x;
  if (block.fibers.size() < threads) block.fibers = std::vector<Fiber>(threads);
  block.warps.assign((threads + kWarp - 1) / kWarp, Warp());
  for (unsigned w = 0; w < block.warps.size(); ++w)
    block.warps[w].barrier.expected = std::min(kWarp, threads - w * kWarp);
  block.barrier = Barrier();
  block.barrier.expected = threads;
  block.error = nullptr;
  const auto address = reinterpret_cast<uint64_t>(&body);
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = block.fibers[t];
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &block.scheduler;
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(&run_fiber<Body>), 2,
                static_cast<unsigned>(address >> 32), static_cast<unsigned>(address));
  }
  for (unsigned left = threads; left > 0;) {
    block.progress = false;
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned t = block.backwards ? threads - 1 - i : i;
      if (block.fibers[t].done) continue;
      block.running = t;
      threadIdx.x = t;
      swapcontext(&block.scheduler, &block.fibers[t].context);
      left -= block.fibers[t].done;
      if (block.error != nullptr) throw std::logic_error(block.error);
    }
    if (!block.progress) throw std::logic_error("a barrier, shuffle or vote is not reached by all threads");
  }
}

}  // namespace emulation

// --- the runtime -------------------------------------------------------------------------------------
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
// A device of few threads: even small tensors take several steps of a loop.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  const char* count = std::getenv("EMULATED_MULTIPROCESSORS");
  *value = count != nullptr ? std::atoi(count) : 1;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const auto legal = [](unsigned n, unsigned most) { return n >= 1 && n <= most; };
  if (!legal(config->gridDim.x, 0x7fffffff) || !legal(config->blockDim.x, 1024))
    return cudaErrorInvalidConfiguration;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  for (unsigned i = 0; i < gridDim.x; ++i) {
    emulation::block.backwards = !emulation::block.backwards;
    blockIdx.x = emulation::block.backwards ? gridDim.x - 1 - i / 2 : i / 2;
    emulation::run_block([&] { kernel(static_cast<Parameters>(arguments)...); });
  }
  return cudaSuccess;
}

// --- device functions --------------------------------------------------------------------------------
inline void __syncthreads() { emulation::wait(emulation::block.barrier); }
inline void __syncwarp(unsigned = ~0u) { emulation::exchange("syncwarp", 0); }
inline void __threadfence() {}

template <class T> T __shfl_sync(unsigned, T x, int lane) {
  return emulation::shuffle("shfl", x, lane % emulation::kWarp);
}
template <class T> T __shfl_xor_sync(unsigned, T x, int mask) {
  return emulation::shuffle("shfl_xor", x, threadIdx.x % emulation::kWarp ^ mask);
}
template <class T> T __shfl_down_sync(unsigned, T x, unsigned delta) {
  return emulation::shuffle("shfl_down", x, threadIdx.x % emulation::kWarp + delta);
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  const uint64_t* const votes = emulation::exchange("vote", predicate);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < emulation::kWarp; ++lane) bits |= static_cast<unsigned>(votes[lane]) << lane;
  return bits;
}
inline bool __any_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) != 0; }
inline bool __all_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, !predicate) == 0; }

template <class T> T atomicAdd(T* p, T x) { return std::exchange(*p, *p + x); }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> T __ldg(const T* p) { return *p; }

inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}
using std::max;
using std::min;
