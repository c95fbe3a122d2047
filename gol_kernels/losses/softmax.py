"""Losses of the softmax family: cross-entropy with a constant log-weight for each row and class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional
from ..class_stats import ClassStats
from .base import LongTailLoss, init_constant_bias_, own_stats


class SoftmaxLoss(LongTailLoss):
    """Softmax cross-entropy over C classes and background."""

    def _log_prior(self, logits: Tensor) -> Tensor | None:
        """[num_logits], added to the logits in the loss."""
        return None

    def _parts(
        self, logits: Tensor, labels: Tensor, row_weights: Tensor | None, avg_factor: float | Tensor | None
    ) -> dict[str, Tensor]:
        loss = functional.softmax_loss(
            logits,
            labels,
            log_prior=self._log_prior(logits),
            row_weights=row_weights,
            avg_factor=avg_factor,
            **self._common(),
        )
        return {"classes": loss}

    def activation(self, logits: Tensor) -> Tensor:
        """softmax over all columns, background dropped: [N, C]."""
        return torch.softmax(logits, dim=1)[:, : self.num_classes]

    def init_classifier_(self, classifier: nn.Module) -> nn.Module:
        """Weight N(0, 0.01), bias 0."""
        return init_constant_bias_(classifier, 0.0)


class BalancedSoftmaxLoss(SoftmaxLoss):
    """Balanced softmax (NeurIPS 2020, eq. 4), with another ``tau`` logit adjustment (ICLR 2021, eq. 10):
    cross-entropy of softmax(z + tau ln pi). Scores are those of softmax(z).

    Args:
        class_stats: its instance counts are the prior pi.
        tau: exponent of the prior; 1 is balanced softmax.
        background: whether there is a background column, which the papers do not have. Its prior is that
            of a class of mean count, so that the loss does not move it against the classes as a whole.
    """

    log_prior: Tensor

    def __init__(
        self,
        class_stats: ClassStats,
        tau: float = 1.0,
        *,
        background: bool = True,
        ignore_index: int = -100,
        validate: bool | None = None,
    ) -> None:
        super().__init__(class_stats.num_classes, ignore_index=ignore_index, validate=validate)
        counts = class_stats.instance_count.to(torch.float64)
        if not bool((counts > 0).any()):
            raise ValueError("BalancedSoftmaxLoss needs class_stats with instance counts")
        self.tau = tau
        self.extra_logits = int(background)
        # A class without instances counts as one with one: its logarithm must be finite.
        log_prior = tau * (counts.clamp(min=1).log() - counts.mean().log())
        self.register_buffer("log_prior", torch.cat([log_prior, log_prior.new_zeros(int(background))]))

    def _log_prior(self, logits: Tensor) -> Tensor:
        return self.log_prior


class EquilibriumLoss(SoftmaxLoss):
    """Equilibrium loss (LOCE, ICCV 2021, eq. 4): cross-entropy of softmax(z + ln m), m the classes' mean
    scores, which follow the training. Scores are those of softmax(z).

    In training mode a call first lets m follow the scores of this batch's labels (over all ranks, see
    ``ClassStats.follow_scores``). The paper's memory of features is no part of the loss.

    Args:
        alpha: decay of m for each instance.
        class_stats: holds m; None makes new ones.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        alpha: float = 0.9,
        class_stats: ClassStats | None = None,
        ignore_index: int = -100,
        validate: bool | None = None,
    ) -> None:
        super().__init__(num_classes, ignore_index=ignore_index, validate=validate)
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha must lie in [0, 1), got {alpha}")
        self.alpha = alpha
        self.class_stats = own_stats(num_classes, class_stats)

    def _parts(
        self, logits: Tensor, labels: Tensor, row_weights: Tensor | None, avg_factor: float | Tensor | None
    ) -> dict[str, Tensor]:
        if self.training:
            functional.check_rows(logits, labels, row_weights, avg_factor)
            self.follow(logits, labels)
        return super()._parts(logits, labels, row_weights, avg_factor)

    @torch.no_grad()
    def follow(self, logits: Tensor, labels: Tensor, instance_ids: Tensor | None = None) -> None:
        """Lets m follow the label's scores; a training call does it, with every row as its own instance.

        Args: instance_ids as ``ClassStats.follow_scores``.
        """
        losses = functional.softmax_loss(logits.detach(), labels, reduction="none", **self._common())
        counted = labels.masked_fill(labels == self.ignore_index, -1)
        self.class_stats.follow_scores(
            torch.exp(-losses), counted, alpha=self.alpha, instance_ids=instance_ids
        )

    def _log_prior(self, logits: Tensor) -> Tensor:
        m = self.class_stats.mean_score
        return torch.cat([m, m.new_full((1,), ClassStats.INITIAL_SCORE)]).log()


class SeesawLoss(LongTailLoss):
    """Seesaw Loss (CVPR 2021) with its objectness pair: logits [N, C+2].

    In training mode a call first counts its labels into ``class_stats`` (over all ranks, see
    ``ClassStats``), then weights with the counts; in evaluation mode it counts nothing.

    Args:
        p, q, eps: as ``functional.seesaw_loss``.
        class_stats: to share counts; None makes new ones.
    """

    extra_logits = 2

    def __init__(
        self,
        num_classes: int,
        *,
        p: float = 0.8,
        q: float = 2.0,
        eps: float = 1e-2,
        class_stats: ClassStats | None = None,
        ignore_index: int = -100,
        validate: bool | None = None,
    ) -> None:
        super().__init__(num_classes, ignore_index=ignore_index, validate=validate)
        self.p, self.q, self.eps = p, q, eps
        self.class_stats = own_stats(num_classes, class_stats)

    def _parts(
        self, logits: Tensor, labels: Tensor, row_weights: Tensor | None, avg_factor: float | Tensor | None
    ) -> dict[str, Tensor]:
        if self.training:
            functional.check_rows(logits, labels, row_weights, avg_factor)
            self.class_stats.count(labels, ignore_index=self.ignore_index, validate=self.validate)
        classes, objectness = functional.seesaw_loss(
            logits,
            labels,
            self.class_stats.label_counts,
            p=self.p,
            q=self.q,
            eps=self.eps,
            row_weights=row_weights,
            avg_factor=avg_factor,
            **self._common(),
        )
        return {"classes": classes, "objectness": objectness}

    def activation(self, logits: Tensor) -> Tensor:
        """softmax over the classes times P(object): [N, C]."""
        c = self.num_classes
        return torch.softmax(logits[:, :c], dim=1) * torch.softmax(logits[:, c:], dim=1)[:, :1]

    def init_classifier_(self, classifier: nn.Module) -> nn.Module:
        """Weight N(0, 0.01), bias 0."""
        return init_constant_bias_(classifier, 0.0)

    def _columns(self) -> str:
        return "the classes, then object and background"
