"""Reweightings of the Bernoulli family: which terms of a loss count, and how much.

A reweighting is given to ``gumbel_loss``, ``sigmoid_loss`` or ``probit_loss``. Its weights are constants of
the loss. ``background_column`` says whether the logits have a column for background (K = C+1, trained as a
class) or not (K = C, a background row has no positive column).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


class OpArguments(NamedTuple):
    """A reweighting in the terms of the op's schema."""

    kind: str
    class_table: Tensor | None = None
    row_table: Tensor | None = None
    rng: Tensor | None = None
    p: float = 0.0
    q: float = 0.0
    eps: float = 1.0
    logit_threshold: float = 0.0


InverseLink = Callable[[float], float]
"""The logit at which a link has the probability given."""


@dataclass(frozen=True)
class EQL:
    """Equalization loss (CVPR 2020): foreground rows drop the negatives of rare classes.

    rare: bool [C], on the logits' device.
    """

    rare: Tensor
    background_column: ClassVar[bool] = False

    def op_arguments(self, logits: Tensor, inverse_link: InverseLink) -> OpArguments:
        """Raises: ValueError where ``rare`` does not fit the logits."""
        check_table("rare", self.rare, logits, (logits.shape[1],), torch.bool)
        return OpArguments("eql", self.rare)


@dataclass(frozen=True)
class Drop:
    """DropLoss (AAAI 2021): EQL, and a background row drops each rare class's negative with probability
    1 - (share of rare classes among the batch's foreground labels).

    rare: bool [C], on the logits' device. generator: of the draws; None is torch's default.
    """

    rare: Tensor
    generator: torch.Generator | None = None
    background_column: ClassVar[bool] = False

    def op_arguments(self, logits: Tensor, inverse_link: InverseLink) -> OpArguments:
        """Draws seed and offset. Raises: ValueError where ``rare`` does not fit the logits."""
        check_table("rare", self.rare, logits, (logits.shape[1],), torch.bool)
        rng = torch.randint(
            2**63 - 1, (2,), generator=self.generator, device=logits.device, dtype=torch.int64
        )
        return OpArguments("drop", self.rare, rng=rng)


@dataclass(frozen=True)
class ClassWeights:
    """A weight for each class's positives and negatives, as EQLv2 (CVPR 2021) has them.

    table: float32 or float64 [2, K], of positives and of negatives, not negative.
    """

    table: Tensor
    background_column: ClassVar[bool] = True

    def op_arguments(self, logits: Tensor, inverse_link: InverseLink) -> OpArguments:
        """Raises: ValueError where ``table`` does not fit the logits."""
        check_table("table", self.table, logits, (2, logits.shape[1]), torch.float32, torch.float64)
        return OpArguments("weights", self.table)


@dataclass(frozen=True)
class Federated:
    """Federated loss (CenterNet2, 2021): only the classes drawn for this batch count.

    kept: bool [K].
    """

    kept: Tensor
    background_column: ClassVar[bool] = True

    def op_arguments(self, logits: Tensor, inverse_link: InverseLink) -> OpArguments:
        """Raises: ValueError where ``kept`` does not fit the logits."""
        check_table("kept", self.kept, logits, (logits.shape[1],), torch.bool)
        return OpArguments("federated", self.kept)


@dataclass(frozen=True)
class ACSL:
    """Adaptive class suppression (CVPR 2021): a foreground row keeps its label and the classes that score
    ``score_threshold`` or more, a background row the columns that share a group with it.

    class_groups: uint8 [K], row_groups: uint8 [N], one bit for each group.
    """

    class_groups: Tensor
    row_groups: Tensor
    score_threshold: float = 0.7
    background_column: ClassVar[bool] = True

    def op_arguments(self, logits: Tensor, inverse_link: InverseLink) -> OpArguments:
        """Raises: ValueError where a table does not fit the logits or the threshold is no probability."""
        check_table("class_groups", self.class_groups, logits, (logits.shape[1],), torch.uint8)
        check_table("row_groups", self.row_groups, logits, (logits.shape[0],), torch.uint8)
        if not 0 < self.score_threshold < 1:
            raise ValueError(f"score_threshold must lie in (0, 1), got {self.score_threshold}")
        threshold = inverse_link(self.score_threshold)
        return OpArguments("acsl", self.class_groups, self.row_groups, logit_threshold=threshold)


@dataclass(frozen=True)
class Seesaw:
    """Seesaw Loss's factors (CVPR 2021, eq. 5-7) on binary terms, with the link's own probability as score.

    class_counts: [C] or [C+1] (background last, unused), cumulative counts as they are AFTER this batch was
    counted; any real dtype. p, q, eps as in ``seesaw_loss``, but q is 0, the mitigation factor alone: in a
    softmax the compensation's gradients stay below 1, a binary term it multiplies by up to (1/eps)^q. With
    the paper's q = 2, 10^4, a detector hardly learned.
    """

    class_counts: Tensor
    p: float = 0.8
    q: float = 0.0
    eps: float = 1e-2
    background_column: ClassVar[bool] = False

    def op_arguments(self, logits: Tensor, inverse_link: InverseLink) -> OpArguments:
        """Raises: ValueError where ``class_counts`` do not fit the logits or eps is no probability."""
        counts, k = self.class_counts, logits.shape[1]
        if counts.dim() != 1 or counts.shape[0] not in (k, k + 1):
            raise ValueError(f"class_counts must be [{k}] or [{k + 1}], got {list(counts.shape)}")
        _check_device("class_counts", counts, logits)
        check_eps(self.eps)
        return OpArguments("seesaw", counts, p=self.p, q=self.q, eps=self.eps)


Reweight = EQL | Drop | ClassWeights | Federated | ACSL | Seesaw


def op_arguments(reweight: Reweight | None, logits: Tensor, inverse_link: InverseLink) -> OpArguments:
    """Of any reweighting, or of none."""
    return OpArguments("none") if reweight is None else reweight.op_arguments(logits, inverse_link)


def inverse_gumbel(temperature: float) -> InverseLink:
    """p -> -T ln(-ln p)."""
    return lambda p: -temperature * math.log(-math.log(p))


def inverse_sigmoid(p: float) -> float:
    """ln(p / (1 - p))."""
    return math.log(p) - math.log1p(-p)


def inverse_probit(p: float) -> float:
    """The normal quantile."""
    # On the CPU whatever torch.set_default_device says: the number is read here.
    return float(torch.special.ndtri(torch.tensor(p, dtype=torch.float64, device="cpu")))


def check_eps(eps: float) -> None:
    """Raises: ValueError outside (0, 1]."""
    if not 0 < eps <= 1:
        raise ValueError(f"eps must lie in (0, 1], got {eps}")


def check_table(
    name: str, table: Tensor, logits: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype
) -> None:
    """Raises: ValueError where a constant of the loss has another dtype, shape or device than it must."""
    if table.dtype not in dtypes or tuple(table.shape) != shape:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name} must be {kinds} {list(shape)} for logits {list(logits.shape)}, "
            f"got {table.dtype} {list(table.shape)}"
        )
    _check_device(name, table, logits)


def _check_device(name: str, tensor: Tensor, logits: Tensor) -> None:
    if tensor.device != logits.device:
        raise ValueError(f"{name} is on {tensor.device}, logits on {logits.device}")
    if tensor.requires_grad:
        raise ValueError(f"{name} is a constant of the loss and cannot require a gradient")
