// gol_kernels::bernoulli_{loss,grad}_native on the CPU.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "../registration.h"
#include "power_table.h"
#include "rows.h"

namespace gol {
namespace cpu {
namespace {

// What the kernel's arguments point to.
struct Tables {
  std::vector<uint64_t> masks;
  std::vector<double> positive_weight, weight64;
  std::vector<float> weight32;
  at::Tensor row_mask;
  PowerTable power;
};

// Masks of the kernel, a bit for each column where dropped(mask, column).
template <class Dropped>
void set_masks(int64_t count, const Dropped& dropped, BernoulliArgs* args, Tables* tables) {
  const int64_t k = args->num_columns;
  args->mask_words = (k + 63) / 64 + 1;
  tables->masks.assign(count * args->mask_words, 0);
  for (int64_t m = 0; m < count; ++m) {
    uint64_t* mask = tables->masks.data() + m * args->mask_words;
    for (int64_t c = 0; c < k; ++c) mask[c / 64] |= uint64_t{dropped(m, c)} << (c % 64);
  }
  args->masks = tables->masks.data();
}

// weight(label) for the positive of each row that has one.
template <class Weight>
void set_positive_weight(const Weight& weight, const Rows& rows, BernoulliArgs* args, Tables* tables) {
  tables->positive_weight.assign(rows.weight.size(), 1.0);
  for (size_t i = 0; i < rows.weight.size(); ++i) {
    const int64_t label = args->labels[i];
    if (label >= 0 && label < args->num_columns) tables->positive_weight[i] = weight(label);
  }
  args->positive_weight = tables->positive_weight.data();
}

// DropLoss keeps a background row's negative of a rare class with probability n_rare / n_foreground
// of this batch, here to the nearest 2^-16: the draw, 16 bits, must be below the limit. Without
// foreground everything is kept (the released code compares with NaN there, with the same result).
uint32_t keep_limit(const RowArguments& a, const BernoulliArgs& args, int64_t num_rows) {
  uint64_t foreground = 0, rare_foreground = 0;
  for (int64_t i = 0; i < num_rows; ++i) {
    const int64_t label = args.labels[i];
    if (label < 0 || label >= a.num_classes || label == a.ignore_index) continue;
    ++foreground;
    rare_foreground += args.masks[label / 64] >> (label % 64) & 1;
  }
  if (foreground == 0) return 0x10000;
  return static_cast<uint32_t>((2 * rare_foreground * 0x10000 + foreground) / (2 * foreground));
}

void set_drop(const RowArguments& a, const Rows& rows, const BernoulliOptions& o, BernoulliArgs* args,
              Tables* tables) {
  const auto rare = o.class_table->accessor<bool, 1>();
  set_masks(1, [&](int64_t, int64_t c) { return rare[c]; }, args, tables);
  args->foreground = Terms::kMasked;
  if (o.reweight == Reweight::kEQL) return;
  const auto seed_offset = o.rng->accessor<int64_t, 1>();
  args->background = Terms::kSampled;
  args->seed = static_cast<uint64_t>(seed_offset[0]);
  args->offset = static_cast<uint64_t>(seed_offset[1]);
  args->keep_limit = keep_limit(a, *args, rows.logits.size(0));
}

void set_weights(const Rows& rows, const BernoulliOptions& o, BernoulliArgs* args, Tables* tables) {
  const int64_t k = args->num_columns;
  const at::Tensor table = o.class_table->to(at::kDouble).contiguous();
  const double* weight = table.const_data_ptr<double>();
  set_positive_weight([&](int64_t label) { return weight[label]; }, rows, args, tables);
  tables->weight64.assign(weight + k, weight + 2 * k);
  tables->weight32.assign(weight + k, weight + 2 * k);
  args->weight = rows.dtype == DType::kFloat64 ? static_cast<const void*>(tables->weight64.data())
                                               : tables->weight32.data();
  args->foreground = args->background = Terms::kWeighted;
}

void set_federated(const Rows& rows, const BernoulliOptions& o, BernoulliArgs* args, Tables* tables) {
  const auto kept = o.class_table->accessor<bool, 1>();
  set_masks(1, [&](int64_t, int64_t c) { return !kept[c]; }, args, tables);
  set_positive_weight([&](int64_t label) { return kept[label] ? 1.0 : 0.0; }, rows, args, tables);
  args->foreground = args->background = Terms::kMasked;
}

void set_acsl(const RowArguments& a, const Rows& rows, const BernoulliOptions& o, BernoulliArgs* args,
              Tables* tables) {
  const int64_t n = rows.logits.size(0);
  tables->row_mask = o.row_table->contiguous();
  args->row_mask = tables->row_mask.const_data_ptr<uint8_t>();
  const auto groups = o.class_table->accessor<uint8_t, 1>();
  std::array<bool, 256> occurs{};
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (args->labels[i] != a.num_classes) continue;
    occurs[args->row_mask[i]] = true;
    count = std::max<int64_t>(count, args->row_mask[i] + 1);
  }
  set_masks(count, [&](int64_t m, int64_t c) { return occurs[m] && (groups[c] & m) == 0; }, args, tables);
  // The kernel keeps what is above a limit: the largest number below the threshold.
  constexpr double kInf = std::numeric_limits<double>::infinity();
  args->logit_limit = rows.dtype == DType::kFloat64
                          ? std::nextafter(o.logit_threshold, -kInf)
                          : std::nextafter(static_cast<float>(o.logit_threshold), static_cast<float>(-kInf));
  args->foreground = Terms::kAbove;
  args->background = Terms::kMasked;
}

// Runs the kernel; returns the unscaled row losses. statistics: float64 [2, K] of zeros, or null.
std::vector<double> run(const RowArguments& a, const Rows& rows, const std::vector<double>& row_scale,
                        const BernoulliOptions& o, at::Tensor* grad, at::Tensor* statistics) {
  const int64_t n = rows.logits.size(0), k = rows.logits.size(1);
  std::vector<double> row_loss(n), positive_slope(statistics != nullptr ? n : 0);
  BernoulliArgs args{};
  set_rows(rows, grad, &args);
  args.num_classes = a.num_classes;
  args.row_scale = row_scale.data();
  args.row_loss = row_loss.data();
  args.link = o.link;
  args.link_options = o.link_options;
  Tables tables;
  switch (o.reweight) {
    case Reweight::kNone: break;
    case Reweight::kEQL:
    case Reweight::kDrop: set_drop(a, rows, o, &args, &tables); break;
    case Reweight::kFederated: set_federated(rows, o, &args, &tables); break;
    case Reweight::kACSL: set_acsl(a, rows, o, &args, &tables); break;
    case Reweight::kWeights: set_weights(rows, o, &args, &tables); break;
    case Reweight::kSeesaw:
      tables.power = seesaw_powers(*o.class_table, k, o.p);
      args.power = tables.power.data(rows.dtype);
      args.q = std::fmax(o.q, 0.0);
      args.eps = o.eps;
      args.foreground = Terms::kSeesaw;
      if (rows.dtype == DType::kFloat64 || tables.power.fits_float32(-args.q * std::log2(o.eps))) break;
      return in_float64(rows, grad, [&](const Rows& wide, at::Tensor* wide_grad) {
        return run(a, wide, row_scale, o, wide_grad, statistics);
      });
  }
  const KernelTable& table = kernels_for(rows.dtype);
  const int64_t scratch_size = bernoulli_scratch(k);
  if (statistics == nullptr) {
    parallel_ranges<uint64_t>(n, kRowGrain, scratch_size, [&](int64_t begin, int64_t end, uint64_t* scratch) {
      table.bernoulli(args, begin, end, scratch);
    });
    return row_loss;
  }
  // The rows' sums are added block by block, the same blocks whatever the number of threads.
  args.row_weight = rows.weight.data();
  args.positive_slope = positive_slope.data();
  constexpr int64_t kMaxBlocks = 64;
  const int64_t size = std::max((n + kMaxBlocks - 1) / kMaxBlocks, 2 * kRowGrain);
  const int64_t blocks = (n + size - 1) / size;
  std::vector<double> sums(blocks * k);
  parallel_ranges<uint64_t>(blocks, 1, scratch_size, [&](int64_t begin, int64_t end, uint64_t* scratch) {
    for (int64_t block = begin; block < end; ++block) {
      BernoulliArgs own = args;
      own.negative_sums = sums.data() + block * k;
      table.bernoulli(own, block * size, std::min((block + 1) * size, n), scratch);
    }
  });
  double* const positives = statistics->mutable_data_ptr<double>();
  for (int64_t i = 0; i < n; ++i) {
    if (positive_slope[i] != 0) positives[args.labels[i]] += rows.weight[i] * positive_slope[i];
  }
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t j = 0; j < k; ++j) positives[k + j] += sums[block * k + j];
  }
  return row_loss;
}

LossResults bernoulli_loss(const RowArguments& a, const BernoulliOptions& o, bool compute_grad,
                           bool compute_statistics) {
  const Rows rows = prepare_rows(a);
  at::Tensor grad = empty_grad(rows, compute_grad);
  const auto float64 = a.logits.options().dtype(at::kDouble);
  at::Tensor statistics =
      compute_statistics ? at::zeros({2, a.logits.size(1)}, float64) : at::empty({0}, float64);
  const auto row_loss =
      run(a, rows, rows.scale, o, compute_grad ? &grad : nullptr, compute_statistics ? &statistics : nullptr);
  return {reduce_rows(rows, row_loss, a.reduction), grad, statistics};
}

at::Tensor bernoulli_grad(const RowArguments& a, const BernoulliOptions& o, const at::Tensor& grad_loss) {
  const Rows rows = prepare_rows(a);
  at::Tensor grad = empty_grad(rows, true);
  run(a, rows, scaled_by(rows.scale, grad_loss), o, &grad, nullptr);
  return grad;
}

}  // namespace

void register_bernoulli(torch::Library& m) { implement_bernoulli(m, bernoulli_loss, bernoulli_grad); }

}  // namespace cpu
}  // namespace gol
