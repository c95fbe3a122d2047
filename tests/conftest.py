"""Shared fixtures: every implementation of the losses that this machine can run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gol_kernels.backends import native, status

CAPABILITIES = ("generic", "avx2", "avx512")


def runnable_capabilities() -> list[str]:
    """The instruction sets of the native CPU kernels that this processor has."""
    if status()["native"] is not None:
        return []
    extension = native.extension()
    before, found = extension.cpu_capability(), []
    for name in CAPABILITIES:
        try:
            extension.set_cpu_capability(name)
        except ValueError:
            continue
        found.append(name)
    extension.set_cpu_capability(before)
    return found


_RUNNABLE = runnable_capabilities()
_NATIVE = [f"native-{name}" for name in CAPABILITIES]


def _implementation(name: str) -> Iterator[str]:
    backend, _, capability = name.partition("-")
    if backend == "reference":
        yield backend
        return
    if capability not in _RUNNABLE:
        pytest.skip(f"no native {capability} kernels here")
    extension = native.extension()
    before = extension.cpu_capability()
    extension.set_cpu_capability(capability)
    yield backend
    extension.set_cpu_capability(before)


@pytest.fixture(params=["reference", *_NATIVE])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend by name; the native one once for each instruction set."""
    yield from _implementation(request.param)


@pytest.fixture(params=_NATIVE)
def native_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """As ``backend``, without the reference: for what is compared with it."""
    yield from _implementation(request.param)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
