"""The losses that are timed, and the data they are timed on.

Every case has logits [N, K] of one size, so that all of them move the same bytes. The data has the shape of
LVIS: a quarter of the rows is foreground, and the classes' frequencies fall over four decades.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import gol_kernels as gk
from gol_kernels import reference, released

from . import closed_forms

ROWS, COLUMNS = 4096, 1204
LOGIT_RANGE = (-3.2, 9.9)
"""Here the released Gumbel formula has a gradient (dead below -3.32) and its clamp is not reached."""

RARE_SHARE = 815 / 1203
"""Classes of LVIS v1 whose image frequency is below 1.1e-3."""


@dataclass(frozen=True)
class Batch:
    """logits [N, K] float32; labels [N] int64 in 0..C; rare bool [C]; counts int64 [C].

    draw_seed: fixes DropLoss's draws, the same for every provider; None: each draws its own, as in training.
    """

    logits: Tensor
    labels: Tensor
    rare: Tensor
    counts: Tensor
    draw_seed: int | None = None

    def generator(self) -> torch.Generator | None:
        """Of our kernels' draws."""
        return None if self.draw_seed is None else torch.Generator().manual_seed(self.draw_seed)

    def draws(self) -> Tensor:
        """[N, K] int16, uniform over all 65536 values: those of our kernels where they are fixed."""
        n, k = self.logits.shape
        generator = self.generator()
        if generator is None:
            # One 64-bit draw makes four of 16 bits: the fastest that PyTorch offers.
            words = torch.empty((n * k + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
            return words.view(torch.int16)[: n * k].view(n, k)
        seed, offset = torch.randint(2**63 - 1, (2,), generator=generator)
        return (reference.philox_uint16(seed, offset, n, k) - 0x8000).to(torch.int16)

    def uniform(self) -> Tensor | None:
        """[N, K] in (0, 1): ``draws`` where they are fixed. None: the released code draws its own."""
        if self.draw_seed is None:
            return None
        # Our kernels round the share of rare classes to 2^-16; half a step makes > agree with that.
        return (self.draws().float() + (0x8000 + 0.5)) / 2**16


@dataclass(frozen=True)
class Form:
    """A loss as a function of the logits and of what ``arguments`` takes from a batch, at every step."""

    function: Callable[..., Any]
    arguments: Callable[[Batch], tuple[Tensor | None, ...]]


@dataclass(frozen=True)
class Case:
    """One loss, in every form that is timed.

    ours: (logits, batch, backend) -> loss. released: -> loss, left to autograd.
    closed: by provider's name, -> (loss, gradient).
    tolerance: allowed rel-L2 difference of a provider's float32 gradient from float64's.
    """

    name: str
    title: str
    extra_logits: int
    ours: Callable[[Tensor, Batch, str | None], Tensor]
    released: Form
    closed: dict[str, Form]
    tolerance: float
    background: bool = True

    def batch(self, n: int = ROWS, k: int = COLUMNS, *, spread: float = 1.5, seed: int = 0) -> Batch:
        """Logits from N(-1, spread^2) within LOGIT_RANGE, labels after the classes' frequencies."""
        generator = torch.Generator().manual_seed(seed)
        c = k - self.extra_logits
        logits = (torch.randn(n, k, generator=generator) * spread - 1).clamp(*LOGIT_RANGE)
        rank = torch.randperm(c, generator=generator)
        frequency = 10 ** (-4 * rank.double() / c)
        labels = torch.multinomial(frequency, n, replacement=True, generator=generator)
        if self.background:
            labels = torch.where(torch.rand(n, generator=generator) < 0.25, labels, c)
        rare = rank >= round(c * (1 - RARE_SHARE))
        return Batch(logits, labels, rare, (frequency * 1e5).long())

    def fixed(self, batch: Batch) -> Batch:
        """The batch with the draws fixed."""
        return replace(batch, draw_seed=3)


# In the gradient's norm one row of 4096 is 1e-2, and in the Bernoulli losses a typical element is 2e-4: a
# wrong formula shows. The exact forms are within 4e-7 of float64; the released Gumbel formula and
# 1 - exp(-e) lose digits as z grows, and are held to 1e-5.
_EXACT, _GUMBEL = 2e-6, 1e-5


def _labels(batch: Batch) -> tuple[Tensor | None, ...]:
    return (batch.labels,)


def _labels_rare(batch: Batch) -> tuple[Tensor | None, ...]:
    return batch.labels, batch.rare


def _labels_rare_draws(batch: Batch) -> tuple[Tensor | None, ...]:
    return batch.labels, batch.rare, batch.draws()


def _labels_rare_uniform(batch: Batch) -> tuple[Tensor | None, ...]:
    return batch.labels, batch.rare, batch.uniform()


def _labels_counts(batch: Batch) -> tuple[Tensor | None, ...]:
    return batch.labels, batch.counts


def _released_gumbel(z: Tensor, labels: Tensor) -> Tensor:
    return released.gumbel_ce(z, labels, avg_factor=z.numel())


def _ours_gumbel(z: Tensor, batch: Batch, backend: str | None) -> Tensor:
    """The mean over elements: the released code clamps its loss at 20, and above it there is no gradient."""
    return gk.gumbel_loss(z, batch.labels, avg_factor=z.numel(), backend=backend)


def _released_gol(z: Tensor, labels: Tensor, rare: Tensor, uniform: Tensor | None) -> Tensor:
    return released.drop_loss(z, labels, rare, gumbel=True, uniform=uniform)


def _ours_gol(z: Tensor, batch: Batch, backend: str | None) -> Tensor:
    return gk.gumbel_loss(z, batch.labels, reweight=gk.Drop(batch.rare, batch.generator()), backend=backend)


def _released_eql(z: Tensor, labels: Tensor, rare: Tensor) -> Tensor:
    return released.eql(z, labels, rare, gumbel=False)


def _ours_eql(z: Tensor, batch: Batch, backend: str | None) -> Tensor:
    return gk.sigmoid_loss(z, batch.labels, reweight=gk.EQL(batch.rare), backend=backend)


def _ours_sigmoid(z: Tensor, batch: Batch, backend: str | None) -> Tensor:
    return gk.sigmoid_loss(z, batch.labels, backend=backend)


def _ours_softmax(z: Tensor, batch: Batch, backend: str | None) -> Tensor:
    return gk.softmax_loss(z, batch.labels, backend=backend)


def _released_seesaw(z: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    classes, objectness = released.seesaw(z, labels, counts.to(z.dtype))
    return classes + objectness


def _ours_seesaw(z: Tensor, batch: Batch, backend: str | None) -> Tensor:
    classes, objectness = gk.seesaw_loss(z, batch.labels, batch.counts, backend=backend)
    return classes + objectness


CASES = {
    case.name: case
    for case in (
        Case(
            "gumbel",
            "Gumbel",
            1,
            _ours_gumbel,
            Form(_released_gumbel, _labels),
            {
                "compiled": Form(closed_forms.gumbel, _labels),
                "compiled, 1-exp(-e)": Form(closed_forms.gumbel_fewer_digits, _labels),
            },
            _GUMBEL,
        ),
        Case(
            "gol",
            "GOL (DropLoss, Gumbel)",
            0,
            _ours_gol,
            Form(_released_gol, _labels_rare_uniform),
            {
                "compiled": Form(closed_forms.gol, _labels_rare_draws),
                "compiled, 1-exp(-e)": Form(closed_forms.gol_fewer_digits, _labels_rare_draws),
            },
            _GUMBEL,
        ),
        Case(
            "eql",
            "EQL (sigmoid)",
            0,
            _ours_eql,
            Form(_released_eql, _labels_rare),
            {"compiled": Form(closed_forms.eql, _labels_rare)},
            _EXACT,
        ),
        Case(
            "sigmoid",
            "Sigmoid",
            1,
            _ours_sigmoid,
            Form(released.sigmoid_ce, _labels),
            {"compiled": Form(closed_forms.sigmoid, _labels)},
            _EXACT,
        ),
        Case(
            "softmax",
            "Softmax",
            1,
            _ours_softmax,
            Form(F.cross_entropy, _labels),
            {"compiled": Form(closed_forms.softmax, _labels)},
            _EXACT,
        ),
        Case(
            "seesaw",
            "Seesaw, all rows foreground",
            2,
            _ours_seesaw,
            Form(_released_seesaw, _labels_counts),
            {"compiled": Form(closed_forms.seesaw, _labels_counts)},
            _EXACT,
            background=False,
        ),
    )
}
