// Any Bernoulli loss, element by element: float64, rows apart, unaligned tensors, few columns, losses of
// single rows, statistics of any reweighting. And the choice between this and the flat kernel.
#include "bernoulli_flat.cuh"

namespace gol {
namespace cuda {
namespace {

constexpr int kGeneralThreads = 128;
constexpr int kWarps = kGeneralThreads / kWarp;

// A warp takes one row after the other, a lane always the same columns.
template <class T, class L>
__global__ void __launch_bounds__(kGeneralThreads)
    bernoulli_general(const __grid_constant__ TermArgs<L> a, Policy policy, int num_warps) {
  using N = Number<T>;
  const BatchRule<N> batch = batch_rule<N>(a, policy);
  const int lane = threadIdx.x % kWarp, warp = blockIdx.x * kWarps + threadIdx.x / kWarp;
  const int num_rows = static_cast<int>(a.rows.num_rows);
  const bool counts = a.statistics != nullptr && warp < num_warps;
  double* positives = static_cast<double*>(a.partial_statistics) + int64_t{warp} * a.num_columns;
  double* negatives = positives + int64_t{num_warps} * a.num_columns;
  for (int c = lane; c < a.num_columns && counts; c += kWarp) positives[c] = negatives[c] = 0;
  double loss = 0;
  for (int row = warp; row < num_rows && warp < num_warps; row += num_warps) {
    const RowRule<N> rule = row_rule<T>(a, policy, a.statistics != nullptr, batch, row);
    const T* z = static_cast<const T*>(a.logits) + row * a.row_stride;
    T* grad = static_cast<T*>(a.grad) + int64_t{row} * a.num_columns;
    N of_lane = 0;
    for (int c = lane; c < a.num_columns; c += kWarp) {
      const Term<N> t = term(a, policy, batch, rule, row, c, to_number(z[c]));
      of_lane += t.loss;
      if (a.grad != nullptr) grad[c] = from_number<T>(rule.scale() * t.slope);
      if (counts)
        (c == rule.positive ? positives : negatives)[c] += fabs(static_cast<double>(rule.weight * t.slope));
    }
    const double of_row = warp_sum(static_cast<double>(of_lane)) * rule.scale();
    if (lane != 0) continue;
    loss += of_row;
    if (a.loss != nullptr && !a.reduces_loss) static_cast<N*>(a.loss)[row] = static_cast<N>(of_row);
  }
  if (a.loss != nullptr && a.reduces_loss)
    reduce_loss<1, N>({loss}, {static_cast<N*>(a.loss)}, a.rows.workspace);
}

// statistics[kind][c] = the sum over r of partial[kind][r][c], always in the same order. 32 columns a block,
// of which 8 warps share the rows.
constexpr int kSumThreads = 256;

template <class P>
__global__ void __launch_bounds__(kSumThreads)
    sum_columns(const P* partial, int num_rows, int num_columns, double* statistics) {
  __shared__ double of_warp[kSumThreads / kWarp][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int kind = blockIdx.x % 2, column = blockIdx.x / 2 * kWarp + lane;
  double sum = 0;
  if (column < num_columns) {
    const P* rows = partial + (int64_t{kind} * num_rows + warp) * num_columns + column;
    for (int r = warp; r < num_rows;
         r += kSumThreads / kWarp, rows += int64_t{num_columns} * (kSumThreads / kWarp))
      sum += static_cast<double>(*rows);
  }
  of_warp[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= num_columns) return;
  for (int w = 1; w < kSumThreads / kWarp; ++w) sum += of_warp[w][lane];
  statistics[int64_t{kind} * num_columns + column] = sum;
}

template <class P>
cudaError_t launch_sum_columns(const BernoulliArgs& a, int64_t num_rows, cudaStream_t stream) {
  return launch(sum_columns<P>, 2 * ((a.num_columns + kWarp - 1) / kWarp), kSumThreads, stream,
                static_cast<const P*>(a.partial_statistics), static_cast<int>(num_rows), a.num_columns,
                a.statistics);
}

// --- the choice ------------------------------------------------------------------------------------
bool is_flat(const BernoulliArgs& a) {
  const int vector = a.dtype == DType::kFloat32 ? 4 : 8;
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const Policy policy = policy_of(a.reweight);
  const bool has_statistics = policy == Policy::kNone || policy == Policy::kWeights;
  const bool has_released =
      policy != Policy::kWeights && policy != Policy::kSeesaw && a.statistics == nullptr;
  return a.dtype != DType::kFloat64 && a.row_stride == a.num_columns && aligned(a.logits) &&
         aligned(a.grad) && FixedColumns::fits(a.rows.num_rows, a.num_columns, vector) &&
         (a.loss == nullptr || a.reduces_loss) && (a.statistics == nullptr || has_statistics) &&
         (a.link != Link::kGumbelReleased || has_released);
}

int general_warps(const BernoulliArgs& a) {
  constexpr int64_t kResident = 16, kMaxPartial = 1 << 21;  // warps on a multiprocessor; numbers
  int64_t warps = num_multiprocessors() * kResident;
  if (a.statistics != nullptr && warps * a.num_columns > kMaxPartial) warps = kMaxPartial / a.num_columns;
  if (warps > a.rows.num_rows) warps = a.rows.num_rows;
  return static_cast<int>(warps < 1 ? 1 : warps);
}

template <class T, class L> cudaError_t launch_general_link(const BernoulliArgs& a, cudaStream_t stream) {
  const int warps = general_warps(a);
  return launch(bernoulli_general<T, L>, (warps + kWarps - 1) / kWarps, kGeneralThreads, stream,
                TermArgs<L>(a), policy_of(a.reweight), warps);
}

template <class T> cudaError_t launch_general(const BernoulliArgs& a, cudaStream_t stream) {
  using N = Number<T>;
  switch (a.link) {
    case Link::kGumbel: return launch_general_link<T, FlatGumbel<N, false, false>>(a, stream);
    case Link::kGumbelReleased: return launch_general_link<T, FlatGumbel<N, true, false>>(a, stream);
    case Link::kSigmoid: return launch_general_link<T, FlatSigmoid<N>>(a, stream);
    case Link::kProbit: return launch_general_link<T, FlatProbit<N>>(a, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int64_t partial_statistics_bytes(const BernoulliArgs& a) {
  if (a.statistics == nullptr) return 0;
  if (is_flat(a))
    return 2 * int64_t{flat_columns(a, kStatisticsBlocks).stride} * a.num_columns * sizeof(float);
  return 2 * int64_t{general_warps(a)} * a.num_columns * sizeof(double);
}

cudaError_t launch_bernoulli(const BernoulliArgs& a, cudaStream_t stream) {
  const bool flat = is_flat(a);
  cudaError_t error;
  if (flat) {
    error = for_dtype<false>(a.dtype, [&](auto* storage) {
      return launch_flat_type<std::remove_pointer_t<decltype(storage)>>(a, stream);
    });
  } else {
    error = for_dtype(a.dtype, [&](auto* storage) {
      return launch_general<std::remove_pointer_t<decltype(storage)>>(a, stream);
    });
  }
  if (error != cudaSuccess || a.statistics == nullptr) return error;
  return flat ? launch_sum_columns<float>(a, flat_columns(a, kStatisticsBlocks).stride, stream)
              : launch_sum_columns<double>(a, general_warps(a), stream);
}

}  // namespace cuda
}  // namespace gol
