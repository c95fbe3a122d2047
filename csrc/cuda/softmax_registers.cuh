// Softmax cross-entropy of rows that stay in registers: loss and gradient in one pass over the logits, for
// fp32, bf16 and fp16. A warp, or the warps of a block, hold a row in fp32; blocks are persistent.
//
// Seesaw (SeesawRow in loss_math.h). With y the label, e_j = 2^(x_j), x_j = log2(e) (z_j - max z), and P the
// powers of the counts, a row is
//   rest = sum_{j != y} e_j min(1, P_j / P_y) max(1, e_j / limit)^q,   limit = max(e_y, eps sum_j e_j)
//   loss = log(1 + rest / e_y),   slope_j = (summand j) / (rest + e_y),   slope_y = -rest / (rest + e_y)
// Multiplied by P_y limit^q, constants of the row, the terms are
//   e_j min(P_j, P_y) max(e_j, limit)^q   and   e_y P_y limit^q
// which for q = 2 takes no second exponential; for another q, e_j max(e_j, limit)^q = 2^(x_j + q max(x_j,
// log2 limit)) is one.
#pragma once

#include "softmax_row.cuh"

namespace gol {
namespace cuda {

enum class Mode { kPlain, kPrior, kSeesawSquare, kSeesaw };

// kWarps hold a row, kColumns of it in each thread. Only rows come here whose vectors would not fit the
// shape before, of kBefore columns in all. kBlocks of a multiprocessor shall find registers.
template <int kWarps_, int kColumns_, int kBefore, int kBlocks_> struct Shape {
  static constexpr int kWarps = kWarps_, kColumns = kColumns_, kBlocks = kBlocks_;
  static constexpr int kRowThreads = kWarps * kWarp, kCapacity = kRowThreads * kColumns;
  static constexpr int kSure = kBefore / kRowThreads;  // columns that every thread has in every row
  static constexpr int kRows = kWarps == 1 ? 4 : 1;    // of a block at a time
  static constexpr int kThreads = kRows * kRowThreads;
};

// A row's columns: 16-byte vectors from its first 16-byte boundary on, and on the edges, before and after
// them, up to 2 (kSize - 1) columns, each with a thread of its own. Nothing outside the row is read.
template <class T> struct Columns {
  static constexpr unsigned kSize = Vector<T>::kSize;
  unsigned head;  // columns before the vectors
  unsigned vectors;
  int edge;  // this thread's column on the edges, or -1

  __device__ __forceinline__ Columns(const T* z, unsigned count, unsigned thread) {
    const unsigned past = static_cast<unsigned>(reinterpret_cast<uintptr_t>(z) / sizeof(T)) % kSize;
    head = min((kSize - past) % kSize, count);
    vectors = (count - head) / kSize;
    const unsigned column = thread < head ? thread : thread + vectors * kSize;
    edge = column < count ? static_cast<int>(column) : -1;
  }
};

// The table of the classes along the vectors of a row. Where warps have a row each, they share it in shared
// memory: a copy for each place of a row's vectors among the table's 16-byte boundaries.
template <class T, class S> class ClassTable {
 public:
  static constexpr int kSize = Vector<T>::kSize;
  static constexpr bool kShared = S::kWarps == 1;
  static constexpr int kLength = kShared ? S::kCapacity + 16 : 4;  // with the edges
  struct Copies {
    alignas(16) float copy[4][kLength];
  };

  static __device__ void fill(Copies* copies, const float* table, int count) {
    for (int i = threadIdx.x; i < kLength + 3; i += S::kThreads) {
      const float value = i < count ? table[i] : 0.f;
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        if (s <= i && i < kLength + s) copies->copy[s][i - s] = value;
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ ClassTable(const Copies& copies, const float* table, unsigned head,
                                        unsigned thread)
      : table_(kShared ? copies.copy[0] : table),
        first_((kShared ? copies.copy[head % 4] + head / 4 * 4 : table + head) + thread * kSize) {}

  __device__ __forceinline__ float at(int column) const { return table_[column]; }

  // Of the thread's vector k; 0 where the row does not have it.
  __device__ __forceinline__ void read(int k, bool has, float (&value)[kSize]) const {
    const float* p = first_ + k * S::kRowThreads * kSize;
    if constexpr (kShared) {
#pragma unroll
      for (int i = 0; i < kSize; i += 4)
        *reinterpret_cast<float4*>(value + i) = *reinterpret_cast<const float4*>(p + i);
    } else {
#pragma unroll
      for (int j = 0; j < kSize; ++j) value[j] = has ? __ldg(p + j) : 0.f;
    }
  }

 private:
  const float *table_, *first_;
};

// The highest of the elements and m; numbers of 16 bits are compared in pairs.
template <class T, int kVectors>
__device__ __forceinline__ float highest_of(const Vector<T> (&v)[kVectors], float m) {
  if constexpr (sizeof(T) == 2) {
    using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    Pair highest = reinterpret_cast<const Pair*>(v[0].element)[0];
#pragma unroll
    for (int i = 1; i < kVectors * 4; ++i)
      highest = __hmax2(highest, reinterpret_cast<const Pair*>(v[i / 4].element)[i % 4]);
    m = vmax(m, vmax(to_number(highest.x), to_number(highest.y)));
  } else {
#pragma unroll
    for (int i = 0; i < kVectors * 4; ++i) m = vmax(m, v[i / 4].element[i % 4]);
  }
  return m;
}

template <class T, Mode kMode, class S> class RegisterRow {
 public:
  using Table = ClassTable<T, S>;

  __device__ __forceinline__ RegisterRow(const T* z, int count)
      : thread_(Threads::index()), columns_(z, count, thread_) {}

  // From logits to the summands of rest: value_, rest_ and at_label_.
  __device__ __forceinline__ void compute(const SoftmaxArgs& a, const typename Table::Copies& copies,
                                          const T* z, int label) {
    const Table table(copies, static_cast<const float*>(a.table), columns_.head, thread_);
    if constexpr (kMode != Mode::kPlain) table_label_ = table.at(label);
    float z_label = to_number(z[label]);
    const float highest = read(table, z, &z_label);
    remove(label);
    // Rounding the product of highest and log2(e) moves all x_j alike, which changes nothing while it is
    // little; of logits far from 0 the highest is subtracted first.
    float offset = highest * -static_cast<float>(kLog2E);
    if (std::fabs(highest) > 0x1p20f) {
      offset = 0;
      z_label -= highest;
      for_values([&](float& v) { v -= highest; });
    }
    const auto x = [&](float logit) { return fma(logit, static_cast<float>(kLog2E), offset); };
    float sum = 0;
    for_values([&](float& v) {
      v = x(v);
      const float e = exp2(v);
      sum += e;
      if constexpr (kMode != Mode::kSeesaw) v = e;
    });
    rest_ = Threads::template sum<1>(sum);
    x_label_ = x(z_label);
    at_label_ = exp2(x_label_);
    if constexpr (kMode == Mode::kSeesawSquare || kMode == Mode::kSeesaw) reweight(a, table);
  }

  __device__ __forceinline__ LossParts<float> loss(const SoftmaxArgs& a) const {
    return class_loss(rest_, at_label_, [&] {
      if constexpr (kMode == Mode::kSeesawSquare) return x_label_ + 2 * log2(limit_) + log2(table_label_);
      else if constexpr (kMode == Mode::kSeesaw)
        return fma(static_cast<float>(a.q), limit_, x_label_) + log2(table_label_);
      else return x_label_;
    });
  }

  __device__ __forceinline__ void write(T* grad, int label, float scale) const {
    const float ratio = quotient(scale, rest_ + at_label_);
    const T grad_label = from_number<T>(-rest_ * ratio);
    write_vectors(grad, [&](int k) {
      float scaled[kSize];
#pragma unroll
      for (int j = 0; j < kSize; ++j) scaled[j] = value_[k * kSize + j] * ratio;
      return pack<T>(scaled);
    });
    if (columns_.edge >= 0)
      grad[columns_.edge] = columns_.edge == label ? grad_label : from_number<T>(edge_value_ * ratio);
    if (holds(label)) grad[label] = grad_label;
  }

  // x in all columns.
  __device__ __forceinline__ void fill(T* grad, T x) const {
    Vector<T> v;
#pragma unroll
    for (int j = 0; j < kSize; ++j) v.element[j] = x;
    write_vectors(grad, [&](int) { return v; });
    if (columns_.edge >= 0) grad[columns_.edge] = x;
  }

 private:
  using Threads = RowThreads<S::kWarps, float>;
  static constexpr int kSize = Vector<T>::kSize, kVectors = S::kColumns / kSize, kSure = S::kSure / kSize;
  static constexpr int kStep = S::kRowThreads;  // from one vector of a thread to its next

  __device__ __forceinline__ bool has(int k) const {
    return k < kSure || thread_ + k * kStep < columns_.vectors;
  }

  // Every column of the thread.
  template <class Body> __device__ __forceinline__ void for_values(const Body& body) {
#pragma unroll
    for (float& v : value_) body(v);
    body(edge_value_);
  }

  // value_ becomes the logits, -inf where the row has no column. Returns the highest, label's included.
  __device__ __forceinline__ float read(const Table& table, const T* z, float* z_label) {
    const T* first = z + columns_.head + thread_ * kSize;
    Vector<T> logits[kVectors];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (has(k)) {
        logits[k] = load_streaming(first + k * kStep * kSize);
      } else {
#pragma unroll
        for (int j = 0; j < kSize; ++j) logits[k].element[j] = from_number<T>(-INFINITY);
      }
    }
    edge_value_ = columns_.edge >= 0 ? to_number(z[columns_.edge]) : -INFINITY;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) unpack(logits[k], value_ + k * kSize);
    if constexpr (kMode != Mode::kPrior)
      return Threads::template max<0>(highest_of(logits, vmax(*z_label, edge_value_)));

    // The label's prior less itself is NaN if it is infinite.
    *z_label += table_label_ + (table_label_ - table_label_);
    if (columns_.edge >= 0) edge_value_ += table.at(columns_.edge);
    float highest = vmax(*z_label, edge_value_);
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      float prior[kSize];
      table.read(k, has(k), prior);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        value_[k * kSize + j] += prior[j];
        highest = vmax(highest, value_[k * kSize + j]);
      }
    }
    return Threads::template max<0>(highest);
  }

  // Whether one of the thread's vectors has the column.
  __device__ __forceinline__ bool holds(int column) const {
    const unsigned vector = (column - columns_.head) / kSize;
    return vector < columns_.vectors && vector % kStep == thread_;
  }

  // -inf for the label's logit: sums over all columns are then sums over the others.
  __device__ __forceinline__ void remove(int label) {
    if (columns_.edge == label) edge_value_ = -INFINITY;
    const unsigned place = label - columns_.head, vector = place / kSize;
    if (vector < columns_.vectors)
      remove_among<0, kVectors>(vector / kStep, holds(label) ? static_cast<int>(place % kSize) : -1);
  }

  // A search by halves, since registers have no index.
  template <int kBegin, int kEnd> __device__ __forceinline__ void remove_among(int k, int element) {
    if constexpr (kEnd - kBegin == 1) {
#pragma unroll
      for (int j = 0; j < kSize; ++j)
        if (j == element) value_[kBegin * kSize + j] = -INFINITY;
    } else {
      constexpr int kMiddle = (kBegin + kEnd) / 2;
      if (k < kMiddle) remove_among<kBegin, kMiddle>(k, element);
      else remove_among<kMiddle, kEnd>(k, element);
    }
  }

  // From e_j, or x_j for a q that is not 2, to Seesaw's summands.
  __device__ __forceinline__ void reweight(const SoftmaxArgs& a, const Table& table) {
    constexpr bool kSquare = kMode == Mode::kSeesawSquare;
    const float total = rest_ + at_label_, q = static_cast<float>(a.q);
    const float log2_eps = static_cast<float>(a.log2_eps);
    limit_ = kSquare ? vmax(at_label_, total * exp2(log2_eps)) : vmax(x_label_, log2(total) + log2_eps);
    float sum = 0;
    const auto weigh = [&](float& v, float power) {
      const float higher = vmax(v, limit_), mitigation = vmin(power, table_label_);
      v = kSquare ? v * mitigation * (higher * higher) : exp2(fma(q, higher, v)) * mitigation;
      sum += v;
    };
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      float power[kSize];
      table.read(k, has(k), power);
#pragma unroll
      for (int j = 0; j < kSize; ++j) weigh(value_[k * kSize + j], power[j]);
    }
    weigh(edge_value_, columns_.edge >= 0 ? table.at(columns_.edge) : 0.f);
    rest_ = Threads::template sum<2>(sum);
    at_label_ = (kSquare ? at_label_ * (limit_ * limit_) : exp2(fma(q, limit_, x_label_))) * table_label_;
  }

  template <class Make> __device__ __forceinline__ void write_vectors(T* grad, const Make& make) const {
    T* first = grad + columns_.head + thread_ * kSize;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (has(k)) store(first + k * kStep * kSize, make(k));
    }
  }

  unsigned thread_;
  Columns<T> columns_;
  float value_[S::kColumns], edge_value_;
  float rest_, at_label_, x_label_;
  float table_label_, limit_;  // limit_ is its logarithm for a q that is not 2
};

template <class T, Mode kMode, class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    softmax_registers(const __grid_constant__ SoftmaxArgs a) {
  using RowOfMode = RegisterRow<T, kMode, S>;
  using Ends = RowEnds<T, int, S::kThreads>;
  __shared__ typename RowOfMode::Table::Copies copies;
  __shared__ typename Ends::Shared shared_ends;
  if constexpr (kMode != Mode::kPlain && RowOfMode::Table::kShared)
    RowOfMode::Table::fill(&copies, static_cast<const float*>(a.table), a.num_softmax);
  const float factor = static_cast<float>(batch_factor(a.rows));
  const int rows = static_cast<int>(a.rows.num_rows), step = gridDim.x * S::kRows;
  const int row_stride = static_cast<int>(a.row_stride);
  Ends ends(a, &shared_ends);
  int row = blockIdx.x * S::kRows + threadIdx.x / S::kRowThreads;
  RowInput<float> next = load_row<float>(a.rows, row < rows ? row : 0);
  // A vote tells the compiler that the warp stays together.
  for (; __any_sync(kAllLanes, row < rows); row += step) {
    const Row<float> r = make_row(a.rows, next, factor);
    next = load_row<float>(a.rows, row + step < rows ? row + step : row);
    const float scale = r.scale(), class_scale = scale * read<float>(a.upstream[0], row);
    const bool foreground = r.label >= 0 && r.label < a.num_softmax;
    const T* z = static_cast<const T*>(a.logits) + int64_t{row} * row_stride;
    T* grad = static_cast<T*>(a.grad) + int64_t{row} * a.num_columns;

    RowOfMode columns(z, a.num_softmax);
    LossParts<float> loss{0, 0};
    if (__any_sync(kAllLanes, foreground && scale != 0)) {
      columns.compute(a, copies, z, r.label);
      loss = columns.loss(a);
      if (a.grad != nullptr) columns.write(grad, r.label, class_scale);
    } else if (a.grad != nullptr) {
      columns.fill(grad, from_number<T>(class_scale * 0.f));
    }
    if (S::kWarps == 1 || threadIdx.x < kWarp) ends.add(row, scale, foreground, loss);
  }
  ends.finish();
}

template <class T, Mode kMode, class S> cudaError_t launch_shape(const SoftmaxArgs& a, cudaStream_t stream) {
  const auto kernel = softmax_registers<T, kMode, S>;
  return launch(kernel, resident_blocks(kernel, S::kThreads, a.rows.num_rows, S::kRows), S::kThreads, stream,
                a);
}

// Of up to kMaxRegisterColumns columns.
template <class T, Mode kMode> cudaError_t launch_mode(const SoftmaxArgs& a, cudaStream_t stream) {
  constexpr bool kSmall = sizeof(T) == 2;  // whose loads need more warps to hide behind
  const int w = a.num_softmax / Vector<T>::kSize * Vector<T>::kSize;
  if (w <= 256) return launch_shape<T, kMode, Shape<1, 8, 0, 8>>(a, stream);
  if (w <= 512) return launch_shape<T, kMode, Shape<1, 16, 256, 8>>(a, stream);
  if (w <= 1024) return launch_shape<T, kMode, Shape<1, 32, 512, kSmall ? 6 : 5>>(a, stream);
  if (w <= 1280) return launch_shape<T, kMode, Shape<1, 40, 1024, kSmall ? 6 : 5>>(a, stream);
  if (w <= 2048) return launch_shape<T, kMode, Shape<2, 32, 1280, kSmall ? 12 : 10>>(a, stream);
  if (w <= 3072) return launch_shape<T, kMode, Shape<4, 24, 2048, 5>>(a, stream);
  if (w <= 5120) return launch_shape<T, kMode, Shape<4, 40, 3072, 4>>(a, stream);
  if (w <= 10240) return launch_shape<T, kMode, Shape<8, 40, 5120, 2>>(a, stream);
  if (w <= 16384) return launch_shape<T, kMode, Shape<8, 64, 10240, 2>>(a, stream);
  if (w <= 24576) return launch_shape<T, kMode, Shape<16, 48, 16384, 1>>(a, stream);
  return launch_shape<T, kMode, Shape<16, 64, 24576, 1>>(a, stream);
}

template <class T> cudaError_t launch_softmax_registers(const SoftmaxArgs& a, cudaStream_t stream) {
  if (a.reweight == SoftmaxReweight::kNone) return launch_mode<T, Mode::kPlain>(a, stream);
  if (a.reweight == SoftmaxReweight::kPrior) return launch_mode<T, Mode::kPrior>(a, stream);
  if (a.q == 2) return launch_mode<T, Mode::kSeesawSquare>(a, stream);
  return launch_mode<T, Mode::kSeesaw>(a, stream);
}

}  // namespace cuda
}  // namespace gol
