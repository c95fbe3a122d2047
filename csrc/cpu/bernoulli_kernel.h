// Loss and gradient of a Bernoulli loss over rows, in one pass.
//
// A row is a stretch of negatives with a hole, its positive column. Whole vectors beside the hole go
// through a loop of load, slope, store, and one multiplication for the loss; the logarithm is taken of
// the product of many factors. Only terms that have weights of their own need a logarithm each.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "stretches.h"

namespace gol {
inline namespace GOL_ISA {

// sum of linear - log2(factor) over the terms of a row. The logarithm is taken of products of kFactors, as
// many as are sure to stay normal; kEvery vectors at most are added in fp32 before the sum goes on in double.
template <class V, int kEvery, int kFactors, bool kLinear> class RowSum {
  static_assert(kEvery % kFactors == 0);

 public:
  GOL_FN RowSum() : sum_(0.0), product_(1.0), total_(0), pending_(0) {}
  // How many vectors may be added before added().
  GOL_FN int64_t room() const { return kFactors - pending_ % kFactors; }
  GOL_FN void add(const NegativeTerm<V>& t) {
    if constexpr (kLinear) sum_ = sum_ + t.linear;
    product_ = product_ * t.factor;
  }
  GOL_FN void added(int64_t vectors) {
    pending_ += vectors;
    if (pending_ % kFactors == 0) take_logarithm();
    if (pending_ == kEvery) flush();
  }
  GOL_FN double total() {
    take_logarithm();
    flush();
    return total_;
  }

 private:
  GOL_FN void take_logarithm() {
    sum_ = sum_ - log2(product_);
    product_ = V(1.0);
  }
  GOL_FN void flush() {
    total_ += Lanes<V>::sum(sum_);
    sum_ = V(0.0);
    pending_ = 0;
  }
  V sum_, product_;
  double total_;
  int64_t pending_;
};

// --- what becomes of the negatives -----------------------------------------------------------
// kept(i, z): the lanes from column i that count, where kSelects; weigh(link, i, n, z, term): a term's weight
// put into it, where kWeighs: then a term is all linear. kTerms: how many may be summed in fp32, or
// multiplied.
template <class V> struct AllTerms {
  static constexpr bool kSelects = false, kWeighs = false;
  static constexpr int kTerms = 64;
  template <class Link, class N>
  GOL_FN NegativeTerm<V> weigh(const Link&, int64_t, N, V, const NegativeTerm<V>& t) const {
    return t;
  }
};

template <class V> struct MaskedTerms : AllTerms<V> {
  static constexpr bool kSelects = true;
  const uint64_t* dropped;
  GOL_FN explicit MaskedTerms(const uint64_t* mask) : dropped(mask) {}
  GOL_FN auto kept(int64_t i, V) const {
    uint64_t word;
    std::memcpy(&word, reinterpret_cast<const unsigned char*>(dropped) + i / 8, sizeof(word));
    return Lanes<V>::clear_bits(word >> (i % 8));
  }
};

template <class V> struct AboveTerms : AllTerms<V> {
  static constexpr bool kSelects = true;
  V limit;
  GOL_FN explicit AboveTerms(double logit_limit) : limit(logit_limit) {}
  GOL_FN auto kept(int64_t, V z) const { return less(limit, z); }
};

// weight times the term, its logarithm taken.
template <class V> GOL_FN NegativeTerm<V> weighted(V weight, const NegativeTerm<V>& t) {
  return {weight * (t.linear - log2(t.factor)), V(1.0), weight * t.slope};
}

template <class V, class Number> struct WeightedTerms {
  static constexpr bool kSelects = false, kWeighs = true;
  static constexpr int kTerms = 16;
  const Number* weight;
  GOL_FN explicit WeightedTerms(const void* table) : weight(static_cast<const Number*>(table)) {}
  // A term of weight 0 does not exist, whatever its logit; a weight that is no number shows.
  template <class Link, class N>
  GOL_FN NegativeTerm<V> weigh(const Link&, int64_t i, N n, V, const NegativeTerm<V>& t) const {
    const V w = load_lanes<V>(weight + i, n);
    const auto gone = less(vmax(w, V(0.0) - w), V(1.2e-38));
    const NegativeTerm<V> u = weighted(w, t);
    return {select(gone, V(0.0), u.linear), u.factor, select(gone, V(0.0), u.slope)};
  }
};

// kSquare: q is 2, the paper's, and a square of the quotient of probabilities needs no exponential.
template <class V, class Number, bool kSquare> struct SeesawTerms {
  static constexpr bool kSelects = false, kWeighs = true;
  static constexpr int kTerms = 16;
  const Number* power;
  SeesawRow<V> factors;
  V inverse_limit;
  // limit: max(p_y, eps).
  GOL_FN SeesawTerms(const cpu::BernoulliArgs& a, int64_t label, double limit)
      : power(static_cast<const Number*>(a.power)),
        factors(static_cast<double>(power[label]), a.q, std::log2(limit)), inverse_limit(1.0 / limit) {}
  template <class Link, class N>
  GOL_FN NegativeTerm<V> weigh(const Link& link, int64_t i, N n, V z, const NegativeTerm<V>& t) const {
    const V mitigation = factors.mitigation(load_lanes<V>(power + i, n));
    if constexpr (!kSquare) return weighted(mitigation * factors.compensation(link.log2_probability(z)), t);
    const V ratio = vmax(link.probability(z) * inverse_limit, V(1.0));
    return weighted(mitigation * ratio * ratio, t);
  }
};

// The loss in base 2 of a row's negatives, the one at `hole` left out. The gradient is scale * slope,
// written everywhere, 0 in the hole's place.
template <class V, bool kGrad, class Number, class Link, class Terms>
GOL_FN double negatives(const Link& link, const Number* z, Number* grad, int64_t count, int64_t hole, V scale,
                        const Terms& terms) {
  using L = Lanes<V>;
  constexpr int W = L::width;
  const std::integral_constant<int, W> full;
  const V zero(0.0);
  constexpr int kFactors = Terms::kTerms < Link::kMaxProduct ? Terms::kTerms : Link::kMaxProduct;
  RowSum<V, Terms::kTerms, kFactors, Terms::kWeighs || Link::kLinear> sum;
  const auto only = [&](typename L::Mask on, const NegativeTerm<V>& t) {
    return NegativeTerm<V>{select(on, t.linear, zero), select(on, t.factor, V(1.0)),
                           select(on, t.slope, zero)};
  };
  // n <= W elements from i on, the hole perhaps among them.
  const auto careful = [&](int64_t i, auto n) {
    auto on = L::first(n);
    if (hole >= i && hole < i + n) on = L::both(on, L::clear_bits(uint64_t{1} << (hole - i)));
    const V logits = load_lanes<V>(z + i, n);
    if constexpr (Terms::kSelects) on = L::both(on, terms.kept(i, logits));
    const NegativeTerm<V> t = only(on, terms.weigh(link, i, n, logits, scaled_negative(link, logits, scale)));
    sum.add(t);
    sum.added(1);
    if (kGrad) store_lanes(grad + i, n, t.slope);
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
    const int64_t vectors = whole < sum.room() ? whole : sum.room();
    for (const int64_t end = i + vectors * W; i < end; i += W) {
      const V logits = L::load(z + i);
      NegativeTerm<V> t = terms.weigh(link, i, full, logits, scaled_negative(link, logits, scale));
      if constexpr (Terms::kSelects) t = only(terms.kept(i, logits), t);
      sum.add(t);
      if (kGrad) L::store(grad + i, t.slope);
    }
    sum.added(vectors);
  }
  return sum.total();
}

// DropLoss, background rows: bit c is set when class c is rare and its draw is not below the limit,
// so that a negative survives with the probability limit / 2^16. Lane l of the generator has columns
// 8l..8l+7, two in each of its four words.
GOL_FN void draw_dropped(const cpu::BernoulliArgs& a, int64_t row, const uint64_t* rare, uint64_t* dropped) {
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
  for (int64_t w = 0; w < words; ++w) dropped[w] &= rare[w];
}

// --- rows --------------------------------------------------------------------------------------
template <class V, class From, class To> GOL_FN void convert(const From* from, int64_t count, To* to) {
  for_vectors<V>(0, count, [&](int64_t j, auto n) { store_lanes(to + j, n, load_lanes<V>(from + j, n)); });
}

// sums[j] += factor * grad[j]
template <class V, class Number>
GOL_FN void add_row(const Number* grad, int64_t count, double factor, Number* sums) {
  const V f(factor);
  for_vectors<V>(0, count, [&](int64_t j, auto n) {
    store_lanes(sums + j, n, fma(f, load_lanes<V>(grad + j, n), load_lanes<V>(sums + j, n)));
  });
}

// Rows of 16-bit logits are widened into scratch, and their gradient is made there.
template <class V, class Number, bool kGrad, template <class> class LinkFor>
void bernoulli_rows(const cpu::BernoulliArgs& a, int64_t begin, int64_t end, uint64_t* scratch) {
  using cpu::DType;
  const LinkFor<V> link(a.link_options);
  const LinkFor<double> exact_link(a.link_options);
  const int64_t K = a.num_columns, padded = (K + 15) / 16 * 16;
  Number* const wide_logits = reinterpret_cast<Number*>(scratch);
  Number* const wide_grad = wide_logits + padded;
  Number* const sums = wide_grad + padded;  // of few rows: fp32 holds them
  uint64_t* const sampled = reinterpret_cast<uint64_t*>(sums + padded);
  const bool is_wide = a.dtype == DType::kFloat32 || a.dtype == DType::kFloat64;
  const bool in_place = is_wide && a.grad != nullptr;
  const auto flush_sums = [&] {
    for (int64_t j = 0; j < K; ++j) a.negative_sums[j] += sums[j];
    for (int64_t j = 0; j < K; ++j) sums[j] = 0;
  };
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * a.row_stride, grad_at = row * K;
    Number* const grad = !kGrad ? nullptr : in_place ? static_cast<Number*>(a.grad) + grad_at : wide_grad;
    const double scale = a.row_scale[row];
    if (a.positive_slope != nullptr) a.positive_slope[row] = 0;
    if (scale == 0 || std::isnan(scale)) {
      a.row_loss[row] = scale;
      fill<kGrad>(grad, K, scale);
    } else {
      const Number* z = wide_logits;
      if (is_wide) z = static_cast<const Number*>(a.logits) + at;
      else if (a.dtype == DType::kFloat16)
        convert<V>(static_cast<const Float16*>(a.logits) + at, K, wide_logits);
      else convert<V>(static_cast<const BFloat16*>(a.logits) + at, K, wide_logits);
      const int64_t label = a.labels[row], positive = label < K ? label : K;
      const V grad_scale(scale * link.unit);
      const auto total = [&](const auto& terms) {
        return negatives<V, kGrad>(link, z, grad, K, positive, grad_scale, terms);
      };
      const uint64_t* const mask =
          a.masks + (a.row_mask != nullptr ? a.row_mask[row] * a.mask_words : int64_t{0});
      double loss = 0;
      switch (label < a.num_classes ? a.foreground : a.background) {
        case cpu::Terms::kAll: loss = total(AllTerms<V>()); break;
        case cpu::Terms::kMasked: loss = total(MaskedTerms<V>(mask)); break;
        case cpu::Terms::kSampled:
          draw_dropped(a, row, mask, sampled);
          loss = total(MaskedTerms<V>(sampled));
          break;
        case cpu::Terms::kAbove: loss = total(AboveTerms<V>(a.logit_limit)); break;
        case cpu::Terms::kWeighted: loss = total(WeightedTerms<V, Number>(a.weight)); break;
        case cpu::Terms::kSeesaw: {
          const double limit = vmax(exact_link.probability(first_element<V>(z + label)), a.eps);
          loss = a.q == 2 ? total(SeesawTerms<V, Number, true>(a, label, limit))
                          : total(SeesawTerms<V, Number, false>(a, label, limit));
        } break;
      }
      loss *= kLn2;
      if (kGrad && a.row_weight != nullptr)
        add_row<V>(grad, K, a.row_weight[row] / scale, sums);  // slopes are positive
      const double weight = a.positive_weight != nullptr ? a.positive_weight[row] : 1.0;
      if (positive < K && weight != 0) {
        const PositiveTerm<double> t = exact_link.positive(first_element<V>(z + positive));
        loss += weight * t.loss;
        if (kGrad) Lanes<V>::store(grad + positive, 1, V(scale * weight * t.slope));
        if (a.positive_slope != nullptr) a.positive_slope[row] = std::fabs(weight * t.slope);
      }
      a.row_loss[row] = loss;
    }
    if (kGrad && !is_wide && a.grad != nullptr) {
      if (a.dtype == DType::kFloat16) convert<V>(grad, K, static_cast<Float16*>(a.grad) + grad_at);
      else convert<V>(grad, K, static_cast<BFloat16*>(a.grad) + grad_at);
    }
    constexpr int64_t kFew = 16;
    if (a.row_weight != nullptr && ((row - begin) % kFew == kFew - 1 || row + 1 == end)) flush_sums();
  }
}

template <class V> using ExactGumbel = GumbelLink<V, false>;
template <class V> using ReleasedGumbel = GumbelLink<V, true>;

template <class V, class Number, bool kGrad>
void bernoulli_for_link(const cpu::BernoulliArgs& a, int64_t begin, int64_t end, uint64_t* scratch) {
  switch (a.link) {
    case cpu::Link::kGumbel:
      if (ClippedGumbelLink<V>::holds(a.link_options))
        bernoulli_rows<V, Number, kGrad, ClippedGumbelLink>(a, begin, end, scratch);
      else bernoulli_rows<V, Number, kGrad, ExactGumbel>(a, begin, end, scratch);
      break;
    case cpu::Link::kGumbelReleased:
      bernoulli_rows<V, Number, kGrad, ReleasedGumbel>(a, begin, end, scratch);
      break;
    case cpu::Link::kSigmoid: bernoulli_rows<V, Number, kGrad, SigmoidLink>(a, begin, end, scratch); break;
    case cpu::Link::kProbit: bernoulli_rows<V, Number, kGrad, ProbitLink>(a, begin, end, scratch); break;
  }
}

// Elementwise p = exp(-exp(-z/T)), or with grad_output its backward grad_output * p * e / T.
template <class T>
void gumbel_activation_range(const cpu::GumbelActivationArgs& a, int64_t begin, int64_t end) {
  using V = RowNumber<T>;
  using L = Lanes<V>;
  const Clip<V> clip(a.link_options);
  const V rate(-kLog2E / a.link_options.temperature), ln2_over_t(kLn2 / a.link_options.temperature);
  const T* logits = static_cast<const T*>(a.logits);
  const T* upstream = static_cast<const T*>(a.grad_output);
  T* output = static_cast<T*>(a.output);
  for (int64_t i = begin; i < end; i += L::width) {
    const int n = end - i < L::width ? static_cast<int>(end - i) : L::width;
    const V z = L::load(logits + i, n);
    const V zc = clip(z);
    const V e2 = exp2(fma(zc, rate, V(kLog2Log2E)));
    V result = exp2(V(0.0) - e2);
    if (upstream != nullptr)
      result = select(differs(z, zc), V(0.0), result * e2 * ln2_over_t) * L::load(upstream + i, n);
    L::store(output + i, n, result);
  }
}

}  // namespace GOL_ISA
}  // namespace gol
