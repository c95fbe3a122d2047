// Softmax cross-entropy, plain or with Seesaw's reweighting, and Seesaw's objectness pair: loss and
// gradient of a row while it stays in the first-level cache.
#pragma once

#include <cmath>
#include <limits>

#include "stretches.h"

namespace gol {
inline namespace GOL_ISA {

// A long sum of vectors of positive numbers: fp32 in blocks of blocks, then double. More than some tens of
// additions to one fp32 number would show.
template <class V> class LongSum {
 public:
  GOL_FN LongSum() : sum_(0.0), blocks_(0.0), total_(0), count_(0) {}
  GOL_FN void add(V x) {
    sum_ = sum_ + x;
    if (++count_ % kBlock == 0) flush();
  }
  GOL_FN double total() { return total_ + Lanes<V>::sum(blocks_ + sum_); }

 private:
  static constexpr unsigned kBlock = 16;
  GOL_FN void flush() {
    blocks_ = blocks_ + sum_;
    sum_ = V(0.0);
    if (count_ % (kBlock * kBlock) != 0) return;
    total_ += Lanes<V>::sum(blocks_);
    blocks_ = V(0.0);
  }
  V sum_, blocks_;
  double total_;
  unsigned count_;
};

template <bool kGrad, class T> struct SoftmaxRow {
  using V = RowNumber<T>;
  using Number = std::conditional_t<std::is_same_v<T, double>, double, float>;
  static constexpr int W = Lanes<V>::width;
  const cpu::SoftmaxArgs& args;
  const T* z;
  const T* next_z;  // the row after this one
  T* grad;          // null without kGrad
  int64_t label;
  int64_t head;  // columns before the aligned vectors of exps
  Number* exps;  // [num_softmax]: the weighted exponential of each column, 0 for the label
  double row_max, distance_label, exp_label;

  GOL_FN SoftmaxRow(const cpu::SoftmaxArgs& a, int64_t row, const T* next, T* row_grad, double* scratch)
      : args(a), z(static_cast<const T*>(a.logits) + row * a.row_stride), next_z(next), grad(row_grad),
        label(a.labels[row]), head(kGrad ? to_alignment<V>(grad) : to_alignment<V>(z)),
        exps(place(row_grad, reinterpret_cast<Number*>(scratch) + (W - head) % W)),
        row_max(maximum(z, a.num_softmax)), distance_label(first_element<V>(z + label) - row_max),
        exp_label(std::exp(distance_label)) {}

  // The gradient itself where it is stored as the numbers are worked on: the first-level cache has to hold
  // one row less.
  static GOL_FN Number* place(T* row_grad, Number* scratch) {
    if constexpr (kGrad && std::is_same_v<T, Number>) return row_grad;
    else return scratch;
  }

  // Four side by side: a maximum waits for the one before it.
  static GOL_FN double maximum(const T* z, int64_t count) {
    const V lowest(-std::numeric_limits<double>::infinity());
    const std::integral_constant<int, W> all;
    V a = lowest, b = lowest, c = lowest, d = lowest;
    int64_t done = 0;
    for (; done + 4 * W <= count; done += 4 * W) {
      a = vmax(load_lanes<V>(z + done, all), a);
      b = vmax(load_lanes<V>(z + done + W, all), b);
      c = vmax(load_lanes<V>(z + done + 2 * W, all), c);
      d = vmax(load_lanes<V>(z + done + 3 * W, all), d);
    }
    a = vmax(vmax(a, b), vmax(c, d));
    for_vectors<V>(0, count - done, [&](int64_t j, auto n) {
      a = vmax(keep_lanes(n, load_lanes<V>(z + done + j, n), lowest), a);
    });
    return static_cast<double>(Lanes<V>::max(a));
  }

  // Writes weight(j, n) to exps and returns the sum. The lambdas of the loops capture copies: what they would
  // reach through a reference is loaded again for every vector.
  template <class Weight> GOL_FN double sum_of(const Weight& weight) {
    LongSum<V> sum;
    for_vectors<V>(head, args.num_softmax, [&](int64_t j, auto n) {
      const V e = weight(j, n);
      store_lanes(exps + j, n, e);
      sum.add(keep_lanes(n, e, V(0.0)));
    });
    return sum.total();
  }

  // The sum over all columns but the label's of weight(j, n, exponential). Arithmetic bounds this pass:
  // meanwhile the next row is fetched, for which its first pass would wait.
  template <class Weight> GOL_FN double exponentials(const Weight& weight) {
    const V highest(row_max);
    return sum_of([=](int64_t j, auto n) {
      __builtin_prefetch(next_z + j);
      V e = weight(j, n, exp(load_lanes<V>(z + j, n) - highest));
      if (label >= j && label < j + n)
        e = select(Lanes<V>::clear_bits(uint64_t{1} << (label - j)), e, V(0.0));
      return e;
    });
  }

  GOL_FN double plain() {
    return exponentials([](int64_t, auto, V e) { return e; });
  }

  // Of softmax(z + log prior): the label's exponential is multiplied as well.
  GOL_FN double with_prior() {
    const auto* prior = static_cast<const Number*>(args.prior);
    const double prior_label = static_cast<double>(prior[label]);
    exp_label *= prior_label;
    distance_label += std::log(prior_label);
    return exponentials([=](int64_t j, auto n, V e) { return e * load_lanes<V>(prior + j, n); });
  }

  // plain() with every exponential multiplied by compensation(j, n, exponential) and the mitigation factor.
  template <class Compensation>
  GOL_FN double reweighted(const SeesawRow<V>& factors, const Compensation& compensation) {
    const auto* power = static_cast<const Number*>(args.power);
    return sum_of([=](int64_t j, auto n) {
      const V e = load_lanes<V>(exps + j, n);
      return e * factors.mitigation(load_lanes<V>(power + j, n)) * compensation(j, n, e);
    });
  }

  GOL_FN double seesaw() {
    // max(s_y, eps), as the scores stand in exps: not yet divided by their sum
    const double limit = std::fmax(exp_label, (plain() + exp_label) * args.eps);
    const double power_label = static_cast<double>(static_cast<const Number*>(args.power)[label]);
    if (args.q == 2) {  // the paper's: a square needs no second exponential
      const V inverse_limit(1.0 / limit);
      return reweighted(SeesawRow<V>(power_label, args.q, 0.0), [=](int64_t, auto, V e) {
        const V ratio = vmax(e * inverse_limit, V(1.0));
        return ratio * ratio;
      });
    }
    const SeesawRow<V> factors(power_label, args.q, std::log2(limit));
    const V highest(row_max);
    return reweighted(factors, [=](int64_t j, auto n, V) {
      return factors.compensation((load_lanes<V>(z + j, n) - highest) * V(kLog2E));
    });
  }

  // loss = log(1 + rest / e_y), and for the label the gradient -rest / (rest + e_y): neither
  // cancels when the label's probability is close to 1.
  GOL_FN double finish(double rest, double scale) const {
    const double ratio = scale / (rest + exp_label);
    if (kGrad) {
      const V factor(ratio);
      for_vectors<V>(head, args.num_softmax, [=](int64_t j, auto n) {
        store_lanes(grad + j, n, load_lanes<V>(exps + j, n) * factor);
      });
      Lanes<V>::store(grad + label, 1, V(-rest * ratio));
    }
    return exp_label > 0 ? std::log1p(rest / exp_label) : std::log(rest) - distance_label;
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
      const T* next_z = row + 1 < end ? z + a.row_stride : z;
      SoftmaxRow<kGrad, T> softmax(a, row, next_z, grad, scratch);
      const double rest = a.power != nullptr   ? softmax.seesaw()
                          : a.prior != nullptr ? softmax.with_prior()
                                               : softmax.plain();
      a.row_loss[row] = softmax.finish(rest, scale);
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
