// The one small kernel before a loss: everything of a batch that the rows need and that would else be
// read on the host.
#include "common.cuh"

namespace gol {
namespace cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kRowsPerBlock = 4 * kThreads;

// One of this block's labels after the other, a block's share of the batch being contiguous.
__device__ BatchCounts count_labels(const PrologueArgs& a) {
  const RowArgs& rows = a.rows;
  const int64_t share = (rows.num_rows + gridDim.x - 1) / gridDim.x;
  const int64_t begin = share * blockIdx.x;
  const int64_t end = begin + share < rows.num_rows ? begin + share : rows.num_rows;
  BatchCounts c{0, 0, 0};
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const int64_t label = rows.labels[i];
    if (label == rows.ignore_index) continue;
    ++c.counted;
    if (label < 0 || label >= rows.num_classes) continue;
    ++c.foreground;
    if (a.rare != nullptr) c.rare += a.rare[label];
  }
  return c;
}

// Counts are whole numbers far below 2^53: sums of doubles are exact.
__device__ int64_t block_total(int64_t x) { return static_cast<int64_t>(block_sum(static_cast<double>(x))); }

__device__ double block_max(double x) {
  __shared__ double of_warp[kWarp];
  x = warp_max(x);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = x;
  __syncthreads();
  for (unsigned w = 0; w < blockDim.x / kWarp; ++w) x = vmax(x, of_warp[w]);
  return x;
}

__device__ void make_powers(const PrologueArgs& a) {
  const auto count = [&](int64_t c) { return vmax(read(a.class_counts, c), 1.0); };
  double largest = 1;
  for (int64_t c = threadIdx.x; c < a.num_powers; c += kThreads) largest = vmax(largest, count(c));
  const double log2_largest = log2(block_max(largest));
  const double p = vmax(a.p, 0.0), lowest = a.is_double ? -900 : -120;
  for (int64_t c = int64_t{blockIdx.x} * kThreads + threadIdx.x; c < a.num_powers;
       c += int64_t{gridDim.x} * kThreads) {
    const double power = exp2(vmax(p * (log2(count(c)) - log2_largest), lowest));
    if (a.is_double) static_cast<double*>(a.power)[c] = power;
    else static_cast<float*>(a.power)[c] = static_cast<float>(power);
  }
}

template <class N> __device__ void code_rows(const PrologueArgs& a) {
  for (int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x; row < a.rows.num_rows;
       row += int64_t{gridDim.x} * kThreads) {
    const Row<N> r = read_row<N>(a.rows, row, N(1));
    static_cast<CodedRow<N>*>(a.coded_rows)[row] = {r.label < a.num_columns ? r.label : -1, r.scale()};
  }
}

__global__ void __launch_bounds__(kThreads) prologue(const __grid_constant__ PrologueArgs a) {
  Workspace* workspace = a.rows.workspace;
  if (blockIdx.x == 0 && threadIdx.x == 0) workspace->arrived = 0;
  if (a.rows.num_counts > 0) {
    BatchCounts c = count_labels(a);
    c = {block_total(c.counted), block_total(c.foreground), block_total(c.rare)};
    if (threadIdx.x == 0) workspace->counts[blockIdx.x] = c;
  }
  if (a.num_powers > 0) make_powers(a);
  if (a.coded_rows != nullptr && a.is_double) code_rows<double>(a);
  if (a.coded_rows != nullptr && !a.is_double) code_rows<float>(a);
}

}  // namespace

int prologue_blocks(int64_t num_rows) {
  const int64_t blocks = (num_rows + kRowsPerBlock - 1) / kRowsPerBlock;
  return static_cast<int>(blocks < 1 ? 1 : blocks > kMaxPrologueBlocks ? kMaxPrologueBlocks : blocks);
}

cudaError_t launch_prologue(const PrologueArgs& a, cudaStream_t stream) {
  const bool one_block = a.rows.num_counts == 0 && a.coded_rows == nullptr;
  return launch(prologue, one_block ? 1 : prologue_blocks(a.rows.num_rows), kThreads, stream, a);
}

}  // namespace cuda
}  // namespace gol
