// Softmax cross-entropy, plain or with Seesaw's reweighting, and Seesaw's objectness pair: loss and
// gradient of a row while it stays in the first-level cache.
#pragma once

#include <cmath>
#include <limits>

#include "stretches.h"

namespace gol {
inline namespace GOL_ISA {

template <class T> struct SoftmaxRow {
  using V = RowNumber<T>;
  using Number = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const cpu::SoftmaxArgs& args;
  const T* z;
  T* grad;  // may be null
  int64_t label;
  int64_t head;  // columns before the aligned vectors of grad (else of z), and of exps
  Number* exps;  // [num_softmax]: the weighted exponential of each column, 0 for the label; scratch follows
  double row_max = 0, x_label = 0;

  GOL_FN SoftmaxRow(const cpu::SoftmaxArgs& a, int64_t row, T* row_grad, double* scratch)
      : args(a), z(static_cast<const T*>(a.logits) + row * a.row_stride), grad(row_grad),
        label(a.labels[row]), head(grad != nullptr ? to_alignment<V>(grad) : to_alignment<V>(z)),
        exps(reinterpret_cast<Number*>(scratch) + (Lanes<V>::width - head) % Lanes<V>::width) {
    V m(-std::numeric_limits<double>::infinity());
    const V lowest = m;
    for_vectors<V>(head, a.num_softmax,
                   [&](int64_t j, auto n) { m = vmax(keep_lanes(n, load_lanes<V>(z + j, n), lowest), m); });
    row_max = static_cast<double>(Lanes<V>::max(m));
    x_label = (first_element<V>(z + label) - row_max) * kLog2E;
  }

  template <class N> GOL_FN V x(int64_t j, N n) const {
    return (load_lanes<V>(z + j, n) - V(row_max)) * V(kLog2E);
  }

  // Writes weight(j, n) to exps, 0 for the label, and returns the sum.
  template <class Weight> GOL_FN double sum_others(const Weight& weight) {
    constexpr int kBlock = 16;  // vectors; more fp32 additions in a row would show
    double total = 0;
    V sum(0.0);
    int pending = 0;
    for_vectors<V>(head, args.num_softmax, [&](int64_t j, auto n) {
      V e = weight(j, n);
      if (label >= j && label < j + n)
        e = select(Lanes<V>::clear_bits(uint64_t{1} << (label - j)), e, V(0.0));
      store_lanes(exps + j, n, e);
      sum = sum + keep_lanes(n, e, V(0.0));
      if (++pending == kBlock) {
        total += Lanes<V>::sum(sum);
        sum = V(0.0);
        pending = 0;
      }
    });
    return total + Lanes<V>::sum(sum);
  }

  GOL_FN double plain() {
    return sum_others([&](int64_t j, auto n) { return exp2(x(j, n)); });
  }

  GOL_FN double seesaw() {
    const double log2_sum = std::log2(plain() + std::exp2(x_label));
    const double threshold = std::fmax(x_label, log2_sum + args.log2_eps);
    const auto* power = static_cast<const Number*>(args.power);
    const SeesawRow<V> factors(static_cast<double>(power[label]), args.q, threshold);
    const V limit(std::exp2(threshold));
    // At most 1/eps classes of a row score above the limit: few vectors need the second exponential. They
    // are listed without a branch, which would be mispredicted for most of them.
    auto* above = reinterpret_cast<int32_t*>(exps + args.num_softmax);
    int64_t num_above = 0;
    double total = sum_others([&](int64_t j, auto n) {
      const V plain_exp = load_lanes<V>(exps + j, n);
      above[num_above] = static_cast<int32_t>(j);
      num_above += Lanes<V>::any(less(limit, plain_exp));
      return plain_exp * factors.mitigation(load_lanes<V>(power + j, n));
    });
    for (int64_t i = 0; i < num_above; ++i) {
      const int64_t j = above[i];
      const int64_t end = j < head ? head : j + Lanes<V>::width;
      const int n = static_cast<int>((end < args.num_softmax ? end : args.num_softmax) - j);
      const V mitigated = load_lanes<V>(exps + j, n);
      const V e = mitigated * factors.compensation(x(j, n));
      store_lanes(exps + j, n, e);
      total += Lanes<V>::sum(keep_lanes(n, e - mitigated, V(0.0)));
    }
    return total;
  }

  // loss = log(1 + rest / e_y), and for the label the gradient -rest / (rest + e_y): neither
  // cancels when the label's probability is close to 1.
  template <bool kGrad> GOL_FN double finish(double rest, double scale) const {
    const double at_label = std::exp2(x_label);
    const double ratio = scale / (rest + at_label);
    if (kGrad) {
      for_vectors<V>(head, args.num_softmax, [&](int64_t j, auto n) {
        store_lanes(grad + j, n, load_lanes<V>(exps + j, n) * V(ratio));
      });
      Lanes<V>::store(grad + label, 1, V(-rest * ratio));
    }
    return at_label > 0 ? std::log1p(rest / at_label) : std::log(rest) - x_label * kLn2;
  }
};

// Two-way cross-entropy of (object, background) at z, with d = z[0] - z[1].
template <bool kGrad, class T> GOL_FN double objectness(const T* z, bool foreground, double scale, T* grad) {
  using L = Lanes<RowNumber<T>>;
  const SigmoidLink<double> link(LinkOptions{});
  const double d = first_element<RowNumber<T>>(z) - first_element<RowNumber<T>>(z + 1);
  double loss, slope;
  if (foreground) {
    const auto t = link.positive(d);
    loss = t.loss, slope = t.slope;
  } else {
    const auto t = link.negative(d);
    loss = kLn2 * (t.linear - log2(t.factor)), slope = t.slope;
  }
  if (kGrad) {
    L::store(grad, 1, RowNumber<T>(scale * slope));
    L::store(grad + 1, 1, RowNumber<T>(-scale * slope));
  }
  return loss;
}

template <bool kGrad, class T>
void softmax_rows(const cpu::SoftmaxArgs& a, int64_t begin, int64_t end, double* scratch) {
  const bool has_objectness = a.row_objectness != nullptr;
  for (int64_t row = begin; row < end; ++row) {
    T* grad = kGrad ? static_cast<T*>(a.grad) + row * a.num_columns : nullptr;
    const T* z = static_cast<const T*>(a.logits) + row * a.row_stride;
    const double scale = a.row_scale[row];
    const bool foreground = a.labels[row] < a.num_softmax;
    if (scale == 0 || std::isnan(scale) || !foreground) {
      const double value = foreground || std::isnan(scale) ? scale : 0.0;
      a.row_loss[row] = value;
      fill<kGrad>(grad, a.num_softmax, value);
    } else {
      SoftmaxRow<T> softmax(a, row, grad, scratch);
      const double rest = a.power == nullptr ? softmax.plain() : softmax.seesaw();
      a.row_loss[row] = softmax.template finish<kGrad>(rest, scale);
    }
    if (!has_objectness) continue;
    const double objectness_scale = a.objectness_scale[row];
    if (objectness_scale == 0 || std::isnan(objectness_scale)) {
      a.row_objectness[row] = objectness_scale;
      fill<kGrad>(grad + a.num_softmax, 2, objectness_scale);
    } else {
      a.row_objectness[row] = objectness<kGrad>(z + a.num_softmax, foreground, objectness_scale,
                                                kGrad ? grad + a.num_softmax : nullptr);
    }
  }
}

}  // namespace GOL_ISA
}  // namespace gol
