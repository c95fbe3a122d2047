// Loops over a stretch of a row in vectors, whatever its length and alignment.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels.h"

namespace gol {
inline namespace GOL_ISA {

// Calls body(column, lanes in use) over [0, count): first `head` < W columns, then whole vectors, then the
// rest. A whole vector has its number of lanes as a type, so that the body is compiled without masks.
template <class V, class Body> GOL_FN void for_vectors(int64_t head, int64_t count, const Body& body) {
  constexpr int W = Lanes<V>::width;
  int64_t j = head < count ? head : count;
  if (j > 0) body(int64_t{0}, static_cast<int>(j));
  for (; j + W <= count; j += W) body(j, std::integral_constant<int, W>());
  if (j < count) body(j, static_cast<int>(count - j));
}
// Columns before the first one at which a vector does not cross a cache line (of AVX-512; a half of AVX2).
template <class V, class T> GOL_FN int64_t to_alignment(const T* p) {
  constexpr int W = Lanes<V>::width;
  return (W - static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) / sizeof(T) % W)) % W;
}
// A vector of p[0..n), the other lanes zero; a full vector where n is the width by its type.
template <class V, class T, int W> GOL_FN V load_lanes(const T* p, std::integral_constant<int, W>) {
  return Lanes<V>::load(p);
}
template <class V, class T> GOL_FN V load_lanes(const T* p, int n) { return Lanes<V>::load(p, n); }
template <class V, class T, int W> GOL_FN void store_lanes(T* p, std::integral_constant<int, W>, V v) {
  Lanes<V>::store(p, v);
}
template <class V, class T> GOL_FN void store_lanes(T* p, int n, V v) { Lanes<V>::store(p, n, v); }
template <class V, int W> GOL_FN V keep_lanes(std::integral_constant<int, W>, V v, V) { return v; }
template <class V> GOL_FN V keep_lanes(int n, V v, V otherwise) {
  return select(Lanes<V>::first(n), v, otherwise);
}

template <class V, class T> GOL_FN double first_element(const T* p) {
  return Lanes<V>::front(Lanes<V>::load(p, 1));
}

template <bool kGrad, class T> GOL_FN void fill(T* grad, int64_t count, double value) {
  using V = RowNumber<T>;
  if (kGrad) for_vectors<V>(0, count, [&](int64_t j, auto n) { store_lanes(grad + j, n, V(value)); });
}

}  // namespace GOL_ISA
}  // namespace gol
