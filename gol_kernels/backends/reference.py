"""The ops in terms of ``gol_kernels.reference``: any device, no compiler."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..ops import BernoulliArguments, RowArguments, SoftmaxArguments, implement, loss_dtype


def unavailable() -> str | None:
    """Always None: plain PyTorch runs everywhere."""
    return None


def check_labels(op: str, labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raises: ValueError naming the first label outside [0, num_classes] that is not ignore_index."""
    illegal = ((labels < 0) | (labels > num_classes)) & (labels != ignore_index)
    if bool(illegal.any()):
        row = int(illegal.nonzero()[0])
        raise ValueError(
            f"{op}: labels must lie in [0, {num_classes}] or be ignore_index ({ignore_index}), "
            f"got {int(labels[row])} in row {row}"
        )


class _Rows(NamedTuple):
    z: Tensor  # [N, K] in the working dtype
    labels: Tensor  # [N] int64, illegal and ignored ones replaced by 0
    weight: Tensor  # [N] float64, 0 for ignored and illegal rows
    scale: Tensor  # [N] float64, weight / denominator; 0 ignored, NaN illegal
    counted: Tensor  # [N] bool, the rows that are not ignored


def _prepare(op: str, a: RowArguments) -> _Rows:
    if a.validate:
        check_labels(op, a.labels, a.num_classes, a.ignore_index)
    labels = a.labels.to(torch.int64)
    counted = labels != a.ignore_index
    legal = (labels >= 0) & (labels <= a.num_classes)
    factor = torch.full((), a.scale, dtype=torch.float64, device=a.logits.device)
    if a.reduction == "mean":
        denominator = (counted.sum() if a.avg_factor is None else a.avg_factor).to(torch.float64)
        factor = factor / torch.where(denominator == 0, torch.ones_like(denominator), denominator)
    weight = torch.ones_like(factor).expand(labels.shape)
    if a.row_weights is not None:
        weight = a.row_weights.to(torch.float64)
    weight = weight.masked_fill(~counted, 0.0)
    scale = (weight * factor).masked_fill(~legal & counted, float("nan"))
    z = a.logits.to(loss_dtype(a.logits))
    # A row of weight 0 does not exist: what its logits hold must not reach the sums as 0 * inf.
    z = z.masked_fill((scale == 0)[:, None], 0.0)
    exists = counted & legal
    return _Rows(z, labels.masked_fill(~exists, 0), weight.masked_fill(~legal, 0.0), scale, exists)


def _reduce(row_loss: Tensor, rows: _Rows, reduction: str) -> Tensor:
    weighted = row_loss.to(torch.float64) * rows.scale
    return (weighted if reduction == "none" else weighted.sum()).to(rows.z.dtype)


def _finish_grad(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (grad * scale.to(grad.dtype)[:, None]).to(dtype)


def _link(a: BernoulliArguments) -> reference.Link:
    if a.link == "sigmoid":
        return reference.SigmoidLink()
    if a.link == "probit":
        return reference.ProbitLink(a.clip_min, a.clip_max, a.slope)
    return reference.GumbelLink(a.temperature, a.clip_min, a.clip_max, a.slope)


def _weight(a: BernoulliArguments, rows: _Rows, link: reference.Link) -> Tensor | None:
    table, labels = a.class_table, rows.labels
    if a.reweight == "none":
        return None
    if table is None:
        raise ValueError(f"bernoulli_loss: {a.reweight} needs class_table")
    if a.reweight == "eql":
        return reference.eql_weight(labels, table)
    if a.reweight == "drop":
        if a.rng is None:
            raise ValueError("bernoulli_loss: DropLoss needs rng, an int64 tensor of (seed, offset)")
        return reference.drop_loss_weight(labels, table, rows.counted, a.rng[0], a.rng[1])
    if a.reweight == "weights":
        return reference.class_weight(labels, table.to(rows.z.dtype))
    if a.reweight == "federated":
        return reference.federated_weight(labels, table)
    if a.reweight == "acsl":
        if a.row_table is None:
            raise ValueError("bernoulli_loss: acsl needs row_table")
        return reference.acsl_weight(rows.z, labels, table, a.row_table, a.logit_threshold, a.num_classes)
    if a.reweight == "seesaw":
        counts = table[: rows.z.shape[1]]
        return reference.bernoulli_seesaw_weight(rows.z, labels, link, counts, p=a.p, q=a.q, eps=a.eps)
    raise ValueError(f"bernoulli_loss: unknown reweight {a.reweight!r}")


def _bernoulli(a: BernoulliArguments, rows: _Rows) -> tuple[Tensor, Tensor]:
    link = _link(a)
    weight = _weight(a, rows, link)
    return reference.bernoulli_loss(rows.z, rows.labels, link, weight)


def _statistics(grad: Tensor, rows: _Rows) -> Tensor:
    magnitude = (grad.to(torch.float64).abs() * rows.weight[:, None]).masked_fill(
        (rows.weight == 0)[:, None], 0.0
    )
    positive = reference.is_positive(rows.labels, grad.shape[1])
    return torch.stack([magnitude.masked_fill(kind, 0.0).sum(0) for kind in (~positive, positive)])


def _bernoulli_loss(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    a = BernoulliArguments(*arguments[:-2])
    compute_grad, compute_statistics = arguments[-2:]
    rows = _prepare("bernoulli_loss", a.rows)
    row_loss, slope = _bernoulli(a, rows)
    none = a.logits.new_empty((0,))
    grad = _finish_grad(slope, rows.scale, a.logits.dtype) if compute_grad else none
    statistics = _statistics(slope, rows) if compute_statistics else none.to(torch.float64)
    return _reduce(row_loss, rows, a.reduction), grad, statistics


def _bernoulli_grad(grad_loss: Tensor, *arguments: Any) -> Tensor:
    a = BernoulliArguments(*arguments)
    rows = _prepare("bernoulli_grad", a.rows)
    return _finish_grad(_bernoulli(a, rows)[1], rows.scale * grad_loss.to(torch.float64), a.logits.dtype)


class _SoftmaxTerms(NamedTuple):
    classes: Tensor  # [N]
    objectness: Tensor  # [N]
    grad_classes: Tensor  # [N, C]
    grad_objectness: Tensor  # [N, 2] or [N, 0]


def _log_weight(a: SoftmaxArguments, z: Tensor, labels: Tensor) -> Tensor | None:
    if a.reweight == "none":
        return None
    if a.class_table is None:
        raise ValueError(f"softmax_loss: {a.reweight} needs class_table")
    table = a.class_table[: z.shape[1]]
    if a.reweight == "prior":
        return reference.prior_log_weight(labels, table.to(z.dtype))
    if a.reweight == "seesaw":
        return reference.seesaw_log_weight(z, labels, table, p=a.p, q=a.q, eps=a.eps)
    raise ValueError(f"softmax_loss: unknown reweight {a.reweight!r}")


def _softmax(a: SoftmaxArguments, rows: _Rows) -> _SoftmaxTerms:
    c = rows.z.shape[1] - 2 if a.objectness else rows.z.shape[1]
    z, foreground = rows.z[:, :c], rows.labels < c
    labels = rows.labels.clamp(max=c - 1)
    row_loss, grad = reference.softmax_loss(z, labels, _log_weight(a, z, labels))
    row_loss = row_loss.masked_fill(~foreground, 0.0)
    grad = grad.masked_fill(~foreground[:, None], 0.0)
    if not a.objectness:
        return _SoftmaxTerms(row_loss, torch.zeros_like(row_loss), grad, z[:, :0])
    row_objectness, grad_objectness = reference.objectness_loss(rows.z[:, c:], foreground)
    return _SoftmaxTerms(row_loss, row_objectness, grad, grad_objectness)


def _softmax_loss(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    a, compute_grad = SoftmaxArguments(*arguments[:-1]), arguments[-1]
    rows = _prepare("softmax_loss", a.rows)
    terms = _softmax(a, rows)
    grad = a.logits.new_empty((0,))
    if compute_grad:
        both = torch.cat([terms.grad_classes, terms.grad_objectness], dim=1)
        grad = _finish_grad(both, rows.scale, a.logits.dtype)
    return _reduce(terms.classes, rows, a.reduction), _reduce(terms.objectness, rows, a.reduction), grad


def _softmax_grad(grad_classes: Tensor, grad_objectness: Tensor, *arguments: Any) -> Tensor:
    a = SoftmaxArguments(*arguments)
    rows = _prepare("softmax_grad", a.rows)
    terms = _softmax(a, rows)
    parts = (
        _finish_grad(grad, rows.scale * upstream.to(torch.float64), a.logits.dtype)
        for grad, upstream in (
            (terms.grad_classes, grad_classes),
            (terms.grad_objectness, grad_objectness),
        )
    )
    return torch.cat(list(parts), dim=1)


def _gumbel_activation(logits: Tensor, temperature: float, clip_min: float, clip_max: float) -> Tensor:
    link = reference.GumbelLink(temperature, clip_min, clip_max)
    return link.activation(logits.to(loss_dtype(logits)))[0].to(logits.dtype)


def _gumbel_activation_grad(
    grad_output: Tensor, logits: Tensor, temperature: float, clip_min: float, clip_max: float
) -> Tensor:
    link = reference.GumbelLink(temperature, clip_min, clip_max)
    slope = link.activation(logits.to(loss_dtype(logits)))[1]
    return (grad_output.to(slope.dtype) * slope).to(logits.dtype)


def _scale_grad_(grad: Tensor, first: Tensor, second: Tensor, split: int) -> None:
    grad[:, :split].mul_(first)
    grad[:, split:].mul_(second)


def _label_counts(labels: Tensor, num_classes: int, ignore_index: int, validate: bool) -> Tensor:
    if validate:
        check_labels("label_counts", labels, num_classes, ignore_index)
    counted = (labels >= 0) & (labels <= num_classes) & (labels != ignore_index)
    counts = torch.zeros(num_classes + 1, dtype=torch.int64, device=labels.device)
    return counts.scatter_add_(0, labels.to(torch.int64).clamp(0, num_classes), counted.to(torch.int64))


implement("bernoulli_loss", "reference", _bernoulli_loss)
implement("bernoulli_grad", "reference", _bernoulli_grad)
implement("softmax_loss", "reference", _softmax_loss)
implement("softmax_grad", "reference", _softmax_grad)
implement("gumbel_activation", "reference", _gumbel_activation)
implement("gumbel_activation_grad", "reference", _gumbel_activation_grad)
implement("scale_grad_", "reference", _scale_grad_)
implement("label_counts", "reference", _label_counts)
