// The ops' arguments as the implementations of every device take them: checked, their names read.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "types.h"

namespace gol {

using OptionalTensor = std::optional<at::Tensor>;

// The arguments that all losses share, under the names of the op schemas.
struct RowArguments {
  const char* op;
  at::Tensor logits;                  // [N, K]
  const at::Tensor& labels;           // [N] int64 or int32
  const OptionalTensor& row_weights;  // [N]
  const OptionalTensor& avg_factor;   // 0-d
  int64_t num_classes;                // the largest legal label
  int64_t ignore_index;
  c10::string_view reduction;
  double scale;
  bool validate;
};

// Those that the Bernoulli ops have beside them.
struct BernoulliOptions {
  const OptionalTensor &class_table, &row_table, &rng;
  Link link;
  LinkOptions link_options;
  Reweight reweight;
  double p, q, eps, logit_threshold;
};

// And the softmax ops.
struct SoftmaxOptions {
  const OptionalTensor& class_table;
  SoftmaxReweight reweight;
  double p, q, eps;
  bool objectness;
};

}  // namespace gol
