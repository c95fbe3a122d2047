"""A pytest plugin: tests/gpu on the emulated CUDA kernels, as far as it does not need CUDA itself.

GOL_KERNELS_TEST_DEVICE=cpu pytest -p tests.emulated_gpu tests/gpu -k "native and test_parity"
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.emulated_cuda import in_place_of_native, load


@pytest.hookimpl(hookwrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Iterator[None]:
    """The native backend is the emulated one while the tests run."""
    assert session.config.cache is not None
    with in_place_of_native(load(Path(session.config.cache.mkdir("cuda_emulation")))):
        yield
