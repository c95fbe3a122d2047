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
  int64_t label;
  Number* exps;  // [num_softmax]: 2^(log2 weight of the column), relative to 2^reference
  double row_max = 0, x_label = 0, reference = 0;

  GOL_FN SoftmaxRow(const cpu::SoftmaxArgs& a, int64_t row, double* scratch)
      : args(a), z(static_cast<const T*>(a.logits) + row * a.row_stride), label(a.labels[row]),
        exps(reinterpret_cast<Number*>(scratch)) {
    V m(-std::numeric_limits<double>::infinity());
    const V lowest = m;
    for_vectors<V>(0, a.num_softmax,
                   [&](int64_t j, auto n) { m = vmax(keep_lanes(n, load_lanes<V>(z + j, n), lowest), m); });
    row_max = static_cast<double>(Lanes<V>::max(m));
    x_label = (first_element<V>(z + label) - row_max) * kLog2E;
  }

  template <class N> GOL_FN V x(int64_t j, N n) const {
    return (load_lanes<V>(z + j, n) - V(row_max)) * V(kLog2E);
  }

  // The sum of 2^exponent over all columns but the label's, which are also written to exps if kKeep.
  template <bool kKeep, class Exponent> GOL_FN double exponentials(const Exponent& exponent) {
    return exponentials<kKeep>(0, label, exponent) +
           exponentials<kKeep>(label + 1, args.num_softmax, exponent);
  }

  template <bool kKeep, class Exponent>
  GOL_FN double exponentials(int64_t from, int64_t to, const Exponent& exponent) {
    constexpr int64_t kBlock = 16 * Lanes<V>::width;  // more fp32 additions in a row would show
    double total = 0;
    for (int64_t block = from; block < to; block += kBlock) {
      V sum(0.0);
      for_vectors<V>(block, block + kBlock < to ? block + kBlock : to, [&](int64_t j, auto n) {
        const V e = exp2(exponent(j, n));
        if (kKeep) store_lanes(exps + j, n, e);
        sum = sum + keep_lanes(n, e, V(0.0));
      });
      total += Lanes<V>::sum(sum);
    }
    return total;
  }

  template <bool kKeep> GOL_FN double plain() {
    return exponentials<kKeep>([&](int64_t j, auto n) { return x(j, n); });
  }

  GOL_FN double seesaw() {
    const auto* pln = static_cast<const Number*>(args.pln);
    const double log2_sum = std::log2(plain<false>() + std::exp2(x_label));
    const double threshold = std::fmax(x_label, log2_sum + args.log2_eps);
    const auto weighted_from = [&](double from) {
      const SeesawRow<V> row(args.q, threshold, static_cast<double>(pln[label]), from);
      return [this, row, pln](int64_t j, auto n) { return row.exponent(x(j, n), load_lanes<V>(pln + j, n)); };
    };
    // No exponent is above q * max(0, 0 - threshold): x <= 0 and mitigation only lowers.
    reference = args.q * std::fmax(-threshold, 0.0);
    double rest = exponentials<true>(weighted_from(reference));
    if (!(rest + std::exp2(x_label - reference) > 1e-20)) {
      // Mitigation took everything far below the bound: once more, relative to the true maximum.
      V m(x_label);
      const V lowest = m;
      const auto weighted = weighted_from(0.0);
      const auto body = [&](int64_t j, auto n) { m = vmax(keep_lanes(n, weighted(j, n), lowest), m); };
      for_vectors<V>(0, label, body);
      for_vectors<V>(label + 1, args.num_softmax, body);
      reference = static_cast<double>(Lanes<V>::max(m));
      rest = exponentials<true>(weighted_from(reference));
    }
    return rest;
  }

  // loss = log(1 + rest / e_y), and for the label the gradient -rest / (rest + e_y): neither
  // cancels when the label's probability is close to 1.
  template <bool kGrad> GOL_FN double finish(double rest, double scale, T* grad) const {
    const double at_label = std::exp2(x_label - reference);
    const double ratio = scale / (rest + at_label);
    if (kGrad) {
      const auto body = [&](int64_t j, auto n) {
        store_lanes(grad + j, n, load_lanes<V>(exps + j, n) * V(ratio));
      };
      for_vectors<V>(0, label, body);
      for_vectors<V>(label + 1, args.num_softmax, body);
      Lanes<V>::store(grad + label, 1, V(-rest * ratio));
    }
    return at_label > 0 ? std::log1p(rest / at_label) : std::log(rest) - (x_label - reference) * kLn2;
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
      SoftmaxRow<T> softmax(a, row, scratch);
      const double rest = a.pln == nullptr ? softmax.template plain<true>() : softmax.seesaw();
      a.row_loss[row] = softmax.template finish<kGrad>(rest, scale, grad);
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
