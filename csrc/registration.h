// Each backend's implementations of the ops, a function for each of its files. They are registered when the
// module is imported, and not, as by TORCH_LIBRARY_IMPL, when the library is loaded: what is thrown there,
// because the ops have other schemas than this build was made for, would end the process.
#pragma once

#include <torch/library.h>

namespace gol {

namespace cpu {
void register_bernoulli(torch::Library& m);
void register_rows(torch::Library& m);
void register_softmax(torch::Library& m);
}  // namespace cpu

namespace cuda {
void register_bernoulli(torch::Library& m);
void register_elementwise(torch::Library& m);
void register_softmax(torch::Library& m);
}  // namespace cuda

}  // namespace gol
