"""The losses as modules: each knows how many logits it needs, how to score them and how to start.

loss = SeesawLoss(num_classes=1203)
classifier = loss.init_classifier_(nn.Linear(1024, loss.num_logits))
total = loss(classifier(features), labels)          # training
scores = loss.activation(classifier(features))      # inference: [N, C]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .class_stats import ClassStats
from .nn import NormedLinear, sigmoid_prior_bias

LINKS = ("gumbel", "sigmoid")
EQL_THRESHOLD = 1.1e-3
"""Image frequency below which GOL takes an LVIS v1 class as rare (815 of 1203 classes)."""


class LongTailLoss(nn.Module):
    """Base of all losses over logits [N, num_logits] and labels [N] in 0..C, C is background."""

    extra_logits = 1
    """num_logits - num_classes."""

    def __init__(self, num_classes: int, *, ignore_index: int = -100, validate: bool | None = None) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.validate = validate

    @property
    def num_logits(self) -> int:
        """Columns that the classifier must have."""
        return self.num_classes + self.extra_logits

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        row_weights: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        *,
        return_parts: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, averaged over the rows that are not ignored or by ``avg_factor``.

        Args:
            logits: [N, num_logits] float32, float64, bfloat16 or float16.
            labels: [N] int64 or int32 in 0..C, or ignore_index.
            row_weights: [N], constant. avg_factor: number or 0-d tensor.
            return_parts: a dict of the terms that sum up to the loss.

        Raises: TypeError, ValueError as ``functional.gumbel_loss``.
        """
        self._check_logits(logits)
        parts = self._parts(logits, labels, row_weights, avg_factor)
        if return_parts:
            return parts
        total = None
        for part in parts.values():
            total = part if total is None else total + part
        assert total is not None
        return total

    def activation(self, logits: Tensor) -> Tensor:
        """Foreground scores [N, C] of logits [N, num_logits], for inference."""
        raise NotImplementedError

    def init_classifier_(self, classifier: nn.Module) -> nn.Module:
        """Initialises the last layer (anything with weight and bias) as the loss's paper does; returns it."""
        raise NotImplementedError

    def _parts(
        self,
        logits: Tensor,
        labels: Tensor,
        row_weights: Tensor | None,
        avg_factor: float | Tensor | None,
    ) -> dict[str, Tensor]:
        raise NotImplementedError

    def _common(self) -> dict[str, Any]:
        return {"ignore_index": self.ignore_index, "validate": self.validate}

    def _check_logits(self, logits: Tensor) -> None:
        if logits.dim() != 2 or logits.shape[1] != self.num_logits:
            raise ValueError(
                f"{type(self).__name__}(num_classes={self.num_classes}) needs logits "
                f"[N, {self.num_logits}] ({self._columns()}), got {list(logits.shape)}"
            )

    def _columns(self) -> str:
        return {0: "one for each class", 1: "the classes, then background"}[self.extra_logits]

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}"


def _init(classifier: nn.Module, bias: float, *, weight: float | None = None) -> nn.Module:
    """Weight constant, or N(0, 0.01) without one; bias constant.

    A cosine classifier always takes the normal: a constant gives all classes one direction.
    """
    if weight is None or isinstance(classifier, NormedLinear):
        nn.init.normal_(classifier.get_parameter("weight"), std=0.01)
    else:
        nn.init.constant_(classifier.get_parameter("weight"), weight)
    if getattr(classifier, "bias", None) is not None:
        nn.init.constant_(classifier.get_parameter("bias"), bias)
    return classifier


class SoftmaxLoss(LongTailLoss):
    """Softmax cross-entropy over C classes and background."""

    def _parts(
        self, logits: Tensor, labels: Tensor, row_weights: Tensor | None, avg_factor: float | Tensor | None
    ) -> dict[str, Tensor]:
        loss = functional.softmax_loss(
            logits, labels, row_weights=row_weights, avg_factor=avg_factor, **self._common()
        )
        return {"classes": loss}

    def activation(self, logits: Tensor) -> Tensor:
        """softmax over all columns, background dropped: [N, C]."""
        return torch.softmax(logits, dim=1)[:, : self.num_classes]

    def init_classifier_(self, classifier: nn.Module) -> nn.Module:
        """Weight N(0, 0.01), bias 0."""
        return _init(classifier, 0.0)


class BernoulliLoss(LongTailLoss):
    """Base of the losses of K binary terms, for either link.

    Args: link "gumbel" or "sigmoid"; the Gumbel options are those of ``functional.gumbel_loss``.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        link: str,
        temperature: float = 1.0,
        clip: tuple[float, float] | None = (-4.0, 10.0),
        outside: str = "zero",
        max_loss: float | None = None,
        compat: str | None = None,
        ignore_index: int = -100,
        validate: bool | None = None,
    ) -> None:
        super().__init__(num_classes, ignore_index=ignore_index, validate=validate)
        if link not in LINKS:
            raise ValueError(f"link must be one of {LINKS}, got {link!r}")
        self.link = link
        self.temperature = temperature
        self.gumbel_options: dict[str, Any] = {
            "temperature": temperature,
            "clip": clip,
            "outside": outside,
            "max_loss": max_loss,
            "compat": compat,
        }

    def _reweight(self) -> functional.EQL | functional.Drop | None:
        return None

    def _parts(
        self, logits: Tensor, labels: Tensor, row_weights: Tensor | None, avg_factor: float | Tensor | None
    ) -> dict[str, Tensor]:
        shared: dict[str, Any] = {
            "reweight": self._reweight(),
            "row_weights": row_weights,
            "avg_factor": avg_factor,
            **self._common(),
        }
        if self.link == "gumbel":
            loss = functional.gumbel_loss(logits, labels, **shared, **self.gumbel_options)
        else:
            loss = functional.sigmoid_loss(logits, labels, **shared)
        return {"classes": loss}

    def activation(self, logits: Tensor) -> Tensor:
        """exp(-exp(-z/T)) without a clip, or the sigmoid, of the class columns: [N, C]."""
        classes = logits[:, : self.num_classes]
        if self.link == "gumbel":
            return functional.gumbel_activation(classes, temperature=self.temperature)
        return torch.sigmoid(classes)

    def init_classifier_(self, classifier: nn.Module, bias: float | None = None) -> nn.Module:
        """Gumbel: weight 0.001, bias -2 (see ``gumbel_prior_bias`` for other C); sigmoid: weight
        N(0, 0.01), bias for a prior of 0.001."""
        if self.link == "gumbel":
            return _init(classifier, -2.0 if bias is None else bias, weight=0.001)
        return _init(classifier, sigmoid_prior_bias(0.001) if bias is None else bias)

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, link={self.link!r}"


class GumbelLoss(BernoulliLoss):
    """GumbelCE (Gumbel Optimized Loss, ECCV 2022): Gumbel link, background trained as a class."""

    def __init__(
        self,
        num_classes: int,
        *,
        temperature: float = 1.0,
        clip: tuple[float, float] | None = (-4.0, 10.0),
        outside: str = "zero",
        max_loss: float | None = None,
        compat: str | None = None,
        ignore_index: int = -100,
        validate: bool | None = None,
    ) -> None:
        super().__init__(
            num_classes,
            link="gumbel",
            temperature=temperature,
            clip=clip,
            outside=outside,
            max_loss=max_loss,
            compat=compat,
            ignore_index=ignore_index,
            validate=validate,
        )


class SigmoidLoss(BernoulliLoss):
    """Binary cross-entropy with logits, background trained as a class."""

    def __init__(self, num_classes: int, *, ignore_index: int = -100, validate: bool | None = None) -> None:
        super().__init__(num_classes, link="sigmoid", ignore_index=ignore_index, validate=validate)


class EQLLoss(BernoulliLoss):
    """Equalization loss (CVPR 2020, eq. 3); with the Gumbel link it is GOL*.

    Args:
        class_stats: of the training set; its image frequencies decide what is rare.
        threshold: a class with a lower image frequency is rare. 1.1e-3 is GOL's for LVIS v1; the EQL
            paper's 1.77e-3 is LVIS v0.5's.
        link and the other options: as ``BernoulliLoss``.
    """

    extra_logits = 0
    rare: Tensor

    def __init__(
        self,
        class_stats: ClassStats,
        threshold: float = EQL_THRESHOLD,
        *,
        link: str = "gumbel",
        temperature: float = 1.0,
        clip: tuple[float, float] | None = (-4.0, 10.0),
        outside: str = "zero",
        max_loss: float | None = None,
        compat: str | None = None,
        ignore_index: int = -100,
        validate: bool | None = None,
    ) -> None:
        super().__init__(
            class_stats.num_classes,
            link=link,
            temperature=temperature,
            clip=clip,
            outside=outside,
            max_loss=max_loss,
            compat=compat,
            ignore_index=ignore_index,
            validate=validate,
        )
        self.threshold = threshold
        self.register_buffer("rare", class_stats.rare(threshold))

    def _reweight(self) -> functional.EQL | functional.Drop | None:
        return functional.EQL(self.rare)


class DropLoss(EQLLoss):
    """DropLoss (AAAI 2021); with the Gumbel link it is GOL (ECCV 2022). Arguments as ``EQLLoss``.

    The draws come from ``generator`` (an attribute, None is torch's default generator).
    """

    generator: torch.Generator | None = None

    def _reweight(self) -> functional.EQL | functional.Drop | None:
        return functional.Drop(self.rare, self.generator)


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
        self.class_stats = ClassStats(num_classes) if class_stats is None else class_stats
        if self.class_stats.num_classes != num_classes:
            raise ValueError(f"class_stats has {self.class_stats.num_classes} classes, not {num_classes}")

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
        return _init(classifier, 0.0)

    def _columns(self) -> str:
        return "the classes, then object and background"
