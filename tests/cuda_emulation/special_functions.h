// float instructions of a GPU that csrc/loss_math.h builds upon. The approximate ones err by up to what the PTX
// manual states, each operand by another amount, and take subnormal numbers for 0, operands and results.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define GOL_EMULATED_GPU

namespace emulation {

inline float flushed(double x) {
  const auto y = static_cast<float>(x);
  return std::fabs(y) < 0x1p-126f ? std::copysign(0.f, y) : y;
}

// Between -2^-22 and 2^-22, a hash of the operand.
inline double error_at(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = (bits ^ bits >> 16) * 0x45d9f3bu;
  bits = (bits ^ bits >> 16) * 0x45d9f3bu;
  return (static_cast<double>(bits ^ bits >> 16) * 0x1p-31 - 1) * 0x1p-22;
}

inline float ex2(float x) {
  const float operand = flushed(x);
  if (operand == 0) return 1;
  return flushed(std::exp2(static_cast<double>(operand)) * (1 + error_at(operand)));
}
inline float lg2(float x) {
  const float operand = flushed(x);
  const double y = std::log2(static_cast<double>(operand));
  return flushed(operand > 0.5f && operand < 2 ? y + error_at(operand) : y * (1 + error_at(operand)));
}
inline float rcp(float x) {
  const float operand = flushed(x);
  return flushed(1 / static_cast<double>(operand) * (1 + error_at(operand) / 2));
}
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline float min_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : b < a ? b : a; }
inline float max_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : b > a ? b : a; }

}  // namespace emulation
