// Each backend's implementations of the ops, a function for each of its files. They are registered when the
// module is imported, and not, as by TORCH_LIBRARY_IMPL, when the library is loaded: what is thrown there,
// because the ops have other schemas than this build was made for, would end the process.
#pragma once

#include <torch/library.h>

#include <tuple>

#include "arguments.h"

namespace gol {

namespace cpu {
void register_bernoulli(torch::Library& m);
void register_elementwise(torch::Library& m);
void register_softmax(torch::Library& m);
}  // namespace cpu

namespace cuda {
void register_bernoulli(torch::Library& m);
void register_elementwise(torch::Library& m);
void register_softmax(torch::Library& m);
}  // namespace cuda

// What a backend implements; the arguments have been checked.
using LossResults = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using BernoulliLoss = LossResults(const RowArguments&, const BernoulliOptions&, bool compute_grad,
                                  bool compute_statistics);
using BernoulliGrad = at::Tensor(const RowArguments&, const BernoulliOptions&, const at::Tensor& grad_loss);
using SoftmaxLoss = LossResults(const RowArguments&, const SoftmaxOptions&, bool compute_grad);
using SoftmaxGrad = at::Tensor(const RowArguments&, const SoftmaxOptions&, const at::Tensor& grad_classes,
                               const at::Tensor& grad_objectness);
using GumbelActivation = void(const GumbelActivationArgs&, at::Device);
using ScaleGrad = void(const at::Tensor& grad, const at::Tensor& first, const at::Tensor& second,
                       int64_t split);
// labels: int64 contiguous. Adds to counts, int64 [num_classes + 1].
using LabelCounts = void(const at::Tensor& labels, int64_t ignore_index, at::Tensor* counts);

// Register it for the ops *_native.
void implement_bernoulli(torch::Library& m, BernoulliLoss* loss, BernoulliGrad* grad);
void implement_softmax(torch::Library& m, SoftmaxLoss* loss, SoftmaxGrad* grad);
void implement_elementwise(torch::Library& m, GumbelActivation* gumbel_activation, ScaleGrad* scale_grad,
                           LabelCounts* label_counts);

}  // namespace gol
