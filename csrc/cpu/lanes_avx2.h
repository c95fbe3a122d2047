// Eight floats in an AVX2 register.
#pragma once

#include <immintrin.h>

#include "../loss_math.h"

namespace gol {
inline namespace GOL_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

struct Vec {
  __m256 v;
  GOL_FN Vec() {}
  GOL_FN Vec(__m256 x) : v(x) {}
  GOL_FN explicit Vec(double x) : v(_mm256_set1_ps(static_cast<float>(x))) {}
};
struct Mask {
  __m256 v;
};

GOL_FN Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
GOL_FN Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
GOL_FN Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
GOL_FN Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
GOL_FN Vec fnma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a.v, b.v, c.v); }  // c - a b
// The instruction returns its second operand when either is NaN: NaN in a stays.
GOL_FN Vec vmin(Vec a, Vec b) { return _mm256_min_ps(b.v, a.v); }
GOL_FN Vec vmax(Vec a, Vec b) { return _mm256_max_ps(b.v, a.v); }
GOL_FN Mask less(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
GOL_FN Mask differs(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_NEQ_OQ)}; }
GOL_FN Vec select(Mask m, Vec a, Vec b) { return _mm256_blendv_ps(b.v, a.v, m.v); }
GOL_FN Vec reciprocal(Vec x) { return _mm256_div_ps(_mm256_set1_ps(1.f), x.v); }
GOL_FN Vec quotient(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
// a / (b + low), |low| below an ulp of b: the quotient corrected by its remainder.
GOL_FN Vec divide(Vec a, Vec b, Vec low) {
  const Vec r = reciprocal(b);
  const Vec q = a * r;
  return fma(fnma(q, low, fnma(q, b, a)), r, q);
}

// 2^(n + k/8 + f) = 2^n * 2^(k/8) * 2^f, |f| <= 1/16. On top of 1.5 * 2^20 the multiple of 1/8 stands in the
// last bits of the mantissa, the integer 8 n + k; shifted to the exponent, its k is taken off again by the
// table of 2^(k/8), which lies in a register.
constexpr float kOnTop = 1572864.f;
GOL_FN __m256i looked_up(__m256i table, Vec on_top) {
  const __m256i bits = _mm256_castps_si256(on_top.v);
  return _mm256_permutevar8x32_epi32(table, bits);
}
GOL_FN Vec shifted(__m256i fraction, Vec on_top) {
  const __m256i bits = _mm256_castps_si256(on_top.v);
  return _mm256_castsi256_ps(_mm256_add_epi32(fraction, _mm256_slli_epi32(bits, 20)));
}
GOL_FN Vec power_on_top(Vec on_top) {
  const __m256i table = _mm256_setr_epi32(0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3,
                                          0x3f75672a, 0x3f7744fd, 0x3f7ac0c7);
  return shifted(looked_up(table, on_top), on_top);
}
// 2^f = 1 + f * this: minimax relative error of the power 2.5e-8.
GOL_FN Vec power_slope(Vec f) {
  const Vec p = fma(Vec(0.05549622), f, Vec(0.24025763));
  return fma(p, f, Vec(0.69314721));
}
// 2^on_top (1 + f slope), 0 where 2^on_top is below 2^-126; on_top must stay below 128.
GOL_FN Vec power(Vec on_top, Vec f, Vec slope) {
  const Vec t = power_on_top(on_top);
  const __m256 normal = _mm256_cmp_ps(on_top.v, _mm256_set1_ps(kOnTop - 126.f), _CMP_NLT_UQ);
  return _mm256_and_ps(normal, fma(t * f, slope, t).v);  // NaN stays
}
GOL_FN Vec exp2(Vec x) {
  const Vec n = x + Vec(kOnTop), f = x - (n - Vec(kOnTop));
  return power(n, f, power_slope(f));
}
// The factor log2(e) is in the table.
GOL_FN Vec exp2_times_log2e(Vec x, Vec rate) {
  const __m256i table = _mm256_setr_epi32(0x3fb8aa3b, 0x3fb960ea, 0x3fbb9ada, 0x3fbf7b18, 0x3fc293ee,
                                          0x3fbe656a, 0x3fbb48bb, 0x3fb956a9);
  const Vec n = fma(x, rate, Vec(kOnTop)), f = fma(x, rate, Vec(kOnTop) - n);
  const Vec t = shifted(looked_up(table, n), n);
  return fma(t * f, power_slope(f), t);
}
// With t = 2^(k/8) rounded to t', t = t' (1 + d), and d from a table: 2^-x = t' + t' u and 1 - 2^-x = (1 -
// t') - t' u for u = f P(f) + d. Where digits could be lost, 1 - t' is exact. 2^f = 1 + f P(f), minimax
// relative error of P 3.7e-9.
GOL_FN Complements<Vec> complements(Vec x) {
  const __m256i table = _mm256_setr_epi32(0x00000000, 0xb24e0611, 0x33092801, 0xb3051aa8, 0x329302ae,
                                          0x31b3d0e5, 0xb27ce182, 0xb1d290be);
  const Vec n = Vec(kOnTop) - x, f = (Vec(kOnTop) - n) - x, t = power_on_top(n);
  Vec p = fma(Vec(0.009618129103), f, Vec(0.05550931705));
  p = fma(p, f, Vec(0.2402265084));
  p = fma(p, f, Vec(0.693147178));
  const Vec u = fma(f, p, _mm256_castsi256_ps(looked_up(table, n)));
  return {fma(t, u, t), fnma(t, u, Vec(1.0) - t)};
}
// e^x = 2^n e^f, f = x - n ln 2 without rounding but that of ln 2, 2e-9 n; where exp2(x * log2(e)) would lose
// |x| ulp. e^f = 1 + f * slope with the polynomial of power_slope.
GOL_FN Vec exp(Vec x) {
  const Vec n = fma(x, Vec(kLog2E), Vec(kOnTop));
  const Vec f = fnma(n - Vec(kOnTop), Vec(kLn2), x);
  const Vec p = fma(Vec(0.1666429787), f, Vec(0.5000647785));
  return power(n, f, fma(p, f, Vec(1.000000042)));
}

// log2 of a positive normal number: exponent + 2/ln2 * atanh((m - 1) / (m + 1)), m in [3/4, 3/2).
GOL_FN Vec log2(Vec x) {
  const __m256i bits = _mm256_castps_si256(x.v);
  // The bits of 3/4 are taken off, so that the exponent counts from mantissas in [3/4, 3/2).
  const __m256i e = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f400000)), 23);
  const Vec m(_mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(e, 23))));
  const Vec s(_mm256_div_ps((m - Vec(1.0)).v, (m + Vec(1.0)).v));
  const Vec s2 = s * s;
  Vec p = fma(Vec(2.0 / 9 * kLog2E), s2, Vec(2.0 / 7 * kLog2E));
  p = fma(p, s2, Vec(2.0 / 5 * kLog2E));
  p = fma(p, s2, Vec(2.0 / 3 * kLog2E));
  p = fma(p, s2, Vec(2.0 * kLog2E));
  const Vec r = fma(p, s, Vec(_mm256_cvtepi32_ps(e)));
  return Vec(_mm256_blendv_ps(r.v, x.v, _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q)));
}

template <class V> struct Lanes;
template <> struct Lanes<Vec> {
  static constexpr int width = 8;
  using Mask = gol::Mask;

  static GOL_FN Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static GOL_FN Vec load(const float* p, int n) { return _mm256_maskload_ps(p, lanes_below(n)); }
  static GOL_FN void store(float* p, Vec v) { _mm256_storeu_ps(p, v.v); }
  static GOL_FN void store(float* p, int n, Vec v) { _mm256_maskstore_ps(p, lanes_below(n), v.v); }

  // To an aligned place, past the caches; end_streams() before other threads may read it.
  static GOL_FN void stream(float* p, Vec v) { _mm256_stream_ps(p, v.v); }
  static GOL_FN void stream(Float16* p, Vec v) { _mm_stream_si128((__m128i*)p, half(v)); }
  static GOL_FN void stream(BFloat16* p, Vec v) { _mm_stream_si128((__m128i*)p, narrow(v)); }
  static GOL_FN void end_streams() { _mm_sfence(); }

  static GOL_FN Vec load(const Float16* p) { return _mm256_cvtph_ps(load16(p)); }
  static GOL_FN Vec load(const Float16* p, int n) { return _mm256_cvtph_ps(load16(p, n)); }
  static GOL_FN void store(Float16* p, Vec v) { _mm_storeu_si128((__m128i*)p, half(v)); }
  static GOL_FN void store(Float16* p, int n, Vec v) { store16(p, n, half(v)); }

  static GOL_FN Vec load(const BFloat16* p) { return widen(load16(p)); }
  static GOL_FN Vec load(const BFloat16* p, int n) { return widen(load16(p, n)); }
  static GOL_FN void store(BFloat16* p, Vec v) { _mm_storeu_si128((__m128i*)p, narrow(v)); }
  static GOL_FN void store(BFloat16* p, int n, Vec v) { store16(p, n, narrow(v)); }

  static GOL_FN Mask first(int n) { return {_mm256_castsi256_ps(lanes_below(n))}; }
  static GOL_FN Mask clear_bits(uint64_t bits) {
    const __m256i lane_bit = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
    const __m256i hit = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane_bit);
    return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(hit, _mm256_setzero_si256()))};
  }
  static GOL_FN Mask both(Mask a, Mask b) { return {_mm256_and_ps(a.v, b.v)}; }
  static GOL_FN double front(Vec x) { return _mm256_cvtss_f32(x.v); }
  static GOL_FN double sum(Vec x) {
    const __m256d d = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(x.v)),
                                    _mm256_cvtps_pd(_mm256_extractf128_ps(x.v, 1)));
    const __m128d h = _mm_add_pd(_mm256_castpd256_pd128(d), _mm256_extractf128_pd(d, 1));
    return _mm_cvtsd_f64(_mm_add_sd(h, _mm_unpackhi_pd(h, h)));
  }
  static GOL_FN float max(Vec x) {
    __m128 h = _mm_max_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
    h = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
  }

 private:
  static GOL_FN __m256i lanes_below(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
  }
  static GOL_FN __m128i load16(const void* p) { return _mm_loadu_si128((const __m128i*)p); }
  static GOL_FN __m128i load16(const void* p, int n) {
    alignas(16) uint16_t buffer[8] = {0};
    for (int i = 0; i < n; ++i) buffer[i] = static_cast<const uint16_t*>(p)[i];
    return _mm_load_si128((const __m128i*)buffer);
  }
  static GOL_FN void store16(void* p, int n, __m128i v) {
    alignas(16) uint16_t buffer[8];
    _mm_store_si128((__m128i*)buffer, v);
    for (int i = 0; i < n; ++i) static_cast<uint16_t*>(p)[i] = buffer[i];
  }
  static GOL_FN __m128i half(Vec v) { return _mm256_cvtps_ph(v.v, _MM_FROUND_TO_NEAREST_INT); }
  static GOL_FN Vec widen(__m128i b) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(b), 16));
  }
  // Round to nearest even on the upper half; NaN would carry over into another number, so it is set.
  static GOL_FN __m128i narrow(Vec v) {
    const __m256i b = _mm256_castps_si256(v.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_add_epi32(b, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    r = _mm256_srli_epi32(r, 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v.v, v.v, _CMP_UNORD_Q));
    r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
  }
};

// Eight 32-bit words for the counter generator, each in the lower half of a 64-bit lane, where
// the widening multiplication wants them: words 0..3 and 4..7. The upper halves hold anything.
struct VecU {
  __m256i lower, upper;
  GOL_FN VecU() {}
  GOL_FN VecU(__m256i a, __m256i b) : lower(a), upper(b) {}
  GOL_FN explicit VecU(uint32_t x) : lower(_mm256_set1_epi64x(x)), upper(_mm256_set1_epi64x(x)) {}
};
GOL_FN VecU xor3(VecU a, VecU b, VecU c) {
  return {_mm256_xor_si256(_mm256_xor_si256(a.lower, b.lower), c.lower),
          _mm256_xor_si256(_mm256_xor_si256(a.upper, b.upper), c.upper)};
}
GOL_FN VecU mulhilo(uint32_t a, VecU b, VecU* hi) {
  const __m256i a64 = _mm256_set1_epi64x(a);
  const __m256i lower = _mm256_mul_epu32(b.lower, a64), upper = _mm256_mul_epu32(b.upper, a64);
  *hi = {_mm256_srli_epi64(lower, 32), _mm256_srli_epi64(upper, 32)};
  return {lower, upper};
}

struct Words {
  static constexpr int width = 8;
  using type = VecU;
  static GOL_FN VecU iota(uint32_t start) {
    const __m256i lane = _mm256_add_epi64(_mm256_setr_epi64x(0, 1, 2, 3), _mm256_set1_epi64x(start));
    return {lane, _mm256_add_epi64(lane, _mm256_set1_epi64x(4))};
  }
  // Bits 2l and 2l+1: whether the lower and the upper half of word l are not below the limit.
  static GOL_FN uint32_t halves_from(VecU v, uint16_t limit) {
    // The lower words of both registers in order 0 1 4 5 2 3 6 7, then put right.
    const __m256 mixed = _mm256_shuffle_ps(_mm256_castsi256_ps(v.lower), _mm256_castsi256_ps(v.upper), 0x88);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_castps_si256(mixed), 0xd8);
    const __m256i at_least =
        _mm256_cmpeq_epi16(_mm256_max_epu16(words, _mm256_set1_epi16(static_cast<short>(limit))), words);
    const __m256i bytes = _mm256_packs_epi16(at_least, at_least);
    const uint32_t mask = static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
    return (mask & 0xff) | (mask >> 8 & 0xff00);
  }
  // Bits 2i and 2i+1 of a 16-bit number to 8i and 8i+1.
  static GOL_FN uint64_t spread_pairs(uint64_t x) {
    x = (x | (x << 24)) & 0x000000ff000000ffull;
    x = (x | (x << 12)) & 0x000f000f000f000full;
    return (x | (x << 6)) & 0x0303030303030303ull;
  }
};

// The number type in which a row stored as T is worked on.
template <class T> using RowNumber = Vec;
constexpr bool kHasFloat64 = false;

}  // namespace GOL_ISA
}  // namespace gol
