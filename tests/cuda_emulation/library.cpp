// Registers the ops of csrc/cuda for CPU tensors, in a namespace of their own.
#include "registration.h"

TORCH_LIBRARY_IMPL(gol_emulated, CPU, m) {
  gol::cuda::register_bernoulli(m);
  gol::cuda::register_elementwise(m);
  gol::cuda::register_softmax(m);
}
