"""What runs on a GPU. Without one, every test of this folder is skipped and says so.

GOL_KERNELS_TEST_DEVICE=cpu runs what does not need CUDA on the CPU instead: a check of the tests themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from gol_kernels import functional
from gol_kernels.backends import choose

DEVICE = os.environ.get("GOL_KERNELS_TEST_DEVICE", "cuda")
KERNELS = ("native", "triton")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda.is_available() is False")
    if DEVICE != "cuda" and item.get_closest_marker("gpu"):
        pytest.skip(f"needs CUDA, and GOL_KERNELS_TEST_DEVICE is {DEVICE}")


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    """The device on which every tensor of a test is made."""
    with torch.device(DEVICE) as device:
        yield device


def _usable(backend: str) -> str:
    try:
        choose("bernoulli_loss", DEVICE, backend)
    except RuntimeError as reason:
        pytest.skip(str(reason))
    return backend


@pytest.fixture(params=["reference", *KERNELS])
def backend(device: torch.device, request: pytest.FixtureRequest) -> str:
    """Each backend by name."""
    return _usable(request.param)


@pytest.fixture(params=KERNELS)
def native_backend(device: torch.device, request: pytest.FixtureRequest) -> str:
    """As ``backend``, without the reference: for what is compared with it."""
    return _usable(request.param)


@pytest.fixture
def chosen(native_backend: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """``native_backend``, taken wherever none is asked for: the modules have no such argument."""
    monkeypatch.setattr(functional, "_backend", lambda op, tensor, backend: backend or native_backend)
    return native_backend
