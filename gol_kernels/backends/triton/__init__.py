"""Triton kernels, compiled for the GPU at hand when they are first called.

Nothing of Triton is imported before that. With TRITON_INTERPRET=1 in the environment the same kernels run on
CPU tensors, one program after the other: for tests.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

from ...ops import OPS, implement

MINIMUM_VERSION = (3, 6)

# Device types; ROCm's GPUs are "cuda" to PyTorch too.
DEVICES = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)

_MODULES = {
    "bernoulli_loss": "bernoulli",
    "bernoulli_grad": "bernoulli",
    "softmax_loss": "softmax",
    "softmax_grad": "softmax",
    "gumbel_activation": "elementwise",
    "gumbel_activation_grad": "elementwise",
    "scale_grad_": "elementwise",
    "label_counts": "rows",
}


def _installed_version() -> tuple[int, int] | None:
    """Triton's version as its package states it, without importing it; None: not installed."""
    try:
        spec = importlib.util.find_spec("triton")
    except ValueError:  # a stand-in without a spec lies in sys.modules
        spec = None
    if spec is None or spec.origin is None:
        return None
    stated = re.search(r"__version__ = ['\"](\d+)\.(\d+)", Path(spec.origin).read_text(encoding="utf-8"))
    return (int(stated[1]), int(stated[2])) if stated else (0, 0)


def unavailable() -> str | None:
    """None when Triton can be used, else the reason why it cannot."""
    version = _installed_version()
    if version is None:
        return "Triton is not installed (pip install triton)"
    if version < MINIMUM_VERSION:
        found, wanted = (".".join(map(str, v)) for v in (version, MINIMUM_VERSION))
        return f"Triton {found} is too old: {wanted} or newer is needed"
    return None


@functools.cache
def _loaded(op: str) -> Any:
    return getattr(importlib.import_module(f".{_MODULES[op]}", __name__), op)


for _op in OPS:
    implement(_op, "triton", lambda *arguments, op=_op: _loaded(op)(*arguments))
