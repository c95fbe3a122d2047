#pragma once
#include <c10/util/Half.h>

#include <cmath>

using __half = c10::Half;
struct __half2 {
  __half x, y;
};
inline float __half2float(__half x) { return static_cast<float>(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __hmax2(__half2 a, __half2 b) {
  const auto larger = [](__half x, __half y) {
    return __half(std::fmax(static_cast<float>(x), static_cast<float>(y)));
  };
  return {larger(a.x, b.x), larger(a.y, b.y)};
}
