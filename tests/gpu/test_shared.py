"""The tests of the folder above that take a backend, on the GPU with every backend that it has."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from importlib import import_module

import pytest
import torch

from gol_kernels.ops import OPS, overload
from tests import test_ops

MODULES = (
    "autograd",
    "bad_input",
    "compat",
    "drop_loss",
    "edge_cases",
    "family",
    "golden",
    "gradients",
    "modules",
)
OF_THE_CPU = {
    "test_label_counts",  # validates by default
    "test_label_out_of_range_names_row_and_value",  # so does this
    "test_result_does_not_depend_on_threads",
}


def _with_a_backend() -> Iterator[tuple[str, Callable[..., None]]]:
    for module in MODULES:
        for name, test in inspect.getmembers(import_module(f"tests.test_{module}"), inspect.isfunction):
            takes = set(inspect.signature(test).parameters) & {"backend", "native_backend"}
            if name.startswith("test_") and takes and name not in OF_THE_CPU:
                yield name, test


SHARED = dict(_with_a_backend())
assert len(SHARED) == len(list(_with_a_backend())), "two modules have a test of the same name"
globals().update(SHARED)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(native_backend: str, op: str, dtype: torch.dtype) -> None:
    for sample in test_ops._samples(op, dtype):
        torch.library.opcheck(overload(op, native_backend), sample)


@pytest.mark.parametrize("index", range(len(test_ops._modules())))
def test_compile_equals_eager(chosen: str, index: int) -> None:
    test_ops.test_compile_equals_eager(index, torch.float32)


def test_compile_equals_eager_where_backward_makes_the_gradient(chosen: str) -> None:
    for index in (0, 5, 8):  # Gumbel, EQL, Seesaw
        test_ops.test_compile_equals_eager(index, torch.float16)
