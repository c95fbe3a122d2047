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

#if defined(__CUDACC__)
#define GOL_FN __host__ __device__ __forceinline__
#else
#define GOL_FN __attribute__((always_inline)) inline
#endif

// Each CPU translation unit compiles this header for another instruction set. Its own namespace
// keeps the linker from merging inline functions across instruction sets.
#ifndef GOL_ISA
#define GOL_ISA generic
#endif

namespace gol {

struct LinkOptions {
  double temperature;
  double clip_min, clip_max;
};

// The slope to report for a logit outside [clip_min, clip_max], and how the slope is formed.
enum class GumbelSlope {
  kZeroOutside,      // exact inside, 0 outside, as torch.clamp sends it back
  kStraightThrough,  // exact inside, the slope at the clip's edge outside
  // What autograd makes of p followed by binary_cross_entropy, the released code of GOL: 0
  // outside, and min(1, p(1-p)/1e-12) times the exact slope inside. Positives die below z = -3.32.
  kReleased,
};

inline namespace GOL_ISA {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
constexpr double kLog2Log2E = 0.5287663729448977;
// The floor that ATen's binary_cross_entropy backward puts under p(1-p): 1e-12 rounded to fp32.
constexpr double kBceFloor = 9.999999960041972e-13;

// --- float and double as number types -------------------------------------------------------
// One rounding, as every SIMD set and GPU has it; the product of two floats is exact in double.
GOL_FN float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return static_cast<float>(static_cast<double>(a) * b + c);
#endif
}
GOL_FN double fma(double a, double b, double c) { return a * b + c; }
#define GOL_SCALAR_NUMBER(T)                                             \
  GOL_FN T vmin(T a, T b) { return b < a ? b : a; } /* NaN in a stays */ \
  GOL_FN T vmax(T a, T b) { return b > a ? b : a; } /* NaN in a stays */ \
  GOL_FN T exp2(T x) { return std::exp2(x); }                            \
  GOL_FN T exp(T x) { return std::exp(x); }                              \
  GOL_FN T log2(T x) { return std::log2(x); }                            \
  GOL_FN T reciprocal(T x) { return T(1) / x; }                          \
  GOL_FN T quotient(T a, T b) { return a / b; }                          \
  GOL_FN T divide(T a, T b, T) { return a / b; }                         \
  GOL_FN bool less(T a, T b) { return a < b; }                           \
  GOL_FN bool differs(T a, T b) { return a < b || a > b; }               \
  GOL_FN T select(bool m, T a, T b) { return m ? a : b; }
GOL_SCALAR_NUMBER(float)
GOL_SCALAR_NUMBER(double)
#undef GOL_SCALAR_NUMBER

// (1 - 2^-x) / x for 0 <= x < 1/2: minimax polynomial, relative error 1.3e-8. The direct
// difference would lose digits there, all of them towards x = 0.
template <class V> GOL_FN V one_minus_exp2_over(V x) {
  V p = fma(V(1.154452266e-3), x, V(-9.541281076e-3));
  p = fma(p, x, V(5.549040644e-2));
  p = fma(p, x, V(-2.402256428e-1));
  return fma(p, x, V(6.931471717e-1));
}
GOL_FN double one_minus_exp2_over(double x) { return x > 0 ? -std::expm1(-x * kLn2) / x : kLn2; }

// --- what a link has to say about one logit ---------------------------------------------------
// A negative (t = 0). Its logarithm can wait: the factors of many elements are multiplied first
// and one log2 is taken of the product.
//   loss = ln 2 * (linear - log2(factor)),  factor in [kMinFactor, 1]
//   d loss / d z = unit * slope,            unit a constant of the link, to be merged with the row's factor
template <class V> struct NegativeTerm {
  V linear, factor, slope;
};
constexpr double kMinFactor = 0.29;
// A positive (t = 1): its loss and d loss / d z.
template <class V> struct PositiveTerm {
  V loss, slope;
};

// Gumbel link: p = exp(-exp(-z/T))  (Gumbel Optimized Loss, ECCV 2022, section 3).
// With e = exp(-z/T):
//   positive:  loss = e                       slope = -e / T
//   negative:  loss = -log(1 - exp(-e))       slope = (1/T) e / (exp(e) - 1)
template <class V, GumbelSlope kSlope> struct GumbelLink {
  V clip_min, clip_max, rate;
  double unit;  // ln(2) / T

  GOL_FN explicit GumbelLink(const LinkOptions& o)
      : clip_min(o.clip_min), clip_max(o.clip_max), rate(-kLog2E / o.temperature),
        unit(kLn2 / o.temperature) {}

  GOL_FN NegativeTerm<V> negative(V z) const {
    const V zc = vmax(vmin(z, clip_max), clip_min);
    const V log2_e2 = fma(zc, rate, V(kLog2Log2E));
    const V e2 = exp2(log2_e2);     // e in base 2: e * log2(e)
    const V p = exp2(V(0.0) - e2);  // exp(-e)
    const auto small = less(e2, V(0.5));
    const V q = V(1.0) - p;
    // 1 - p = e2 * series for a small e, which then cancels in slope = p * e2 / (1 - p).
    const V factor = select(small, one_minus_exp2_over(e2), q);
    const V linear = select(small, V(0.0) - log2_e2, V(0.0));
    V slope = quotient(p * select(small, V(1.0), e2), factor);
    if (kSlope == GumbelSlope::kReleased) slope = slope * released(p, select(small, factor * e2, q));
    return {linear, factor, outside(z, zc, slope)};
  }

  GOL_FN PositiveTerm<V> positive(V z) const {
    const V zc = vmax(vmin(z, clip_max), clip_min);
    const V e2 = exp2(fma(zc, rate, V(kLog2Log2E)));
    V slope = V(-unit) * e2;
    if (kSlope == GumbelSlope::kReleased) {
      const V p = exp2(V(0.0) - e2);
      const auto small = less(e2, V(0.5));
      slope = slope * released(p, select(small, one_minus_exp2_over(e2) * e2, V(1.0) - p));
    }
    return {e2 * V(kLn2), outside(z, zc, slope)};
  }

 private:
  static GOL_FN V released(V p, V q) { return vmin(p * q * V(1.0 / kBceFloor), V(1.0)); }
  static GOL_FN V outside(V z, V zc, V slope) {
    return kSlope == GumbelSlope::kStraightThrough ? slope : select(differs(z, zc), V(0.0), slope);
  }
};

// Sigmoid link: p = 1 / (1 + exp(-z)).  positive(z) = softplus(-z), negative(z) = softplus(z).
template <class V> struct SigmoidLink {
  double unit = 1.0;

  GOL_FN explicit SigmoidLink(const LinkOptions&) {}

  GOL_FN NegativeTerm<V> negative(V z) const {
    const V magnitude = vmax(z, V(0.0) - z);
    const V w = exp(V(0.0) - magnitude);  // never overflows
    const V s = V(1.0) + w;
    const auto is_negative = less(z, V(0.0));
    // p = w/(1+w) or 1/(1+w), with what the sum 1 + w rounded away.
    const V p = divide(select(is_negative, w, V(1.0)), s, w - (s - V(1.0)));
    return {select(is_negative, V(0.0), z * V(kLog2E)), reciprocal(s), p};
  }

  GOL_FN PositiveTerm<V> positive(V z) const {
    const NegativeTerm<V> mirrored = negative(V(0.0) - z);
    return {V(kLn2) * (mirrored.linear - log2(mirrored.factor)), V(0.0) - mirrored.slope};
  }
};

// --- Seesaw reweighting of a softmax (Seesaw Loss, CVPR 2021, eq. 4-8) --------------------------
// In a row of class y the exponential of class j != y is multiplied by M_j C_j, both constants:
//   M_j = min(1, (n_j / n_y)^p)                          mitigation, from counts
//   C_j = max(1, s_j / max(s_y, eps))^q                  compensation, from scores s = softmax(z)
// Here with x_j = log2(exp(z_j - max z)) <= 0, power_j = n_j^p up to a common factor, and threshold =
// max(x_y, log2(sum_j 2^x_j) + log2(eps)), the score limit in units of x.
template <class V> struct SeesawRow {
  V inverse_power_y, q, threshold;

  GOL_FN SeesawRow(double power_y, double q_, double threshold_)
      : inverse_power_y(1.0 / power_y), q(q_), threshold(threshold_) {}

  GOL_FN V mitigation(V power) const { return vmin(power * inverse_power_y, V(1.0)); }
  GOL_FN V compensation(V x) const { return exp2(q * vmax(x - threshold, V(0.0))); }
};

// --- Philox4x32-10 (Salmon et al., SC 2011), the counter generator of DropLoss -------------------
// A draw of 16 bits belongs to (seed, offset, row, column) alone, so every backend, forward and
// backward, draws the same number: counter = (column / 8, row, offset_lo, offset_hi), key = seed; column
// 8g + 2w + h is half h (0 the lower) of word w.
// U is uint32_t or a SIMD vector of them with xor3(a, b, c) and mulhilo(constant, b, &hi) -> lo.
GOL_FN uint32_t mulhilo(uint32_t a, uint32_t b, uint32_t* hi) {
  const uint64_t product = static_cast<uint64_t>(a) * b;
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
