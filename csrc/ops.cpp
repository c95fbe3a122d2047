// The extension module gol_kernels._C. The ops' schemas stand in gol_kernels/ops.py, where a build
// without this extension finds them too; each backend file registers its own implementations.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/kernels.h"

#ifndef GOL_CUDA_ARCHS
#define GOL_CUDA_ARCHS ""
#endif

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
#ifdef GOL_WITH_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["cuda_archs"] = GOL_CUDA_ARCHS;
  info["compiler"] = compiler();
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_info", &build_info, "What this extension was built with.");
  m.def(
      "cpu_capability", [] { return std::string(gol::cpu::kernels().name); },
      "The instruction set of the CPU kernels in use: generic, avx2 or avx512.");
  m.def("set_cpu_capability", &gol::cpu::set_capability,
        "Chooses the CPU kernels; ValueError for a set that this machine cannot run.");
}
