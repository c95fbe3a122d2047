"""The table of losses that the tests go through, and how their errors are measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gol_kernels as gk
from gol_kernels import reference, released


def special_error() -> float:
    """By what exponentials and logarithms of a float32 kernel may err relatively, beyond rounding: on a GPU,
    which has an instruction for each, by 2^-22 (PTX manual, ex2.approx and lg2.approx)."""
    return 2.0**-22 if torch.get_default_device().type == "cuda" else 0.0


def loss_error() -> float:
    """Relative error of a float32 loss."""
    return 1e-6 + 2 * special_error()


@dataclass(frozen=True)
class Case:
    """A loss over logits [N, columns(C)] and labels 0..C (0..C-1 where background is not legal)."""

    name: str
    extra_logits: int
    loss: Callable[..., Tensor]  # (logits, labels, **common) -> loss
    released: Callable[[Tensor, Tensor], Tensor] | None = None  # the released eager formula
    background: bool = True
    tolerance: float = 2e-7  # relative L2 error of the float32 gradient, with exact special functions

    @property
    def float32_error(self) -> float:
        """The same where they err: a slope is made of two of them."""
        return self.tolerance + 2 * special_error()

    def inputs(
        self, n: int, c: int, dtype: torch.dtype = torch.float32, spread: float = 2.0
    ) -> tuple[Tensor, Tensor]:
        """Logits around -1 and labels, a third of them background where that is legal."""
        logits = (torch.randn(n, c + self.extra_logits, dtype=torch.float64) * spread - 1).to(dtype)
        labels = torch.randint(0, c, (n,))
        if self.background:
            labels = torch.where(torch.rand(n) < 1 / 3, c, labels)
        return logits, labels


def rare_mask(c: int, device: torch.device | str | None = None) -> Tensor:
    """Two of three classes."""
    return torch.arange(c, device=device) % 3 != 1


def counts(c: int, device: torch.device | str | None = None) -> Tensor:
    """Class counts from 0 to about 10^5, long-tailed."""
    return (10 ** (5 * torch.linspace(0, 1, c, device=device).flip(0)) - 1).to(torch.int64)


def class_weights(k: int, device: torch.device | str | None = None) -> Tensor:
    """[2, K]: weights of positives and negatives, some of them 0."""
    wave = torch.arange(k, dtype=torch.float64, device=device)
    return torch.stack([1 + wave % 4, (wave % 5) / 4]).to(torch.float32)


def class_groups(k: int, device: torch.device | str | None = None) -> Tensor:
    """uint8 [K]: groups 1, 2, 4 in turn, and 8 for the last column."""
    groups = 2 ** (torch.arange(k, device=device) % 3)
    groups[-1] = 8
    return groups.to(torch.uint8)


def row_groups(labels: Tensor, background: int) -> Tensor:
    """uint8 [N]: background rows keep the groups 2, 4 and 8."""
    return torch.where(labels == background, 14, 0).to(torch.uint8)


def generator(device: torch.device | str | None = None, seed: int = 5) -> torch.Generator:
    return torch.Generator(device or torch.get_default_device()).manual_seed(seed)


def _seesaw(logits: Tensor, labels: Tensor, **common: Any) -> Tensor:
    classes, objectness = gk.seesaw_loss(logits, labels, counts(logits.shape[1] - 2, logits.device), **common)
    return classes + objectness


def _seesaw_without_objectness(logits: Tensor, labels: Tensor, **common: Any) -> Tensor:
    return gk.seesaw_loss(logits, labels, counts(logits.shape[1], logits.device), **common)[0]


def _prior(logits: Tensor, labels: Tensor, **common: Any) -> Tensor:
    log_prior = counts(logits.shape[1], logits.device).double().clamp(min=1).log()
    return gk.softmax_loss(logits, labels, log_prior=log_prior, **common)


REWEIGHTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "eql": lambda z, y: gk.EQL(rare_mask(z.shape[1], z.device)),
    "drop": lambda z, y: gk.Drop(rare_mask(z.shape[1], z.device), generator(z.device)),
    "weights": lambda z, y: gk.ClassWeights(class_weights(z.shape[1], z.device)),
    "federated": lambda z, y: gk.Federated(rare_mask(z.shape[1], z.device)),
    "acsl": lambda z, y: gk.ACSL(class_groups(z.shape[1], z.device), row_groups(y, z.shape[1] - 1), 0.6),
    "seesaw": lambda z, y: gk.Seesaw(counts(z.shape[1], z.device), q=2.0),
}
"""Every reweighting of the Bernoulli family, of logits and labels."""

LINKS: dict[str, Callable[..., Tensor]] = {
    "gumbel": gk.gumbel_loss,
    "sigmoid": gk.sigmoid_loss,
    "probit": gk.probit_loss,
}


def _reweighted(link: str, reweight: str) -> Callable[..., Tensor]:
    return lambda z, y, **common: LINKS[link](z, y, reweight=REWEIGHTS[reweight](z, y), **common)


def _pairs() -> list[Case]:
    """Every link with every reweighting. Seesaw's weight is a power of a quotient of probabilities, of which
    float32 keeps fewer digits."""
    return [
        Case(
            f"{link}-{reweight}",
            int(reweight in ("weights", "federated", "acsl")),
            _reweighted(link, reweight),
            _RELEASED.get((link, reweight)),
            tolerance=6e-7 if reweight == "seesaw" else 2e-7,
        )
        for link in LINKS
        for reweight in REWEIGHTS
    ]


_RELEASED: dict[tuple[str, str], Callable[[Tensor, Tensor], Tensor]] = {
    ("gumbel", "eql"): lambda z, y: released.eql(z, y, rare_mask(z.shape[1]), gumbel=True),
    ("sigmoid", "eql"): lambda z, y: released.eql(z, y, rare_mask(z.shape[1]), gumbel=False),
}

CASES = [
    Case("gumbel", 1, gk.gumbel_loss, released.gumbel_ce),
    Case("gumbel-T2", 1, lambda z, y, **k: gk.gumbel_loss(z, y, temperature=2.0, **k)),
    Case("gumbel-straight", 1, lambda z, y, **k: gk.gumbel_loss(z, y, outside="straight_through", **k)),
    Case("gumbel-unclipped", 1, lambda z, y, **k: gk.gumbel_loss(z, y, clip=None, **k)),
    Case("sigmoid", 1, gk.sigmoid_loss, released.sigmoid_ce),
    Case("softmax", 1, gk.softmax_loss, lambda z, y: torch.nn.functional.cross_entropy(z, y)),
    Case("probit", 1, gk.probit_loss),
    Case("probit-unclipped", 1, lambda z, y, **k: gk.probit_loss(z, y, clip=None, **k)),
    Case("softmax-prior", 1, _prior),
    *_pairs(),
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
    "loss_error",
    "rare_mask",
    "reference",
    "relative_l2",
    "special_error",
    "truth",
]
