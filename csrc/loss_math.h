// The scalar mathematics of every link and reweighting, once for all kernels.
//
// Everything is templated on a number type V: float or double (plain C++, and a CUDA thread), or a
// SIMD vector of floats. A number type is constructed from a double and supplies + - *, fma, vmin,
// vmax, exp2, exp, log2, reciprocal, quotient, divide, less, differs (ordered "not equal", false for NaN) and
// select; this header supplies those for float and double. Work is done in base 2, where an exponential is
// one exp2 and a logarithm one log2.
#pragma once

#include <cmath>
#include <cstdint>

#include "types.h"

#if defined(__CUDACC__)
#define GOL_FN __host__ __device__ __forceinline__
#else
#define GOL_FN __attribute__((always_inline)) inline
#endif
#define GOL_INLINE __attribute__((always_inline))  // of a lambda, after its parameters

// Each CPU translation unit compiles this header for another instruction set. Its own namespace
// keeps the linker from merging inline functions across instruction sets.
#ifndef GOL_ISA
#define GOL_ISA generic
#endif

namespace gol {
inline namespace GOL_ISA {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
constexpr double kLog2Log2E = 0.5287663729448977;
constexpr double kSqrtHalf = 0.7071067811865476;
constexpr double kNormalDensity0 = 0.3989422804014327;  // 1 / sqrt(2 pi)
// The floor that ATen's binary_cross_entropy backward puts under p(1-p): 1e-12 rounded to fp32.
constexpr double kBceFloor = 9.999999960041972e-13;

// --- float and double as number types -------------------------------------------------------
#define GOL_SCALAR_NUMBER(T)                               \
  GOL_FN bool less(T a, T b) { return a < b; }             \
  GOL_FN bool differs(T a, T b) { return a < b || a > b; } \
  GOL_FN T select(bool m, T a, T b) { return m ? a : b; }
#define GOL_STANDARD_NUMBER(T)                                           \
  GOL_FN T vmin(T a, T b) { return b < a ? b : a; } /* NaN in a stays */ \
  GOL_FN T vmax(T a, T b) { return b > a ? b : a; } /* NaN in a stays */ \
  GOL_FN T exp2(T x) { return std::exp2(x); }                            \
  GOL_FN T exp(T x) { return std::exp(x); }                              \
  GOL_FN T log2(T x) { return std::log2(x); }                            \
  GOL_FN T reciprocal(T x) { return T(1) / x; }                          \
  GOL_FN T quotient(T a, T b) { return a / b; }                          \
  GOL_FN T divide(T a, T b, T) { return a / b; }
GOL_SCALAR_NUMBER(float)
GOL_SCALAR_NUMBER(double)
GOL_STANDARD_NUMBER(double)
GOL_FN double fma(double a, double b, double c) { return a * b + c; }
#if defined(__CUDA_ARCH__) || defined(GOL_EMULATED_GPU)
// float on a GPU: one special-function instruction each, relative error 2^-22 (log2 of a number in (1/2, 2):
// absolute error 2^-22), where CUDA's own functions of these names take a dozen. Subnormal numbers are 0.
#if defined(__CUDA_ARCH__)
GOL_FN float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
#define GOL_DEVICE_FUNCTION(name, instruction)                     \
  GOL_FN float name(float x) {                                     \
    float y;                                                       \
    asm(instruction ".approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); \
    return y;                                                      \
  }
GOL_DEVICE_FUNCTION(exp2, "ex2")
GOL_DEVICE_FUNCTION(log2, "lg2")
GOL_DEVICE_FUNCTION(reciprocal, "rcp")
#undef GOL_DEVICE_FUNCTION
// NaN in either stays.
GOL_FN float vmin(float a, float b) {
  float c;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}
GOL_FN float vmax(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}
#else  // where the kernels run without a GPU, somebody else has to supply its instructions
GOL_FN float fma(float a, float b, float c) { return ::emulation::fma(a, b, c); }
GOL_FN float exp2(float x) { return ::emulation::ex2(x); }
GOL_FN float log2(float x) { return ::emulation::lg2(x); }
GOL_FN float reciprocal(float x) { return ::emulation::rcp(x); }
GOL_FN float vmin(float a, float b) { return ::emulation::min_nan(a, b); }
GOL_FN float vmax(float a, float b) { return ::emulation::max_nan(a, b); }
#endif
// 2^(high + low), x log2(e) in two pieces: rounded to one, its error would grow with |x|. exp(-104) is 0
// already, and -inf would make low NaN; so would inf.
GOL_FN float exp(float x) {
  x = vmax(x, -104.f);
  constexpr float kHigh = static_cast<float>(kLog2E), kLow = static_cast<float>(kLog2E - kHigh);
  const float high = x * kHigh;
  const float low = fma(x, kLow, fma(x, kHigh, -high));
  return exp2(high) * fma(low, static_cast<float>(kLn2), 1.f);  // of an infinite power no difference of two
}
GOL_FN float quotient(float a, float b) { return a * reciprocal(b); }
// a / (b + low), |low| below an ulp of b: the quotient corrected by its remainder.
GOL_FN float divide(float a, float b, float low) {
  const float r = reciprocal(b), q = a * r;
  return fma(fma(-q, low, fma(-q, b, a)), r, q);
}
#else
GOL_STANDARD_NUMBER(float)
// One rounding, as every SIMD set and GPU has it; the product of two floats is exact in double.
GOL_FN float fma(float a, float b, float c) { return static_cast<float>(static_cast<double>(a) * b + c); }
#endif
#undef GOL_SCALAR_NUMBER
#undef GOL_STANDARD_NUMBER

// Most instructions of a GPU negate an operand at no cost, but none takes it from 0.
template <class V> GOL_FN V minus(V x) { return V(0.0) - x; }
GOL_FN float minus(float x) { return -x; }
GOL_FN double minus(double x) { return -x; }

// (1 - 2^-x) / x for 0 <= x < 1/2: minimax polynomial, relative error 1.3e-8. The direct
// difference would lose digits there, all of them towards x = 0.
template <class V> GOL_FN V one_minus_exp2_over(V x) {
  V p = fma(V(1.154452266e-3), x, V(-9.541281076e-3));
  p = fma(p, x, V(5.549040644e-2));
  p = fma(p, x, V(-2.402256428e-1));
  return fma(p, x, V(6.931471717e-1));
}
GOL_FN double one_minus_exp2_over(double x) { return x > 0 ? -std::expm1(-x * kLn2) / x : kLn2; }

// log2(e) 2^(rate x), for -126 <= rate x <= 126.
template <class V> GOL_FN V exp2_times_log2e(V x, V rate) { return exp2(fma(x, rate, V(kLog2Log2E))); }

// 2^-x and, to as many digits, 1 - 2^-x, for 0 <= x <= 126.
template <class V> struct Complements {
  V power, rest;
};
template <class V> GOL_FN Complements<V> complements(V x) {
  const V power = exp2(minus(x));
  return {power, select(less(x, V(0.5)), one_minus_exp2_over(x) * x, V(1.0) - power)};
}

// --- what a link has to say about one logit ---------------------------------------------------
// A negative (t = 0). Its logarithm can wait: the factors of many elements are multiplied first
// and one log2 is taken of the product.
//   loss = ln 2 * (linear - log2(factor)),  factor in (0, 1]
//   d loss / d z = unit * slope,            unit a constant of the link, to be merged with the row's factor
template <class V> struct NegativeTerm {
  V linear, factor, slope;
};
// A positive (t = 1): its loss and d loss / d z.
template <class V> struct PositiveTerm {
  V loss, slope;
};
// A link has, beside unit: kMaxProduct, the number of factors whose product is sure to stay normal; kLinear,
// whether any term has a linear part; negative(z); positive(z); probability(z); and log2_probability(z), at
// most 0.

// z held inside the clip, and the slope to report for it.
template <class V> struct Clip {
  V min, max, edge;
  GOL_FN explicit Clip(const LinkOptions& o) : min(o.clip_min), max(o.clip_max), edge(o.edge) {}
  GOL_FN V operator()(V z) const { return vmax(vmin(z, max), min); }
  GOL_FN V slope(V z, V zc, V inside) const { return select(differs(z, zc), inside * edge, inside); }
};

// Gumbel link: p = exp(-exp(-z/T))  (Gumbel Optimized Loss, ECCV 2022, section 3).
// With e = exp(-z/T):
//   positive:  loss = e                       slope = -e / T
//   negative:  loss = -log(1 - exp(-e))       slope = (1/T) e / (exp(e) - 1)
// kReleased: what autograd makes of p followed by binary_cross_entropy, the released code of GOL: min(1,
// p(1-p)/1e-12) times the exact slope. Positives die below z = -3.32.
template <class V, bool kReleased> struct GumbelLink {
  static constexpr int kMaxProduct = 64;  // factors are at least 0.29: 0.29^64 = 4e-35
  static constexpr bool kLinear = true;
  Clip<V> clip;
  V rate;
  double unit;  // ln(2) / T

  GOL_FN explicit GumbelLink(const LinkOptions& o)
      : clip(o), rate(-kLog2E / o.temperature), unit(kLn2 / o.temperature) {}

  // The slope of a negative, less the clip, is numerator / factor: one reciprocal may serve many.
  struct Parts {
    V zc, linear, factor, numerator;
  };
  GOL_FN Parts parts(V z) const { return parts_inside(clip(z)); }
  // kWhole: factor is all of 1 - p, and linear 0. The product of 8 is normal, at least 2^-126, for clip_max /
  // T up to 126 ln(2) / 8 = 10.917.
  template <bool kWhole = false> GOL_FN Parts parts_inside(V zc) const {
    const V log2_e2 = fma(zc, rate, V(kLog2Log2E));
    const V e2 = exp2(log2_e2);   // e in base 2: e * log2(e)
    const V p = exp2(minus(e2));  // exp(-e)
    const auto small = less(e2, V(0.5));
    const V q = V(1.0) - p;
    const V series = one_minus_exp2_over(e2);
    const V whole = select(small, series * e2, q);
    if (kWhole) return {zc, V(0.0), whole, released(p * e2, p, whole)};
    // 1 - p = e2 * series for a small e, which then cancels in slope = p * e2 / (1 - p).
    return {zc, select(small, minus(log2_e2), V(0.0)), select(small, series, q),
            released(p * select(small, V(1.0), e2), p, whole)};
  }

  GOL_FN NegativeTerm<V> negative(V z) const {
    const Parts t = parts(z);
    return {t.linear, t.factor, clip.slope(z, t.zc, quotient(t.numerator, t.factor))};
  }

  GOL_FN PositiveTerm<V> positive(V z) const {
    const V zc = clip(z);
    const V minus_inverse_t = V(-unit * kLog2E);
    // Not from exp2(log2(e)): rounded, it would be off by as many ulps as e has bits. Where e overflows, 1000
    // is as good as infinity, from which exp might make NaN.
    const V e = exp(vmin(zc * minus_inverse_t, V(1000.0)));
    V slope = e * minus_inverse_t;
    if (kReleased) {
      const V e2 = e * V(kLog2E), p = exp2(minus(e2));
      slope = released(slope, p, select(less(e2, V(0.5)), one_minus_exp2_over(e2) * e2, V(1.0) - p));
    }
    return {e, clip.slope(z, zc, slope)};
  }

  GOL_FN V log2_probability(V z) const { return minus(exp2(fma(clip(z), rate, V(kLog2Log2E)))); }
  GOL_FN V probability(V z) const { return exp2(log2_probability(z)); }

 private:
  // q = 1 - p.
  static GOL_FN V released(V slope, V p, V q) {
    return kReleased ? slope * vmin(p * q * V(1.0 / kBceFloor), V(1.0)) : slope;
  }
};

// The Gumbel link inside a clip so tight that neither e nor p leaves the normal numbers, as in the paper's -4
// to 10: its powers need no care, and the factor may be all of 1 - p.
template <class V> struct ClippedGumbelLink : GumbelLink<V, false> {
  static constexpr int kMaxProduct = 8;  // factors are at least exp(-10.9), their product exp(-87.2) > 2^-126
  static constexpr bool kLinear = false;
  using GumbelLink<V, false>::clip;
  using GumbelLink<V, false>::rate;

  GOL_FN explicit ClippedGumbelLink(const LinkOptions& o) : GumbelLink<V, false>(o) {}
  static bool holds(const LinkOptions& o) {
    return o.clip_max / o.temperature <= 10.9 && std::exp(-o.clip_min / o.temperature) * kLog2E <= 126;
  }
  // The slope multiplied by scale.
  GOL_FN NegativeTerm<V> negative(V z, V scale) const {
    const V zc = clip(z), e2 = exp2_times_log2e(zc, rate);
    const Complements<V> p = complements(e2);
    const V inside = quotient(p.power * e2, p.rest);
    return {V(0.0), p.rest, inside * select(differs(z, zc), scale * clip.edge, scale)};
  }
  GOL_FN NegativeTerm<V> negative(V z) const { return negative(z, V(1.0)); }
  GOL_FN V log2_probability(V z) const { return minus(exp2_times_log2e(clip(z), rate)); }
  GOL_FN V probability(V z) const { return complements(exp2_times_log2e(clip(z), rate)).power; }
};
// The slope multiplied by scale, for any link.
template <class Link, class V> GOL_FN NegativeTerm<V> scaled_negative(const Link& link, V z, V scale) {
  const NegativeTerm<V> t = link.negative(z);
  return {t.linear, t.factor, scale * t.slope};
}
template <class V> GOL_FN NegativeTerm<V> scaled_negative(const ClippedGumbelLink<V>& link, V z, V scale) {
  return link.negative(z, scale);
}

// Sigmoid link: p = 1 / (1 + exp(-z)).  positive(z) = softplus(-z), negative(z) = softplus(z).
template <class V> struct SigmoidLink {
  static constexpr int kMaxProduct = 64;  // factors are at least 1/2
  static constexpr bool kLinear = true;
  double unit = 1.0;

  GOL_FN explicit SigmoidLink(const LinkOptions&) {}

  GOL_FN NegativeTerm<V> negative(V z) const {
    const V magnitude = vmax(z, minus(z));
    const V w = exp(minus(magnitude));  // never overflows
    const V s = V(1.0) + w;
    const auto is_negative = less(z, V(0.0));
    // p = w/(1+w) or 1/(1+w), with what the sum 1 + w rounded away.
    const V p = divide(select(is_negative, w, V(1.0)), s, w - (s - V(1.0)));
    return {select(is_negative, V(0.0), z * V(kLog2E)), reciprocal(s), p};
  }

  GOL_FN PositiveTerm<V> positive(V z) const {
    const NegativeTerm<V> mirrored = negative(minus(z));
    return {V(kLn2) * (mirrored.linear - log2(mirrored.factor)), minus(mirrored.slope)};
  }

  // In the operations of negative(z): where both are inlined they are made once.
  GOL_FN V log2_probability(V z) const {
    const V s = V(1.0) + exp(minus(vmax(z, minus(z))));
    return select(less(z, V(0.0)), z * V(kLog2E), V(0.0)) + log2(reciprocal(s));
  }
  GOL_FN V probability(V z) const { return negative(z).slope; }
};

// erfcx(a / sqrt 2) / 2 for a >= 0, with which the smaller of Phi(a), Phi(-a) is exp(-a^2/2) times this:
// t Q(t), t = 1/(1 + a/4), Q of degree 9, minimax relative error 3.4e-8.
template <class V> GOL_FN V scaled_normal_tail(V a) {
  const V t = reciprocal(fma(a, V(0.25), V(1.0)));
  V q = fma(V(0.0197820116914), t, V(-0.0808773179738));
  q = fma(q, t, V(0.0955970902208));
  q = fma(q, t, V(-0.0317175221847));
  q = fma(q, t, V(0.0636991069001));
  q = fma(q, t, V(0.0589751527492));
  q = fma(q, t, V(0.0816031078805));
  q = fma(q, t, V(0.0934663554622));
  q = fma(q, t, V(0.0997364316014));
  q = fma(q, t, V(0.0997355667234));
  return q * t;
}
GOL_FN double scaled_normal_tail(double a) {
  if (a < 8) return std::exp(a * a / 2) * std::erfc(a * kSqrtHalf) / 2;
  // Continued fraction (Laplace) 1/(a + 1/(a + 2/(a + ...))), from the inside out.
  double tail = a;
  for (int k = 60; k > 0; --k) tail = a + k / tail;
  return kNormalDensity0 / tail;
}

// Probit link: p = Phi(z), the normal distribution function.
//   positive:  loss = -log Phi(z)     slope = -phi(z) / Phi(z)
//   negative:  loss = -log Phi(-z)    slope = phi(z) / Phi(-z)
// With r = scaled_normal_tail(|z|) and g = exp(-z^2/2), the smaller of Phi(z), Phi(-z) is g r.
template <class V> struct ProbitLink {
  static constexpr int kMaxProduct = 8;  // factors are at least 4e-5, at |z| = 1e4
  static constexpr bool kLinear = true;
  Clip<V> clip;
  double unit = 1.0;

  GOL_FN explicit ProbitLink(const LinkOptions& o) : clip(o) {}

  GOL_FN NegativeTerm<V> negative(V z) const {
    const V zc = clip(z);
    NegativeTerm<V> t = minus_log_cdf(zc, less(V(0.0), zc));
    t.slope = clip.slope(z, zc, t.slope);
    return t;
  }

  GOL_FN PositiveTerm<V> positive(V z) const {
    const V zc = clip(z);
    const NegativeTerm<V> t = minus_log_cdf(zc, less(zc, V(0.0)));
    return {V(kLn2) * (t.linear - log2(t.factor)), clip.slope(z, zc, minus(t.slope))};
  }

  // In the operations of negative(z): where both are inlined most are made once.
  GOL_FN V log2_probability(V z) const {
    const V zc = clip(z);
    const NegativeTerm<V> t = minus_log_cdf(zc, less(zc, V(0.0)));
    return log2(t.factor) - t.linear;
  }

  GOL_FN V probability(V z) const {
    const V zc = clip(z);
    const V tail = exp(minus(zc * zc * V(0.5))) * scaled_normal_tail(vmax(zc, minus(zc)));
    return select(less(zc, V(0.0)), tail, V(1.0) - tail);
  }

  // -log Phi(x) and the magnitude of its slope for x = |zc| or x = -|zc|, the latter where is_tail.
  template <class Mask> static GOL_FN NegativeTerm<V> minus_log_cdf(V zc, Mask is_tail) {
    const V half_square = zc * zc * V(0.5);
    const V r = scaled_normal_tail(vmax(zc, minus(zc)));
    const V g = exp(minus(half_square));
    const V factor = select(is_tail, r, V(1.0) - g * r);
    return {select(is_tail, half_square * V(kLog2E), V(0.0)), factor,
            quotient(V(kNormalDensity0) * select(is_tail, V(1.0), g), factor)};
  }
};

// --- Seesaw reweighting (Seesaw Loss, CVPR 2021, eq. 4-8) ----------------------------------------
// In a row of class y the exponential of class j != y of a softmax, or the negative of class j of a
// Bernoulli loss, is multiplied by M_j C_j, both constants:
//   M_j = min(1, (n_j / n_y)^p)                          mitigation, from counts
//   C_j = max(1, s_j / max(s_y, eps))^q                  compensation, from scores s
// power_j = n_j^p up to a common factor. compensation(x) takes log2 s_j up to a constant of the row, and
// threshold is log2 max(s_y, eps) with the same constant: in a softmax x_j = log2(exp(z_j - max z)) and
// threshold = max(x_y, log2(sum_j 2^x_j) + log2(eps)); in a Bernoulli loss x_j = log2 p_j.
template <class V> struct SeesawRow {
  V inverse_power_y, q, threshold;

  template <class N>
  GOL_FN SeesawRow(N power_y, N q_, N threshold_)
      : inverse_power_y(reciprocal(power_y)), q(q_), threshold(threshold_) {}

  GOL_FN V mitigation(V power) const { return vmin(power * inverse_power_y, V(1.0)); }
  GOL_FN V compensation(V x) const { return exp2(q * vmax(x - threshold, V(0.0))); }
};

// --- Philox4x32-10 (Salmon et al., SC 2011), the counter generator of DropLoss -------------------
// A draw of 16 bits belongs to (seed, offset, row, column) alone, so every backend, forward and
// backward, draws the same number: counter = (column / 8, row, offset_lo, offset_hi), key = seed; column
// 8g + 2w + h is half h (0 the lower) of word w.
// U is uint32_t or a SIMD vector of them with xor3(a, b, c) and mulhilo(constant, b, &hi) -> lo.
GOL_FN uint32_t mulhilo(uint32_t a, uint32_t b, uint32_t* hi) {
#if defined(__CUDA_ARCH__)
  uint64_t product;  // of the C++ expression nvcc makes an addition more
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
#else
  const uint64_t product = static_cast<uint64_t>(a) * b;
#endif
  *hi = static_cast<uint32_t>(product >> 32);
  return static_cast<uint32_t>(product);
}

GOL_FN uint32_t xor3(uint32_t a, uint32_t b, uint32_t c) { return a ^ b ^ c; }

template <class U> struct Philox4 {
  U word[4];
};

template <class U> GOL_FN Philox4<U> philox4x32_10(U c0, uint32_t c1, uint64_t c23, uint64_t key) {
  U x0 = c0, x1 = U(c1), x2 = U(static_cast<uint32_t>(c23)), x3 = U(static_cast<uint32_t>(c23 >> 32));
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    U hi0, hi1;
    const U lo0 = mulhilo(0xD2511F53u, x0, &hi0);
    const U lo1 = mulhilo(0xCD9E8D57u, x2, &hi1);
    x0 = xor3(hi1, x1, U(k0));
    x1 = lo1;
    x2 = xor3(hi0, x3, U(k1));
    x3 = lo0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{x0, x1, x2, x3}};
}

}  // namespace GOL_ISA
}  // namespace gol
