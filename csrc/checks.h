// The checks that the ops of every device begin with, in one set of words, before anything is computed. All
// raise TypeError or ValueError.
#pragma once

#include "arguments.h"

namespace gol {

// The type of logits as the kernels take it.
DType dtype_of(const char* op, const at::Tensor& logits);
void check_device(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& logits);
// Type and shape of labels; where validate is set also their values, for which labels on a GPU are copied to
// the host and waited for.
void check_labels(const char* op, const at::Tensor& labels, int64_t num_classes, int64_t ignore_index,
                  bool validate);
// Types, shapes and devices of all of them.
void check_rows(const RowArguments& a);

// What the names mean; of a reweighting also whether the tables that it needs are there.
Link link_of(const char* op, c10::string_view link, c10::string_view slope, c10::string_view reweight);
Reweight reweight_of(const RowArguments& a, c10::string_view reweight, const OptionalTensor& class_table,
                     const OptionalTensor& row_table, const OptionalTensor& rng);
SoftmaxReweight softmax_reweight_of(const RowArguments& a, c10::string_view reweight,
                                    const OptionalTensor& class_table, bool objectness);

}  // namespace gol
