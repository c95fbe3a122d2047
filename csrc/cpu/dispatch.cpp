#include <ATen/Version.h>

#include <atomic>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace gol {
namespace cpu {
namespace {

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
#endif

const KernelTable* best() {
#if defined(__x86_64__)
  // What torch uses: it has asked the processor, and has obeyed ATEN_CPU_CAPABILITY.
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512" && has_avx512()) return &kAvx512Kernels;
  if ((capability == "AVX512" || capability == "AVX2") && has_avx2()) return &kAvx2Kernels;
#endif
  return &kGenericKernels;
}

std::atomic<const KernelTable*> chosen{nullptr};

}  // namespace

const KernelTable& kernels() {
  const KernelTable* table = chosen.load(std::memory_order_relaxed);
  if (table == nullptr) chosen.store(table = best(), std::memory_order_relaxed);
  return *table;
}

const KernelTable& kernels_for(DType dtype) { return dtype == DType::kFloat64 ? kGenericKernels : kernels(); }

void set_capability(const char* name) {
  const std::string wanted(name);
#if defined(__x86_64__)
  if (wanted == "avx512" && has_avx512()) return chosen.store(&kAvx512Kernels);
  if (wanted == "avx2" && has_avx2()) return chosen.store(&kAvx2Kernels);
#endif
  if (wanted == "generic") return chosen.store(&kGenericKernels);
  throw std::invalid_argument("this machine cannot run the CPU kernels for '" + wanted + "'");
}

}  // namespace cpu
}  // namespace gol
