// Plain C++ for any processor: four floats in a vector of GCC's and Clang's, double in a "vector" of one
// lane.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstring>
#include <type_traits>

#include "../loss_math.h"

namespace gol {
inline namespace GOL_ISA {

using BFloat16 = c10::BFloat16;
using Float16 = c10::Half;

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));  // of a comparison: -1 where it holds, else 0

struct Vec {
  Floats v;
  GOL_FN Vec() {}
  GOL_FN Vec(Floats x) : v(x) {}
  GOL_FN explicit Vec(double x) : v(Floats{} + static_cast<float>(x)) {}
};
struct Mask {
  Ints v;
};

GOL_FN Vec operator+(Vec a, Vec b) { return a.v + b.v; }
GOL_FN Vec operator-(Vec a, Vec b) { return a.v - b.v; }
GOL_FN Vec operator*(Vec a, Vec b) { return a.v * b.v; }
GOL_FN Vec fma(Vec a, Vec b, Vec c) { return a.v * b.v + c.v; }  // one rounding where the processor has that
GOL_FN Vec vmin(Vec a, Vec b) { return b.v < a.v ? b.v : a.v; }  // NaN in a stays
GOL_FN Vec vmax(Vec a, Vec b) { return b.v > a.v ? b.v : a.v; }  // NaN in a stays
GOL_FN Mask less(Vec a, Vec b) { return {a.v < b.v}; }
GOL_FN Mask differs(Vec a, Vec b) { return {(a.v < b.v) | (a.v > b.v)}; }
GOL_FN Vec select(Mask m, Vec a, Vec b) { return m.v ? a.v : b.v; }
GOL_FN Vec reciprocal(Vec x) { return 1.f / x.v; }
GOL_FN Vec quotient(Vec a, Vec b) { return a.v / b.v; }
GOL_FN Vec divide(Vec a, Vec b, Vec) { return a.v / b.v; }

// 2^n e^r, |r| <= ln(2) / 2, relative error of the polynomial 3e-9. On top of 1.5 * 2^23 + 127 the biased
// exponent n + 127 stands in the last bits of the mantissa. Below 2^-126 the result is 0; n must stay below
// 128.
constexpr float kOnTop = 12582912.f + 127.f;
GOL_FN Vec scaled_exp(Floats n_on_top, Floats r) {
  Floats p = r * 1.381461318e-3f + 8.368709824e-3f;
  p = p * r + 4.166838736e-2f;
  p = p * r + 1.666652069e-1f;
  p = p * r + 4.999999345e-1f;
  p = p * (r * r) + r;
  const Floats power = (Floats)((Ints)n_on_top << 23);
  return n_on_top < kOnTop - 126.f ? Floats{} : p * power + power;  // NaN stays
}
GOL_FN Vec exp2(Vec x) {
  const Floats n = x.v + kOnTop;
  return scaled_exp(n, (x.v - (n - kOnTop)) * static_cast<float>(kLn2));
}
// ln(2) in two pieces: the first has 9 bits, so that its product with n is exact.
GOL_FN Vec exp(Vec x) {
  const Floats n = x.v * static_cast<float>(kLog2E) + kOnTop;
  const Floats whole = n - kOnTop;
  return scaled_exp(n, (x.v - whole * 0.693359375f) - whole * static_cast<float>(kLn2 - 0.693359375));
}

// log2 of a positive normal number: exponent + 2/ln2 * atanh((m - 1) / (m + 1)), m in [3/4, 3/2).
GOL_FN Vec log2(Vec x) {
  const Ints bits = (Ints)x.v;
  // The bits of 3/4 are taken off, so that the exponent counts from mantissas in [3/4, 3/2).
  const Ints e = (bits - 0x3f400000) >> 23;
  const Floats m = (Floats)(bits - (e << 23));
  const Floats s = (m - 1.f) / (m + 1.f);
  const Floats s2 = s * s;
  Floats p = s2 * static_cast<float>(2.0 / 9 * kLog2E) + static_cast<float>(2.0 / 7 * kLog2E);
  p = p * s2 + static_cast<float>(2.0 / 5 * kLog2E);
  p = p * s2 + static_cast<float>(2.0 / 3 * kLog2E);
  p = p * s2 + static_cast<float>(2.0 * kLog2E);
  return x.v == x.v ? p * s + __builtin_convertvector(e, Floats) : x.v;
}

// double, and any number that is a vector of one lane.
template <class V> struct Lanes {
  static constexpr int width = 1;
  using Mask = bool;
  template <class T> static V load(const T* p) { return static_cast<V>(*p); }
  template <class T> static V load(const T* p, int) { return static_cast<V>(*p); }
  template <class T> static void store(T* p, V v) { *p = static_cast<T>(v); }
  template <class T> static void store(T* p, int, V v) { *p = static_cast<T>(v); }
  template <class T> static void stream(T* p, V v) { store(p, v); }
  static void end_streams() {}
  static Mask first(int n) { return n > 0; }
  static Mask clear_bits(uint64_t bits) { return (bits & 1) == 0; }
  static Mask both(Mask a, Mask b) { return a && b; }
  static double front(V v) { return v; }
  static double sum(V v) { return v; }
  static V max(V v) { return v; }
};

template <> struct Lanes<Vec> {
  static constexpr int width = 4;
  using Mask = gol::Mask;
  template <class T> static GOL_FN Vec load(const T* p) { return load(p, width); }
  template <class T> static GOL_FN Vec load(const T* p, int n) {
    Floats v{};
    for (int i = 0; i < n; ++i) v[i] = static_cast<float>(p[i]);
    return v;
  }
  static GOL_FN Vec load(const float* p) {
    Floats v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  template <class T> static GOL_FN void store(T* p, Vec x) { store(p, width, x); }
  template <class T> static GOL_FN void store(T* p, int n, Vec x) {
    for (int i = 0; i < n; ++i) p[i] = static_cast<T>(x.v[i]);
  }
  static GOL_FN void store(float* p, Vec x) { std::memcpy(p, &x.v, sizeof(x.v)); }
  template <class T> static GOL_FN void stream(T* p, Vec x) { store(p, x); }
  static GOL_FN void end_streams() {}
  static GOL_FN Mask first(int n) { return {Ints{0, 1, 2, 3} < n}; }
  static GOL_FN Mask clear_bits(uint64_t bits) {
    return {(Ints{1, 2, 4, 8} & static_cast<int32_t>(bits)) == 0};
  }
  static GOL_FN Mask both(Mask a, Mask b) { return {a.v & b.v}; }
  static GOL_FN double front(Vec x) { return x.v[0]; }
  static GOL_FN double sum(Vec x) {
    return (static_cast<double>(x.v[0]) + x.v[1]) + (static_cast<double>(x.v[2]) + x.v[3]);
  }
  static GOL_FN float max(Vec x) {
    const float a = x.v[0] > x.v[1] ? x.v[0] : x.v[1], b = x.v[2] > x.v[3] ? x.v[2] : x.v[3];
    return a > b ? a : b;
  }
};

struct Words {  // a "vector" of one 32-bit word, for the counter generator
  static constexpr int width = 1;
  using type = uint32_t;
  static uint32_t iota(uint32_t start) { return start; }
  // Bits 0 and 1: whether the lower and the upper half are not below the limit.
  static uint32_t halves_from(uint32_t v, uint16_t limit) {
    return ((v & 0xffff) >= limit) | ((v >> 16) >= limit) << 1;
  }
  // Bits 2i and 2i+1 of a 16-bit number to 8i and 8i+1.
  static GOL_FN uint64_t spread_pairs(uint64_t x) {
    x = (x | (x << 24)) & 0x000000ff000000ffull;
    x = (x | (x << 12)) & 0x000f000f000f000full;
    return (x | (x << 6)) & 0x0303030303030303ull;
  }
};

// The number type in which a row stored as T is worked on.
template <class T> using RowNumber = std::conditional_t<std::is_same_v<T, double>, double, Vec>;
constexpr bool kHasFloat64 = true;

}  // namespace GOL_ISA
}  // namespace gol
