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

// The gradient of a row, exponentials times a factor, that is still to be written: vector by vector, each
// when that of the next row takes its place. Arithmetic bounds that pass and memory this one; one after the
// other they took a quarter longer.
template <class T> struct PendingRow {
  using V = RowNumber<T>;
  using Number = std::conditional_t<std::is_same_v<T, double>, double, float>;
  static constexpr int W = Lanes<V>::width;
  const Number* exps = nullptr;  // [count], from an aligned vector on
  T* grad = nullptr;
  int64_t count = 0;
  V factor = V(0.0);
  bool stream;
  Number* edge = nullptr;  // where the vector goes, if any, that the row after this one completes

  GOL_FN explicit PendingRow(bool past_caches) : stream(past_caches) {}
  // Vector i / W, or what there is of it.
  GOL_FN void write(int64_t i) const {
    if (i + W <= count) {
      const V v = Lanes<V>::load(exps + i) * factor;
      if (stream) Lanes<V>::stream(grad + i, v);
      else Lanes<V>::store(grad + i, v);
    } else if (i < count) {
      const int n = static_cast<int>(count - i);
      const V v = Lanes<V>::load(exps + i, n) * factor;
      if (edge != nullptr) Lanes<V>::store(edge, v);
      else Lanes<V>::store(grad + i, n, v);
    }
  }
  // Everything from vector i / W on.
  GOL_FN void finish(int64_t i) {
    for (; i < count; i += W) write(i);
    count = 0;
  }
};

template <bool kGrad, class T> struct SoftmaxRow {
  using V = RowNumber<T>;
  using Number = typename PendingRow<T>::Number;
  static constexpr int W = Lanes<V>::width;
  const cpu::SoftmaxArgs& args;
  const T* z;
  const T* next_z;  // the row after this one
  T* grad;          // null without kGrad
  int64_t label;
  int64_t head;  // columns before the aligned vectors of exps
  // The end of the row before, where it is of the head's vector: with streaming, a vector that is stored in
  // two parts makes everything after it wait for memory (a fifth of the time at 1204 columns). Else null.
  Number* edge;
  Number* exps;  // [num_softmax]: the weighted exponential of each column, 0 for the label
  PendingRow<T>* pending;
  // The exponents are relative to `reference`, the row's maximum or not far below it.
  double reference, distance_label, label_weight = 1, exp_label;

  GOL_FN SoftmaxRow(const cpu::SoftmaxArgs& a, int64_t row, const T* next, T* row_grad, double* scratch,
                    PendingRow<T>* row_before)
      : args(a), z(static_cast<const T*>(a.logits) + row * a.row_stride), next_z(next), grad(row_grad),
        label(a.labels[row]), head(kGrad ? to_alignment<V>(grad) : to_alignment<V>(z)),
        edge(reinterpret_cast<Number*>(scratch)), exps(edge + 2 * W - head), pending(row_before) {
    const bool follows = pending->count > 0 && pending->grad + pending->count == grad;
    if (!kGrad || !a.stream || !follows || head == 0 || head > a.num_softmax) edge = nullptr;
    pending->edge = edge;
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
    for_vectors<V>(0, count - done, [&](int64_t j, auto n) GOL_INLINE {
      a = vmax(keep_lanes(n, load_lanes<V>(z + done + j, n), lowest), a);
    });
    return static_cast<double>(Lanes<V>::max(a));
  }

  // Writes weight(j, n) to exps and returns the sum. The lambdas of the loops capture copies: what they would
  // reach through a reference is loaded again for every vector; and so it is where one is not inlined.
  template <class Weight> GOL_FN double sum_of(const Weight& weight) {
    LongSum<V> sum;
    for_vectors<V>(head, args.num_softmax, [&](int64_t j, auto n) GOL_INLINE {
      const V e = weight(j, n);
      store_lanes(exps + j, n, e);
      sum.add(keep_lanes(n, e, V(0.0)));
    });
    return sum.total();
  }

  // The sum over all columns but the label's of weight(j, n, exponential). Arithmetic bounds this pass:
  // meanwhile the gradient of the row before is written, and the next row fetched.
  template <class Weight> GOL_FN double referred(const Weight& weight) {
    const V reference_lanes(reference), highest(kHighestExponent);
    const PendingRow<T> before = *pending;
    const int64_t first = head;
    const double sum = sum_of([=](int64_t j, auto n) GOL_INLINE {
      __builtin_prefetch(next_z + j, 0, 0);
      if (kGrad && j >= first) before.write(j - first);
      V e = weight(j, n, exp(vmin(load_lanes<V>(z + j, n) - reference_lanes, highest)));
      if (label >= j && label < j + n)
        e = select(Lanes<V>::clear_bits(uint64_t{1} << (label - j)), e, V(0.0));
      return e;
    });
    if (kGrad) pending->finish((args.num_softmax - head + W - 1) / W * W);
    return sum;
  }

  // Of the maximum what is at hand will do, the label's logit and some others, unless the sum shows that the
  // row's is far above it.
  template <class Weight> GOL_FN double exponentials(const Weight& weight) {
    constexpr int64_t kSome = 4 * W;
    const double z_label = first_element<V>(z + label);
    reference = std::fmax(maximum(z, args.num_softmax < kSome ? args.num_softmax : kSome), z_label);
    for (bool is_maximum = false;; is_maximum = true) {
      distance_label = z_label - reference;
      exp_label = std::exp(distance_label);
      const double sum = referred(weight);
      if (sum <= kHighestSum || is_maximum) return sum;
      reference = maximum(z, args.num_softmax);
    }
  }

  GOL_FN double plain() {
    return exponentials([](int64_t, auto, V e) GOL_INLINE { return e; });
  }

  // Of softmax(z + log prior): the label's exponential is multiplied as well.
  GOL_FN double with_prior() {
    const auto* prior = static_cast<const Number*>(args.prior);
    const double rest =
        exponentials([=](int64_t j, auto n, V e) GOL_INLINE { return e * load_lanes<V>(prior + j, n); });
    label_weight = static_cast<double>(prior[label]);
    exp_label *= label_weight;
    return rest;
  }

  // plain() with every exponential multiplied by compensation(j, n, exponential) and the mitigation factor.
  template <class Compensation>
  GOL_FN double reweighted(const SeesawRow<V>& factors, const Compensation& compensation) {
    const auto* power = static_cast<const Number*>(args.power);
    return sum_of([=](int64_t j, auto n) GOL_INLINE {
      const V e = load_lanes<V>(exps + j, n);
      return e * factors.mitigation(load_lanes<V>(power + j, n)) * compensation(j, n, e);
    });
  }

  GOL_FN double seesaw() {
    // max(s_y, eps), as the scores stand in exps: not yet divided by their sum
    const double rest = plain(), limit = std::fmax(exp_label, (rest + exp_label) * args.eps);
    const double power_label = static_cast<double>(static_cast<const Number*>(args.power)[label]);
    if (args.q == 2) {  // the paper's: a square needs no second exponential
      const V inverse_limit(1.0 / limit);
      return reweighted(SeesawRow<V>(power_label, args.q, 0.0), [=](int64_t, auto, V e) GOL_INLINE {
        const V ratio = vmax(e * inverse_limit, V(1.0));
        return ratio * ratio;
      });
    }
    const SeesawRow<V> factors(power_label, args.q, std::log2(limit));
    const V reference_lanes(reference);
    return reweighted(factors, [=](int64_t j, auto n, V) GOL_INLINE {
      return factors.compensation((load_lanes<V>(z + j, n) - reference_lanes) * V(kLog2E));
    });
  }

  // rest / e_y, whose log1p is the loss; where it could overflow, minus the loss.
  GOL_FN double odds(double rest) const {
    constexpr double kLowest = 1e-300;
    if (exp_label > kLowest) return rest / exp_label;
    return distance_label + std::log(label_weight) - std::log(rest);
  }

  // Leaves the row's gradient, scale times softmax, to be written. The label's is -rest / (rest + e_y): that
  // does not cancel when the label's probability is close to 1.
  GOL_FN void leave_gradient(double rest, double scale) const {
    const double ratio = scale / (rest + exp_label);
    const Number factor = static_cast<Number>(ratio);
    exps[label] = factor != 0 ? static_cast<Number>(-rest * ratio / factor) : Number{0};
    pending->exps = exps + head;
    pending->grad = grad + head;
    pending->count = args.num_softmax - head;
    pending->factor = V(static_cast<double>(factor));
    pending->edge = nullptr;
    const int n = static_cast<int>(head < args.num_softmax ? head : args.num_softmax);
    if (edge != nullptr) {
      const V first = Lanes<V>::load(exps + head - W) * pending->factor;
      Lanes<V>::stream(grad + head - W, select(Lanes<V>::first(W - n), Lanes<V>::load(edge), first));
    } else if (n > 0) {
      Lanes<V>::store(grad, n, Lanes<V>::load(exps, n) * pending->factor);
    }
  }

 private:
  // No column's exponential is above this one, which is a float, and so are as many as there may be.
  static constexpr double kHighestExponent = 44;
  // A million columns may be as high as the reference; and float has room for the weights.
  static constexpr double kHighestSum = 1 << 20;
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

// The losses of `odds`, in place. One by one after each row the logarithms took 7 % of the whole time.
inline void losses_of_odds(double* odds, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const double x = odds[i];
    odds[i] = x > 0.1 ? std::log(1 + x) : x < 0 ? -x : std::log1p(x);  // log1p takes longer
  }
}

template <bool kGrad, class T>
void softmax_rows(const cpu::SoftmaxArgs& a, int64_t begin, int64_t end, double* scratch) {
  const bool has_objectness = a.row_objectness != nullptr;
  PendingRow<T> pending(a.stream);
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
      // Of these lines a part is stored.
      if (kGrad && has_objectness) __builtin_prefetch(grad + a.num_softmax, 1);
      const T* next_z = row + 1 < end ? z + a.row_stride : z;
      SoftmaxRow<kGrad, T> softmax(a, row, next_z, grad, scratch, &pending);
      const double rest = a.power != nullptr   ? softmax.seesaw()
                          : a.prior != nullptr ? softmax.with_prior()
                                               : softmax.plain();
      a.row_loss[row] = softmax.odds(rest);
      if (kGrad) softmax.leave_gradient(rest, scale);
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
  losses_of_odds(a.row_loss + begin, end - begin);
  if (kGrad) {
    pending.finish(0);
    Lanes<RowNumber<T>>::end_streams();
  }
}

}  // namespace GOL_ISA
}  // namespace gol
