"""The ops in terms of ``gol_kernels.reference``: any device, no compiler."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..ops import implement, loss_dtype


def unavailable() -> str | None:
    """Always None: plain PyTorch runs everywhere."""
    return None


def _check_labels(op: str, labels: Tensor, num_classes: int, ignore_index: int) -> None:
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
    scale: Tensor  # [N] weight / denominator; 0 ignored, NaN illegal
    counted: Tensor  # [N] bool, the rows that are not ignored


def _prepare(
    op: str,
    logits: Tensor,
    labels: Tensor,
    row_weights: Tensor | None,
    avg_factor: Tensor | None,
    num_classes: int,
    ignore_index: int,
    reduction: str,
    scale: float,
    validate: bool,
) -> _Rows:
    if validate:
        _check_labels(op, labels, num_classes, ignore_index)
    labels = labels.to(torch.int64)
    counted = labels != ignore_index
    legal = (labels >= 0) & (labels <= num_classes)
    factor = torch.full((), scale, dtype=torch.float64, device=logits.device)
    if reduction == "mean":
        denominator = (counted.sum() if avg_factor is None else avg_factor).to(torch.float64)
        factor = factor / torch.where(denominator == 0, torch.ones_like(denominator), denominator)
    row_scale = factor.expand(labels.shape)
    if row_weights is not None:
        row_scale = row_scale * row_weights.to(torch.float64)
    row_scale = row_scale.masked_fill(~legal, float("nan")).masked_fill(~counted, 0.0)
    z = logits.to(loss_dtype(logits))
    # A row of weight 0 does not exist: what its logits hold must not reach the sums as 0 * inf.
    z = z.masked_fill((row_scale == 0)[:, None], 0.0)
    return _Rows(z, labels.masked_fill(~(legal & counted), 0), row_scale, counted & legal)


def _reduce(row_loss: Tensor, rows: _Rows, reduction: str) -> Tensor:
    weighted = row_loss.to(torch.float64) * rows.scale
    return (weighted if reduction == "none" else weighted.sum()).to(rows.z.dtype)


def _finish_grad(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (grad * scale.to(grad.dtype)[:, None]).to(dtype)


def _bernoulli(
    rows: _Rows,
    class_table: Tensor | None,
    rng: Tensor | None,
    link: str,
    clip: tuple[float, float, float],
    slope: str,
    reweight: str,
) -> tuple[Tensor, Tensor]:
    chosen = reference.SigmoidLink() if link == "sigmoid" else reference.GumbelLink(*clip, slope)
    dropped = None
    if reweight != "none":
        if class_table is None:
            raise ValueError("this reweighting needs class_table")
        if reweight == "eql":
            dropped = reference.eql_dropped(rows.labels, class_table)
        else:
            if rng is None:
                raise ValueError("DropLoss needs rng, an int64 tensor of (seed, offset)")
            dropped = reference.drop_loss_dropped(rows.labels, class_table, rows.counted, rng[0], rng[1])
    return reference.bernoulli_loss(rows.z, rows.labels, chosen, dropped)


def _bernoulli_loss(
    logits: Tensor,
    labels: Tensor,
    row_weights: Tensor | None,
    avg_factor: Tensor | None,
    class_table: Tensor | None,
    rng: Tensor | None,
    link: str,
    temperature: float,
    clip_min: float,
    clip_max: float,
    slope: str,
    reweight: str,
    num_classes: int,
    ignore_index: int,
    reduction: str,
    scale: float,
    validate: bool,
    compute_grad: bool,
) -> tuple[Tensor, Tensor]:
    options = (num_classes, ignore_index, reduction, scale, validate)
    rows = _prepare("bernoulli_loss", logits, labels, row_weights, avg_factor, *options)
    clip = (temperature, clip_min, clip_max)
    row_loss, grad = _bernoulli(rows, class_table, rng, link, clip, slope, reweight)
    grad = _finish_grad(grad, rows.scale, logits.dtype) if compute_grad else logits.new_empty((0,))
    return _reduce(row_loss, rows, reduction), grad


def _bernoulli_grad(
    grad_loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    row_weights: Tensor | None,
    avg_factor: Tensor | None,
    class_table: Tensor | None,
    rng: Tensor | None,
    link: str,
    temperature: float,
    clip_min: float,
    clip_max: float,
    slope: str,
    reweight: str,
    num_classes: int,
    ignore_index: int,
    reduction: str,
    scale: float,
    validate: bool,
) -> Tensor:
    options = (num_classes, ignore_index, reduction, scale, validate)
    rows = _prepare("bernoulli_grad", logits, labels, row_weights, avg_factor, *options)
    clip = (temperature, clip_min, clip_max)
    _, grad = _bernoulli(rows, class_table, rng, link, clip, slope, reweight)
    return _finish_grad(grad, rows.scale * grad_loss.to(torch.float64), logits.dtype)


class _SoftmaxTerms(NamedTuple):
    classes: Tensor  # [N]
    objectness: Tensor  # [N]
    grad_classes: Tensor  # [N, C]
    grad_objectness: Tensor  # [N, 2] or [N, 0]


def _softmax(
    rows: _Rows, class_counts: Tensor | None, reweight: str, p: float, q: float, eps: float, objectness: bool
) -> _SoftmaxTerms:
    c = rows.z.shape[1] - 2 if objectness else rows.z.shape[1]
    z, foreground = rows.z[:, :c], rows.labels < c
    labels = rows.labels.clamp(max=c - 1)
    log_weight = None
    if reweight == "seesaw":
        if class_counts is None:
            raise ValueError("seesaw needs class_counts")
        log_weight = reference.seesaw_log_weight(z, labels, class_counts[:c], p=p, q=q, eps=eps)
    row_loss, grad = reference.softmax_loss(z, labels, log_weight)
    row_loss = row_loss.masked_fill(~foreground, 0.0)
    grad = grad.masked_fill(~foreground[:, None], 0.0)
    if not objectness:
        return _SoftmaxTerms(row_loss, torch.zeros_like(row_loss), grad, z[:, :0])
    row_objectness, grad_objectness = reference.objectness_loss(rows.z[:, c:], foreground)
    return _SoftmaxTerms(row_loss, row_objectness, grad, grad_objectness)


def _softmax_loss(
    logits: Tensor,
    labels: Tensor,
    row_weights: Tensor | None,
    avg_factor: Tensor | None,
    class_counts: Tensor | None,
    reweight: str,
    p: float,
    q: float,
    eps: float,
    objectness: bool,
    num_classes: int,
    ignore_index: int,
    reduction: str,
    scale: float,
    validate: bool,
    compute_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    options = (num_classes, ignore_index, reduction, scale, validate)
    rows = _prepare("softmax_loss", logits, labels, row_weights, avg_factor, *options)
    terms = _softmax(rows, class_counts, reweight, p, q, eps, objectness)
    grad = logits.new_empty((0,))
    if compute_grad:
        both = torch.cat([terms.grad_classes, terms.grad_objectness], dim=1)
        grad = _finish_grad(both, rows.scale, logits.dtype)
    return _reduce(terms.classes, rows, reduction), _reduce(terms.objectness, rows, reduction), grad


def _softmax_grad(
    grad_classes: Tensor,
    grad_objectness: Tensor,
    logits: Tensor,
    labels: Tensor,
    row_weights: Tensor | None,
    avg_factor: Tensor | None,
    class_counts: Tensor | None,
    reweight: str,
    p: float,
    q: float,
    eps: float,
    objectness: bool,
    num_classes: int,
    ignore_index: int,
    reduction: str,
    scale: float,
    validate: bool,
) -> Tensor:
    options = (num_classes, ignore_index, reduction, scale, validate)
    rows = _prepare("softmax_grad", logits, labels, row_weights, avg_factor, *options)
    terms = _softmax(rows, class_counts, reweight, p, q, eps, objectness)
    parts = (
        _finish_grad(grad, rows.scale * upstream.to(torch.float64), logits.dtype)
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


def _label_counts(labels: Tensor, num_classes: int, ignore_index: int, validate: bool) -> Tensor:
    if validate:
        _check_labels("label_counts", labels, num_classes, ignore_index)
    counted = (labels >= 0) & (labels <= num_classes) & (labels != ignore_index)
    counts = torch.zeros(num_classes + 1, dtype=torch.int64, device=labels.device)
    return counts.scatter_add_(0, labels.to(torch.int64).clamp(0, num_classes), counted.to(torch.int64))


implement("bernoulli_loss", "reference", _bernoulli_loss)
implement("bernoulli_grad", "reference", _bernoulli_grad)
implement("softmax_loss", "reference", _softmax_loss)
implement("softmax_grad", "reference", _softmax_grad)
implement("gumbel_activation", "reference", _gumbel_activation)
implement("gumbel_activation_grad", "reference", _gumbel_activation_grad)
implement("label_counts", "reference", _label_counts)
