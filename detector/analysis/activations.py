"""Activations and the gradients of their losses against the logit (Gumbel Optimized Loss, figures 3 and 6).

Every curve comes from the library's own loss modules: their activation, and autograd through their loss.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import gol_kernels as gk
from gol_kernels.losses import LongTailLoss
from gol_kernels.losses.bernoulli import BernoulliLoss

LOGITS = (-8.0, 14.0, 1101)  # first, last, number: 0.02 apart, on both sides of the clips
TEMPERATURES = (0.5, 1.0, 2.0, 4.0)


def _default_clip(loss: Callable[..., Tensor]) -> tuple[float, float]:
    return inspect.signature(loss).parameters["clip"].default


CLIP = _default_clip(gk.gumbel_loss)


@dataclass(frozen=True)
class Curve:
    """p(z) and |d loss / d z| where the class is the label (positive) and where it is not; float64 [n]."""

    name: str
    logits: NDArray[np.float64]
    probability: NDArray[np.float64]
    positive: NDArray[np.float64]
    negative: NDArray[np.float64]


def activation_curves() -> list[Curve]:
    """Sigmoid, softmax of two, probit, and the Gumbel: as it trains here, without its clip, and as
    released."""
    uncapped = {"compat": "gol", "max_loss": math.inf}  # the cap is on a batch's loss, not on a logit
    return [
        trace("sigmoid", gk.SigmoidLoss(1)),
        trace("softmax of two", gk.SoftmaxLoss(1)),
        trace(
            "probit, clip [{:g}, {:g}]".format(*_default_clip(gk.probit_loss)),
            BernoulliLoss(1, link="probit"),
        ),
        trace("Gumbel without clip", gk.GumbelLoss(1, clip=None)),
        trace("Gumbel, released code", gk.GumbelLoss(1, **uncapped)),
        trace("Gumbel", gk.GumbelLoss(1)),
    ]


def temperature_curves(temperatures: Sequence[float] = TEMPERATURES) -> list[Curve]:
    """The Gumbel at several temperatures, without its clip. Raises ValueError for one that is not
    positive."""
    return [trace(f"T = {t:g}", gk.GumbelLoss(1, temperature=t, clip=None)) for t in temperatures]


def trace(name: str, loss: LongTailLoss) -> Curve:
    """The curve of a loss with one class and a second column, whose logit is 0."""
    logits = torch.linspace(*LOGITS, dtype=torch.float64)
    columns = torch.stack([logits, torch.zeros_like(logits)], dim=1)
    return Curve(
        name,
        logits.numpy(),
        loss.activation(columns)[:, 0].numpy(),
        _slope(loss, columns, label=0).numpy(),
        _slope(loss, columns, label=1).numpy(),
    )


def _slope(loss: LongTailLoss, columns: Tensor, label: int) -> Tensor:
    """|d loss / d z| of every row's first column."""
    columns = columns.clone().requires_grad_()
    total = loss(columns, torch.full((len(columns),), label), avg_factor=1.0)
    assert isinstance(total, Tensor)
    return torch.autograd.grad(total, columns)[0][:, 0].abs()


def dead_below(exact: Curve, released: Curve) -> float:
    """The highest logit inside the clip from which down `released` has less than half of the positive
    gradient of `exact`; NaN where there is none."""
    inside = (exact.logits >= CLIP[0]) & (exact.logits <= CLIP[1])
    dead = exact.logits[inside & (released.positive < exact.positive / 2)]
    return float(dead.max()) if len(dead) else math.nan
