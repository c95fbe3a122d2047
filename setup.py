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

from setuptools import setup

ROOT = Path(__file__).resolve().parent
COMPILING = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}


def is_set(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


def find_cuda_home(wheels: Path) -> str:
    """The toolkit of the first nvcc in $CUDA_HOME, $CUDA_PATH, $PATH and the usual places; "" for none."""
    homes = [f"{os.environ[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [*homes, os.environ["PATH"], "/usr/local/cuda/bin", *map(str, wheels.glob("*/bin"))]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(places))
    # nvcc is asked, because the one on PATH may be a link or a script that lies outside its toolkit.
    question = [nvcc or "true", "--dryrun", "-x", "cu", os.devnull]
    top = re.search(r"\bTOP=(.+)", subprocess.run(question, capture_output=True, text=True).stderr)
    return os.path.realpath(top[1]) if top else ""


def check(part: str, torch: ModuleType | None, compiler: str | None, cuda_home: str) -> None:
    """Raises RuntimeError with the reason why EXT (the extension), or CUDA (its kernels), cannot be built."""
    reasons = {
        "GOL_KERNELS_NO_EXT is set": is_set("GOL_KERNELS_NO_EXT"),
        "torch cannot be imported at build time (install it first, then use --no-build-isolation)": not torch,
        "there is no C++ compiler (looked for $CXX, else c++)": not compiler,
    }
    if part == "CUDA":
        reasons |= {
            "GOL_KERNELS_NO_CUDA is set": is_set("GOL_KERNELS_NO_CUDA"),
            "csrc/cuda has no sources": not any(ROOT.glob("csrc/cuda/*.cu")),
            "torch is not a CUDA build": not (torch and torch.version.cuda),
            "there is no nvcc (in $CUDA_HOME, $CUDA_PATH, $PATH, /usr/local/cuda, wheels)": not cuda_home,
        }
    for reason in filter(reasons.get, reasons):
        raise RuntimeError(reason)


def cuda_archs(torch: ModuleType) -> str:
    gpus = sorted({torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())})
    blackwell = ["10.0", "12.0"] if float(torch.version.cuda) >= 12.8 else []  # older compilers lack it
    archs = [f"{major}.{minor}" for major, minor in gpus] or ["8.0", "8.6", "8.9", "9.0", *blackwell]
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(archs) + "+PTX"


def compile_options(archs: str, wheels: Path) -> dict[str, object]:
    """Arguments of `setup` that build the extension with CUDA kernels for `archs`, or without any for ""."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension, include_paths

    # The wheels' headers come last: only those that the toolkit lacks (cusparse.h, ...) are taken from there.
    headers = [*include_paths("cuda"), *map(str, wheels.glob("*/include"))] if archs else include_paths()
    system = [flag for folder in headers for flag in ("-isystem", folder)]
    optimise = ["-O0", "-g", "-UNDEBUG"] if is_set("DEBUG") else ["-O3"]
    openmp = ["-fopenmp"] if sys.platform == "linux" else []  # without it at::parallel_for is silently serial
    cxx, nvcc = (shlex.split(os.environ.get(name, "")) for name in ("CXXFLAGS", "NVCC_FLAGS"))
    # -g0 first: the interpreter's own flags may hold -g.
    cxx = ["-g0", *optimise, *openmp, "-Wall", "-Wextra", "-fvisibility=hidden", *system, *cxx]
    nvcc = [*optimise, "-Xcompiler=-fvisibility=hidden", *system, *nvcc]
    patterns = ["csrc/*.cpp", "csrc/cpu/*.cpp", *(["csrc/cuda/*.cu", "csrc/cuda/*.cpp"] if archs else [])]
    extension = (CUDAExtension if archs else CppExtension)(
        "gol_kernels._C",
        sorted(path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("GOL_WITH_CUDA", None), ("GOL_CUDA_ARCHS", f'"{archs}"')] if archs else [],
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=openmp,
    )
    if archs and not any(Path(folder, "libcudart.so").exists() for folder in extension.library_dirs):
        extension.libraries.remove("cudart")  # the wheels have libcudart.so.N, but not the link name
        extension.extra_link_args += map(str, wheels.glob("*/lib/libcudart.so.*"))
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


def build() -> None:
    """Runs `setup` with CUDA kernels, else without them, else as pure Python; prints which, and why."""
    try:
        import torch
    except (ImportError, OSError):
        torch = None
    wheels = Path(torch.__file__).parents[1] / "nvidia" if torch else Path()
    compiler = shutil.which(shlex.split(os.environ.get("CXX") or "c++")[0])
    cuda_home = find_cuda_home(wheels)
    for part, name in (("CUDA", "CUDA kernels"), ("EXT", "extension")):
        try:
            check(part, torch, compiler, cuda_home)
            archs = cuda_archs(torch) if part == "CUDA" else ""
            if archs:  # read when torch.utils.cpp_extension is imported
                os.environ.update(CUDA_HOME=cuda_home, TORCH_CUDA_ARCH_LIST=archs)
            print(f"gol_kernels: {name}: yes, torch {torch.__version__}, {compiler} {archs}", flush=True)
            return setup(**compile_options(archs, wheels))
        except (Exception, SystemExit) as error:  # compilers, ninja, torch's version checks: each its own
            if is_set(f"GOL_KERNELS_FORCE_{part}"):
                raise SystemExit(f"gol_kernels: GOL_KERNELS_FORCE_{part} is set, but {error}") from error
            print(f"gol_kernels: {name}: no, {error}", flush=True)
    if {"editable_wheel", "--inplace"} & set(sys.argv):
        for outdated in ROOT.glob("gol_kernels/_C*.so"):
            outdated.unlink()
    setup()


if __name__ == "__main__":
    # Metadata and the source distribution must not depend on this machine.
    build() if COMPILING & set(sys.argv) else setup()
