// Fills the table of an instruction set: one instantiation for each storage type.
#pragma once

#include "bernoulli_kernel.h"
#include "softmax_kernel.h"

namespace gol {
inline namespace GOL_ISA {

// Calls body(T*) with the storage type; a set that has no fp64 vectors leaves kFloat64 to generic.
template <class Body> void for_dtype(cpu::DType dtype, const Body& body) {
  switch (dtype) {
    case cpu::DType::kFloat32: body(static_cast<float*>(nullptr)); break;
    case cpu::DType::kBFloat16: body(static_cast<BFloat16*>(nullptr)); break;
    case cpu::DType::kFloat16: body(static_cast<Float16*>(nullptr)); break;
    case cpu::DType::kFloat64:
      if constexpr (kHasFloat64) body(static_cast<double*>(nullptr));
      break;
  }
}

template <class V, class Number>
void bernoulli_of(const cpu::BernoulliArgs& a, int64_t begin, int64_t end, uint64_t* scratch) {
  const bool gradient = a.grad != nullptr || a.row_weight != nullptr;
  if (gradient) bernoulli_for_link<V, Number, true>(a, begin, end, scratch);
  else bernoulli_for_link<V, Number, false>(a, begin, end, scratch);
}

inline void bernoulli(const cpu::BernoulliArgs& a, int64_t begin, int64_t end, uint64_t* scratch) {
  if (a.dtype != cpu::DType::kFloat64) return bernoulli_of<RowNumber<float>, float>(a, begin, end, scratch);
  if constexpr (kHasFloat64) bernoulli_of<double, double>(a, begin, end, scratch);
}

inline void softmax(const cpu::SoftmaxArgs& a, int64_t begin, int64_t end, double* scratch) {
  for_dtype(a.dtype, [&](auto* storage) {
    using T = std::remove_pointer_t<decltype(storage)>;
    if (a.grad == nullptr) softmax_rows<false, T>(a, begin, end, scratch);
    else softmax_rows<true, T>(a, begin, end, scratch);
  });
}

inline void gumbel_activation(const cpu::GumbelActivationArgs& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto* storage) {
    gumbel_activation_range<std::remove_pointer_t<decltype(storage)>>(a, begin, end);
  });
}

}  // namespace GOL_ISA
}  // namespace gol
