#pragma once
#include <c10/util/BFloat16.h>

#include <cmath>

using __nv_bfloat16 = c10::BFloat16;
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float __bfloat162float(__nv_bfloat16 x) { return static_cast<float>(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline __nv_bfloat162 __hmax2(__nv_bfloat162 a, __nv_bfloat162 b) {
  const auto larger = [](__nv_bfloat16 x, __nv_bfloat16 y) {
    return __nv_bfloat16(std::fmax(static_cast<float>(x), static_cast<float>(y)));
  };
  return {larger(a.x, b.x), larger(a.y, b.y)};
}
