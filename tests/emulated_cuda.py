"""csrc/cuda compiled for the CPU against tests/cuda_emulation, and memory that notices who leaves it."""

from __future__ import annotations

import ctypes
import faulthandler
import functools
import hashlib
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import cpp_extension

from gol_kernels import ops
from tests import cases

ROOT = Path(__file__).resolve().parents[1]
EMULATION = ROOT / "tests" / "cuda_emulation"
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
BINDINGS = [
    *sorted((ROOT / "csrc" / "cuda").glob("*.cpp")),
    ROOT / "csrc" / "checks.cpp",
    ROOT / "csrc" / "registration.cpp",
    EMULATION / "library.cpp",
]
COMPILER = shutil.which(os.environ.get("CXX", "g++"))

FLAGS = [
    *("-std=c++17", "-fPIC", "-fno-strict-aliasing"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-attributes"),
    *(f"-I{EMULATION}", f"-I{ROOT / 'csrc'}"),
    *(f"-isystem{path}" for path in cpp_extension.include_paths()),
]
# Undefined behaviour, such as a vector that is not aligned, stops the process.
KERNEL_FLAGS = [
    *("-O1", "-fsanitize=alignment,bounds,shift,signed-integer-overflow"),
    "-fsanitize-undefined-trap-on-error",
]


def _run(*command: str | Path) -> None:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def _compile(source: Path, folder: Path) -> Path:
    assert COMPILER is not None
    flags = KERNEL_FLAGS if source.suffix == ".cu" else ["-O0"]
    target = folder / f"{source.name}.o"
    _run(COMPILER, *FLAGS, *flags, "-x", "c++", "-c", source, "-o", target)
    return target


def _build(folder: Path) -> Path:
    """The kernels and bindings as a library that registers gol_emulated::*, kept until anything changes."""
    assert COMPILER is not None
    headers = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.*h"), *EMULATION.rglob("*.h")]
    digest = hashlib.sha256("\0".join([torch.__version__, sys.version, *FLAGS, *KERNEL_FLAGS]).encode())
    for path in sorted([*KERNELS, *BINDINGS, *headers]):
        digest.update(path.read_bytes())
    library = folder / f"emulated-{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=folder) as scratch, ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(functools.partial(_compile, folder=Path(scratch)), [*BINDINGS, *KERNELS]))
        torch_libraries = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10"]
        linked = Path(scratch, library.name)
        _run(COMPILER, "-shared", *objects, *torch_libraries, "-o", linked)
        for old in folder.glob("emulated-*.so"):
            old.unlink()
        linked.rename(library)
    return library


_libraries: list[torch.library.Library] = []  # a library's definitions end with it


@functools.cache
def load(folder: Path) -> Any:
    """The ops as torch.ops.gol_emulated.<op>_native, compiled into the folder."""
    definitions = torch.library.Library("gol_emulated", "DEF")
    _libraries.append(definitions)
    for op, schema in ops.SCHEMAS.items():
        definitions.define(f"{op}_native{schema}")
    torch.ops.load_library(_build(folder))
    return torch.ops.gol_emulated


@contextmanager
def in_place_of_native(emulated: Any) -> Iterator[None]:
    """The emulated kernels are the native backend's on the CPU; tests expect a GPU's arithmetic of them."""
    exact = cases.special_error
    override = torch.library.Library(ops.NAMESPACE, "IMPL")
    for op in ops.OPS:
        override.impl(f"{op}_native", getattr(emulated, f"{op}_native").default, "CPU", allow_override=True)
    cases.special_error = lambda: 2.0**-22  # as special_functions.h errs
    yield
    cases.special_error = exact
    override._destroy()


@pytest.fixture(scope="session")
def emulated(pytestconfig: pytest.Config) -> Any:
    """``load``'s ops, for CPU tensors."""
    if sys.platform != "linux" or COMPILER is None:
        pytest.skip("the emulation needs Linux and a C++ compiler ($CXX or g++)")
    assert pytestconfig.cache is not None
    return load(Path(pytestconfig.cache.mkdir("cuda_emulation")))


class Guarded:
    """Tensors aligned as vectors. The rest of the last vector is NaN; what follows it must not be touched."""

    def __init__(self) -> None:
        self._maps: list[mmap.mmap] = []

    def __call__(self, tensor: Tensor, protection: int = mmap.PROT_READ | mmap.PROT_WRITE) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        pages = -(-size // mmap.PAGESIZE)
        end, offset = pages * mmap.PAGESIZE, pages * mmap.PAGESIZE - -(-size // 16) * 16
        memory = mmap.mmap(-1, end + mmap.PAGESIZE)
        memory[offset:end] = b"\xff" * (end - offset)
        self._maps.append(memory)
        rest = torch.frombuffer(memory, dtype=tensor.dtype, offset=offset)  # to the end of the guard page
        copy = rest[: tensor.numel()].view(tensor.shape).copy_(tensor)
        libc, base = ctypes.CDLL(None), copy.data_ptr() - offset
        assert libc.mprotect(ctypes.c_void_p(base + end), mmap.PAGESIZE, 0) == 0
        assert libc.mprotect(ctypes.c_void_p(base), end, protection) == 0
        return copy


def survives(call: Callable[[], object]) -> bool:
    """Whether a process of its own comes to the end of the call."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        try:
            call()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0
