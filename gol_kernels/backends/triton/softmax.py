"""The softmax family: cross-entropy with constant log-weights, and Seesaw's objectness pair, in one pass.

A row is a program whose chunks lie in registers; beyond 32 768 columns (float64: 16 384) they do so in turn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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


# --- columns: xs are those of a stretch, a tuple of chunks from column ``start`` on --------------------
@triton.jit
def other_logits(
    zs, start, label, class_table, REWEIGHT: tl.constexpr, LAYOUT: tl.constexpr, W: tl.constexpr
):
    """Logits with their prior; -inf in the place of the label's, whose exponential is not among the sums."""
    xs = ()
    for k in tl.static_range(len(zs)):
        columns = start + k * zs[0].shape[0] + tl.arange(0, zs[0].shape[0])
        is_label = tl.arange(0, zs[0].shape[0]) == label - (start + k * zs[0].shape[0])
        x = tl.where(is_label, float("-inf"), zs[k].to(W))
        if REWEIGHT.kind == "prior":
            x += tl.load(table_at(class_table, columns, LAYOUT), columns < LAYOUT.columns, 0).to(W)
        xs = append(xs, x)
    return xs


@triton.jit
def seesaw_row(own, others, label, log_powers, REWEIGHT: tl.constexpr):
    """(log2 of the label's power, threshold) of a row, from its plain exponentials."""
    threshold = tl.maximum(log2(others + exp2(own)) + REWEIGHT.log2_eps, own)
    return tl.load(log_powers + label), threshold


@triton.jit
def seesaw_exponents(xs, start, seesaw, log_powers, REWEIGHT: tl.constexpr, LAYOUT: tl.constexpr):
    """Exponents with Seesaw's log2 M and log2 C added, both 0 at the label: see csrc/loss_math.h."""
    own_power, threshold = seesaw
    bias = threshold * REWEIGHT.q
    ys = ()
    for k in tl.static_range(len(xs)):
        columns = start + k * xs[0].shape[0] + tl.arange(0, xs[0].shape[0])
        power = tl.load(table_at(log_powers, columns, LAYOUT), columns < LAYOUT.columns, 0)
        # x + q max(0, x - threshold) + min(0, log2 n_j^p - log2 n_y^p)
        y = tl.maximum(xs[k], xs[k] * (1.0 + REWEIGHT.q) - bias) + tl.minimum(power - own_power, 0.0)
        ys = append(ys, y)
    return ys


@triton.jit
def highest_of(xs, highest):
    for k in tl.static_range(len(xs)):
        highest = tl.maximum(highest, xs[k])
    return highest


@triton.jit
def exponents(xs, highest, UNIT: tl.constexpr):
    """log2 of exponentials of which the highest is 1. UNIT: log2 of e for logits, 1 for exponents."""
    shifted = ()
    for k in tl.static_range(len(xs)):
        shifted = append(shifted, (xs[k] - highest) * UNIT)
    return shifted


@triton.jit
def add_exponentials(xs, total):
    for k in tl.static_range(len(xs)):
        total += exp2(xs[k])
    return total


@triton.jit
def store_slopes(xs, start, row, ratio, grad, LAYOUT: tl.constexpr):
    """Of a row's exponents, whose exponentials times ratio are the gradient."""
    for k in tl.static_range(len(xs)):
        columns = start + k * xs[0].shape[0] + tl.arange(0, xs[0].shape[0])
        tl.store(grad + row * LAYOUT.grad_stride + columns, exp2(xs[k]) * ratio, columns < LAYOUT.columns)


# --- a row in registers ---------------------------------------------------------------------------------
@triton.jit
def held_sums(xs, own, UNIT: tl.constexpr):
    """(exponents of the others, of the label, sum of the others' exponentials)."""
    lowest = tl.full(xs[0].shape, float("-inf"), xs[0].dtype)
    highest = tl.maximum(tl.max(highest_of(xs, lowest), 0), own)
    xs = exponents(xs, highest, UNIT)
    others = tl.sum(add_exponentials(xs, tl.zeros_like(xs[0])), 0)
    return xs, (own - highest) * UNIT, others


@triton.jit
def held_row(zs, own, label, class_table, REWEIGHT: tl.constexpr, LAYOUT: tl.constexpr, W: tl.constexpr):
    """``held_sums`` of a row's logits, reweighted."""
    xs = other_logits(zs, 0, label, class_table, REWEIGHT, LAYOUT, W)
    xs, own, others = held_sums(xs, own, LOG2_E)
    if REWEIGHT.kind == "seesaw":
        seesaw = seesaw_row(own, others, label, class_table, REWEIGHT)
        xs = seesaw_exponents(xs, 0, seesaw, class_table, REWEIGHT, LAYOUT)
        xs, own, others = held_sums(xs, own, 1.0)
    return xs, own, others


# --- a wider row, read once for each sum and once for the gradient --------------------------------------
@triton.jit
def read_exponents(
    start,
    logits,
    row,
    label,
    class_table,
    highest,
    seesaw,
    highest_seesaw,
    REWEIGHT: tl.constexpr,
    LAYOUT: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    W: tl.constexpr,
):
    """A stretch as ``held_row`` has it, so far as the numbers of the row are known; logits if none is."""
    zs = load_row(logits, row, start, LAYOUT, CHUNK, CHUNKS, float("-inf"))
    xs = other_logits(zs, start, label, class_table, REWEIGHT, LAYOUT, W)
    if highest is not None:
        xs = exponents(xs, highest, LOG2_E)
    if seesaw is not None:
        xs = seesaw_exponents(xs, start, seesaw, class_table, REWEIGHT, LAYOUT)
    if highest_seesaw is not None:
        xs = exponents(xs, highest_seesaw, 1.0)
    return xs


@triton.jit
def read_sums(
    own,
    logits,
    row,
    label,
    class_table,
    highest,
    seesaw,
    UNIT: tl.constexpr,
    REWEIGHT: tl.constexpr,
    LAYOUT: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    W: tl.constexpr,
):
    """(highest, exponent of the label, sum of the others' exponentials) in one pass, as ``held_sums``.

    A sum is relative to the highest seen so far (Milakov and Gimelshein 2018, Online normalizer calculation
    for softmax, algorithm 3); every thread has its own.
    """
    top = tl.full([CHUNK], float("-inf"), W)
    total = tl.zeros([CHUNK], W)
    for start in tl.range(0, LAYOUT.columns, CHUNK * CHUNKS, loop_unroll_factor=1):
        xs = read_exponents(
            start, logits, row, label, class_table, highest, seesaw, None, REWEIGHT, LAYOUT, CHUNK, CHUNKS, W
        )
        before = top
        top = highest_of(xs, before)
        base = tl.where(top == float("-inf"), number(0.0, W), top)  # -inf less itself would be NaN
        total = add_exponentials(exponents(xs, base, UNIT), total * exp2((before - base) * UNIT))
    top_of_row = tl.maximum(tl.max(top, 0), own)
    others = tl.sum(total * exp2((top - top_of_row) * UNIT), 0)
    return top_of_row, (own - top_of_row) * UNIT, others


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
    HELD: tl.constexpr = LAYOUT.columns <= CHUNK * CHUNKS
    row = tl.program_id(0).to(tl.int64)
    if HELD:
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
            fill_row(grad, row, 0, row_scale, LAYOUT, CHUNK, (LAYOUT.columns + CHUNK - 1) // CHUNK)
        return
    own = tl.load(logits + row * LAYOUT.row_stride + label).to(W)
    if REWEIGHT.kind == "prior":
        own += tl.load(class_table + label).to(W)
    if HELD:
        xs, own, others = held_row(zs, own, label, class_table, REWEIGHT, LAYOUT, W)
    else:
        seesaw = None
        highest_seesaw = None
        highest, own, others = read_sums(
            own, logits, row, label, class_table, None, None, LOG2_E, REWEIGHT, LAYOUT, CHUNK, CHUNKS, W
        )
        if REWEIGHT.kind == "seesaw":
            seesaw = seesaw_row(own, others, label, class_table, REWEIGHT)
            highest_seesaw, own, others = read_sums(
                own, logits, row, label, class_table, highest, seesaw, 1.0, REWEIGHT, LAYOUT, CHUNK, CHUNKS, W
            )
    # loss = log(1 + others / e_y), and for the label the gradient -others / (others + e_y): neither cancels
    # when the label's probability is close to 1.
    at_label = exp2(own)
    if row_loss is not None:
        tiny = at_label < 1e-30
        loss = log1p(others / tl.where(tiny, number(1.0, W), at_label))
        tl.store(row_loss + row, tl.where(tiny, (log2(others) - own) * LN_2, loss) * row_scale)
    if grad is not None:
        ratio = row_scale / (others + at_label)
        if HELD:
            store_slopes(xs, 0, row, ratio, grad, LAYOUT)
        else:
            for start in tl.range(0, LAYOUT.columns, CHUNK * CHUNKS, loop_unroll_factor=1):
                xs = read_exponents(
                    start, logits, row, label, class_table, highest, seesaw, highest_seesaw,
                    REWEIGHT, LAYOUT, CHUNK, CHUNKS, W,
                )  # fmt: skip
                store_slopes(xs, start, row, ratio, grad, LAYOUT)
        tl.debug_barrier()  # another thread has stored a 0 there
        tl.store(grad + row * LAYOUT.grad_stride + label, others * ratio * -1.0)


# --- on the host ---------------------------------------------------------------------------------
_WARPS = 16  # of a program at most: the threads of 32 have half the registers each
_HELD_CHUNKS = 8  # that registers hold; a wider row takes more warps
_READ_CHUNKS = 2  # of a row wider than all of them hold, in a turn of its loops


class _Plan(NamedTuple):
    """How a row is cut: in ``chunks`` of ``chunk`` columns at once, by a program of ``num_warps``."""

    chunk: int
    chunks: int
    num_warps: int
    number: tl.dtype  # that is worked in


def _plan(columns: int, dtype: torch.dtype) -> _Plan:
    of_warp = columns_plan(columns, dtype, _HELD_CHUNKS)
    num_warps = min(_WARPS, power_of_2(cdiv(columns, of_warp.chunk * _HELD_CHUNKS)))
    chunk = of_warp.chunk * num_warps
    chunks = cdiv(columns, chunk)
    if chunks > _HELD_CHUNKS:
        chunks = _READ_CHUNKS
    return _Plan(chunk, chunks, num_warps, of_warp.number)


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
    plan = _plan(columns, dtype)
    launch(
        softmax_kernel,
        (n,),
        logits.device,
        *(logits, rows.labels, rows.row_weights, rows.denominator, *upstream, rows.scale),
        *(rows.log_powers if a.reweight == "seesaw" else table, grad, row_loss, row_objectness),
        REWEIGHT=Reweight(a.reweight, max(a.q, 0.0), math.log2(a.eps)),
        LAYOUT=replace(rows.layout, columns=columns),
        OBJECTNESS=a.objectness,
        CHUNK=plan.chunk,
        CHUNKS=plan.chunks,
        W=plan.number,
        num_warps=plan.num_warps,
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
