"""The released eager formulas in the place of our loss modules, with the modules' own state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gol_kernels import released

Formula = Callable[[Any, Tensor, Tensor], Tensor]


def _seesaw(module: Any, z: Tensor, labels: Tensor) -> Tensor:
    module.class_stats.count(labels)
    counts = module.class_stats.label_counts[:-1].to(z.dtype)
    return torch.stack(released.seesaw(z, labels, counts, p=module.p, q=module.q, eps=module.eps)).sum()


def _eqlv2(module: Any, z: Tensor, labels: Tensor) -> Tensor:
    stats = module.gradient_stats
    ratio = stats.gradient_ratio.to(z.dtype)
    loss, *sums = released.eqlv2(z, labels, ratio, gamma=module.gamma, mu=module.mu, alpha=module.alpha)
    stats.add_gradients(torch.stack(sums).double())
    return loss


RELEASED: dict[str, Formula] = {
    "softmax": lambda module, z, labels: F.cross_entropy(z, labels),
    "sigmoid": lambda module, z, labels: released.sigmoid_ce(z, labels),
    "gumbel": lambda module, z, labels: released.gumbel_ce(z, labels),
    "eql": lambda module, z, labels: released.eql(z, labels, module.rare, gumbel=False),
    "gol_star": lambda module, z, labels: released.eql(z, labels, module.rare, gumbel=True),
    "droploss": lambda module, z, labels: released.drop_loss(z, labels, module.rare, gumbel=False),
    "gol": lambda module, z, labels: released.drop_loss(z, labels, module.rare, gumbel=True),
    "seesaw": _seesaw,
    "eqlv2": _eqlv2,
}
"""By the trainer's name of a loss: (module, logits [N, K] float32, labels [N]) -> the mean over rows. Labels
are counted by our kernels here, where the released Seesaw reads them one by one on the host."""


@contextmanager
def in_place_of(module: Any, formula: Formula) -> Iterator[None]:
    """Within the block the loss module computes the formula; its hooks and its state stay.

    Half precision is cast first and autocast turned off, as mmdet does for its losses: the formulas need
    float32, and torch refuses ``binary_cross_entropy`` under autocast on a GPU. The divisor that the trainer
    gives is not looked at: in one process it is the number of rows, which the formulas divide by.
    """

    def forward(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            return formula(module, logits.float(), labels)

    module.forward = forward
    try:
        yield
    finally:
        del module.forward
