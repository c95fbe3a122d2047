"""Every loss in plain PyTorch: the oracle of the tests, and the backend where no kernel is built.

Closed forms throughout: no probability is formed and then put through a logarithm, so float64 is good
to its last digits and float32 to its own. Nothing here imports the rest of the package.

Notation: N rows, K columns, C foreground classes; z logits [N, K]; y labels [N], C is background.
A loss returns ``(row_loss [N], grad [N, K])``, the unreduced loss of each row and d row_loss / d z.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

BCE_FLOOR = 9.999999960041972e-13
"""The floor that ATen's binary_cross_entropy backward puts under p(1-p): 1e-12 rounded to float32."""


class Link(Protocol):
    """What a link says of logits z, elementwise and in z's dtype: a loss and d loss / d z."""

    def positive(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and slope of target 1: -log p."""

    def negative(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and slope of target 0: -log(1 - p)."""


def _outside(z: Tensor, slope: Tensor, clip_min: float, clip_max: float, kind: str) -> Tensor:
    if kind == "straight_through":
        return slope
    return slope.masked_fill((z < clip_min) | (z > clip_max), 0.0)


@dataclass(frozen=True)
class GumbelLink:
    """p = exp(-exp(-z/T)) (Gumbel Optimized Loss, ECCV 2022, section 3), z clamped to the clip first.

    With e = exp(-z/T): positive -log p = e, slope -e/T; negative -log(1-p) = -log(-expm1(-e)), slope
    (1/T) e/expm1(e). ``slope`` says what a logit outside the clip sends back: "zero_outside" nothing,
    "straight_through" the slope at the clip's edge. "released" is what autograd makes of the released
    code, p followed by binary_cross_entropy: zero outside, and min(1, p(1-p)/1e-12) times the exact
    slope inside.
    """

    temperature: float = 1.0
    clip_min: float = -4.0
    clip_max: float = 10.0
    slope: str = "zero_outside"

    def positive(self, z: Tensor) -> tuple[Tensor, Tensor]:
        e = self._e(z)
        return e, self._finish(z, e, -e / self.temperature)

    def negative(self, z: Tensor) -> tuple[Tensor, Tensor]:
        e = self._e(z)
        u = z.clamp(self.clip_min, self.clip_max) / self.temperature
        # -log(1 - exp(-e)): each form keeps its digits on its side of e = ln 2; beyond u = 15 the
        # expansion u + e/2 is exact to rounding, also where e underflows.
        loss = torch.where(e <= math.log(2), -torch.log(-torch.expm1(-e)), -torch.log1p(-torch.exp(-e)))
        loss = torch.where(u > 15, u + e / 2, loss)
        slope = torch.where(e > 0, e / torch.expm1(e), torch.ones_like(e))  # e/expm1(e) -> 1 as e -> 0
        return loss, self._finish(z, e, torch.where(e.isnan(), e, slope) / self.temperature)

    def activation(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """p = exp(-exp(-z/T)) and dp/dz = p e / T (0 outside the clip)."""
        e = self._e(z)
        p = torch.exp(-e)
        return p, self._finish(z, e, p * e / self.temperature)

    def _e(self, z: Tensor) -> Tensor:
        return torch.exp(-z.clamp(self.clip_min, self.clip_max) / self.temperature)

    def _finish(self, z: Tensor, e: Tensor, slope: Tensor) -> Tensor:
        if self.slope == "released":
            slope = slope * torch.clamp(torch.exp(-e) * -torch.expm1(-e) / BCE_FLOOR, max=1.0)
        return _outside(z, slope, self.clip_min, self.clip_max, self.slope)


@dataclass(frozen=True)
class SigmoidLink:
    """p = 1/(1+exp(-z)): positive softplus(-z), negative softplus(z)."""

    def positive(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return -F.logsigmoid(z), -torch.sigmoid(-z)

    def negative(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return -F.logsigmoid(-z), torch.sigmoid(z)


@dataclass(frozen=True)
class ProbitLink:
    """p = Phi(z), the normal distribution function, z clamped to the clip first.

    Positive -log Phi(z), slope -phi(z)/Phi(z); negative is the positive at -z, its slope negated.
    ``slope`` as in ``GumbelLink``: "zero_outside" or "straight_through".
    """

    clip_min: float = -5.0
    clip_max: float = 5.0
    slope: str = "zero_outside"

    def positive(self, z: Tensor) -> tuple[Tensor, Tensor]:
        loss, slope = self._minus_log_cdf(z.clamp(self.clip_min, self.clip_max))
        return loss, _outside(z, slope, self.clip_min, self.clip_max, self.slope)

    def negative(self, z: Tensor) -> tuple[Tensor, Tensor]:
        loss, slope = self._minus_log_cdf(-z.clamp(self.clip_min, self.clip_max))
        return loss, _outside(z, -slope, self.clip_min, self.clip_max, self.slope)

    @staticmethod
    def _minus_log_cdf(x: Tensor) -> tuple[Tensor, Tensor]:
        # With r = erfcx(|x|/sqrt 2)/2: the smaller of Phi(x), Phi(-x) is exp(-x^2/2) r. phi/Phi follows
        # without forming either where they underflow.
        r = torch.special.erfcx(x.abs() / math.sqrt(2)) / 2
        density = math.sqrt(0.5 / math.pi)
        g = torch.exp(-x * x / 2)
        lower = x < 0
        loss = torch.where(lower, x * x / 2 - torch.log(r), -torch.log1p(-g * r))
        return loss, -torch.where(lower, density / r, density * g / (1 - g * r))


def bernoulli_loss(
    z: Tensor, labels: Tensor, link: Link, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """K independent binary terms; a label of K has no positive column.

    Args:
        z: [N, K] float32 or float64.
        labels: [N] int64 in 0..K.
        weight: [N, K], constant, of each term; None: 1. A term of weight 0 does not exist.

    Returns:
        row_loss [N] and grad [N, K].
    """
    loss, grad = link.negative(z)
    has_positive = (labels < z.shape[1])[:, None]
    column = labels.clamp(max=z.shape[1] - 1)[:, None]
    positive_loss, positive_grad = link.positive(z.gather(1, column))
    loss = loss.scatter(1, column, torch.where(has_positive, positive_loss, loss.gather(1, column)))
    grad = grad.scatter(1, column, torch.where(has_positive, positive_grad, grad.gather(1, column)))
    if weight is not None:
        gone = weight == 0
        loss, grad = (loss * weight).masked_fill(gone, 0.0), (grad * weight).masked_fill(gone, 0.0)
    return loss.sum(1), grad


def is_positive(labels: Tensor, num_columns: int) -> Tensor:
    """bool [N, K]: t of every term."""
    return labels[:, None] == torch.arange(num_columns, device=labels.device)


# --- reweightings of the Bernoulli family: W [N, K], constant ------------------------------------
def eql_weight(labels: Tensor, rare: Tensor) -> Tensor:
    """EQL (CVPR 2020, eq. 3): a foreground row drops the negatives of rare classes.

    Args: labels [N] int64, C is background; rare [C] bool. Returns: [N, C] bool, True is kept.
    """
    foreground = (labels < rare.numel())[:, None]
    return ~(foreground & rare[None, :]) | is_positive(labels, rare.numel())


def drop_loss_weight(labels: Tensor, rare: Tensor, counted: Tensor, seed: Tensor, offset: Tensor) -> Tensor:
    """DropLoss (AAAI 2021): EQL's on foreground rows; a background row keeps a rare class's negative with
    the batch's share of rare foreground labels as probability.

    Args: labels [N]; rare [C] bool; counted [N] bool, the rows whose labels form the share;
        seed, offset: 0-d int64 of the Philox generator. Returns: [N, C] bool, True is kept.
    """
    limit = keep_limit(labels.masked_fill(~counted, -1), rare)
    draws = philox_uint16(seed, offset, labels.numel(), rare.numel())
    background = (labels >= rare.numel())[:, None]
    return eql_weight(labels, rare) & ~(background & rare[None, :] & (draws >= limit))


def class_weight(labels: Tensor, table: Tensor) -> Tensor:
    """A weight for each class: table [2, K], of positives and of negatives (EQLv2, CVPR 2021, eq. 5-6).

    Returns: [N, K] in table's dtype.
    """
    return torch.where(is_positive(labels, table.shape[1]), table[0], table[1])


def federated_weight(labels: Tensor, kept: Tensor) -> Tensor:
    """Federated loss (CenterNet2): the terms of the classes drawn for this batch, kept [K] bool.

    Returns: [N, K] bool.
    """
    return kept[None, :].expand(labels.numel(), kept.numel())


def acsl_weight(
    z: Tensor,
    labels: Tensor,
    class_groups: Tensor,
    row_groups: Tensor,
    logit_threshold: float,
    num_classes: int,
) -> Tensor:
    """Adaptive class suppression (ACSL, CVPR 2021, section 3.2).

    A foreground row keeps its label and the negatives with z >= logit_threshold; a background row the
    columns that share a group with it.

    Args: class_groups [K], row_groups [N] uint8, one bit for each group; num_classes C, the background label.
    Returns: [N, K] bool.
    """
    foreground = (labels < num_classes)[:, None]
    same_group = (row_groups[:, None] & class_groups[None, :]) != 0
    return torch.where(foreground, z >= logit_threshold, same_group) | is_positive(labels, z.shape[1])


def bernoulli_seesaw_weight(
    z: Tensor, labels: Tensor, link: Link, class_counts: Tensor, *, p: float, q: float, eps: float
) -> Tensor:
    """Seesaw's M C (CVPR 2021, eq. 5-7) for binary terms: s is the link's own probability.

        log M_ij = p min(0, ln n_j - ln n_y),   log C_ij = q max(0, ln p_j - max(ln p_y, ln eps))

    1 at the label and on background rows. Args: z [N, C]; labels [N] in 0..C; class_counts [C], this batch
    counted already. Returns: [N, C].
    """
    foreground = (labels < z.shape[1])[:, None]
    log_p = -link.positive(z)[0]
    log_weight = _seesaw_log_weight(log_p, labels.clamp(max=z.shape[1] - 1), class_counts, p, q, eps)
    return torch.where(foreground, log_weight.exp(), torch.ones_like(log_weight))


def keep_limit(labels: Tensor, rare: Tensor) -> Tensor:
    """DropLoss's share of rare classes among the batch's foreground labels, to the nearest 2^-16.

    round(2^16 n_rare / n_foreground), and 2^16 without foreground: then nothing is dropped.
    Args: labels [N] int64, anything outside 0..C-1 is not foreground; rare [C] bool. Returns: 0-d int64.
    """
    foreground = (labels >= 0) & (labels < rare.numel())
    n_rare = (rare[labels.clamp(0, rare.numel() - 1)] & foreground).sum()
    n = foreground.sum()
    share = (2 * n_rare * 0x10000 + n) // (2 * n).clamp(min=1)
    return torch.where(n > 0, share, torch.full_like(n, 0x10000))


def philox_uint16(seed: Tensor, offset: Tensor, rows: int, columns: int) -> Tensor:
    """Philox4x32-10 (Salmon et al., SC 2011): [rows, columns] int64 in [0, 2^16).

    Column 8g + 2w + h is half h (0 the lower) of word w of counter (g, row, offset_lo, offset_hi) under
    key (seed_lo, seed_hi), whatever the shape drawn.
    """
    word = 0xFFFFFFFF
    groups = (columns + 7) // 8
    device = seed.device
    x0 = torch.arange(groups, device=device).expand(rows, groups)
    x1 = torch.arange(rows, device=device)[:, None].expand(rows, groups)
    x2 = (offset & word).expand(rows, groups)
    x3 = ((offset >> 32) & word).expand(rows, groups)
    k0, k1 = seed & word, (seed >> 32) & word
    for _ in range(10):
        # int64 products wrap modulo 2^64, which leaves both 32-bit halves right.
        first, second = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1, x2, x3 = (
            ((second >> 32) & word) ^ x1 ^ k0,
            second & word,
            ((first >> 32) & word) ^ x3 ^ k1,
            first & word,
        )
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    halves = [half for x in (x0, x1, x2, x3) for half in (x & 0xFFFF, x >> 16)]
    return torch.stack(halves, dim=-1).reshape(rows, 8 * groups)[:, :columns]


def softmax_loss(z: Tensor, labels: Tensor, log_weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy of softmax(z + log_weight), the weights held constant and 0 at the label.

    Args: z [N, K]; labels [N] int64 in 0..K-1; log_weight [N, K] or None. Returns: row_loss [N], grad [N, K].
    """
    logits = z if log_weight is None else z + log_weight
    log_p = torch.log_softmax(logits, dim=1)
    column = labels[:, None]
    p = log_p.exp()
    # d/dz_y = -(sum of the others), not p_y - 1: it keeps its digits when p_y is close to 1.
    others = p.scatter(1, column, 0.0)
    return -log_p.gather(1, column)[:, 0], others.scatter(1, column, -others.sum(1, keepdim=True))


def seesaw_log_weight(
    z: Tensor, labels: Tensor, class_counts: Tensor, *, p: float = 0.8, q: float = 2.0, eps: float = 1e-2
) -> Tensor:
    """log M + log C of Seesaw Loss (CVPR 2021, eq. 4-8), [N, C].

    log M_ij = p min(0, ln n_j - ln n_y)                       mitigation (eq. 6), n >= 1
    log C_ij = q max(0, ln s_j - max(ln s_y, ln eps))          compensation (eq. 7), s = softmax(z)

    Both vanish at j = y. ``p <= 0`` or ``q <= 0`` turns a factor off.
    Args: z [N, C]; labels [N] int64 in 0..C-1; class_counts [C], this batch counted already.
    """
    return _seesaw_log_weight(torch.log_softmax(z, dim=1), labels, class_counts, p, q, eps)


def _seesaw_log_weight(
    log_s: Tensor, labels: Tensor, class_counts: Tensor, p: float, q: float, eps: float
) -> Tensor:
    ln_n = class_counts.to(log_s.dtype).clamp(min=1).log()
    limit = log_s.gather(1, labels[:, None]).clamp(min=math.log(eps))
    mitigation = (ln_n[None, :] - ln_n[labels][:, None]).clamp(max=0)
    compensation = (log_s - limit).clamp(min=0)
    log_weight = max(p, 0.0) * mitigation + max(q, 0.0) * compensation
    return log_weight.scatter(1, labels[:, None], 0.0)


def prior_log_weight(labels: Tensor, log_prior: Tensor) -> Tensor:
    """log pi_j - log pi_y, which makes softmax(z + log pi). With pi the class counts it is balanced softmax
    (NeurIPS 2020, eq. 4), with their power tau logit adjustment (ICLR 2021, eq. 10), with the classes' mean
    scores the equilibrium loss (ICCV 2021, eq. 4).

    Args: labels [N] int64 in 0..K-1; log_prior [K]. Returns: [N, K].
    """
    return log_prior[None, :] - log_prior[labels][:, None]


def objectness_loss(z: Tensor, foreground: Tensor) -> tuple[Tensor, Tensor]:
    """Two-way cross-entropy of (object, background).

    Args: z [N, 2]; foreground [N] bool. Returns: row_loss [N], grad [N, 2].
    """
    link = SigmoidLink()
    d = z[:, 0] - z[:, 1]
    (positive, d_positive), (negative, d_negative) = link.positive(d), link.negative(d)
    slope = torch.where(foreground, d_positive, d_negative)
    return torch.where(foreground, positive, negative), torch.stack([slope, -slope], dim=1)
