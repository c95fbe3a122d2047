// The extension module gol_kernels._C. The ops' schemas stand in gol_kernels/ops.py, where a build
// without this extension finds them too; importing the module registers its implementations of them.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "registration.h"

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

// torch's C++ interface changes from one minor version to the next, and not always is a symbol missing then.
void check_torch() {
  const std::string built =
      std::to_string(TORCH_VERSION_MAJOR) + "." + std::to_string(TORCH_VERSION_MINOR) + ".";
  const auto running = pybind11::module_::import("torch").attr("__version__").cast<std::string>();
  if (running.compare(0, built.size(), built) != 0)
    throw pybind11::import_error("it was built with torch " TORCH_VERSION ", and this is torch " + running);
}

// All or, where one throws, none: what a library registered ends with it.
void register_ops() {
  static std::vector<torch::Library> registered;
  std::vector<torch::Library> libraries;
  const auto library = [&](c10::DispatchKey key) -> torch::Library& {
    return libraries.emplace_back(torch::Library::IMPL, "gol_kernels", key, __FILE__, __LINE__);
  };
  torch::Library& cpu = library(c10::DispatchKey::CPU);
  gol::cpu::register_bernoulli(cpu);
  gol::cpu::register_elementwise(cpu);
  gol::cpu::register_softmax(cpu);
#ifdef GOL_WITH_CUDA
  torch::Library& cuda = library(c10::DispatchKey::CUDA);
  gol::cuda::register_bernoulli(cuda);
  gol::cuda::register_elementwise(cuda);
  gol::cuda::register_softmax(cuda);
#endif
  registered.swap(libraries);
}

}  // namespace

// What is thrown becomes an ImportError.
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  check_torch();
  register_ops();
  m.def("build_info", &build_info, "What this extension was built with.");
  m.def(
      "cpu_capability", [] { return std::string(gol::cpu::kernels().name); },
      "The instruction set of the CPU kernels in use: generic, avx2 or avx512.");
  m.def("set_cpu_capability", &gol::cpu::set_capability,
        "Chooses the CPU kernels; ValueError for a set that this machine cannot run.");
  m.def("set_last_cache", &gol::cpu::set_last_cache,
        "Sets what is taken for the last cache's size in bytes, returns what it was: gradients beyond it are "
        "written past it.");
}
