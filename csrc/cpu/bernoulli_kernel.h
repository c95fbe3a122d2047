// Loss and gradient of a Bernoulli loss over rows, in one pass.
//
// A row is a stretch of negatives with a hole, its positive column. Whole vectors beside the hole go
// through a loop of load, slope, store, and one multiplication for the loss; the logarithm is taken of
// the product of up to kLogEvery factors.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "stretches.h"

namespace gol {
inline namespace GOL_ISA {

// kMinFactor^64 = 4e-35 is far above the smallest normal number.
constexpr int kLogEvery = 64;

// sum of linear - log2(factor) over the negatives of a row.
template <class V> class RowSum {
 public:
  GOL_FN RowSum() : linear_(0.0), product_(1.0), total_(0), pending_(0) {}
  // How many vectors may be added before flush().
  GOL_FN int64_t room() const { return kLogEvery - pending_; }
  GOL_FN void add(const NegativeTerm<V>& t) {
    linear_ = linear_ + t.linear;
    product_ = product_ * t.factor;
  }
  GOL_FN void added(int64_t vectors) {
    pending_ += vectors;
    if (pending_ == kLogEvery) flush();
  }
  GOL_FN double total() {
    flush();
    return total_;
  }

 private:
  GOL_FN void flush() {
    total_ += Lanes<V>::sum(linear_ - log2(product_));
    linear_ = V(0.0);
    product_ = V(1.0);
    pending_ = 0;
  }
  V linear_, product_;
  double total_;
  int64_t pending_;
};

// All negatives of a row, those of the column `hole` left out; the gradient is scale * slope, and written
// everywhere but in the hole's place. dropped has one bit for each column; kMasked = false ignores it.
template <class V, bool kGrad, bool kMasked, class T, class Link>
GOL_FN void negatives(const Link& link, const T* z, T* grad, int64_t count, int64_t hole, V scale,
                      const uint64_t* dropped, RowSum<V>* sum) {
  using L = Lanes<V>;
  constexpr int W = L::width;
  const auto kept = [&](int64_t i) {
    uint64_t word;
    std::memcpy(&word, reinterpret_cast<const unsigned char*>(dropped) + i / 8, sizeof(word));
    return L::clear_bits(word >> (i % 8));
  };
  const auto only = [](typename L::Mask on, const NegativeTerm<V>& t) {
    return NegativeTerm<V>{select(on, t.linear, V(0.0)), select(on, t.factor, V(1.0)),
                           select(on, t.slope, V(0.0))};
  };
  // n <= W elements from i on, the hole perhaps among them.
  const auto careful = [&](int64_t i, int n) {
    auto on = L::first(n);
    if (hole >= i && hole < i + n) on = L::both(on, L::clear_bits(uint64_t{1} << (hole - i)));
    if (kMasked) on = L::both(on, kept(i));
    const NegativeTerm<V> t = only(on, link.negative(L::load(z + i, n)));
    sum->add(t);
    sum->added(1);
    if (kGrad) L::store(grad + i, n, scale * t.slope);
  };
  // A store across two cache lines costs twice.
  const int64_t head = kGrad ? to_alignment<V>(grad) : 0;
  int64_t i = head < count ? head : count;
  if (i > 0) careful(0, static_cast<int>(i));
  while (i < count) {
    const int64_t stop = hole >= i && hole < count ? hole : count;
    const int64_t whole = (stop - i) / W;
    if (whole == 0) {
      const int n = count - i < W ? static_cast<int>(count - i) : W;
      careful(i, n);
      i += n;
      continue;
    }
    const int64_t vectors = whole < sum->room() ? whole : sum->room();
    for (const int64_t end = i + vectors * W; i < end; i += W) {
      NegativeTerm<V> t = link.negative(L::load(z + i));
      if (kMasked) t = only(kept(i), t);
      sum->add(t);
      if (kGrad) L::store(grad + i, scale * t.slope);
    }
    sum->added(vectors);
  }
}

// DropLoss, background rows: bit c is set when class c is rare and its draw is not below the limit,
// so that a negative survives with the probability limit / 2^16. Lane l of the generator has columns
// 8l..8l+7, two in each of its four words.
GOL_FN void draw_dropped(const cpu::BernoulliArgs& a, int64_t row, uint64_t* dropped) {
  constexpr int kLanes = Words::width;
  const int64_t words = (a.num_columns + 63) / 64;
  for (int64_t w = 0; w < words + 2; ++w) dropped[w] = 0;
  if (a.keep_limit >= 0x10000) return;  // every draw is below: nothing is dropped
  for (int64_t group = 0; group * 8 < a.num_columns; group += kLanes) {
    const auto draws = philox4x32_10(Words::iota(static_cast<uint32_t>(group)), static_cast<uint32_t>(row),
                                     a.offset, a.seed);
    uint32_t halves[4];
    for (int k = 0; k < 4; ++k)
      halves[k] = Words::halves_from(draws.word[k], static_cast<uint16_t>(a.keep_limit));
    for (int part = 0; part * 8 < kLanes; ++part) {  // eight lanes fill one word of 64 columns
      uint64_t bits = 0;
      for (int k = 0; k < 4; ++k) bits |= Words::spread_pairs(halves[k] >> (16 * part) & 0xffff) << (2 * k);
      dropped[group / 8 + part] |= bits << (group % 8 * 8);
    }
  }
  for (int64_t w = 0; w < words; ++w) dropped[w] &= a.rare[w];
}

template <bool kGrad, class T, template <class> class LinkFor>
void bernoulli_rows(const cpu::BernoulliArgs& a, int64_t begin, int64_t end, uint64_t* scratch) {
  using V = RowNumber<T>;
  const LinkFor<V> link(a.link_options);
  const LinkFor<double> exact_link(a.link_options);
  const int64_t K = a.num_columns;
  for (int64_t row = begin; row < end; ++row) {
    const T* z = static_cast<const T*>(a.logits) + row * a.row_stride;
    T* grad = kGrad ? static_cast<T*>(a.grad) + row * K : nullptr;
    const double scale = a.row_scale[row];
    if (scale == 0 || std::isnan(scale)) {
      a.row_loss[row] = scale;
      fill<kGrad>(grad, K, scale);
      continue;
    }
    const int64_t label = a.labels[row];
    const bool foreground = label < a.num_classes;
    const uint64_t* dropped = nullptr;
    if (a.drop != cpu::Drop::kNone && foreground) {
      dropped = a.rare;
    } else if (a.drop == cpu::Drop::kForegroundAndSampledBackground) {
      draw_dropped(a, row, scratch);
      dropped = scratch;
    }
    const int64_t positive = label < K ? label : K;
    RowSum<V> sum;
    const V grad_scale(scale * link.unit);
    if (dropped == nullptr) negatives<V, kGrad, false>(link, z, grad, K, positive, grad_scale, dropped, &sum);
    else negatives<V, kGrad, true>(link, z, grad, K, positive, grad_scale, dropped, &sum);
    double loss = kLn2 * sum.total();
    if (positive < K) {
      const PositiveTerm<double> t = exact_link.positive(first_element<V>(z + positive));
      loss += t.loss;
      if (kGrad) Lanes<V>::store(grad + positive, 1, V(scale * t.slope));
    }
    a.row_loss[row] = loss;
  }
}

template <class V> using GumbelZeroOutside = GumbelLink<V, GumbelSlope::kZeroOutside>;
template <class V> using GumbelStraightThrough = GumbelLink<V, GumbelSlope::kStraightThrough>;
template <class V> using GumbelReleased = GumbelLink<V, GumbelSlope::kReleased>;

template <bool kGrad, class T>
void bernoulli_for_link(const cpu::BernoulliArgs& a, int64_t begin, int64_t end, uint64_t* scratch) {
  if (a.link == cpu::Link::kSigmoid) bernoulli_rows<kGrad, T, SigmoidLink>(a, begin, end, scratch);
  else if (a.gumbel_slope == GumbelSlope::kZeroOutside)
    bernoulli_rows<kGrad, T, GumbelZeroOutside>(a, begin, end, scratch);
  else if (a.gumbel_slope == GumbelSlope::kStraightThrough)
    bernoulli_rows<kGrad, T, GumbelStraightThrough>(a, begin, end, scratch);
  else bernoulli_rows<kGrad, T, GumbelReleased>(a, begin, end, scratch);
}

// Elementwise p = exp(-exp(-z/T)), or with grad_output its backward grad_output * p * e / T.
template <class T>
void gumbel_activation_range(const cpu::GumbelActivationArgs& a, int64_t begin, int64_t end) {
  using V = RowNumber<T>;
  using L = Lanes<V>;
  const V clip_min(a.link_options.clip_min), clip_max(a.link_options.clip_max);
  const V rate(-kLog2E / a.link_options.temperature), ln2_over_t(kLn2 / a.link_options.temperature);
  const T* logits = static_cast<const T*>(a.logits);
  const T* upstream = static_cast<const T*>(a.grad_output);
  T* output = static_cast<T*>(a.output);
  for (int64_t i = begin; i < end; i += L::width) {
    const int n = end - i < L::width ? static_cast<int>(end - i) : L::width;
    const V z = L::load(logits + i, n);
    const V zc = vmax(vmin(z, clip_max), clip_min);
    const V e2 = exp2(fma(zc, rate, V(kLog2Log2E)));
    V result = exp2(V(0.0) - e2);
    if (upstream != nullptr) {
      result = select(differs(z, zc), V(0.0), result * e2 * ln2_over_t) * L::load(upstream + i, n);
    }
    L::store(output + i, n, result);
  }
}

}  // namespace GOL_ISA
}  // namespace gol
