"""What all loss modules share."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..class_stats import ClassStats
from ..nn import NormedLinear


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


def init_constant_bias_(classifier: nn.Module, bias: float, *, weight: float | None = None) -> nn.Module:
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


def own_stats(num_classes: int, class_stats: ClassStats | None) -> ClassStats:
    """``class_stats``, or new ones. Raises: ValueError where they are of another number of classes."""
    if class_stats is None:
        return ClassStats(num_classes)
    if class_stats.num_classes != num_classes:
        raise ValueError(f"class_stats has {class_stats.num_classes} classes, not {num_classes}")
    return class_stats
