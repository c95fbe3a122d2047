#include "rows.h"

#include <atomic>
#include <cmath>
#include <fstream>
#include <limits>

#include "../checks.h"

namespace gol {
namespace cpu {
namespace {

// Of the cores that share it. glibc's _SC_LEVEL3_CACHE_SIZE is the whole processor's, ten times as much.
int64_t last_cache_bytes() {
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");  // "32768K"
  int64_t kibibytes = 0;
  return file >> kibibytes && kibibytes > 0 ? kibibytes << 10 : int64_t{32} << 20;
}

std::atomic<int64_t> last_cache{last_cache_bytes()};

}  // namespace

int64_t set_last_cache(int64_t bytes) { return last_cache.exchange(bytes); }

Rows prepare_rows(const RowArguments& a) {
  const int64_t n = a.logits.size(0);
  Rows rows{a.logits.stride(1) == 1 || a.logits.size(1) == 1 ? a.logits : a.logits.contiguous(),
            a.labels.to(at::kLong).contiguous(), std::vector<double>(n), std::vector<double>(n),
            dtype_of(a.op, a.logits)};

  at::Tensor weights;
  if (a.row_weights.has_value()) weights = a.row_weights->to(at::kDouble).contiguous();
  const double* weight = weights.defined() ? weights.const_data_ptr<double>() : nullptr;
  const int64_t* label = rows.labels.const_data_ptr<int64_t>();
  int64_t counted = 0;
  for (int64_t i = 0; i < n; ++i) counted += label[i] != a.ignore_index;

  double factor = a.scale;
  if (a.reduction == "mean") {
    const double denominator =
        a.avg_factor.has_value() ? a.avg_factor->item<double>() : static_cast<double>(counted);
    if (denominator != 0) factor /= denominator;  // nothing to average over: the sum, which is 0
  }
  for (int64_t i = 0; i < n; ++i) {
    const bool legal = label[i] >= 0 && label[i] <= a.num_classes;
    const double w = weight == nullptr ? 1.0 : weight[i];
    rows.weight[i] = legal && label[i] != a.ignore_index ? w : 0.0;
    rows.scale[i] = label[i] == a.ignore_index ? 0.0
                    : legal                    ? w * factor
                                               : std::numeric_limits<double>::quiet_NaN();
  }
  return rows;
}

bool exceeds_caches(const at::Tensor& logits) {
  // Together half of the cache: there the two ways are equally fast (Zen 4).
  return 4 * static_cast<int64_t>(logits.nbytes()) > last_cache.load(std::memory_order_relaxed);
}

std::vector<double> scaled_by(const std::vector<double>& scale, const at::Tensor& grad_loss) {
  const at::Tensor upstream = grad_loss.to(at::kDouble).expand({static_cast<int64_t>(scale.size())});
  std::vector<double> product(scale.size());
  const auto access = upstream.accessor<double, 1>();
  for (size_t i = 0; i < scale.size(); ++i) product[i] = scale[i] * access[static_cast<int64_t>(i)];
  return product;
}

at::Tensor reduce_rows(const Rows& rows, const std::vector<double>& row_loss, c10::string_view reduction) {
  const auto options = rows.logits.options().dtype(rows.dtype == DType::kFloat64 ? at::kDouble : at::kFloat);
  const int64_t n = static_cast<int64_t>(row_loss.size());
  if (reduction != "none") {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (rows.scale[i] != 0) total += rows.scale[i] * row_loss[i];
    }
    return at::full({}, total, options);
  }
  at::Tensor losses = at::empty({n}, options.dtype(at::kDouble));
  double* loss = losses.mutable_data_ptr<double>();
  for (int64_t i = 0; i < n; ++i) loss[i] = rows.scale[i] != 0 ? rows.scale[i] * row_loss[i] : 0.0;
  return losses.to(options.dtype());
}

at::Tensor empty_grad(const Rows& rows, bool compute_grad) {
  if (!compute_grad) return at::empty({0}, rows.logits.options());
  return at::empty(rows.logits.sizes(), rows.logits.options(), at::MemoryFormat::Contiguous);
}

}  // namespace cpu
}  // namespace gol
