// The checks that the ops of every device begin with, in one set of words, before anything is computed.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace gol {

using OptionalTensor = std::optional<at::Tensor>;

// The arguments that all losses share, under the names of the op schemas.
struct RowArguments {
  const char* op;
  const at::Tensor& logits;           // [N, K]
  const at::Tensor& labels;           // [N] int64 or int32
  const OptionalTensor& row_weights;  // [N]
  const OptionalTensor& avg_factor;   // 0-d
  int64_t num_classes;                // the largest legal label
  int64_t ignore_index;
  c10::string_view reduction;
  double scale;
  bool validate;
};

// Types, shapes and devices of all of them. Raises TypeError or ValueError.
void check_rows(const RowArguments& a);
// Type and shape of labels; where validate is set also their values, for which labels on a GPU are copied to
// the host and waited for.
void check_labels(const char* op, const at::Tensor& labels, int64_t num_classes, int64_t ignore_index,
                  bool validate);
// A table that the reweighting in use needs: of this type and shape, on the logits' device.
void check_table(const char* op, const char* name, const OptionalTensor& table, at::IntArrayRef shape,
                 at::ScalarType dtype, c10::string_view reweight, const at::Tensor& logits);
// Seesaw's class_table, the counts of c classes or more.
void check_counts(const char* op, const OptionalTensor& table, int64_t c, const at::Tensor& logits);
void check_device(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& logits);
void check_floating(const char* op, const at::Tensor& logits);

}  // namespace gol
