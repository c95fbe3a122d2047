"""Backends: which implementation of an op runs here, and why.

native     the C++ extension: CPU kernels, and CUDA kernels where they were built
triton     Triton kernels, compiled when they are first called
reference  plain PyTorch, any device, always there
"""

from __future__ import annotations

from ..ops import BACKENDS, OPS
from . import native, reference, triton

__all__ = ["BACKENDS", "OPS", "choose", "status"]

# Each backend's device types; None: any device.
_DEVICES: dict[str, tuple[str, ...] | None] = {
    "native": native.DEVICES,
    "triton": triton.DEVICES,
    "reference": None,
}
_STATUS = {
    "native": native.unavailable(),
    "triton": triton.unavailable(),
    "reference": reference.unavailable(),
}


def status() -> dict[str, str | None]:
    """Each backend with None when it is usable, else the reason why it is not."""
    return dict(_STATUS)


def _obstacle(backend: str, device: str) -> str | None:
    reason = _STATUS[backend]
    if reason is not None:
        return reason
    devices = _DEVICES[backend]
    if devices is not None and device not in devices:
        return f"no {backend} kernels for device '{device}', only for {', '.join(devices)}"
    return None


def choose(op: str, device: str, backend: str | None = None) -> tuple[str, str]:
    """The backend that ``op`` takes on tensors of ``device``, and the reason.

    Args:
        op: a name of ``OPS``.
        device: a device type, "cpu" or "cuda".
        backend: insist on this one.

    Raises:
        ValueError: no such backend or op.
        RuntimeError: the backend insisted on is not usable here; the message says why.
    """
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; there are {', '.join(OPS)}")
    if backend is not None:
        if backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}; there are {', '.join(BACKENDS)}")
        obstacle = _obstacle(backend, device)
        if obstacle is not None:
            raise RuntimeError(f"backend {backend!r} cannot run {op} on '{device}': {obstacle}")
        return backend, "asked for"
    obstacles: list[str] = []
    for candidate in BACKENDS:
        obstacle = _obstacle(candidate, device)
        if obstacle is None:
            return candidate, "; ".join(obstacles) or "first choice"
        obstacles.append(f"not {candidate}: {obstacle}")
    raise AssertionError("the reference backend takes every device")
