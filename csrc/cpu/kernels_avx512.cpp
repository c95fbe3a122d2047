// The kernels for AVX-512 F, BW, DQ and VL.
#if defined(__x86_64__)

// Everything that may be inlined from a header is included before the target changes.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
#endif

#define GOL_ISA avx512
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of its own _mm512_undefined_ps.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include "lanes_avx512.h"
// lanes first: the kernels are written in its terms
#include "bernoulli_kernel.h"
#include "softmax_kernel.h"
#include "table.h"

namespace gol {
namespace cpu {
const KernelTable kAvx512Kernels = {"avx512", GOL_ISA::bernoulli, GOL_ISA::softmax,
                                    GOL_ISA::gumbel_activation};
}  // namespace cpu
}  // namespace gol

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
