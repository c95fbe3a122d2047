"""The losses that are timed, and the data they are timed on.

Every case has logits [N, K] of one size, so that all of them move the same bytes. The data has the shape of
LVIS: a quarter of the rows is foreground, and the classes' frequencies fall over four decades.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
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
    """logits [N, K]; labels [N] int64 in 0..C; rare bool [C]; counts int64 [C].

    What else the losses are given is made once and is no part of a step.

    draw_seed: fixes DropLoss's draws, the same for every provider; None: each draws its own, as in training.
    upstream: the loss is multiplied by it before its gradient is taken, as GradScaler does.
    """

    logits: Tensor
    labels: Tensor
    rare: Tensor
    counts: Tensor
    draw_seed: int | None = None
    upstream: float = 1.0

    @cached_property
    def ratio(self) -> Tensor:
        """[C] of EQLv2's positive and negative gradients: from 2, of the most frequent class, to 0.02."""
        return 2 * (self.counts / 1e5).sqrt()

    @cached_property
    def sampled(self) -> Tensor:
        """bool [C+1]: fifty classes, as the federated loss keeps, and not the background."""
        generator = torch.Generator(self.counts.device).manual_seed(1)
        drawn = torch.randperm(len(self.counts), generator=generator, device=self.counts.device)[:50]
        return self.counts.new_zeros(len(self.counts) + 1, dtype=torch.bool).index_fill_(0, drawn, True)

    @cached_property
    def groups(self) -> tuple[Tensor, Tensor]:
        """uint8 [C+1] and [N], ACSL's: frequent (4), common (2), rare (1) classes as in LVIS v1, background
        (8); of the background rows a tenth has the common, a hundredth the rare classes."""
        rank = self.counts.argsort(descending=True).argsort() / len(self.counts)
        classes = 1 + (rank < 866 / 1203).int() + 2 * (rank < 405 / 1203).int()
        row = torch.arange(len(self.labels), device=self.labels.device)
        rows = 12 + 2 * (row % 10 == 0) + (row % 100 == 1)
        background = self.labels == len(self.counts)
        return F.pad(classes, (0, 1), value=8).to(torch.uint8), (rows * background).to(torch.uint8)

    @cached_property
    def prior(self) -> Tensor:
        """float32 [C+1]: the counts, at least 1; of background as many as of all classes."""
        return torch.cat([self.counts.clamp(min=1), self.counts.sum()[None]]).float()

    @cached_property
    def log_prior(self) -> Tensor:
        """float64 [C+1]."""
        return self.prior.double().log()

    def generator(self) -> torch.Generator | None:
        """Of our kernels' draws."""
        if self.draw_seed is None:
            return None
        return torch.Generator(self.logits.device).manual_seed(self.draw_seed)

    def draws(self) -> Tensor:
        """[N, K] int16, uniform over all 65536 values: those of our kernels where they are fixed."""
        n, k = self.logits.shape
        generator, device = self.generator(), self.logits.device
        if generator is None:
            # One 64-bit draw makes four of 16 bits: the fastest that PyTorch offers.
            words = torch.empty((n * k + 3) // 4, dtype=torch.int64, device=device).random_(-(2**63), None)
            return words.view(torch.int16)[: n * k].view(n, k)
        seed, offset = torch.randint(2**63 - 1, (2,), generator=generator, device=device)
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
    per_element: whether the loss is a mean over elements, not over rows.
    module: of a loss with a state, the module in a state in which its next call has the batch's loss.
    """

    name: str
    title: str
    extra_logits: int
    ours: Callable[[Tensor, Batch, str | None], Tensor]
    released: Form
    closed: dict[str, Form]
    tolerance: float
    background: bool = True
    per_element: bool = False
    module: Callable[[Batch], nn.Module] | None = None

    def batch(
        self,
        n: int = ROWS,
        k: int = COLUMNS,
        *,
        spread: float = 1.5,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> Batch:
        """Logits from N(-1, spread^2) within LOGIT_RANGE, labels after the classes' frequencies."""
        draw: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(seed), "device": device}
        c = k - self.extra_logits
        logits = (torch.randn(n, k, **draw) * spread - 1).clamp(*LOGIT_RANGE).to(dtype)
        rank = torch.randperm(c, **draw)
        frequency = 10 ** (-4 * rank.double() / c)
        labels = torch.multinomial(frequency, n, replacement=True, generator=draw["generator"])
        if self.background:
            labels = torch.where(torch.rand(n, **draw) < 0.25, labels, c)
        rare = rank >= round(c * (1 - RARE_SHARE))
        counts = (frequency * 1e5).long()
        return Batch(logits, labels, rare, counts, upstream=self.upstream(logits))

    def upstream(self, logits: Tensor) -> float:
        """1; for float16 about the loss's denominator: it has no numbers for a mean's gradients."""
        if logits.dtype != torch.float16 or logits.numel() == 0:
            return 1.0
        return 2.0 ** round(math.log2(logits.numel() if self.per_element else logits.shape[0]))

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


def _counting(make: Callable[[int], Any]) -> Callable[[Batch], nn.Module]:
    """A module that counts the batch's labels before it weights, a batch before the batch's counts."""

    def build(batch: Batch) -> nn.Module:
        c = batch.counts.shape[0]
        module = make(c).to(batch.logits.device)
        module.class_stats.label_counts.copy_(F.pad(batch.counts, (0, 1)) - gk.label_counts(batch.labels, c))
        return module

    return build


def _eqlv2_module(batch: Batch) -> nn.Module:
    module = gk.EQLv2Loss(len(batch.counts)).to(batch.logits.device)
    assert module.gradient_stats is not None
    module.gradient_stats.negative_gradient.fill_(1e6)
    module.gradient_stats.positive_gradient.copy_(1e6 * batch.ratio)
    return module


def _eager_gumbel_seesaw(z: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Ours alone: released Gumbel terms with the released Seesaw's factors. All rows are foreground."""
    target = F.one_hot(labels, z.shape[1]).to(z.dtype)
    p = released.gumbel_probability(z)
    factors = released.seesaw_factors(p.detach(), labels, counts.to(z.dtype))
    loss = F.binary_cross_entropy(p, target, reduction="none")
    return torch.sum(loss * (factors * (1 - target) + target)) / len(z)


def _ours_gumbel_seesaw(z: Tensor, batch: Batch, backend: str | None) -> Tensor:
    return gk.gumbel_loss(z, batch.labels, reweight=gk.Seesaw(batch.counts, q=2.0), backend=backend)


def _released_eqlv2(z: Tensor, labels: Tensor, ratio: Tensor) -> Tensor:
    return released.eqlv2(z, labels, ratio)[0]


def _ours_eqlv2(z: Tensor, batch: Batch, backend: str | None) -> Tensor:
    negative = F.pad(torch.sigmoid(12 * (batch.ratio - 0.8)), (0, 1), value=1.0)
    reweight = gk.ClassWeights(torch.stack([5 - 4 * negative, negative]))
    sums = z.new_zeros((2, z.shape[1]), dtype=torch.float64)
    return gk.sigmoid_loss(z, batch.labels, reweight=reweight, class_gradients=sums, backend=backend)


def _labels_ratio(batch: Batch) -> tuple[Tensor | None, ...]:
    return batch.labels, batch.ratio


def _released_federated(z: Tensor, labels: Tensor, sampled: Tensor) -> Tensor:
    return released.federated(z, labels, sampled[:-1])


def _ours_federated(z: Tensor, batch: Batch, backend: str | None) -> Tensor:
    return gk.sigmoid_loss(z, batch.labels, reweight=gk.Federated(batch.sampled), backend=backend)


def _labels_sampled(batch: Batch) -> tuple[Tensor | None, ...]:
    return batch.labels, batch.sampled


def _ours_acsl(z: Tensor, batch: Batch, backend: str | None) -> Tensor:
    return gk.sigmoid_loss(z, batch.labels, reweight=gk.ACSL(*batch.groups), backend=backend)


def _labels_groups(batch: Batch) -> tuple[Tensor | None, ...]:
    return batch.labels, *batch.groups


def _ours_balanced(z: Tensor, batch: Batch, backend: str | None) -> Tensor:
    return gk.softmax_loss(z, batch.labels, log_prior=batch.log_prior, backend=backend)


def _ours_equilibrium(z: Tensor, batch: Batch, backend: str | None) -> Tensor:
    """Its prior, the classes' mean scores, is another one at every step."""
    return gk.softmax_loss(z, batch.labels, log_prior=batch.prior.double().log(), backend=backend)


def _labels_prior(batch: Batch) -> tuple[Tensor | None, ...]:
    return batch.labels, batch.prior


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
            per_element=True,
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
            module=_counting(gk.SeesawLoss),
        ),
        Case(
            "gumbel_seesaw",
            "Gumbel with Seesaw's factors, all rows foreground",
            0,
            _ours_gumbel_seesaw,
            Form(_eager_gumbel_seesaw, _labels_counts),
            {"compiled": Form(closed_forms.gumbel_seesaw, _labels_counts)},
            _GUMBEL,
            background=False,
            module=_counting(partial(gk.GumbelSeesawLoss, q=2.0)),
        ),
        Case(
            "eqlv2",
            "EQLv2 (sigmoid), with its gradient sums",
            1,
            _ours_eqlv2,
            Form(_released_eqlv2, _labels_ratio),
            {"compiled": Form(closed_forms.eqlv2, _labels_ratio)},
            _EXACT,
            module=_eqlv2_module,
        ),
        Case(
            "federated",
            "Federated (sigmoid)",
            1,
            _ours_federated,
            Form(_released_federated, _labels_sampled),
            {"compiled": Form(closed_forms.federated, _labels_sampled)},
            _EXACT,
        ),
        Case(
            "acsl",
            "ACSL (sigmoid)",
            1,
            _ours_acsl,
            Form(released.acsl, _labels_groups),
            {"compiled": Form(closed_forms.acsl, _labels_groups)},
            _EXACT,
        ),
        Case(
            "balanced",
            "Balanced softmax",
            1,
            _ours_balanced,
            Form(released.balanced_softmax, _labels_prior),
            {"compiled": Form(closed_forms.softmax, _labels_prior)},
            _EXACT,
        ),
        Case(
            "equilibrium",
            "Equilibrium (LOCE)",
            1,
            _ours_equilibrium,
            Form(released.equilibrium, _labels_prior),
            {"compiled": Form(closed_forms.softmax, _labels_prior)},
            _EXACT,
        ),
    )
}
