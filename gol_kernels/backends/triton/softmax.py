"""The softmax family: cross-entropy with constant log-weights, and Seesaw's objectness pair, in one pass.

A row is a program whose chunks lie in registers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops import SoftmaxArguments, loss_dtype
from .math import LN_2, LOG2_E, append, exp2, log1p, log2, number
from .rows import (
    cdiv,
    columns_plan,
    fill_row,
    launch,
    load_row,
    power_of_2,
    prepare,
    reduce_rows,
    row_of,
    scale_of,
    table_at,
)


@dataclass(frozen=True)
class Reweight:
    """A reweighting and its options, a compile-time constant of a kernel."""

    kind: str
    q: float
    log2_eps: float


@triton.jit
def objectness_row(row, logits, grad, row_loss, foreground, scale, LAYOUT: tl.constexpr, W: tl.constexpr):
    """Two-way cross-entropy of (object, background), the two columns after the softmax's."""
    pair = logits + row * LAYOUT.row_stride + LAYOUT.columns
    dead = (scale == 0) | (scale != scale)
    d = tl.load(pair).to(W) - tl.load(pair + 1).to(W)
    margin = tl.where(foreground, d, -d)
    w = exp2(tl.abs(margin) * -LOG2_E)
    loss = tl.where(margin < 0, -margin, number(0.0, W)) + log1p(w)
    slope = tl.where(margin < 0, number(1.0, W), w) / (1.0 + w)
    value = tl.where(dead, scale, slope * scale)
    if row_loss is not None:
        tl.store(row_loss + row, tl.where(dead, scale, loss * scale))
    if grad is not None:
        pair = grad + row * LAYOUT.grad_stride + LAYOUT.columns
        sign = tl.where(foreground, number(-1.0, W), number(1.0, W))
        tl.store(pair, value * sign)
        tl.store(pair + 1, value * -sign)


@triton.jit
def exponents(zs, own, label, class_table, REWEIGHT: tl.constexpr, LAYOUT: tl.constexpr, W: tl.constexpr):
    """log2 of a row's exponentials, the largest 1, by chunks and of the label, whose logit is ``own``."""
    if REWEIGHT.kind == "prior":
        own += tl.load(class_table + label).to(W)
    xs = ()
    top = tl.full(zs[0].shape, float("-inf"), W)
    for k in tl.static_range(len(zs)):
        x = zs[k].to(W)
        if REWEIGHT.kind == "prior":
            columns = k * zs[0].shape[0] + tl.arange(0, zs[0].shape[0])
            x += tl.load(table_at(class_table, columns, LAYOUT), columns < LAYOUT.columns, 0).to(W)
        top = tl.maximum(top, x)
        xs = append(xs, x)
    highest = tl.max(top, 0)
    shifted = ()
    for k in tl.static_range(len(zs)):
        shifted = append(shifted, (xs[k] - highest) * LOG2_E)
    return shifted, (own - highest) * LOG2_E


@triton.jit
def seesaw_exponents(
    xs, own, label, log_powers, REWEIGHT: tl.constexpr, LAYOUT: tl.constexpr, W: tl.constexpr
):
    """``exponents`` with Seesaw's log2 M and log2 C added, both 0 at the label: see csrc/loss_math.h."""
    total = tl.zeros(xs[0].shape, W)
    for k in tl.static_range(len(xs)):
        total += exp2(xs[k])
    threshold = tl.maximum(log2(tl.sum(total, 0)) + REWEIGHT.log2_eps, own)
    own_power, bias = tl.load(log_powers + label), threshold * REWEIGHT.q
    ys = ()
    top = tl.full(xs[0].shape, float("-inf"), W)
    for k in tl.static_range(len(xs)):
        columns = k * xs[0].shape[0] + tl.arange(0, xs[0].shape[0])
        power = tl.load(table_at(log_powers, columns, LAYOUT), columns < LAYOUT.columns, 0)
        # x + q max(0, x - threshold) + min(0, log2 n_j^p - log2 n_y^p)
        y = tl.maximum(xs[k], xs[k] * (1.0 + REWEIGHT.q) - bias) + tl.minimum(power - own_power, 0.0)
        top = tl.maximum(top, y)
        ys = append(ys, y)
    highest = tl.max(top, 0)
    shifted = ()
    for k in tl.static_range(len(xs)):
        shifted = append(shifted, ys[k] - highest)
    return shifted, own - highest


@triton.jit
def softmax_kernel(
    logits,
    labels,
    row_weights,
    denominator,
    upstream,
    upstream_objectness,
    scale: tl.float64,
    class_table,
    grad,
    row_loss,
    row_objectness,
    REWEIGHT: tl.constexpr,
    LAYOUT: tl.constexpr,
    OBJECTNESS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    W: tl.constexpr,
):
    """Program row: row_loss and row_objectness [N], grad [N, K]; each may be None."""
    row = tl.program_id(0).to(tl.int64)
    zs = load_row(logits, row, 0, LAYOUT, CHUNK, CHUNKS, float("-inf"))
    label, legal, weight, factor = row_of(row, labels, row_weights, denominator, scale, LAYOUT, W)
    row_scale = scale_of(row, legal, weight, factor, upstream, LAYOUT)
    foreground = label < LAYOUT.columns
    if OBJECTNESS:
        objectness_scale = scale_of(row, legal, weight, factor, upstream_objectness, LAYOUT)
        objectness_row(row, logits, grad, row_objectness, foreground, objectness_scale, LAYOUT, W)
    row_scale = tl.where(foreground, row_scale, number(0.0, W))
    if (row_scale == 0) | ~legal:
        if row_loss is not None:
            tl.store(row_loss + row, row_scale)
        if grad is not None:
            fill_row(grad, row, 0, row_scale, LAYOUT, CHUNK, CHUNKS)
        return
    own_z = tl.load(logits + row * LAYOUT.row_stride + label).to(W)
    xs, own = exponents(zs, own_z, label, class_table, REWEIGHT, LAYOUT, W)
    if REWEIGHT.kind == "seesaw":
        xs, own = seesaw_exponents(xs, own, label, class_table, REWEIGHT, LAYOUT, W)
    es = ()
    rest = tl.zeros([CHUNK], W)
    for k in tl.static_range(CHUNKS):
        e = tl.where(tl.arange(0, CHUNK) == label - k * CHUNK, 0.0, exp2(xs[k]))
        rest += e
        es = append(es, e)
    # loss = log(1 + others / e_y), and for the label the gradient -others / (others + e_y): neither cancels
    # when the label's probability is close to 1.
    others, at_label = tl.sum(rest, 0), exp2(own)
    if row_loss is not None:
        tiny = at_label < 1e-30
        loss = log1p(others / tl.where(tiny, number(1.0, W), at_label))
        tl.store(row_loss + row, tl.where(tiny, (log2(others) - own) * LN_2, loss) * row_scale)
    if grad is not None:
        ratio = row_scale / (others + at_label)
        for k in tl.static_range(CHUNKS):
            columns = k * CHUNK + tl.arange(0, CHUNK)
            tl.store(grad + row * LAYOUT.grad_stride + columns, es[k] * ratio, columns < LAYOUT.columns)
        tl.debug_barrier()  # another thread has stored a 0 there
        tl.store(grad + row * LAYOUT.grad_stride + label, others * ratio * -1.0)


# --- on the host ---------------------------------------------------------------------------------
_CHUNKS = 8  # of a program; a wider row takes more warps


def _num_warps(columns: int, chunk: int) -> int:
    """Warps for a row of at most eight chunks a warp; beyond 32 warps rows spill out of the registers."""
    return min(32, power_of_2(cdiv(columns, chunk * _CHUNKS)))


def _table(op: str, a: SoftmaxArguments, columns: int) -> Tensor | None:
    if a.reweight == "none":
        return None
    if a.reweight not in ("prior", "seesaw"):
        raise ValueError(f"{op}: unknown reweight {a.reweight!r}")
    if a.class_table is None or a.class_table.dim() != 1 or a.class_table.shape[0] < columns:
        got = None if a.class_table is None else list(a.class_table.shape)
        raise ValueError(f"{op}: {a.reweight} needs class_table of {columns} or more, got {got}")
    return a.class_table[:columns].contiguous()


def _run(
    op: str,
    a: SoftmaxArguments,
    upstream: tuple[Tensor | None, Tensor | None],
    compute_loss: bool,
    compute_grad: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(row losses [1, N] of the classes, of the objectness, grad)."""
    width = a.logits.shape[1]
    columns = width - 2 if a.objectness else width
    if columns < 1:
        raise ValueError(f"{op}: no class column among {width}")
    table = _table(op, a, columns)
    rows = prepare(op, a.rows, upstream[0], class_counts=table if a.reweight == "seesaw" else None, p=a.p)
    n, dtype, logits = a.logits.shape[0], loss_dtype(a.logits), rows.logits
    row_loss = logits.new_empty((1, n), dtype=dtype) if compute_loss else None
    row_objectness = logits.new_empty((1, n), dtype=dtype) if compute_loss and a.objectness else None
    grad = logits.new_empty((n, width)) if compute_grad else None
    plan = columns_plan(columns, dtype, _CHUNKS)
    num_warps = _num_warps(columns, plan.chunk)
    chunk = plan.chunk * num_warps
    launch(
        softmax_kernel,
        (n,),
        logits.device,
        *(logits, rows.labels, rows.row_weights, rows.denominator, *upstream, rows.scale),
        *(rows.log_powers if a.reweight == "seesaw" else table, grad, row_loss, row_objectness),
        REWEIGHT=Reweight(a.reweight, max(a.q, 0.0), math.log2(a.eps)),
        LAYOUT=replace(rows.layout, columns=columns),
        OBJECTNESS=a.objectness,
        CHUNK=chunk,
        CHUNKS=cdiv(columns, chunk),
        W=plan.number,
        num_warps=num_warps,
    )
    return row_loss, row_objectness, grad


def softmax_loss(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op of this name."""
    a, compute_grad = SoftmaxArguments(*arguments[:-1]), arguments[-1]
    row_loss, row_objectness, grad = _run("softmax_loss", a, (None, None), True, compute_grad)
    assert row_loss is not None
    classes = reduce_rows(row_loss, a.reduction)
    objectness = (
        torch.zeros_like(classes) if row_objectness is None else reduce_rows(row_objectness, a.reduction)
    )
    return classes, objectness, a.logits.new_empty((0,)) if grad is None else grad


def softmax_grad(grad_classes: Tensor, grad_objectness: Tensor, *arguments: Any) -> Tensor:
    """The op of this name."""
    a = SoftmaxArguments(*arguments)
    upstream = grad_classes.contiguous(), grad_objectness.contiguous()
    grad = _run("softmax_grad", a, upstream, False, True)[2]
    assert grad is not None
    return grad
