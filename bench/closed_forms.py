"""The strongest baselines: loss and gradient in one function, without autograd, made for torch.compile.

Each works on the negatives of all [N, K] columns and then puts the N positives right, which is what Inductor
fuses best. They are baselines of the benches alone: no options, no ignored rows.

z [N, K] float32, labels [N] int64. Returns the loss, a mean over rows unless it says otherwise, and its
gradient [N, K].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from gol_kernels.reference import keep_limit

_CLIP = (-4.0, 10.0)


def gumbel(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """GumbelCE over K columns, the background's too; the mean over elements."""
    return _gumbel(z, labels, None, z.numel(), exact=True)


def gumbel_fewer_digits(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """1 - exp(-e) instead of -expm1(-e): faster, and wrong by up to 7e-4 near z = 10."""
    return _gumbel(z, labels, None, z.numel(), exact=False)


def gol(z: Tensor, labels: Tensor, rare: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """DropLoss over C = K classes; draws int16 [N, C]."""
    return _gumbel(z, labels, _drop_kept(labels, rare, draws), len(z), exact=True)


def gol_fewer_digits(z: Tensor, labels: Tensor, rare: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """As ``gumbel_fewer_digits``."""
    return _gumbel(z, labels, _drop_kept(labels, rare, draws), len(z), exact=False)


def sigmoid(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy over K columns, the background's too."""
    return _sigmoid(z, labels, None)


def eql(z: Tensor, labels: Tensor, rare: Tensor) -> tuple[Tensor, Tensor]:
    """EQL over C = K classes."""
    return _sigmoid(z, labels, ~((labels < z.shape[1])[:, None] & rare))


def gumbel_seesaw(z: Tensor, labels: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Seesaw's factors on the negatives over C = K columns, all rows foreground; log p is -e."""
    _, e, _ = _gumbel_terms(z, True)
    return _gumbel(z, labels, _seesaw_log_weight(-e, labels, counts).exp(), len(z), exact=True)


def eqlv2(z: Tensor, labels: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """EQLv2 (gamma = 12, mu = 0.8, alpha = 4) over C + 1 = K columns. Its gradient sums would be two more
    reductions over rows, which Inductor makes a pass of its own: they are left out, in its favour."""
    n = z.shape[0]
    negative = F.pad(torch.sigmoid(12 * (ratio - 0.8)), (0, 1), value=1.0)
    loss, slope = _softplus(z)
    column = labels[:, None]
    (positive_y, slope_y), negative_y = _softplus(-z.gather(1, column)), loss.gather(1, column)[:, 0]
    own = 5 - 4 * negative[labels]
    total = (loss * negative).sum(1) + own * positive_y[:, 0] - negative[labels] * negative_y
    grad = (slope * negative / n).scatter_(1, column, -own[:, None] * slope_y / n)
    return total.sum() / n, grad


def federated(z: Tensor, labels: Tensor, sampled: Tensor) -> tuple[Tensor, Tensor]:
    """The columns sampled, bool [K]; a label that is not among them has no positive."""
    return _sigmoid(z, torch.where(sampled[labels], labels, z.shape[1]), sampled[None, :].expand_as(z))


def acsl(z: Tensor, labels: Tensor, class_groups: Tensor, row_groups: Tensor) -> tuple[Tensor, Tensor]:
    """ACSL (threshold 0.7) over C + 1 = K columns."""
    foreground = (labels < z.shape[1] - 1)[:, None]
    drawn = (row_groups[:, None] & class_groups) != 0
    return _sigmoid(z, labels, torch.where(foreground, z >= math.log(0.7 / 0.3), drawn))


def softmax(z: Tensor, labels: Tensor, prior: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy over K columns, of softmax(z + log prior) where there is a prior.

    The exponentials are multiplied by it: Inductor would take its logarithm anew for every element.
    """
    n = z.shape[0]
    p, loss = _softmax_rows(z, labels, prior)
    return loss.sum() / n, p.scatter_add_(1, labels[:, None], z.new_full((n, 1), -1.0)) / n


def seesaw(z: Tensor, labels: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Seesaw (p = 0.8, q = 2, eps = 0.01) and its objectness over C + 2 = K columns, all rows foreground."""
    n, c = z.shape[0], z.shape[1] - 2
    classes, column = z[:, :c], labels[:, None]
    log_s = classes - classes.logsumexp(1, keepdim=True)
    p, loss = _softmax_rows(classes + _seesaw_log_weight(log_s, labels, counts), labels)
    # All rows are objects: softplus(b - o), slope -sigmoid(b - o).
    d = z[:, c + 1] - z[:, c]
    slope = torch.sigmoid(d)
    objectness = d.clamp(min=0) + torch.log1p(torch.exp(-d.abs()))
    grad = torch.cat([p, -slope[:, None], slope[:, None]], 1)
    grad = grad.scatter_add_(1, column, z.new_full((n, 1), -1.0)) / n
    return (loss.sum() + objectness.sum()) / n, grad


def _seesaw_log_weight(log_s: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """p = 0.8, q = 2, eps = 0.01. Both factors vanish at the label: ln n_y - ln n_y, and log s_y is not above
    the limit."""
    ln_n = counts.clamp(min=1).to(log_s.dtype).log()
    limit = log_s.gather(1, labels[:, None]).clamp(min=math.log(1e-2))
    mitigation = (ln_n - ln_n[labels][:, None]).clamp(max=0)
    return 0.8 * mitigation + 2.0 * (log_s - limit).clamp(min=0)


def _softmax_rows(z: Tensor, labels: Tensor, prior: Tensor | None = None) -> tuple[Tensor, Tensor]:
    m = z.amax(1, keepdim=True)
    e = torch.exp(z - m)
    if prior is not None:
        e = e * prior
    total = e.sum(1, keepdim=True)
    loss = (total.log() + m - z.gather(1, labels[:, None]))[:, 0]
    return e / total, loss if prior is None else loss - prior[labels].log()


def _drop_kept(labels: Tensor, rare: Tensor, draws: Tensor) -> Tensor:
    """Background rows keep a rare class's negative where the draw is below the share of rare labels."""
    below = draws < keep_limit(labels, rare) - 0x8000
    return ~rare | ((labels == rare.numel())[:, None] & below)


def _gumbel(
    z: Tensor, labels: Tensor, kept: Tensor | None, divisor: int, *, exact: bool
) -> tuple[Tensor, Tensor]:
    """Negative: -log t, slope e (1 - t) / t with t = 1 - exp(-e), e = exp(-z). Positive: e, slope -e."""
    t, e, clamped = _gumbel_terms(z, exact)
    log_t = torch.log(t)
    slope = torch.where(clamped == z, (e - e * t) / (t * divisor), 0.0)
    has_positive, column = _positives(z, labels)
    z_y = z.gather(1, column)
    t_y, e_y, clamped_y = _gumbel_terms(z_y, exact)
    own, log_t_y = torch.where(clamped_y == z_y, -e_y / divisor, 0.0), torch.log(t_y)
    loss, grad = _put_positives(-log_t, slope, kept, has_positive, column, e_y, own, -log_t_y)
    return loss / divisor, grad


def _gumbel_terms(z: Tensor, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    clamped = z.clamp(*_CLIP)
    e = torch.exp(-clamped)
    return (-torch.expm1(-e) if exact else 1 - torch.exp(-e)), e, clamped


def _sigmoid(z: Tensor, labels: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """Negative: softplus(z), slope sigmoid(z). Positive: softplus(-z), slope -sigmoid(-z)."""
    n = z.shape[0]
    loss, slope = _softplus(z)
    has_positive, column = _positives(z, labels)
    z_y = z.gather(1, column)
    (negative_y, _), (positive_y, slope_y) = _softplus(z_y), _softplus(-z_y)
    total, grad = _put_positives(
        loss, slope / n, kept, has_positive, column, positive_y, -slope_y / n, negative_y
    )
    return total / n, grad


def _softplus(z: Tensor) -> tuple[Tensor, Tensor]:
    e = torch.exp(-z.abs())
    return z.clamp(min=0) + torch.log1p(e), torch.where(z >= 0, 1.0, e) / (1 + e)


def _positives(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return (labels < z.shape[1])[:, None], labels.clamp(max=z.shape[1] - 1)[:, None]


def _put_positives(
    loss: Tensor,
    slope: Tensor,
    kept: Tensor | None,
    has_positive: Tensor,
    column: Tensor,
    positive: Tensor,
    positive_slope: Tensor,
    negative: Tensor,
) -> tuple[Tensor, Tensor]:
    """Summed loss and gradient, with the label's column taken out of the negatives and put in as positive.

    kept: bool, or a weight of every negative.
    """
    if kept is not None:
        loss, slope = _times(loss, kept), _times(slope, kept)
        negative = _times(negative, kept.gather(1, column))
    total = loss.sum(1) + torch.where(has_positive, positive - negative, 0.0)[:, 0]
    own = torch.where(has_positive, positive_slope, slope.gather(1, column))
    return total.sum(), slope.scatter_(1, column, own)


def _times(term: Tensor, kept: Tensor) -> Tensor:
    return torch.where(kept, term, 0.0) if kept.dtype == torch.bool else term * kept
