// The terms of a Bernoulli loss on the device: links, rows, and the weights of negatives.
#pragma once

#include <limits>

#include "bernoulli.h"
#include "common.cuh"

namespace gol {
namespace cuda {

// --- links -----------------------------------------------------------------------------------------
// A link taken apart where the flat kernel needs it: between clip and formula a term can be removed, and
// where kFraction the slope of a negative still has to be divided by its factor.
//   clipped(z)     the logit held inside the clip
//   kLight         leaves registers for many threads
//   nothing        in its place: linear 0, factor 1 and slope 0 exactly, in float, where exp underflows
//   inside(zc)     a negative at a clipped logit
//   outside(...)   its slope, corrected for z outside the clip
// kWhole: see parts_inside.
template <class N, bool kReleased, bool kWhole> struct FlatGumbel : GumbelLink<N, kReleased> {
  using Number = N;
  static constexpr bool kFraction = true, kLight = kWhole;
  N nothing;  // exp(-e) = 2^-256

  explicit FlatGumbel(const LinkOptions& o)
      : GumbelLink<N, kReleased>(o), nothing((kLog2Log2E - 8) * kLn2 * o.temperature) {}
  static bool fits(const LinkOptions& o) { return !kWhole || o.clip_max <= 10.9 * o.temperature; }
  __device__ __forceinline__ N clipped(N z) const { return this->clip(z); }
  __device__ __forceinline__ NegativeTerm<N> inside(N zc) const {
    const auto t = this->template parts_inside<kWhole>(zc);
    return {t.linear, t.factor, t.numerator};
  }
  __device__ __forceinline__ N outside(N z, N zc, N slope) const { return this->clip.slope(z, zc, slope); }
};

template <class N> struct FlatSigmoid : SigmoidLink<N> {
  using Number = N;
  static constexpr bool kFraction = false, kLight = true;
  N nothing = -200;

  explicit FlatSigmoid(const LinkOptions& o) : SigmoidLink<N>(o) {}
  __device__ __forceinline__ N clipped(N z) const { return z; }
  __device__ __forceinline__ NegativeTerm<N> inside(N z) const { return this->negative(z); }
  __device__ __forceinline__ N outside(N, N, N slope) const { return slope; }
};

template <class N> struct FlatProbit : ProbitLink<N> {
  using Number = N;
  static constexpr bool kFraction = false, kLight = true;
  N nothing = -30;

  explicit FlatProbit(const LinkOptions& o) : ProbitLink<N>(o) {}
  __device__ __forceinline__ N clipped(N z) const { return this->clip(z); }
  __device__ __forceinline__ NegativeTerm<N> inside(N zc) const {
    return ProbitLink<N>::minus_log_cdf(zc, zc > N(0));
  }
  __device__ __forceinline__ N outside(N z, N zc, N slope) const { return this->clip.slope(z, zc, slope); }
};

// --- arguments -------------------------------------------------------------------------------------
// kSelect: some terms are removed, by class and row (EQL, federated) or by logit too (ACSL).
// kDraw: DropLoss, by class, row and chance.
enum class Policy { kNone, kSelect, kDraw, kWeights, kSeesaw };

inline Policy policy_of(Reweight reweight) {
  switch (reweight) {
    case Reweight::kNone: return Policy::kNone;
    case Reweight::kDrop: return Policy::kDraw;
    case Reweight::kWeights: return Policy::kWeights;
    case Reweight::kSeesaw: return Policy::kSeesaw;
    default: return Policy::kSelect;
  }
}

constexpr uint32_t kEveryByte = 0x01010101;

// BernoulliArgs in a kernel's own number type, converted on the host.
template <class L> struct TermArgs : BernoulliArgs {
  using N = typename L::Number;
  L flat_link;
  N unit, seesaw_q, seesaw_log2_eps, seesaw_logit_eps;
  // kSelect: a negative is kept where class_bits shares a bit with the row's mask, or from threshold on.
  uint32_t foreground_mask, background_mask;
  N foreground_threshold;

  explicit TermArgs(const BernoulliArgs& a)
      : BernoulliArgs(a), flat_link(a.link_options), unit(flat_link.unit), seesaw_q(a.q > 0 ? a.q : 0),
        seesaw_log2_eps(a.log2_eps), seesaw_logit_eps(a.logit_eps),
        foreground_mask(kEveryByte * (a.reweight == Reweight::kACSL        ? 0
                                      : a.reweight == Reweight::kFederated ? 1
                                                                           : 2)),
        background_mask(kEveryByte),
        foreground_threshold(a.reweight == Reweight::kACSL ? a.logit_threshold
                                                           : std::numeric_limits<N>::quiet_NaN()) {}
};

__device__ __forceinline__ uint32_t class_bits(const BernoulliArgs& a, int column) {
  const uint32_t entry = static_cast<const uint8_t*>(a.class_table)[column];
  if (a.reweight == Reweight::kACSL) return entry;
  if (a.reweight == Reweight::kFederated) return entry != 0 ? 1 : 0;
  return entry != 0 ? 1 : 3;  // a rare class: in background rows alone
}

// --- what all rows of a batch share ----------------------------------------------------------------
template <class N> struct BatchRule {
  N factor;
  // DropLoss: a draw of 16 bits at or above the limit drops the negative of a rare class.
  uint32_t keep_limit;
  uint64_t seed, offset;
};

// The share of rare classes in the foreground, to the nearest 2^-16; everything is kept without foreground.
__device__ inline uint32_t keep_limit(const RowArgs& rows) {
  const BatchCounts c = batch_counts(rows);
  if (c.foreground == 0) return 0x10000;
  return static_cast<uint32_t>((2 * c.rare * 0x10000 + c.foreground) / (2 * c.foreground));
}

// Called by whole warps.
template <class N> __device__ __forceinline__ BatchRule<N> batch_rule(const BernoulliArgs& a, Policy policy) {
  BatchRule<N> rule{static_cast<N>(batch_factor(a.rows)), 0x10000, 0, 0};
  if (a.upstream != nullptr) rule.factor *= *static_cast<const N*>(a.upstream);
  if (policy == Policy::kDraw) {
    rule.keep_limit = keep_limit(a.rows);
    rule.seed = static_cast<uint64_t>(a.rng[0]);
    rule.offset = static_cast<uint64_t>(a.rng[1]);
  }
  return rule;
}

// Of columns 8 group .. 8 group + 7 of a row: bit k is set where the draw is at or above the limit.
template <class N>
__device__ __forceinline__ uint32_t drop_eight(const BatchRule<N>& batch, int row, uint32_t group) {
  const auto draws = philox4x32_10(group, static_cast<uint32_t>(row), batch.offset, batch.seed);
  uint32_t bits = 0;
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    if ((draws.word[word] & 0xffff) >= batch.keep_limit) bits |= 1u << (2 * word);
    if (draws.word[word] >> 16 >= batch.keep_limit) bits |= 2u << (2 * word);
  }
  return bits;
}

// --- one row ---------------------------------------------------------------------------------------
// A policy leaves the fields of the others alone.
template <class N> struct RowRule {
  int positive;  // its column, -1: none
  bool foreground;
  N weight, factor;
  uint32_t mask;  // kSelect
  N threshold;    // kSelect: kept from here on. kSeesaw: not compensated up to here
  SeesawRow<N> seesaw{N(1), N(0), N(0)};

  __device__ __forceinline__ bool exists() const { return weight != N(0) && factor != N(0); }
  __device__ __forceinline__ N scale() const { return weight * factor; }
};

// With statistics a row of an illegal label, of weight NaN, must not reach them.
template <class T, class L>
__device__ __forceinline__ RowRule<Number<T>> row_rule(const TermArgs<L>& a, Policy policy, bool statistics,
                                                       const BatchRule<Number<T>>& batch, int row) {
  using N = Number<T>;
  const CodedRow<N> coded = static_cast<const CodedRow<N>*>(a.coded_rows)[row];
  const bool illegal = statistics && coded.weight != coded.weight;
  RowRule<N> rule;
  rule.positive = coded.positive;
  rule.foreground = static_cast<unsigned>(coded.positive) < static_cast<unsigned>(a.rows.num_classes);
  rule.weight = illegal ? N(0) : coded.weight;
  rule.factor = illegal ? N(NAN) : batch.factor;
  if (policy == Policy::kSelect) {
    rule.mask = rule.foreground ? a.foreground_mask : a.background_mask;
    rule.threshold = rule.foreground ? a.foreground_threshold : N(NAN);
    if (a.row_groups != nullptr && !rule.foreground) rule.mask = kEveryByte * a.row_groups[row];
  }
  if (policy == Policy::kSeesaw) {
    N power = 0;  // of background rows: nothing is mitigated, nothing compensated
    N log2_p = N(INFINITY);
    rule.threshold = log2_p;
    if (rule.positive >= 0) {
      const N z = to_number(static_cast<const T*>(a.logits)[row * a.row_stride + rule.positive]);
      power = static_cast<const N*>(a.class_table)[rule.positive];
      log2_p = vmax(a.flat_link.log2_probability(z), a.seesaw_log2_eps);
      rule.threshold = vmax(a.flat_link.clipped(z), a.seesaw_logit_eps);
    }
    rule.seesaw = SeesawRow<N>(power, a.seesaw_q, log2_p);
  }
  return rule;
}

// The weight of one negative of a row.
template <class L, class N>
__device__ __forceinline__ N negative_weight(const TermArgs<L>& a, Policy policy, const BatchRule<N>& batch,
                                             const RowRule<N>& rule, int row, int column, N z) {
  switch (policy) {
    case Policy::kSelect: {
      const bool kept = (class_bits(a, column) & rule.mask) != 0 || z >= rule.threshold;
      return kept ? N(1) : N(0);
    }
    case Policy::kDraw: {
      if (!static_cast<const bool*>(a.class_table)[column]) return N(1);
      if (rule.foreground) return N(0);
      return drop_eight(batch, row, column / 8) >> (column % 8) & 1 ? N(0) : N(1);
    }
    case Policy::kWeights: return static_cast<const N*>(a.class_table)[a.num_columns + column];
    case Policy::kSeesaw: {
      const N power = static_cast<const N*>(a.class_table)[column];
      return rule.seesaw.mitigation(power) * rule.seesaw.compensation(a.flat_link.log2_probability(z));
    }
    default: return N(1);
  }
}

// Loss and slope of one term for a row of weight 1 and factor 1.
template <class N> struct Term {
  N loss, slope;
};

template <class L, class N>
__device__ __forceinline__ Term<N> positive_term(const TermArgs<L>& a, Policy policy, int column, N z) {
  N weight = 1;
  if (policy == Policy::kWeights) weight = static_cast<const N*>(a.class_table)[column];
  if (policy == Policy::kSelect && a.reweight == Reweight::kFederated) weight = class_bits(a, column);
  if (weight == N(0)) return {N(0), N(0)};
  const auto t = a.flat_link.positive(z);
  return {weight * t.loss, weight * t.slope};
}

template <class L, class N>
__device__ __forceinline__ Term<N> term(const TermArgs<L>& a, Policy policy, const BatchRule<N>& batch,
                                        const RowRule<N>& rule, int row, int column, N z) {
  if (!rule.exists()) return {N(0), N(0)};
  if (column == rule.positive) return positive_term(a, policy, column, z);
  const N weight = negative_weight(a, policy, batch, rule, row, column, z);
  if (weight == N(0)) return {N(0), N(0)};
  const NegativeTerm<N> t = a.flat_link.negative(z);
  return {weight * N(kLn2) * (t.linear - log2(t.factor)), weight * a.unit * t.slope};
}

}  // namespace cuda
}  // namespace gol
