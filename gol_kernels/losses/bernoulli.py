"""Losses of the Bernoulli family: K binary terms, a link and a reweighting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional, reweight
from ..class_stats import ClassStats
from ..nn import sigmoid_prior_bias
from .base import LongTailLoss, init_constant_bias_, own_stats

EQL_THRESHOLD = 1.1e-3
"""Image frequency below which GOL takes an LVIS v1 class as rare (815 of 1203 classes)."""

LINKS: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "gumbel": (functional.gumbel_loss, ("temperature", "clip", "outside", "max_loss", "compat")),
    "sigmoid": (functional.sigmoid_loss, ()),
    "probit": (functional.probit_loss, ("clip", "outside")),
}
"""Of each link the loss function and its own options."""


class BernoulliLoss(LongTailLoss):
    """Base of the losses of K binary terms.

    Args:
        link: "gumbel", "sigmoid" or "probit".
        gradient_stats: in training, the sums of each class's positive and negative gradients and the labels
            are added to it; they come out of the same pass over the logits.
        link_options: those of ``functional.gumbel_loss`` (temperature, clip, outside, max_loss, compat) or
            ``functional.probit_loss`` (clip, outside).
    """

    has_released_gumbel_form = False

    def __init__(
        self,
        num_classes: int,
        *,
        link: str,
        gradient_stats: ClassStats | None = None,
        ignore_index: int = -100,
        validate: bool | None = None,
        **link_options: Any,
    ) -> None:
        super().__init__(num_classes, ignore_index=ignore_index, validate=validate)
        if link not in LINKS:
            raise ValueError(f"link must be one of {', '.join(LINKS)}, got {link!r}")
        unknown = set(link_options) - set(LINKS[link][1])
        if unknown:
            raise TypeError(
                f"{type(self).__name__} with the {link} link has no option {', '.join(sorted(unknown))}; "
                f"there are: {', '.join(LINKS[link][1]) or 'none'}"
            )
        if link_options.get("compat") is not None and not self.has_released_gumbel_form:
            raise ValueError(f"{type(self).__name__} has no released Gumbel form that compat could reproduce")
        self.link = link
        self.link_options = link_options
        self.gradient_stats = gradient_stats
        # Options that the link refuses are refused here, not in the first step.
        LINKS[link][0](torch.empty(0, 1), torch.empty(0, dtype=torch.int64), **link_options)

    def _reweight(self, logits: Tensor, labels: Tensor) -> reweight.Reweight | None:
        return None

    def _parts(
        self, logits: Tensor, labels: Tensor, row_weights: Tensor | None, avg_factor: float | Tensor | None
    ) -> dict[str, Tensor]:
        functional.check_rows(logits, labels, row_weights, avg_factor)
        stats = self.gradient_stats if self.training else None
        gradients = None if stats is None else logits.new_zeros((2, self.num_logits), dtype=torch.float64)
        loss = LINKS[self.link][0](
            logits,
            labels,
            reweight=self._reweight(logits, labels),
            row_weights=row_weights,
            avg_factor=avg_factor,
            class_gradients=gradients,
            **self._common(),
            **self.link_options,
        )
        if stats is not None and gradients is not None:
            self._observe(stats, labels, gradients)
        return {"classes": loss}

    def _observe(self, stats: ClassStats, labels: Tensor, gradients: Tensor) -> None:
        stats.count(labels, ignore_index=self.ignore_index, validate=self.validate)
        stats.add_gradients(gradients)

    def probability(self, logits: Tensor) -> Tensor:
        """The link's p of every column, without a clip."""
        if self.link == "gumbel":
            temperature = self.link_options.get("temperature", 1.0)
            return functional.gumbel_activation(logits, temperature=temperature)
        return torch.sigmoid(logits) if self.link == "sigmoid" else torch.special.ndtr(logits)

    def activation(self, logits: Tensor) -> Tensor:
        """p of the class columns: [N, C]."""
        return self.probability(logits[:, : self.num_classes])

    def init_classifier_(self, classifier: nn.Module, bias: float | None = None) -> nn.Module:
        """Gumbel: weight 0.001, bias -2 (see ``gumbel_prior_bias`` for other C); sigmoid and probit: weight
        N(0, 0.01), bias for a prior of 0.001."""
        if self.link == "gumbel":
            return init_constant_bias_(classifier, -2.0 if bias is None else bias, weight=0.001)
        if bias is None:
            prior = 1e-3
            bias = sigmoid_prior_bias(prior) if self.link == "sigmoid" else reweight.inverse_probit(prior)
        return init_constant_bias_(classifier, bias)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, link={self.link!r}"


class GumbelLoss(BernoulliLoss):
    """GumbelCE (Gumbel Optimized Loss, ECCV 2022): Gumbel link, background trained as a class.

    Options: those of ``BernoulliLoss``.
    """

    has_released_gumbel_form = True

    def __init__(self, num_classes: int, **options: Any) -> None:
        super().__init__(num_classes, link="gumbel", **options)


class SigmoidLoss(BernoulliLoss):
    """Binary cross-entropy with logits, background trained as a class.

    Options: those of ``BernoulliLoss``.
    """

    def __init__(self, num_classes: int, **options: Any) -> None:
        super().__init__(num_classes, link="sigmoid", **options)


class EQLLoss(BernoulliLoss):
    """Equalization loss (CVPR 2020, eq. 3); with the Gumbel link it is GOL*.

    Args:
        class_stats: of the training set; its image frequencies decide what is rare.
        threshold: a class with a lower image frequency is rare. 1.1e-3 is GOL's for LVIS v1; the EQL
            paper's 1.77e-3 is LVIS v0.5's.
        link and the other options: as ``BernoulliLoss``.
    """

    extra_logits = 0
    has_released_gumbel_form = True
    rare: Tensor

    def __init__(
        self,
        class_stats: ClassStats,
        threshold: float = EQL_THRESHOLD,
        *,
        link: str = "gumbel",
        **options: Any,
    ) -> None:
        super().__init__(class_stats.num_classes, link=link, **options)
        self.threshold = threshold
        self.register_buffer("rare", class_stats.rare(threshold))

    def _reweight(self, logits: Tensor, labels: Tensor) -> reweight.Reweight:
        return reweight.EQL(self.rare)


class DropLoss(EQLLoss):
    """DropLoss (AAAI 2021); with the Gumbel link it is GOL (ECCV 2022). Arguments as ``EQLLoss``.

    The draws come from ``generator`` (an attribute, None is torch's default generator).
    """

    generator: torch.Generator | None = None

    def _reweight(self, logits: Tensor, labels: Tensor) -> reweight.Reweight:
        return reweight.Drop(self.rare, self.generator)


class GumbelSeesawLoss(BernoulliLoss):
    """Seesaw's factors on the negatives of a Bernoulli loss: w_ij = M_ij C_ij, see ``reweight.Seesaw``.

    In training mode a call first counts its labels into ``class_stats``, as ``SeesawLoss`` does.

    Args:
        p, q, eps: as ``reweight.Seesaw``; by default the mitigation factor alone.
        class_stats: as ``SeesawLoss``. link and the other options: as ``BernoulliLoss``.
    """

    extra_logits = 0

    def __init__(
        self,
        num_classes: int,
        *,
        p: float = 0.8,
        q: float = 0.0,
        eps: float = 1e-2,
        class_stats: ClassStats | None = None,
        link: str = "gumbel",
        **options: Any,
    ) -> None:
        super().__init__(num_classes, link=link, **options)
        self.p, self.q, self.eps = p, q, eps
        self.class_stats = own_stats(num_classes, class_stats)

    def _reweight(self, logits: Tensor, labels: Tensor) -> reweight.Reweight:
        if self.training:
            self.class_stats.count(labels, ignore_index=self.ignore_index, validate=self.validate)
        return reweight.Seesaw(self.class_stats.label_counts, self.p, self.q, self.eps)

    def _observe(self, stats: ClassStats, labels: Tensor, gradients: Tensor) -> None:
        if stats is self.class_stats:  # which has counted these labels already
            stats.add_gradients(gradients)
        else:
            super()._observe(stats, labels, gradients)


class EQLv2Loss(BernoulliLoss):
    """EQLv2 (CVPR 2021, eq. 5-7): a class's positives and negatives are weighted by the ratio g of the
    positive and negative gradients it has received so far.

    v_j = sigmoid(gamma (g_j - mu)) weights its negatives, u_j = 1 + alpha (1 - v_j) its positives; the
    background column has weight 1. In training mode a call adds its weighted gradients to
    ``gradient_stats`` (over all ranks), with which the next call weights.

    Args:
        gamma, mu, alpha: the paper's 12, 0.8, 4.
        class_stats: becomes ``gradient_stats``; None makes new ones.
        link and the other options: as ``BernoulliLoss``; the paper's link is the sigmoid.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        gamma: float = 12.0,
        mu: float = 0.8,
        alpha: float = 4.0,
        class_stats: ClassStats | None = None,
        link: str = "sigmoid",
        **options: Any,
    ) -> None:
        stats = own_stats(num_classes, class_stats)
        super().__init__(num_classes, link=link, gradient_stats=stats, **options)
        self.gamma, self.mu, self.alpha = gamma, mu, alpha

    def _reweight(self, logits: Tensor, labels: Tensor) -> reweight.Reweight:
        assert self.gradient_stats is not None
        negative = torch.sigmoid(self.gamma * (self.gradient_stats.gradient_ratio - self.mu))
        table = torch.stack([1 + self.alpha * (1 - negative), negative])
        return reweight.ClassWeights(torch.cat([table, table.new_ones((2, 1))], dim=1))

    def activation(self, logits: Tensor) -> Tensor:
        """p_j (1 - p_background): [N, C]."""
        p = self.probability(logits)
        return p[:, : self.num_classes] * (1 - p[:, self.num_classes :])


class FederatedLoss(BernoulliLoss):
    """Federated loss (CenterNet2, 2021): the terms of the batch's own classes, and of others drawn with a
    probability that grows with ``frequency ** power`` until there are ``num_sampled``.

    As released, background among the labels takes one of the ``num_sampled`` places, and the background
    column itself is not trained. Every call draws anew, from ``generator`` (an attribute, None is torch's).

    Args:
        class_stats: its image counts are the frequencies.
        link and the other options: as ``BernoulliLoss``.
    """

    generator: torch.Generator | None = None
    log_frequency: Tensor

    def __init__(
        self,
        class_stats: ClassStats,
        num_sampled: int = 50,
        *,
        power: float = 0.5,
        link: str = "sigmoid",
        **options: Any,
    ) -> None:
        super().__init__(class_stats.num_classes, link=link, **options)
        if num_sampled < 1:
            raise ValueError(f"num_sampled must be at least 1, got {num_sampled}")
        self.num_sampled = num_sampled
        frequency = class_stats.image_count.to(torch.float64)
        self.register_buffer("log_frequency", power * frequency.log())  # -inf: never drawn

    def _reweight(self, logits: Tensor, labels: Tensor) -> reweight.Reweight:
        counts = functional.label_counts(labels, self.num_classes, **self._common())
        present = counts > 0
        places = (self.num_sampled - present.sum()).clamp(min=0)
        # Drawing without replacement is taking the largest of ln f + Gumbel noise, here without a sync.
        uniform = torch.rand(
            self.num_classes, generator=self.generator, device=logits.device, dtype=torch.float64
        )
        key = self.log_frequency - torch.log(-torch.log(uniform))
        key = key.masked_fill(present[:-1], -torch.inf)
        rank = key.argsort(descending=True).argsort()
        kept = present[:-1] | ((rank < places) & (key > -torch.inf))
        return reweight.Federated(torch.cat([kept, kept.new_zeros(1)]))


class ACSLLoss(BernoulliLoss):
    """Adaptive class suppression loss (ACSL, CVPR 2021, section 3.2).

    A foreground row suppresses only the classes that score ``score_threshold`` or more. A background row
    suppresses frequent classes and the background column; a share ``common_share`` of the background rows,
    drawn anew in each call from ``generator`` (an attribute, None is torch's), suppresses common classes as
    well, and a share ``rare_share``, drawn by itself, rare ones.

    Args:
        class_stats: its image counts make the groups: rare up to 10 images, common up to 100 (LVIS).
        link and the other options: as ``BernoulliLoss``; the paper's link is the sigmoid.
    """

    RARE, COMMON, FREQUENT, BACKGROUND = 1, 2, 4, 8
    generator: torch.Generator | None = None
    class_groups: Tensor

    def __init__(
        self,
        class_stats: ClassStats,
        score_threshold: float = 0.7,
        *,
        rare_share: float = 0.01,
        common_share: float = 0.1,
        link: str = "sigmoid",
        **options: Any,
    ) -> None:
        super().__init__(class_stats.num_classes, link=link, **options)
        for name, share in (("rare_share", rare_share), ("common_share", common_share)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {share}")
        self.score_threshold, self.rare_share, self.common_share = score_threshold, rare_share, common_share
        images = class_stats.image_count
        groups = torch.full_like(images, self.FREQUENT, dtype=torch.uint8)
        groups[images <= 100] = self.COMMON
        groups[images <= 10] = self.RARE
        self.register_buffer("class_groups", torch.cat([groups, groups.new_full((1,), self.BACKGROUND)]))

    def _reweight(self, logits: Tensor, labels: Tensor) -> reweight.Reweight:
        background = labels == self.num_classes
        groups = background.to(torch.uint8) * (self.FREQUENT | self.BACKGROUND)
        for bit, share in ((self.RARE, self.rare_share), (self.COMMON, self.common_share)):
            groups = groups | self._drawn(background, share).to(torch.uint8) * bit
        return reweight.ACSL(self.class_groups, groups, self.score_threshold)

    def _drawn(self, rows: Tensor, share: float) -> Tensor:
        """bool [N]: floor(share * n) of the n rows that are True, drawn without replacement."""
        key = torch.rand(rows.shape, generator=self.generator, device=rows.device)
        rank = key.masked_fill(~rows, torch.inf).argsort().argsort()
        return rows & (rank < torch.floor(share * rows.sum()))
