"""Decides what of the native extension `gol_kernels._C` can be compiled here, says why, and compiles it.

Package metadata is in pyproject.toml and the same on every machine. Environment variables ("", "0": unset):
  GOL_KERNELS_NO_EXT, GOL_KERNELS_NO_CUDA        leave out the extension / its CUDA kernels
  GOL_KERNELS_FORCE_EXT, GOL_KERNELS_FORCE_CUDA  fail where they would be left out
  TORCH_CUDA_ARCH_LIST                           default: the GPUs present, else every tuned architecture
  CXX, CXXFLAGS, NVCC_FLAGS, CUDA_HOME, MAX_JOBS, DEBUG=1 (no optimisation, debug symbols)
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
COMPILING = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}


def is_set(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


def sources(*patterns: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern))


def find_cuda_home(wheels: Path) -> str:
    """The toolkit of the first nvcc in $CUDA_HOME, $CUDA_PATH, $PATH and the usual places; "" for none."""
    homes = [f"{os.environ[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [*homes, os.environ["PATH"], "/usr/local/cuda/bin", *map(str, wheels.glob("*/bin"))]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(places))
    # nvcc is asked, because the one on PATH may be a link or a script that lies outside its toolkit.
    question = [nvcc or "true", "--dryrun", "-x", "cu", os.devnull]
    top = re.search(r"\bTOP=(.+)", subprocess.run(question, capture_output=True, text=True).stderr)
    return os.path.realpath(top[1]) if top else ""


def obstacles(torch: ModuleType | None, compiler: str | None, cuda_home: str) -> tuple[str, str]:
    """What keeps the extension, and its CUDA kernels, from being built; "" where nothing does."""
    ext = cuda = ""
    if is_set("GOL_KERNELS_NO_EXT"):
        ext = "GOL_KERNELS_NO_EXT is set"
    elif torch is None:
        ext = "torch cannot be imported at build time (install it first, then use pip's --no-build-isolation)"
    elif not compiler:
        ext = "there is no C++ compiler (looked for $CXX, else c++)"
    elif is_set("GOL_KERNELS_NO_CUDA"):
        cuda = "GOL_KERNELS_NO_CUDA is set"
    elif not sources("csrc/cuda/*.cu"):
        cuda = "csrc/cuda has no sources"
    elif not torch.version.cuda:
        cuda = f"torch {torch.__version__} is not a CUDA build"
    elif not cuda_home:
        cuda = "there is no nvcc (looked in $CUDA_HOME, $CUDA_PATH, $PATH, /usr/local/cuda, nvidia wheels)"
    for name, reason in (("EXT", ext), ("CUDA", ext or cuda)):
        if reason and is_set(f"GOL_KERNELS_FORCE_{name}"):
            raise SystemExit(f"gol_kernels: GOL_KERNELS_FORCE_{name} is set, but {reason}")
    return ext, ext or cuda


def cuda_archs(torch: ModuleType) -> str:
    gpus = sorted({torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())})
    blackwell = ["10.0", "12.0"] if float(torch.version.cuda) >= 12.8 else []  # older compilers lack it
    archs = [f"{major}.{minor}" for major, minor in gpus] or ["8.0", "8.6", "8.9", "9.0", *blackwell]
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(archs) + "+PTX"


def make_extension(archs: str, wheels: Path) -> Extension:
    """The extension with CUDA kernels for `archs`, or without any for ""."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension, include_paths

    # The wheels' headers come last: only those that the toolkit lacks (cusparse.h, ...) are taken from there.
    headers = [*include_paths("cuda"), *map(str, wheels.glob("*/include"))] if archs else include_paths()
    system = [flag for folder in headers for flag in ("-isystem", folder)]
    optimise = ["-O0", "-g", "-UNDEBUG"] if is_set("DEBUG") else ["-O3"]
    openmp = ["-fopenmp"] if sys.platform == "linux" else []  # without it at::parallel_for is silently serial
    # -g0 first: the interpreter's own flags may hold -g.
    cxx = ["-g0", *optimise, *openmp, "-Wall", "-Wextra", "-fvisibility=hidden", *system]
    nvcc = [*optimise, "-Xcompiler=-fvisibility=hidden", *system]
    cxx += shlex.split(os.environ.get("CXXFLAGS", ""))
    nvcc += shlex.split(os.environ.get("NVCC_FLAGS", ""))
    extension = (CUDAExtension if archs else CppExtension)(
        "gol_kernels._C",
        sources("csrc/*.cpp", "csrc/cpu/*.cpp", *(["csrc/cuda/*.cu", "csrc/cuda/*.cpp"] if archs else [])),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("GOL_WITH_CUDA", None), ("GOL_CUDA_ARCHS", f'"{archs}"')] if archs else [],
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=openmp,
    )
    if archs and not any(Path(folder, "libcudart.so").exists() for folder in extension.library_dirs):
        extension.libraries.remove("cudart")  # the wheels have libcudart.so.N, but not the link name
        extension.extra_link_args = openmp + [str(path) for path in wheels.glob("*/lib/libcudart.so.*")]
    return extension


def build_command(archs: str, wheels: Path) -> type:
    """build_ext that tries with CUDA kernels, then without, and then leaves a pure Python package."""
    from torch.utils.cpp_extension import BuildExtension

    class BuildWithFallback(BuildExtension):
        def build_extensions(self) -> None:
            for attempt in dict.fromkeys((archs, "")):
                # Changed in place, because setuptools keeps attributes of its own on this object.
                vars(self.extensions[0]).update(vars(make_extension(attempt, wheels)))
                try:
                    return super().build_extensions()
                except Exception as error:  # compilers, ninja and torch's version checks: each raises its own
                    if is_set("GOL_KERNELS_FORCE_CUDA" if attempt else "GOL_KERNELS_FORCE_EXT"):
                        raise
                    left_out = "the CUDA kernels" if attempt else "the extension (as pure Python)"
                    print(f"gol_kernels: WARNING: installing without {left_out}: {error}", flush=True)
            self.extensions.clear()

    return BuildWithFallback


def compile_options() -> dict[str, object]:
    """Arguments with which `setup` compiles the extension, none where it is left out. Prints the decision."""
    try:
        import torch
    except (ImportError, OSError):
        torch = None
    wheels = Path(torch.__file__).parents[1] / "nvidia" if torch else Path()
    compiler = shutil.which(shlex.split(os.environ.get("CXX") or "c++")[0])
    cuda_home = find_cuda_home(wheels)
    no_ext, no_cuda = obstacles(torch, compiler, cuda_home)
    archs = "" if no_cuda else cuda_archs(torch)
    ext = f"no, {no_ext}" if no_ext else f"yes, torch {torch.__version__}, {compiler}"
    cuda = f"no, {no_cuda}" if no_cuda else f"yes, torch's CUDA {torch.version.cuda}, {cuda_home}, {archs}"
    print(f"gol_kernels: extension: {ext}\ngol_kernels: CUDA kernels: {cuda}", flush=True)
    if archs:
        os.environ.update(CUDA_HOME=cuda_home, TORCH_CUDA_ARCH_LIST=archs)  # for torch.utils.cpp_extension
    if no_ext:
        return {}
    command = build_command(archs, wheels)  # which fills in the sources and flags
    return {"ext_modules": [Extension("gol_kernels._C", [])], "cmdclass": {"build_ext": command}}


if __name__ == "__main__":
    # Metadata and the source distribution must not depend on this machine.
    distribution = setup(**compile_options() if COMPILING & set(sys.argv) else {})
    if {"editable_wheel", "--inplace"} & set(sys.argv) and not distribution.ext_modules:
        for outdated in ROOT.glob("gol_kernels/_C*.so"):
            outdated.unlink()
