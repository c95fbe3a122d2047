// gol_kernels::bernoulli_{loss,grad}_native and gumbel_activation{,_grad}_native on the CPU.
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

// The arguments that the Bernoulli ops have beside the rows', under the names of the op schemas.
struct Options {
  const OptionalTensor &class_table, &row_table, &rng;
  c10::string_view link;
  double temperature, clip_min, clip_max;
  c10::string_view slope, reweight;
  double p, q, eps, logit_threshold;
};

// What the kernel's arguments point to.
struct Tables {
  std::vector<uint64_t> masks;
  std::vector<double> positive_weight, weight64;
  std::vector<float> weight32;
  at::Tensor row_mask;
  PowerTable power;
};

void set_link(const char* op, const Options& o, BernoulliArgs* args) {
  const bool released = o.slope == "released", straight_through = o.slope == "straight_through";
  TORCH_CHECK_VALUE(released || straight_through || o.slope == "zero_outside", op, ": unknown slope '",
                    o.slope, "'");
  args->link_options = {o.temperature, o.clip_min, o.clip_max, straight_through ? 1.0 : 0.0};
  if (o.link == "gumbel") args->link = released ? Link::kGumbelReleased : Link::kGumbel;
  else if (o.link == "sigmoid") args->link = Link::kSigmoid;
  else if (o.link == "probit") args->link = Link::kProbit;
  else TORCH_CHECK_VALUE(false, op, ": unknown link '", o.link, "'");
  const bool has_released = o.reweight == "none" || o.reweight == "eql" || o.reweight == "drop";
  TORCH_CHECK_VALUE(
      !released || (o.link == "gumbel" && has_released), op,
      ": slope 'released' exists for link 'gumbel' and reweight 'none', 'eql' or 'drop', got link '", o.link,
      "' and reweight '", o.reweight, "'");
}

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

void set_drop(const RowArguments& a, const Rows& rows, const Options& o, BernoulliArgs* args,
              Tables* tables) {
  check_table(a.op, "class_table", o.class_table, {args->num_columns}, at::kBool, o.reweight, a.logits);
  const auto rare = o.class_table->accessor<bool, 1>();
  set_masks(1, [&](int64_t, int64_t c) { return rare[c]; }, args, tables);
  args->foreground = Terms::kMasked;
  if (o.reweight == "eql") return;
  TORCH_CHECK_VALUE(o.rng.has_value() && o.rng->numel() == 2 && o.rng->scalar_type() == at::kLong, a.op,
                    ": DropLoss needs rng, an int64 tensor of (seed, offset)");
  const auto seed_offset = o.rng->accessor<int64_t, 1>();
  args->background = Terms::kSampled;
  args->seed = static_cast<uint64_t>(seed_offset[0]);
  args->offset = static_cast<uint64_t>(seed_offset[1]);
  args->keep_limit = keep_limit(a, *args, rows.logits.size(0));
}

void set_weights(const RowArguments& a, const Rows& rows, const Options& o, BernoulliArgs* args,
                 Tables* tables) {
  const int64_t k = args->num_columns;
  TORCH_CHECK_VALUE(o.class_table.has_value() && o.class_table->sizes() == at::IntArrayRef({2, k}), a.op,
                    ": reweight 'weights' needs class_table, a tensor of [2, ", k, "]");
  const at::Tensor table = o.class_table->to(at::kDouble).contiguous();
  const double* weight = table.const_data_ptr<double>();
  set_positive_weight([&](int64_t label) { return weight[label]; }, rows, args, tables);
  tables->weight64.assign(weight + k, weight + 2 * k);
  tables->weight32.assign(weight + k, weight + 2 * k);
  args->weight = rows.dtype == DType::kFloat64 ? static_cast<const void*>(tables->weight64.data())
                                               : tables->weight32.data();
  args->foreground = args->background = Terms::kWeighted;
}

void set_federated(const RowArguments& a, const Rows& rows, const Options& o, BernoulliArgs* args,
                   Tables* tables) {
  check_table(a.op, "class_table", o.class_table, {args->num_columns}, at::kBool, o.reweight, a.logits);
  const auto kept = o.class_table->accessor<bool, 1>();
  set_masks(1, [&](int64_t, int64_t c) { return !kept[c]; }, args, tables);
  set_positive_weight([&](int64_t label) { return kept[label] ? 1.0 : 0.0; }, rows, args, tables);
  args->foreground = args->background = Terms::kMasked;
}

void set_acsl(const RowArguments& a, const Rows& rows, const Options& o, BernoulliArgs* args,
              Tables* tables) {
  const int64_t n = rows.logits.size(0);
  check_table(a.op, "class_table", o.class_table, {args->num_columns}, at::kByte, o.reweight, a.logits);
  check_table(a.op, "row_table", o.row_table, {n}, at::kByte, o.reweight, a.logits);
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
                        const Options& o, at::Tensor* grad, at::Tensor* statistics) {
  const int64_t n = rows.logits.size(0), k = rows.logits.size(1);
  std::vector<double> row_loss(n), positive_slope(statistics != nullptr ? n : 0);
  BernoulliArgs args{};
  args.dtype = rows.dtype;
  args.logits = rows.logits.const_data_ptr();
  args.row_stride = rows.logits.stride(0);
  args.grad = grad != nullptr ? grad->mutable_data_ptr() : nullptr;
  args.num_columns = k;
  args.num_classes = a.num_classes;
  args.labels = rows.labels.const_data_ptr<int64_t>();
  args.row_scale = row_scale.data();
  args.row_loss = row_loss.data();
  set_link(a.op, o, &args);
  Tables tables;
  if (o.reweight == "eql" || o.reweight == "drop") set_drop(a, rows, o, &args, &tables);
  else if (o.reweight == "weights") set_weights(a, rows, o, &args, &tables);
  else if (o.reweight == "federated") set_federated(a, rows, o, &args, &tables);
  else if (o.reweight == "acsl") set_acsl(a, rows, o, &args, &tables);
  else if (o.reweight == "seesaw") {
    check_counts(a.op, o.class_table, k, a.logits);
    tables.power = seesaw_powers(*o.class_table, k, o.p);
    args.power = tables.power.data(rows.dtype);
    args.q = std::fmax(o.q, 0.0);
    args.eps = o.eps;
    if (rows.dtype != DType::kFloat64 && !tables.power.fits_float32(-args.q * std::log2(o.eps))) {
      return in_float64(rows, grad, [&](const Rows& wide, at::Tensor* wide_grad) {
        return run(a, wide, row_scale, o, wide_grad, statistics);
      });
    }
    args.foreground = Terms::kSeesaw;
  } else {
    TORCH_CHECK_VALUE(o.reweight == "none", a.op, ": unknown reweight '", o.reweight, "'");
  }
  // fp64 exists in plain C++ alone: it is the kernel of gradient checks.
  const KernelTable& table = rows.dtype == DType::kFloat64 ? kGenericKernels : kernels();
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

std::tuple<at::Tensor, at::Tensor, at::Tensor> bernoulli_loss(
    const at::Tensor& logits, const at::Tensor& labels, const OptionalTensor& row_weights,
    const OptionalTensor& avg_factor, const OptionalTensor& class_table, const OptionalTensor& row_table,
    const OptionalTensor& rng, c10::string_view link, double temperature, double clip_min, double clip_max,
    c10::string_view slope, c10::string_view reweight, double p, double q, double eps, double logit_threshold,
    int64_t num_classes, int64_t ignore_index, c10::string_view reduction, double scale, bool validate,
    bool compute_grad, bool compute_statistics) {
  const RowArguments a{"bernoulli_loss", logits,       labels,    row_weights, avg_factor,
                       num_classes,      ignore_index, reduction, scale,       validate};
  const Options options{class_table, row_table, rng, link, temperature, clip_min,       clip_max,
                        slope,       reweight,  p,   q,    eps,         logit_threshold};
  const Rows rows = prepare_rows(a);
  at::Tensor grad = empty_grad(rows, compute_grad);
  const auto float64 = logits.options().dtype(at::kDouble);
  at::Tensor statistics =
      compute_statistics ? at::zeros({2, logits.size(1)}, float64) : at::empty({0}, float64);
  const auto row_loss = run(a, rows, rows.scale, options, compute_grad ? &grad : nullptr,
                            compute_statistics ? &statistics : nullptr);
  return {reduce_rows(rows, row_loss, reduction), grad, statistics};
}

at::Tensor bernoulli_grad(const at::Tensor& grad_loss, const at::Tensor& logits, const at::Tensor& labels,
                          const OptionalTensor& row_weights, const OptionalTensor& avg_factor,
                          const OptionalTensor& class_table, const OptionalTensor& row_table,
                          const OptionalTensor& rng, c10::string_view link, double temperature,
                          double clip_min, double clip_max, c10::string_view slope, c10::string_view reweight,
                          double p, double q, double eps, double logit_threshold, int64_t num_classes,
                          int64_t ignore_index, c10::string_view reduction, double scale, bool validate) {
  const RowArguments a{"bernoulli_grad", logits,       labels,    row_weights, avg_factor,
                       num_classes,      ignore_index, reduction, scale,       validate};
  const Options options{class_table, row_table, rng, link, temperature, clip_min,       clip_max,
                        slope,       reweight,  p,   q,    eps,         logit_threshold};
  const Rows rows = prepare_rows(a);
  at::Tensor grad = empty_grad(rows, true);
  run(a, rows, scaled_by(rows.scale, grad_loss), options, &grad, nullptr);
  return grad;
}

at::Tensor run_activation(const at::Tensor& logits, const at::Tensor* grad_output,
                          const LinkOptions& options) {
  const at::Tensor z = logits.contiguous();
  const at::Tensor upstream = grad_output != nullptr ? grad_output->to(z.scalar_type()).contiguous() : z;
  at::Tensor output = at::empty_like(z, at::MemoryFormat::Contiguous);
  GumbelActivationArgs args{};
  switch (z.scalar_type()) {
    case at::kFloat: args.dtype = DType::kFloat32; break;
    case at::kDouble: args.dtype = DType::kFloat64; break;
    case at::kBFloat16: args.dtype = DType::kBFloat16; break;
    case at::kHalf: args.dtype = DType::kFloat16; break;
    default:
      TORCH_CHECK_TYPE(false, "gumbel_activation: floating-point logits expected, got ", z.scalar_type());
  }
  args.logits = z.const_data_ptr();
  args.grad_output = grad_output != nullptr ? upstream.const_data_ptr() : nullptr;
  args.output = output.mutable_data_ptr();
  args.link_options = options;
  const KernelTable& table = args.dtype == DType::kFloat64 ? kGenericKernels : kernels();
  constexpr int64_t kGrain = 16384;  // elements
  at::parallel_for(0, z.numel(), kGrain,
                   [&](int64_t begin, int64_t end) { table.gumbel_activation(args, begin, end); });
  return output;
}

at::Tensor gumbel_activation(const at::Tensor& logits, double temperature, double clip_min, double clip_max) {
  return run_activation(logits, nullptr, {temperature, clip_min, clip_max, 0.0});
}

at::Tensor gumbel_activation_grad(const at::Tensor& grad_output, const at::Tensor& logits, double temperature,
                                  double clip_min, double clip_max) {
  return run_activation(logits, &grad_output, {temperature, clip_min, clip_max, 0.0});
}

}  // namespace

void register_bernoulli(torch::Library& m) {
  m.impl("bernoulli_loss_native", bernoulli_loss);
  m.impl("bernoulli_grad_native", bernoulli_grad);
  m.impl("gumbel_activation_native", gumbel_activation);
  m.impl("gumbel_activation_grad_native", gumbel_activation_grad);
}

}  // namespace cpu
}  // namespace gol
