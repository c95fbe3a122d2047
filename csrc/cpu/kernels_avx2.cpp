// The kernels for AVX2 with FMA and F16C.
#if defined(__x86_64__)

// Everything that may be inlined from a header is included before the target changes.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define GOL_ISA avx2
#include "lanes_avx2.h"
// lanes first: the kernels are written in its terms
#include "bernoulli_kernel.h"
#include "softmax_kernel.h"
#include "table.h"

namespace gol {
namespace cpu {
const KernelTable kAvx2Kernels = {"avx2", GOL_ISA::bernoulli, GOL_ISA::softmax, GOL_ISA::gumbel_activation};
}  // namespace cpu
}  // namespace gol

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
