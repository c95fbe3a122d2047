"""Triton kernels."""

from __future__ import annotations

DEVICES = ("cuda",)


def unavailable() -> str | None:
    """None when Triton can be used, else the reason why it cannot."""
    return "placeholder"
