// Sixteen floats in an AVX-512 register.
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
  __m512 v;
  GOL_FN Vec() {}
  GOL_FN Vec(__m512 x) : v(x) {}
  GOL_FN explicit Vec(double x) : v(_mm512_set1_ps(static_cast<float>(x))) {}
};
using Mask = __mmask16;

GOL_FN Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
GOL_FN Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
GOL_FN Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
GOL_FN Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
GOL_FN Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a.v, b.v, c.v); }  // c - a b
// The instruction returns its second operand when either is NaN: NaN in a stays.
GOL_FN Vec vmin(Vec a, Vec b) { return _mm512_min_ps(b.v, a.v); }
GOL_FN Vec vmax(Vec a, Vec b) { return _mm512_max_ps(b.v, a.v); }
GOL_FN Mask less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
GOL_FN Mask differs(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_OQ); }
GOL_FN Vec select(Mask m, Vec a, Vec b) { return _mm512_mask_blend_ps(m, b.v, a.v); }

// 14-bit estimate and one Newton step: within 1 ulp, a third of the division's time.
GOL_FN Vec reciprocal(Vec x) {
  const Vec y(_mm512_rcp14_ps(x.v));
  return fma(y, fnma(x, y, Vec(1.0)), y);
}
GOL_FN Vec quotient(Vec a, Vec b) { return a * reciprocal(b); }
// a / (b + low), |low| below an ulp of b: the quotient corrected by its remainder.
GOL_FN Vec divide(Vec a, Vec b, Vec low) {
  const Vec r = reciprocal(b);
  const Vec q = a * r;
  return fma(fnma(q, low, fnma(q, b, a)), r, q);
}

// 2^(n + k/16 + f) = 2^n * 2^(k/16) * 2^f, |f| <= 1/32. On top of 1.5 * 2^19 the multiple of 1/16 stands in
// the last bits of the mantissa, the integer 16 n + k; shifted to the exponent, its k is taken off again by
// the table of 2^(k/16), which lies in a register.
constexpr float kOnTop = 786432.f;
GOL_FN __m512i looked_up(__m512i table, Vec on_top) {
  const __m512i bits = _mm512_castps_si512(on_top.v);
  return _mm512_permutexvar_epi32(bits, table);
}
GOL_FN Vec shifted(__m512i fraction, Vec on_top) {
  const __m512i bits = _mm512_castps_si512(on_top.v);
  return _mm512_castsi512_ps(_mm512_add_epi32(fraction, _mm512_slli_epi32(bits, 19)));
}
GOL_FN Vec power_on_top(Vec on_top) {
  const __m512i table = _mm512_setr_epi32(
      0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
      0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d);
  return shifted(looked_up(table, on_top), on_top);
}
// 2^f = 1 + f * this: minimax relative error of the power 1.6e-9.
GOL_FN Vec power_slope(Vec f) {
  const Vec p = fma(Vec(0.05550213649), f, Vec(0.240234288));
  return fma(p, f, Vec(0.6931471827));
}
// 2^on_top (1 + f slope), 0 where 2^on_top is below 2^-126; on_top must stay below 128.
GOL_FN Vec power(Vec on_top, Vec f, Vec slope) {
  const Vec t = power_on_top(on_top);
  const Mask normal = _mm512_cmp_ps_mask(on_top.v, _mm512_set1_ps(kOnTop - 126.f), _CMP_NLT_UQ);
  return _mm512_maskz_fmadd_ps(normal, (t * f).v, slope.v, t.v);  // NaN stays
}
GOL_FN Vec exp2(Vec x) {
  const Vec n = x + Vec(kOnTop), f = x - (n - Vec(kOnTop));
  return power(n, f, power_slope(f));
}
// The factor log2(e) is in the table.
GOL_FN Vec exp2_times_log2e(Vec x, Vec rate) {
  const __m512i table = _mm512_setr_epi32(
      0x3fb8aa3b, 0x3fb8d73d, 0x3fb960ea, 0x3fba4b5b, 0x3fbb9ada, 0x3fbd53e0, 0x3fbf7b18, 0x3fc21564,
      0x3fc293ee, 0x3fc05be9, 0x3fbe656a, 0x3fbcb359, 0x3fbb48bb, 0x3fba28bc, 0x3fb956a9, 0x3fb8d5f5);
  const Vec n = fma(x, rate, Vec(kOnTop)), f = fma(x, rate, Vec(kOnTop) - n);
  const Vec t = shifted(looked_up(table, n), n);
  return fma(t * f, power_slope(f), t);
}
// With t = 2^(k/16) rounded to t', t = t' (1 + d), and d from a table: 2^-x = t' + t' u and 1 - 2^-x = (1 -
// t') - t' u for u = f P(f) + d. Where digits could be lost, 1 - t' is exact. 2^f = 1 + f P(f), minimax
// relative error of P 2.3e-10.
GOL_FN Complements<Vec> complements(Vec x) {
  const __m512i table = _mm512_setr_epi32(
      0x00000000, 0x3346cb6a, 0xb24e0611, 0x334b2482, 0x33092801, 0x331b85f2, 0xb3051aa8, 0xb2006c56,
      0x329302ae, 0xb302e5a2, 0x31b3d0e5, 0x31d1daf2, 0xb27ce182, 0xb1b4b0da, 0xb1d290be, 0x31b0a147);
  const Vec n = Vec(kOnTop) - x, f = (Vec(kOnTop) - n) - x, t = power_on_top(n);
  Vec p = fma(Vec(0.009618129109), f, Vec(0.05550541077));
  p = fma(p, f, Vec(0.2402265071));
  p = fma(p, f, Vec(0.6931471804));
  const Vec u = fma(f, p, _mm512_castsi512_ps(looked_up(table, n)));
  return {fma(t, u, t), fnma(t, u, Vec(1.0) - t)};
}
// e^x = 2^n e^f, f = x - n ln 2 without rounding but that of ln 2, 2e-9 n; where exp2(x * log2(e)) would lose
// |x| ulp. e^f = 1 + f * slope with the polynomial of power_slope.
GOL_FN Vec exp(Vec x) {
  const Vec n = fma(x, Vec(kLog2E), Vec(kOnTop));
  const Vec f = fnma(n - Vec(kOnTop), Vec(kLn2), x);
  const Vec p = fma(Vec(0.1666607447), f, Vec(0.5000161952));
  return power(n, f, fma(p, f, Vec(1.000000003)));
}

// log2 of a positive normal number m 2^e, m in [3/4, 3/2): e + r P(r), r = m - 1, P of degree 8, minimax
// relative error 2.7e-8. e is the exponent of 4/3 x also where that product is rounded.
GOL_FN Vec log2(Vec x) {
  const Vec r = Vec(_mm512_getmant_ps(x.v, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src)) - Vec(1.0);
  const Vec e(_mm512_getexp_ps((x * Vec(4.0 / 3)).v));
  Vec p = fma(Vec(0.0780667873815), r, Vec(-0.174230231916));
  p = fma(p, r, Vec(0.216324832013));
  p = fma(p, r, Vec(-0.242723509034));
  p = fma(p, r, Vec(0.28819150693));
  p = fma(p, r, Vec(-0.360575922669));
  p = fma(p, r, Vec(0.480902080476));
  p = fma(p, r, Vec(-0.72134847837));
  p = fma(p, r, Vec(1.44269503244));
  return fma(p, r, e);
}

template <class V> struct Lanes;
template <> struct Lanes<Vec> {
  static constexpr int width = 16;
  using Mask = gol::Mask;

  static GOL_FN Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static GOL_FN Vec load(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static GOL_FN void store(float* p, Vec v) { _mm512_storeu_ps(p, v.v); }
  static GOL_FN void store(float* p, int n, Vec v) { _mm512_mask_storeu_ps(p, first(n), v.v); }

  // To an aligned place, past the caches; end_streams() before other threads may read it.
  static GOL_FN void stream(float* p, Vec v) { _mm512_stream_ps(p, v.v); }
  static GOL_FN void stream(Float16* p, Vec v) { _mm256_stream_si256((__m256i*)p, half(v)); }
  static GOL_FN void stream(BFloat16* p, Vec v) { _mm256_stream_si256((__m256i*)p, narrow(v)); }
  static GOL_FN void end_streams() { _mm_sfence(); }

  static GOL_FN Vec load(const Float16* p) { return _mm512_cvtph_ps(load16(p)); }
  static GOL_FN Vec load(const Float16* p, int n) { return _mm512_cvtph_ps(load16(p, n)); }
  static GOL_FN void store(Float16* p, Vec v) { _mm256_storeu_si256((__m256i*)p, half(v)); }
  static GOL_FN void store(Float16* p, int n, Vec v) { _mm256_mask_storeu_epi16(p, first(n), half(v)); }

  static GOL_FN Vec load(const BFloat16* p) { return widen(load16(p)); }
  static GOL_FN Vec load(const BFloat16* p, int n) { return widen(load16(p, n)); }
  static GOL_FN void store(BFloat16* p, Vec v) { _mm256_storeu_si256((__m256i*)p, narrow(v)); }
  static GOL_FN void store(BFloat16* p, int n, Vec v) { _mm256_mask_storeu_epi16(p, first(n), narrow(v)); }

  static GOL_FN Mask first(int n) { return static_cast<Mask>((1u << n) - 1); }
  static GOL_FN Mask clear_bits(uint64_t bits) { return static_cast<Mask>(~bits); }
  static GOL_FN Mask both(Mask a, Mask b) { return a & b; }
  static GOL_FN double front(Vec x) { return _mm512_cvtss_f32(x.v); }
  static GOL_FN double sum(Vec x) {
    return _mm512_reduce_add_pd(_mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(x.v)),
                                              _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1))));
  }
  static GOL_FN float max(Vec x) { return _mm512_reduce_max_ps(x.v); }

 private:
  static GOL_FN __m256i load16(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static GOL_FN __m256i load16(const void* p, int n) { return _mm256_maskz_loadu_epi16(first(n), p); }
  static GOL_FN __m256i half(Vec v) { return _mm512_cvtps_ph(v.v, _MM_FROUND_TO_NEAREST_INT); }
  static GOL_FN Vec widen(__m256i b) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
  }
  // Round to nearest even on the upper half; NaN would carry over into another number, so it is set.
  static GOL_FN __m256i narrow(Vec v) {
    const __m512i b = _mm512_castps_si512(v.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
    const __m512i r = _mm512_add_epi32(b, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const Mask nan = _mm512_cmp_ps_mask(v.v, v.v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(
        _mm512_mask_blend_epi32(nan, _mm512_srli_epi32(r, 16), _mm512_set1_epi32(0x7fc0)));
  }
};

// Sixteen 32-bit words for the counter generator, each in the lower half of a 64-bit lane, where
// the widening multiplication wants them: words 0..7 and 8..15. The upper halves hold anything.
struct VecU {
  __m512i lower, upper;
  GOL_FN VecU() {}
  GOL_FN VecU(__m512i a, __m512i b) : lower(a), upper(b) {}
  GOL_FN explicit VecU(uint32_t x) : lower(_mm512_set1_epi64(x)), upper(_mm512_set1_epi64(x)) {}
};
GOL_FN VecU xor3(VecU a, VecU b, VecU c) {
  return {_mm512_ternarylogic_epi64(a.lower, b.lower, c.lower, 0x96),
          _mm512_ternarylogic_epi64(a.upper, b.upper, c.upper, 0x96)};
}
GOL_FN VecU mulhilo(uint32_t a, VecU b, VecU* hi) {
  const __m512i a64 = _mm512_set1_epi64(a);
  const __m512i lower = _mm512_mul_epu32(b.lower, a64), upper = _mm512_mul_epu32(b.upper, a64);
  *hi = {_mm512_srli_epi64(lower, 32), _mm512_srli_epi64(upper, 32)};
  return {lower, upper};
}

struct Words {
  static constexpr int width = 16;
  using type = VecU;
  static GOL_FN VecU iota(uint32_t start) {
    const __m512i lane =
        _mm512_add_epi64(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), _mm512_set1_epi64(start));
    return {lane, _mm512_add_epi64(lane, _mm512_set1_epi64(8))};
  }
  // Bits 2l and 2l+1: whether the lower and the upper half of word l are not below the limit.
  static GOL_FN uint32_t halves_from(VecU v, uint16_t limit) {
    const __m512i words = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi64_epi32(v.lower)),
                                             _mm512_cvtepi64_epi32(v.upper), 1);
    return _mm512_cmpge_epu16_mask(words, _mm512_set1_epi16(static_cast<short>(limit)));
  }
  // Bits 2i and 2i+1 of a 16-bit number to 8i and 8i+1.
  static GOL_FN uint64_t spread_pairs(uint64_t x) { return _pdep_u64(x, 0x0303030303030303ull); }
};

// The number type in which a row stored as T is worked on.
template <class T> using RowNumber = Vec;
constexpr bool kHasFloat64 = false;

}  // namespace GOL_ISA
}  // namespace gol
