// Included before csrc/cuda/*.cpp: registers its ops for CPU tensors, in a namespace of their own.
#include <torch/library.h>

#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(name, key, m) _TORCH_LIBRARY_IMPL(gol_emulated, CPU, m, C10_UID)
