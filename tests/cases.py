"""The table of losses that the tests go through, and how their errors are measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gol_kernels as gk
from gol_kernels import reference, released


@dataclass(frozen=True)
class Case:
    """A loss over logits [N, columns(C)] and labels 0..C (0..C-1 where background is not legal)."""

    name: str
    extra_logits: int
    loss: Callable[..., Tensor]  # (logits, labels, **common) -> loss
    released: Callable[[Tensor, Tensor], Tensor] | None = None  # the released eager formula
    background: bool = True

    def inputs(
        self, n: int, c: int, dtype: torch.dtype = torch.float32, spread: float = 2.0
    ) -> tuple[Tensor, Tensor]:
        """Logits around -1 and labels, a third of them background where that is legal."""
        logits = (torch.randn(n, c + self.extra_logits, dtype=torch.float64) * spread - 1).to(dtype)
        labels = torch.randint(0, c, (n,))
        if self.background:
            labels = torch.where(torch.rand(n) < 1 / 3, c, labels)
        return logits, labels


def rare_mask(c: int) -> Tensor:
    """Two of three classes."""
    return torch.arange(c) % 3 != 1


def counts(c: int) -> Tensor:
    """Class counts from 0 to about 10^5, long-tailed."""
    return (10 ** (5 * torch.linspace(0, 1, c).flip(0)) - 1).to(torch.int64)


def generator(device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(5)


def _seesaw(logits: Tensor, labels: Tensor, **common: Any) -> Tensor:
    classes, objectness = gk.seesaw_loss(logits, labels, counts(logits.shape[1] - 2), **common)
    return classes + objectness


def _seesaw_without_objectness(logits: Tensor, labels: Tensor, **common: Any) -> Tensor:
    return gk.seesaw_loss(logits, labels, counts(logits.shape[1]), **common)[0]


def _eql(link: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda z, y, **common: link(z, y, reweight=gk.EQL(rare_mask(z.shape[1])), **common)


def _drop(link: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda z, y, **common: link(z, y, reweight=gk.Drop(rare_mask(z.shape[1]), generator()), **common)


CASES = [
    Case("gumbel", 1, gk.gumbel_loss, released.gumbel_ce),
    Case("gumbel-T2", 1, lambda z, y, **k: gk.gumbel_loss(z, y, temperature=2.0, **k)),
    Case("gumbel-straight", 1, lambda z, y, **k: gk.gumbel_loss(z, y, outside="straight_through", **k)),
    Case("gumbel-unclipped", 1, lambda z, y, **k: gk.gumbel_loss(z, y, clip=None, **k)),
    Case("sigmoid", 1, gk.sigmoid_loss, released.sigmoid_ce),
    Case("softmax", 1, gk.softmax_loss, lambda z, y: torch.nn.functional.cross_entropy(z, y)),
    Case(
        "eql-gumbel",
        0,
        _eql(gk.gumbel_loss),
        lambda z, y: released.eql(z, y, rare_mask(z.shape[1]), gumbel=True),
    ),
    Case(
        "eql-sigmoid",
        0,
        _eql(gk.sigmoid_loss),
        lambda z, y: released.eql(z, y, rare_mask(z.shape[1]), gumbel=False),
    ),
    Case("gol", 0, _drop(gk.gumbel_loss)),
    Case("drop-sigmoid", 0, _drop(gk.sigmoid_loss)),
    Case(
        "seesaw",
        2,
        _seesaw,
        lambda z, y: sum(released.seesaw(z, y, counts(z.shape[1] - 2).to(z.dtype))),  # type: ignore[arg-type,return-value]
    ),
    Case("seesaw-no-objectness", 0, _seesaw_without_objectness, background=False),
]
BY_NAME = {case.name: case for case in CASES}


def loss_and_grad(function: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and d loss / d logits, both detached."""
    leaf = logits.detach().clone().requires_grad_(True)
    loss = function(leaf)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), grad


def truth(case: Case, logits: Tensor, labels: Tensor, **common: Any) -> tuple[Tensor, Tensor]:
    """Float64 reference loss and gradient of the same logits."""
    return loss_and_grad(lambda z: case.loss(z, labels, backend="reference", **common), logits.double())


def relative_l2(value: Tensor, expected: Tensor) -> float:
    """||value - expected|| / ||expected|| in float64; ||value|| where nothing is expected."""
    expected = expected.double()
    scale = expected.norm()
    return float((value.double() - expected).norm() / (scale if scale > 0 else 1))


__all__ = [
    "BY_NAME",
    "CASES",
    "Case",
    "counts",
    "loss_and_grad",
    "rare_mask",
    "reference",
    "relative_l2",
    "truth",
]
