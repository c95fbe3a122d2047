// Loss and gradient of a Bernoulli loss over a dense, aligned [N, K] in one pass of 16-byte vectors.
//
// All elements are computed as negatives of the vector's first row; that holds for all but one vector in a
// hundred and more. Before the formulas, terms that are removed, or positive, or in a row that does not
// exist, have their logit replaced by one at which a negative is exactly nothing; after them a positive is
// written over its element. A vector in which the row changes is treated so as well, or, where its two rows
// are scaled differently, element by element.
//
// Special functions per element: two exponentials, and for a fraction one reciprocal in four and, where all
// weights are 1, one logarithm of a product in a vector.
#pragma once

#include "bernoulli_terms.cuh"
#include "fixed_columns.cuh"

namespace gol {
namespace cuda {

constexpr int kFlatThreads = 256;

// What a policy keeps of a thread's columns in registers.
template <Policy kPolicy, int V> struct ColumnTable {
  uint32_t
      bits[(V + 3) / 4];  // kSelect: class_bits, a byte for each. kDraw: bits[0], a bit for each, is rare
  float value[V];         // kWeights: of negatives. kSeesaw: powers

  __device__ __forceinline__ ColumnTable(const BernoulliArgs& a, const FixedVector<V>& place) {
#pragma unroll
    for (uint32_t& word : bits) word = 0;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int column = place.column_of(j);
      if (kPolicy == Policy::kSelect) bits[j / 4] |= class_bits(a, column) << (j % 4 * 8);
      if (kPolicy == Policy::kDraw) bits[0] |= uint32_t{static_cast<const bool*>(a.class_table)[column]} << j;
      if (kPolicy == Policy::kWeights)
        value[j] = static_cast<const float*>(a.class_table)[a.num_columns + column];
      if (kPolicy == Policy::kSeesaw) value[j] = static_cast<const float*>(a.class_table)[column];
    }
  }
};

template <class T, class L, Policy kPolicy, bool kStatistics> struct FlatThread {
  static constexpr int V = Vector<T>::kSize;
  static constexpr bool kWeighted = kPolicy == Policy::kWeights || kPolicy == Policy::kSeesaw;
  using Rule = RowRule<float>;

  const TermArgs<L>& a;
  const FixedColumns& columns;
  const BatchRule<float> batch;
  FixedVector<V> place;
  const ColumnTable<kPolicy, V> table;
  float loss = 0;                 // in base 2
  int step = 0, ahead_step = -1;  // kDraw
  uint32_t ahead = 0;
  float positives[kStatistics ? V : 1] = {}, negatives[kStatistics ? V : 1] = {};

  __device__ __forceinline__ FlatThread(const TermArgs<L>& args, const FixedColumns& f, int thread)
      : a(args), columns(f), batch(batch_rule<float>(args, kPolicy)), place(f, thread), table(args, place) {}

  __device__ __forceinline__ const T* logits() const {
    return static_cast<const T*>(a.logits) + place.element();
  }
  __device__ __forceinline__ T* grad() const { return static_cast<T*>(a.grad) + place.element(); }
  __device__ __forceinline__ Rule rule_of(int row) const {
    return row_rule<T>(a, kPolicy, kStatistics, batch, row);
  }

  // Whether one scale, and Seesaw's factors, hold for both.
  static __device__ __forceinline__ bool alike(const Rule& r, const Rule& s) {
    if (r.weight != s.weight || r.factor != s.factor) return false;
    return kPolicy != Policy::kSeesaw ||
           (r.seesaw.inverse_power_y == s.seesaw.inverse_power_y && r.seesaw.threshold == s.seesaw.threshold);
  }

  // --- elements by themselves ---------------------------------------------------------------------
  // To the statistics of element j. The sums stay in registers: no index is computed.
  __device__ __forceinline__ void count(bool is_positive, int j, float slope) {
    if constexpr (kStatistics) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        positives[i] += i == j && is_positive ? fabsf(slope) : 0;
        negatives[i] += i == j && !is_positive ? fabsf(slope) : 0;
      }
    }
  }

  __device__ __forceinline__ void write(const Rule& rule, const Term<float>& t, int j) {
    loss += rule.scale() * t.loss * static_cast<float>(kLog2E);
    if (a.grad != nullptr) grad()[j] = from_number<T>(rule.scale() * t.slope);
  }

  __device__ __forceinline__ void any_term(const Rule& rule, int row, int j) {
    const int column = place.column_of(j);
    const Term<float> t = term(a, kPolicy, batch, rule, row, column, to_number(logits()[j]));
    write(rule, t, j);
    count(column == rule.positive, j, rule.weight * t.slope);
  }

  // Writes the positive of a row over element j, where it is one of the vector's.
  __device__ __forceinline__ void positive(const Rule& rule, int j) {
    if (static_cast<unsigned>(j) >= V || !rule.exists()) return;
    const Term<float> t = positive_term(a, kPolicy, rule.positive, to_number(logits()[j]));
    write(rule, t, j);
    count(true, j, rule.weight * t.slope);
  }

  // --- DropLoss -----------------------------------------------------------------------------------
  // Bit j: the draw at element j of the vector drops a rare class, if its row is of background. A group of 8
  // columns and a vector lie askew, but the vector's second group is the first one of the vector after it,
  // which is the next lane's: a lane calls the generator once. For the vector after lane 31's the lanes
  // call it once in 32 steps, a step each. Called by whole warps.
  __device__ __forceinline__ uint32_t draw(bool wanted) {
    const int lane = threadIdx.x % kWarp, phase = step++ % kWarp;
    if (batch.keep_limit >= 0x10000 || !__any_sync(kAllLanes, wanted)) return 0;
    if (ahead_step != step - 1 - phase) {
      ahead_step = step - 1 - phase;
      const int end = __shfl_sync(kAllLanes, place.column, kWarp - 1) + V;
      const bool wraps = end >= columns.num_columns;
      const int row = __shfl_sync(kAllLanes, place.row, kWarp - 1) + wraps + (lane - phase) * columns.stride;
      ahead = drop_eight(batch, row, (wraps ? end - columns.num_columns : end) / 8);
    }
    const uint32_t first = drop_eight(batch, place.row, place.column / 8);
    uint32_t after = __shfl_down_sync(kAllLanes, first, 1);
    const uint32_t after_last = __shfl_sync(kAllLanes, ahead, phase);
    if (lane == kWarp - 1) after = after_last;
    // Where the row ends, the vector after has not this row's second group, but the next row's first.
    if (place.split > V) return (first | after << 8) >> (place.column % 8);
    uint32_t bits = first;
    if (place.column % 8 + place.split > 8) bits |= drop_eight(batch, place.row, place.column / 8 + 1) << 8;
    bits = bits >> (place.column % 8) & ((1u << place.split) - 1);
    return bits | after << place.split;
  }

  // --- the vector as negatives --------------------------------------------------------------------
  // The logit of element j held inside the clip, or `nothing` where the policy removes the term.
  __device__ __forceinline__ float kept(const Rule& rule, uint32_t drop, int j, float z) const {
    bool gone = false;
    if (kPolicy == Policy::kSelect)
      gone = !((table.bits[j / 4] & rule.mask & 0xffu << (j % 4 * 8)) != 0 || z >= rule.threshold);
    if (kPolicy == Policy::kDraw) gone = (drop >> j & 1) != 0;
    if (kPolicy == Policy::kWeights) gone = table.value[j] == 0;
    return gone ? a.flat_link.nothing : a.flat_link.clipped(z);
  }

  // next: the rule of the row after, for a vector that crosses into it.
  __device__ __forceinline__ void keep(const Rule& rule, const Rule& next, uint32_t drawn,
                                       const float (&z)[V], float (&zc)[V]) const {
    uint32_t drop = 0;
    if (kPolicy == Policy::kDraw) {
      const uint32_t rest = place.crosses() ? ~0u << place.split : 0;  // of the next row
      drop = table.bits[0] & (drawn | (rule.foreground ? ~rest : 0) | (next.foreground ? rest : 0));
    }
#pragma unroll
    for (int j = 0; j < V; ++j) zc[j] = kept(rule, drop, j, z[j]);
    const int hit = rule.positive - place.column;  // none: far below 0
    if (static_cast<unsigned>(hit) >= V && rule.exists() && !place.crosses()) return;
    const int hit_next = place.crosses() && next.positive >= 0 ? next.positive + place.split : V;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (kPolicy == Policy::kSelect && j >= place.split) zc[j] = kept(next, drop, j, z[j]);
      if (j == hit || j == hit_next || !rule.exists()) zc[j] = a.flat_link.nothing;
    }
  }

  // Multiplies the slopes by the weights of their negatives; returns the loss of a row of scale 1.
  __device__ __forceinline__ float weigh(const Rule& rule, const float (&zc)[V],
                                         const NegativeTerm<float> (&t)[V], float (&slope)[V]) const {
    float weight[V], sum = 0, highest = zc[0];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      weight[j] = table.value[j];
      if (kPolicy == Policy::kSeesaw) weight[j] = rule.seesaw.mitigation(weight[j]);
      highest = vmax(highest, zc[j]);
    }
    // Few classes score above the label: few vectors need the third exponential.
    if (kPolicy == Policy::kSeesaw && highest > rule.threshold) {
#pragma unroll
      for (int j = 0; j < V; ++j) weight[j] *= rule.seesaw.compensation(a.flat_link.log2_probability(zc[j]));
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
      sum = fma(weight[j], t[j].linear - log2(t[j].factor), sum);
      slope[j] *= weight[j];
    }
    return sum;
  }

  // Multiplies the slopes by scale, and divides a fraction by its factor: one reciprocal for four.
  static __device__ __forceinline__ void scale_all(float scale, const NegativeTerm<float> (&t)[V],
                                                   float (&slope)[V]) {
#pragma unroll
    for (int j = 0; j < V; j += 4) {
      float by[2] = {scale, scale};
      if (L::kFraction) {
        const float ab = t[j].factor * t[j + 1].factor, cd = t[j + 2].factor * t[j + 3].factor;
        const float inverse = reciprocal(ab * cd) * scale;
        by[0] = inverse * cd;
        by[1] = inverse * ab;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
        slope[j + i] *= L::kFraction ? by[i / 2] * t[j + (i ^ 1)].factor : by[i / 2];
    }
  }

  // All of the vector at once. False, with nothing done, where its rows are not alike, or a logit is NaN and
  // would spoil the gradients of the others.
  __device__ __forceinline__ bool at_once(const Vector<T>& raw, const Rule& rule, uint32_t drawn) {
    Rule next = rule;
    if (place.crosses()) {
      if (place.row + 1 == columns.num_rows) return false;  // the tensor ends within it
      next = rule_of(place.row + 1);
      if (!alike(rule, next)) return false;
    }
    float z[V], zc[V], slope[V];
    unpack(raw, z);
    keep(rule, next, drawn, z, zc);
    NegativeTerm<float> t[V];
    float linear = 0, product = 1;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      t[j] = a.flat_link.inside(zc[j]);
      linear += t[j].linear;
      slope[j] = a.flat_link.outside(z[j], zc[j], t[j].slope);
    }
#pragma unroll
    for (int j = 0; j < V; j += 4)  // as in scale_all
      product *= (t[j].factor * t[j + 1].factor) * (t[j + 2].factor * t[j + 3].factor);
    if (product != product) return false;
    loss = fma(rule.scale(), kWeighted ? weigh(rule, zc, t, slope) : linear - log2(product), loss);
    scale_all(a.unit * (kStatistics ? rule.weight : rule.scale()), t, slope);
    if (kStatistics) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        negatives[j] += fabsf(slope[j]);
        slope[j] *= rule.factor;
      }
    }
    if (a.grad != nullptr) store(grad(), pack<T>(slope));
    positive(rule, rule.positive - place.column);
    if (place.crosses()) positive(next, next.positive >= 0 ? next.positive + place.split : V);
    return true;
  }

  // One vector; for kDraw called by whole warps, of which some lanes may have none left.
  __device__ __forceinline__ void vector(bool active) {
    Vector<T> raw;
    if (active && !(place.crosses() && place.row + 1 == columns.num_rows)) raw = load_streaming(logits());
    const Rule rule = rule_of(active ? place.row : 0);
    uint32_t drawn = 0;
    if constexpr (kPolicy == Policy::kDraw)
      drawn = draw(active && table.bits[0] != 0 && (!rule.foreground || place.crosses()));
    if (!active || at_once(raw, rule, drawn)) return;
#pragma unroll 1
    for (int j = 0; j < V; ++j) {
      const int row = place.row + (j >= place.split);
      if (row < columns.num_rows) any_term(rule_of(row), row, j);
    }
  }
};

// Blocks on a multiprocessor at a time: what leaves the registers that the tables and sums of a thread need.
constexpr int kStatisticsBlocks = 3;
template <class L> constexpr int flat_blocks(Policy policy, bool statistics) {
  if (statistics) return kStatisticsBlocks;
  return policy == Policy::kSeesaw ? 3 : policy == Policy::kNone && L::kLight ? 5 : 4;
}

inline FixedColumns flat_columns(const BernoulliArgs& a, int blocks) {
  return {a.rows.num_rows, a.num_columns, a.dtype == DType::kFloat32 ? 4 : 8,
          int64_t{num_multiprocessors()} * blocks * kFlatThreads};
}

template <class T, class L, Policy kPolicy, bool kStatistics>
__global__ void __launch_bounds__(kFlatThreads, flat_blocks<L>(kPolicy, kStatistics))
    bernoulli_flat(const __grid_constant__ TermArgs<L> a, const __grid_constant__ FixedColumns columns) {
  const int id = blockIdx.x * kFlatThreads + threadIdx.x;
  const bool has_place = id < columns.threads;
  FlatThread<T, L, kPolicy, kStatistics> thread(a, columns, has_place ? id : 0);
  for (;; thread.place.advance(columns)) {
    const bool active = has_place && thread.place.row < columns.num_rows;
    if (kPolicy == Policy::kDraw ? !__any_sync(kAllLanes, active) : !active) break;
    thread.vector(active);
  }
  if constexpr (kStatistics) {
    if (has_place) {
      // Together the threads' sums are the rows of a matrix [columns.stride, K].
      constexpr int V = Vector<T>::kSize;
      float* partial = static_cast<float*>(a.partial_statistics) + int64_t{id} * V;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        partial[j] = thread.positives[j];
        partial[int64_t{columns.threads} * V + j] = thread.negatives[j];
      }
    }
  }
  if (a.loss != nullptr)
    reduce_loss<1, float>({thread.loss * kLn2}, {static_cast<float*>(a.loss)}, a.rows.workspace);
}

template <class T, class L, Policy kPolicy, bool kStatistics>
cudaError_t launch_flat(const BernoulliArgs& a, cudaStream_t stream) {
  const FixedColumns columns = flat_columns(a, flat_blocks<L>(kPolicy, kStatistics));
  return launch(bernoulli_flat<T, L, kPolicy, kStatistics>,
                (columns.threads + kFlatThreads - 1) / kFlatThreads, kFlatThreads, stream, TermArgs<L>(a),
                columns);
}

// Statistics come with what trains by them; else the general kernel makes them.
template <class T, class L> cudaError_t launch_flat_link(const BernoulliArgs& a, cudaStream_t stream) {
  const bool statistics = a.statistics != nullptr;
  switch (policy_of(a.reweight)) {
    case Policy::kNone:
      return statistics ? launch_flat<T, L, Policy::kNone, true>(a, stream)
                        : launch_flat<T, L, Policy::kNone, false>(a, stream);
    case Policy::kWeights:
      return statistics ? launch_flat<T, L, Policy::kWeights, true>(a, stream)
                        : launch_flat<T, L, Policy::kWeights, false>(a, stream);
    case Policy::kSelect: return launch_flat<T, L, Policy::kSelect, false>(a, stream);
    case Policy::kDraw: return launch_flat<T, L, Policy::kDraw, false>(a, stream);
    case Policy::kSeesaw: return launch_flat<T, L, Policy::kSeesaw, false>(a, stream);
  }
  return cudaErrorInvalidValue;
}

// The released slope belongs to the losses of its paper.
template <class T> cudaError_t launch_flat_type(const BernoulliArgs& a, cudaStream_t stream) {
  switch (a.link) {
    case Link::kGumbel:
      return FlatGumbel<float, false, true>::fits(a.link_options)
                 ? launch_flat_link<T, FlatGumbel<float, false, true>>(a, stream)
                 : launch_flat_link<T, FlatGumbel<float, false, false>>(a, stream);
    case Link::kGumbelReleased: {
      using L = FlatGumbel<float, true, false>;
      switch (policy_of(a.reweight)) {
        case Policy::kNone: return launch_flat<T, L, Policy::kNone, false>(a, stream);
        case Policy::kSelect: return launch_flat<T, L, Policy::kSelect, false>(a, stream);
        case Policy::kDraw: return launch_flat<T, L, Policy::kDraw, false>(a, stream);
        default: return cudaErrorInvalidValue;
      }
    }
    case Link::kSigmoid: return launch_flat_link<T, FlatSigmoid<float>>(a, stream);
    case Link::kProbit: return launch_flat_link<T, FlatProbit<float>>(a, stream);
  }
  return cudaErrorInvalidValue;
}

// One translation unit for each, which compile side by side.
extern template cudaError_t launch_flat_type<float>(const BernoulliArgs&, cudaStream_t);
extern template cudaError_t launch_flat_type<__nv_bfloat16>(const BernoulliArgs&, cudaStream_t);
extern template cudaError_t launch_flat_type<__half>(const BernoulliArgs&, cudaStream_t);

}  // namespace cuda
}  // namespace gol
