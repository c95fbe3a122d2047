"""The losses as the papers' released code computes them, written out eagerly and left to autograd.

They are what parity is claimed against, and what the benches call "released". Known differences from
the closed forms, each a property of the released code:

- Gumbel: p is formed first and put through ``binary_cross_entropy``, whose backward divides by
  max(p(1-p), 1e-12). A positive with z < -3.32 loses its gradient (-0.137 instead of -33.1 at -3.5).
- Outside [-4, 10] the clamp sends back nothing: a negative at z > 10 is not corrected.
- GumbelCE's reduced loss is clamped to [0, 20]; above 20 the whole batch has no gradient.
- EQL, DropLoss, EQLv2, the federated loss and ACSL ignore row weights and divide by N.
- Seesaw forms C x C ratios, and counts on the local rank alone.
- Balanced softmax takes the logarithm of the counts once for each row.
- The equilibrium loss takes the logarithm of a quotient of exponentials: a logit 104 below the row's highest
  underflows in float32, and as the label's gives an infinite loss and no gradient that is a number.

What a loss draws at random (DropLoss's elements, the federated classes, ACSL's rows) is an argument here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def gumbel_probability(z: Tensor) -> Tensor:
    """1 / exp(exp(-clamp(z, -4, 10)))."""
    return 1 / torch.exp(torch.exp(-z.clamp(-4, 10)))


def gumbel_ce(
    z: Tensor, labels: Tensor, row_weights: Tensor | None = None, avg_factor: float | None = None
) -> Tensor:
    """GumbelCE over all K columns of z [N, K] float32; labels [N] in 0..K-1; mean over avg_factor or N."""
    target = F.one_hot(labels, z.shape[1]).to(torch.float32)
    loss = F.binary_cross_entropy(gumbel_probability(z), target, reduction="none")
    if row_weights is not None:
        loss = loss * row_weights[:, None].expand_as(loss)
    loss = loss.sum() / (z.shape[0] if avg_factor is None else avg_factor)
    return torch.clamp(loss, 0, 20)


def sigmoid_ce(z: Tensor, labels: Tensor) -> Tensor:
    """BCE with logits summed over all K columns, averaged over rows."""
    target = F.one_hot(labels, z.shape[1]).to(z.dtype)
    return F.binary_cross_entropy_with_logits(z, target, reduction="none").sum() / z.shape[0]


def eql(z: Tensor, labels: Tensor, rare: Tensor, *, gumbel: bool) -> Tensor:
    """EQL over z [N, C]; labels [N] in 0..C; rare [C] bool."""
    return _masked(z, labels, rare, (labels < z.shape[1]).to(z.dtype)[:, None], gumbel)


def drop_loss(
    z: Tensor, labels: Tensor, rare: Tensor, *, gumbel: bool, uniform: Tensor | None = None
) -> Tensor:
    """DropLoss over z [N, C]; with ``gumbel`` this is GOL. uniform [N, C] replaces its random draw."""
    n_classes = z.shape[1]
    foreground = (labels < n_classes).to(z.dtype)[:, None]
    rare_rows = rare[labels[labels < n_classes]].to(z.dtype)
    share = rare_rows.mean()
    draw = torch.rand_like(z) if uniform is None else uniform
    background_drop = (draw > share).to(z.dtype) * (1 - foreground)
    return _masked(z, labels, rare, foreground + background_drop, gumbel)


def _masked(z: Tensor, labels: Tensor, rare: Tensor, drop: Tensor, gumbel: bool) -> Tensor:
    n, n_classes = z.shape
    target = F.one_hot(labels, n_classes + 1)[:, :n_classes].to(z.dtype)
    weight = 1 - drop * rare.to(z.dtype)[None, :].expand(n, n_classes) * (1 - target)
    if gumbel:
        loss = F.binary_cross_entropy(gumbel_probability(z), target, reduction="none")
    else:
        loss = F.binary_cross_entropy_with_logits(z, target, reduction="none")
    return torch.sum(loss * weight) / n


def seesaw(
    z: Tensor,
    labels: Tensor,
    class_counts: Tensor,
    *,
    p: float = 0.8,
    q: float = 2.0,
    eps: float = 1e-2,
    avg_factor: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Seesaw classes and objectness over z [N, C+2]; class_counts [C] float, this batch counted already."""
    c = z.shape[1] - 2
    a = z.shape[0] if avg_factor is None else avg_factor
    positive = labels < c
    target = (~positive).long()
    objectness = F.cross_entropy(z[:, c:], target, reduction="none").sum() / a
    classes = z[positive, :c]
    if classes.shape[0] == 0:
        return classes.sum(), objectness
    y = labels[positive]
    factors = seesaw_factors(F.softmax(classes.detach(), dim=1), y, class_counts, p=p, q=q, eps=eps)
    adjusted = classes + factors.log() * (1 - F.one_hot(y, c))
    return F.cross_entropy(adjusted, y, reduction="none").sum() / a, objectness


def seesaw_factors(
    scores: Tensor, labels: Tensor, class_counts: Tensor, *, p: float = 0.8, q: float = 2.0, eps: float = 1e-2
) -> Tensor:
    """Mitigation times compensation of scores [N, C]; labels [N] in 0..C-1; class_counts [C] float."""
    n = class_counts.clamp(min=1)
    ratio = n[None, :] / n[:, None]
    lighter = (ratio < 1).to(scores.dtype)
    mitigation = (ratio.pow(p) * lighter + (1 - lighter))[labels]
    own = scores[torch.arange(len(labels)), labels].clamp(min=eps)
    against = scores / own[:, None]
    heavier = (against > 1).to(scores.dtype)
    compensation = against.pow(q) * heavier + (1 - heavier)
    return mitigation * compensation


def eqlv2(
    z: Tensor, labels: Tensor, ratio: Tensor, *, gamma: float = 12.0, mu: float = 0.8, alpha: float = 4.0
) -> tuple[Tensor, Tensor, Tensor]:
    """EQLv2 (CVPR 2021) over z [N, C+1]; ratio [C] of the positive and negative gradients so far.

    Returns: the loss and this batch's sums of positive and of negative gradients, each [C].
    """
    n, k = z.shape
    target = F.one_hot(labels, k).to(z.dtype)
    negative = torch.cat([torch.sigmoid(gamma * (ratio - mu)), ratio.new_ones(1)])
    weight = (1 + alpha * (1 - negative)) * target + negative * (1 - target)
    loss = F.binary_cross_entropy_with_logits(z, target, reduction="none")
    slope = weight * torch.abs(torch.sigmoid(z.detach()) - target)
    sums = [(slope * kind).sum(0)[:-1] for kind in (target, 1 - target)]
    return torch.sum(loss * weight) / n, sums[0], sums[1]


def federated(z: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
    """Federated loss (CenterNet2) over z [N, C+1], whose last column is not trained; kept [C] bool."""
    n, c = z.shape[0], z.shape[1] - 1
    target = F.one_hot(labels, c + 1)[:, :c].to(z.dtype)
    loss = F.binary_cross_entropy_with_logits(z[:, :c], target, reduction="none")
    return torch.sum(loss * kept.to(z.dtype)[None, :].expand(n, c)) / n


def acsl(
    z: Tensor, labels: Tensor, class_groups: Tensor, row_groups: Tensor, *, score_threshold: float = 0.7
) -> Tensor:
    """ACSL (CVPR 2021) over z [N, C+1], background last.

    class_groups [C+1], row_groups [N] uint8: a background row has the columns that share a bit with it.
    """
    n, k = z.shape
    target = F.one_hot(labels, k).to(z.dtype)
    high = torch.sigmoid(z.detach()) >= score_threshold
    drawn = (row_groups[:, None] & class_groups[None, :]) != 0
    weight = torch.where((labels < k - 1)[:, None], high, drawn).to(z.dtype)
    weight = torch.maximum(weight, target)
    loss = F.binary_cross_entropy_with_logits(z, target, reduction="none")
    return torch.sum(loss * weight) / n


def balanced_softmax(z: Tensor, labels: Tensor, class_counts: Tensor) -> Tensor:
    """Balanced softmax (NeurIPS 2020) over z [N, K]; class_counts [K] float, at least 1; mean over rows."""
    return F.cross_entropy(z + class_counts[None, :].expand_as(z).log(), labels)


def equilibrium(z: Tensor, labels: Tensor, mean_scores: Tensor) -> Tensor:
    """Equilibrium loss of LOCE (ICCV 2021) over z [N, K]; mean_scores [K]; mean over rows."""
    target = torch.zeros_like(z).scatter_(1, labels[:, None], 1).detach()
    e = mean_scores[None, :] * torch.exp(z - z.max(dim=1, keepdim=True).values)
    p = e / e.sum(1, keepdim=True)
    return -(p * target).sum(1).log().mean()
