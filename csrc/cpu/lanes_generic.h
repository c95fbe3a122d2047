// float and double as SIMD vectors of one lane: the kernels in plain C++.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <type_traits>

#include "../loss_math.h"

namespace gol {
inline namespace GOL_ISA {

using BFloat16 = c10::BFloat16;
using Float16 = c10::Half;

template <class V> struct Lanes {
  static constexpr int width = 1;
  using Mask = bool;
  template <class T> static V load(const T* p) { return static_cast<V>(*p); }
  template <class T> static V load(const T* p, int) { return static_cast<V>(*p); }
  template <class T> static void store(T* p, V v) { *p = static_cast<T>(v); }
  template <class T> static void store(T* p, int, V v) { *p = static_cast<T>(v); }
  static Mask first(int n) { return n > 0; }
  static Mask clear_bits(uint64_t bits) { return (bits & 1) == 0; }
  static bool any(Mask m) { return m; }
  static Mask both(Mask a, Mask b) { return a && b; }
  static double sum(V v) { return v; }
  static V max(V v) { return v; }
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
template <class T> using RowNumber = std::conditional_t<std::is_same_v<T, double>, double, float>;
constexpr bool kHasFloat64 = true;

}  // namespace GOL_ISA
}  // namespace gol
