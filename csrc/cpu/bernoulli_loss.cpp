// gol_kernels::bernoulli_{loss,grad}_native and gumbel_activation{,_grad}_native on the CPU.
#include <torch/library.h>

#include "rows.h"

namespace gol {
namespace cpu {
namespace {

struct Options {
  c10::string_view link;
  LinkOptions link_options;
  c10::string_view slope;
  c10::string_view reweight;
};

GumbelSlope parse_slope(const char* op, c10::string_view slope) {
  if (slope == "zero_outside") return GumbelSlope::kZeroOutside;
  if (slope == "straight_through") return GumbelSlope::kStraightThrough;
  TORCH_CHECK_VALUE(slope == "released", op, ": unknown slope '", slope, "'");
  return GumbelSlope::kReleased;
}

Link parse_link(const char* op, c10::string_view link) {
  if (link == "sigmoid") return Link::kSigmoid;
  TORCH_CHECK_VALUE(link == "gumbel", op, ": unknown link '", link, "'");
  return Link::kGumbel;
}

Drop parse_drop(const char* op, c10::string_view reweight) {
  if (reweight == "none") return Drop::kNone;
  if (reweight == "eql") return Drop::kForeground;
  TORCH_CHECK_VALUE(reweight == "drop", op, ": unknown reweight '", reweight, "'");
  return Drop::kForegroundAndSampledBackground;
}

// One bit for each column, and 64 bits of padding for reads that begin inside the last word.
std::vector<uint64_t> rare_bits(const char* op, const OptionalTensor& rare, int64_t num_columns) {
  TORCH_CHECK_VALUE(rare.has_value() && rare->dim() == 1 && rare->size(0) == num_columns &&
                        rare->scalar_type() == at::kBool,
                    op, ": this reweighting needs class_table, a bool tensor of [", num_columns, "]");
  std::vector<uint64_t> bits((num_columns + 63) / 64 + 1);
  const auto table = rare->accessor<bool, 1>();
  for (int64_t c = 0; c < num_columns; ++c) bits[c / 64] |= uint64_t{table[c]} << (c % 64);
  return bits;
}

// DropLoss keeps a background row's negative of a rare class with probability n_rare / n_foreground
// of this batch, here to the nearest 2^-16: the draw, 16 bits, must be below the limit. Without
// foreground everything is kept (the released code compares with NaN there, with the same result).
uint32_t keep_limit(const Rows& rows, const std::vector<uint64_t>& rare, int64_t num_classes) {
  uint64_t foreground = 0, rare_foreground = 0;
  const int64_t* label = rows.labels.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows.labels.numel(); ++i) {
    if (label[i] < 0 || label[i] >= num_classes) continue;
    ++foreground;
    rare_foreground += rare[label[i] / 64] >> (label[i] % 64) & 1;
  }
  if (foreground == 0) return 0x10000;
  return static_cast<uint32_t>((2 * rare_foreground * 0x10000 + foreground) / (2 * foreground));
}

// Runs the kernel; returns the unscaled row losses.
std::vector<double> run(const RowArguments& a, const Rows& rows, const std::vector<double>& row_scale,
                        const Options& o, const OptionalTensor& class_table, const OptionalTensor& rng,
                        at::Tensor* grad) {
  const int64_t n = rows.logits.size(0), k = rows.logits.size(1);
  std::vector<double> row_loss(n);
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
  args.link = parse_link(a.op, o.link);
  args.gumbel_slope = parse_slope(a.op, o.slope);
  args.link_options = o.link_options;
  args.drop = parse_drop(a.op, o.reweight);
  std::vector<uint64_t> rare;
  if (args.drop != Drop::kNone) {
    rare = rare_bits(a.op, class_table, k);
    args.rare = rare.data();
  }
  if (args.drop == Drop::kForegroundAndSampledBackground) {
    TORCH_CHECK_VALUE(rng.has_value() && rng->numel() == 2 && rng->scalar_type() == at::kLong, a.op,
                      ": DropLoss needs rng, an int64 tensor of (seed, offset)");
    const auto seed_offset = rng->accessor<int64_t, 1>();
    args.seed = static_cast<uint64_t>(seed_offset[0]);
    args.offset = static_cast<uint64_t>(seed_offset[1]);
    args.keep_limit = keep_limit(rows, rare, a.num_classes);
  }
  // fp64 exists in plain C++ alone: it is the kernel of gradient checks.
  const KernelTable& table = rows.dtype == DType::kFloat64 ? kGenericKernels : kernels();
  parallel_rows<uint64_t>(n, k / 64 + 3, [&](int64_t begin, int64_t end, uint64_t* scratch) {
    table.bernoulli(args, begin, end, scratch);
  });
  return row_loss;
}

std::tuple<at::Tensor, at::Tensor> bernoulli_loss(
    const at::Tensor& logits, const at::Tensor& labels, const OptionalTensor& row_weights,
    const OptionalTensor& avg_factor, const OptionalTensor& class_table, const OptionalTensor& rng,
    c10::string_view link, double temperature, double clip_min, double clip_max, c10::string_view slope,
    c10::string_view reweight, int64_t num_classes, int64_t ignore_index, c10::string_view reduction,
    double scale, bool validate, bool compute_grad) {
  const RowArguments a{"bernoulli_loss", logits,       labels,    row_weights, avg_factor,
                       num_classes,      ignore_index, reduction, scale,       validate};
  const Rows rows = prepare_rows(a);
  at::Tensor grad = empty_grad(rows, compute_grad);
  const Options options{link, {temperature, clip_min, clip_max}, slope, reweight};
  const auto row_loss = run(a, rows, rows.scale, options, class_table, rng, compute_grad ? &grad : nullptr);
  return {reduce_rows(rows, row_loss, reduction), grad};
}

at::Tensor bernoulli_grad(const at::Tensor& grad_loss, const at::Tensor& logits, const at::Tensor& labels,
                          const OptionalTensor& row_weights, const OptionalTensor& avg_factor,
                          const OptionalTensor& class_table, const OptionalTensor& rng, c10::string_view link,
                          double temperature, double clip_min, double clip_max, c10::string_view slope,
                          c10::string_view reweight, int64_t num_classes, int64_t ignore_index,
                          c10::string_view reduction, double scale, bool validate) {
  const RowArguments a{"bernoulli_grad", logits,       labels,    row_weights, avg_factor,
                       num_classes,      ignore_index, reduction, scale,       validate};
  const Rows rows = prepare_rows(a);
  at::Tensor grad = empty_grad(rows, true);
  const Options options{link, {temperature, clip_min, clip_max}, slope, reweight};
  run(a, rows, scaled_by(rows.scale, grad_loss), options, class_table, rng, &grad);
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
  return run_activation(logits, nullptr, {temperature, clip_min, clip_max});
}

at::Tensor gumbel_activation_grad(const at::Tensor& grad_output, const at::Tensor& logits, double temperature,
                                  double clip_min, double clip_max) {
  return run_activation(logits, &grad_output, {temperature, clip_min, clip_max});
}

}  // namespace

TORCH_LIBRARY_IMPL(gol_kernels, CPU, m) {
  m.impl("bernoulli_loss_native", bernoulli_loss);
  m.impl("bernoulli_grad_native", bernoulli_grad);
  m.impl("gumbel_activation_native", gumbel_activation);
  m.impl("gumbel_activation_grad_native", gumbel_activation_grad);
}

}  // namespace cpu
}  // namespace gol
