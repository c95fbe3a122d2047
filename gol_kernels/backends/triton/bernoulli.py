"""The Bernoulli family: any link with any reweighting, loss and gradient in one pass over the logits.

A row is a program of one warp: its chunks of 256 columns lie in registers, and a logarithm is taken of the
product of their factors. With statistics a program takes one chunk of many rows, and sums its columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops import BernoulliArguments, loss_dtype
from .links import MAX_PRODUCT, Link, clip, log2_probability, negative, positive
from .math import LN_2, append, equal, exp2, log2, number
from .rows import (
    cdiv,
    columns_plan,
    dense_bytes,
    fill_row,
    launch,
    load_row,
    prepare,
    reduce_rows,
    row_of,
    scale_of,
    table_at,
    total,
)

_STATISTICS_ROWS = 32  # rows of a program that sums columns


@dataclass(frozen=True)
class Reweight:
    """A reweighting and its options, a compile-time constant of a kernel."""

    kind: str
    q: float
    log2_eps: float
    logit_threshold: float

    @property
    def weighs(self) -> bool:
        """Whether a term's weight is more than 0 or 1: then each has a logarithm of its own."""
        return self.kind in ("weights", "seesaw")


@triton.jit
def own_term(z, label, class_table, LINK: tl.constexpr, REWEIGHT: tl.constexpr, LAYOUT: tl.constexpr):
    """(loss, d loss / d z) of a row's positive; 0 where the label has no column."""
    clipped = clip(z, LINK)
    loss, slope = positive(clipped, LINK)
    if LINK.cuts_slope:
        slope *= tl.where(clipped == z, number(1.0, z.dtype), number(0.0, z.dtype))
    exists = label < LAYOUT.columns
    if REWEIGHT.kind == "weights":
        weight = tl.load(class_table + label, exists, 0).to(z.dtype)
        loss *= weight
        slope *= weight
        exists &= weight != 0
    elif REWEIGHT.kind == "federated":
        exists &= tl.load(class_table + label, exists, 0) != 0
    zero = number(0.0, z.dtype)
    return tl.where(exists, loss, zero), tl.where(exists, slope, zero)


@triton.jit
def row_context(
    z,
    row,
    label,
    class_table,
    row_table,
    counts,
    LINK: tl.constexpr,
    REWEIGHT: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """Two numbers of the row that the weights of its terms depend on; z is the label's logit."""
    if REWEIGHT.kind == "drop":
        limit = tl.full((), 0x10000, tl.int32)
        if label >= LAYOUT.num_classes:  # a foreground row draws nothing
            limit = keep_limit(counts)
        return limit, row.to(tl.uint32)
    elif REWEIGHT.kind == "acsl":
        return tl.load(row_table + row), row
    elif REWEIGHT.kind == "seesaw":
        power = tl.load(class_table + label, label < LAYOUT.columns, 0)
        score = log2_probability(clip(z, LINK), LINK)
        return power, tl.maximum(score, number(REWEIGHT.log2_eps, z.dtype))
    else:
        return label, row


@triton.jit
def keep_limit(counts):
    """DropLoss's share of rare foreground labels in units of 2^-16, rounded; all of it without foreground."""
    num_rare, foreground = total(counts, 1).to(tl.int64), total(counts, 2).to(tl.int64)
    share = (2 * num_rare * 0x10000 + foreground) // tl.maximum(2 * foreground, 1)
    return tl.where(foreground > 0, share, 0x10000).to(tl.int32)


@triton.jit
def survives(first_column, row, limit, rng, N: tl.constexpr):
    """Which of N columns, from a multiple of 8 on, draw less than limit: see ``reference.philox_uint16``."""
    seed, offset = tl.load(rng), tl.load(rng + 1)
    groups = first_column // 8 + tl.arange(0, N // 8)
    low, high = (offset & 0xFFFFFFFF).to(tl.uint32), ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, groups, row, low, high)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # word 2 a + b at [:, a, b]
    below = tl.join((words & 0xFFFF) < limit, (words >> 16) < limit)
    return tl.reshape(below, [N])


@triton.jit
def counted(
    z,
    columns,
    valid,
    label,
    first,
    second,
    class_table,
    rng,
    REWEIGHT: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """Which of a chunk's negatives a reweighting counts; ``first`` and ``second`` are ``row_context``'s."""
    foreground = label < LAYOUT.num_classes
    if REWEIGHT.kind == "eql" or REWEIGHT.kind == "drop":
        rare = tl.load(table_at(class_table, columns, LAYOUT), valid, 0) != 0
        gone = rare & foreground
        if REWEIGHT.kind == "drop":
            if first < 0x10000:
                limit = first.to(tl.uint32)
                gone = rare & ~survives(tl.min(columns, 0), second, limit, rng, columns.shape[0])
        return ~gone
    elif REWEIGHT.kind == "federated":
        return tl.load(table_at(class_table, columns, LAYOUT), valid, 0) != 0
    elif REWEIGHT.kind == "weights":
        return tl.load(table_at(class_table + LAYOUT.columns, columns, LAYOUT), valid, 0) != 0
    elif REWEIGHT.kind == "acsl":
        shared = (tl.load(table_at(class_table, columns, LAYOUT), valid, 0) & first) != 0
        return tl.where(foreground, z >= number(REWEIGHT.logit_threshold, z.dtype), shared)
    else:
        return valid


@triton.jit
def term_weight(
    z,
    columns,
    valid,
    label,
    first,
    second,
    class_table,
    LINK: tl.constexpr,
    REWEIGHT: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """The weight of a chunk's negatives, of clipped logits z."""
    if REWEIGHT.kind == "weights":
        return tl.load(table_at(class_table + LAYOUT.columns, columns, LAYOUT), valid, 0).to(z.dtype)
    else:
        mitigation = tl.minimum(tl.load(table_at(class_table, columns, LAYOUT), valid, 0) - first, 0.0)
        compensation = tl.maximum(log2_probability(z, LINK) - second, 0.0) * REWEIGHT.q
        return tl.where(label < LAYOUT.num_classes, exp2(mitigation + compensation), 1.0)


@triton.jit
def row_terms(
    zs,
    start,
    row,
    label,
    multiplier,
    logits,
    class_table,
    row_table,
    rng,
    counts,
    grad,
    LINK: tl.constexpr,
    REWEIGHT: tl.constexpr,
    LAYOUT: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    W: tl.constexpr,
):
    """Of a row's chunks zs, from column ``start`` on: (loss, slopes of the negatives, slope of the positive,
    whether it is among them). The slopes are multiplier * d loss / d z; those of negatives go to grad.
    """
    own_z = tl.load(logits + row * LAYOUT.row_stride + label, label < LAYOUT.columns, 0).to(W)
    own_loss, own_slope = own_term(own_z, label, class_table, LINK, REWEIGHT, LAYOUT)
    first, second = row_context(own_z, row, label, class_table, row_table, counts, LINK, REWEIGHT, LAYOUT)
    own_slope *= multiplier
    multiplier *= LINK.unit
    product = tl.full([CHUNK], 1.0, W)
    loss = tl.zeros([CHUNK], W)
    slopes = ()
    for k in tl.static_range(CHUNKS):
        columns = start + k * CHUNK + tl.arange(0, CHUNK)
        valid = columns < LAYOUT.columns
        z = zs[k].to(W)
        on = (tl.arange(0, CHUNK) != label - (start + k * CHUNK)) & valid
        if REWEIGHT.kind != "none":
            on &= counted(z, columns, valid, label, first, second, class_table, rng, REWEIGHT, LAYOUT)
        clipped = clip(z, LINK)
        held = tl.where(on, clipped, number(LINK.neutral, W))
        linear, factor, slope = negative(held, LINK)
        if REWEIGHT.weighs:
            weight = term_weight(
                held, columns, valid, label, first, second, class_table, LINK, REWEIGHT, LAYOUT
            )
            loss += weight * (linear - log2(factor))
            slope *= weight
        else:
            product *= factor
            if LINK.has_linear:
                loss += linear
        if LINK.cuts_slope:
            slope *= equal(clipped, z)
        slope *= multiplier
        if grad is not None:
            tl.store(grad + row * LAYOUT.grad_stride + columns, slope, valid)
        slopes = append(slopes, slope)
    if not REWEIGHT.weighs:
        loss -= log2(product)
    own_here = (label >= start) & (label < tl.minimum(start + CHUNKS * CHUNK, LAYOUT.columns))
    return tl.sum(loss, 0) * LN_2 + tl.where(own_here, own_loss, number(0.0, W)), slopes, own_slope, own_here


@triton.jit
def rows_kernel(
    logits,
    labels,
    row_weights,
    denominator,
    upstream,
    scale: tl.float64,
    class_table,
    row_table,
    rng,
    counts,
    grad,
    row_loss,
    LINK: tl.constexpr,
    REWEIGHT: tl.constexpr,
    LAYOUT: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    W: tl.constexpr,
):
    """Program (row, block): row_loss [blocks, N] and grad [N, K], either may be None."""
    row = tl.program_id(0).to(tl.int64)
    start = 0
    if LAYOUT.columns > CHUNK * CHUNKS:
        start = tl.program_id(1) * (CHUNK * CHUNKS)
    zs = load_row(logits, row, start, LAYOUT, CHUNK, CHUNKS, 0)
    label, legal, weight, factor = row_of(row, labels, row_weights, denominator, scale, LAYOUT, W)
    row_scale = scale_of(row, legal, weight, factor, upstream, LAYOUT)
    if row_loss is not None:
        row_loss += tl.program_id(1).to(tl.int64) * tl.num_programs(0)
    if (row_scale == 0) | ~legal:
        if row_loss is not None:
            tl.store(row_loss + row, row_scale)
        if grad is not None:
            fill_row(grad, row, start, row_scale, LAYOUT, CHUNK, CHUNKS)
        return
    loss, _, own_slope, own_here = row_terms(
        zs, start, row, label, row_scale, logits, class_table, row_table, rng, counts, grad,
        LINK, REWEIGHT, LAYOUT, CHUNK, CHUNKS, W,
    )  # fmt: skip
    if row_loss is not None:
        tl.store(row_loss + row, loss * row_scale)
    if grad is not None:
        tl.debug_barrier()  # another thread has stored the negative's slope there
        tl.store(grad + row * LAYOUT.grad_stride + label, own_slope, own_here)


@triton.jit(do_not_specialize=["num_rows"])
def statistics_kernel(
    logits,
    labels,
    row_weights,
    denominator,
    scale: tl.float64,
    class_table,
    row_table,
    rng,
    counts,
    grad,
    row_loss,
    statistics,
    num_rows,
    LINK: tl.constexpr,
    REWEIGHT: tl.constexpr,
    LAYOUT: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    W: tl.constexpr,
):
    """Program (group, block): ROWS rows of one chunk. statistics [groups, 2, K]: positives, negatives."""
    start = tl.program_id(1) * CHUNK
    columns = start + tl.arange(0, CHUNK)
    valid = columns < LAYOUT.columns
    positives = tl.zeros([CHUNK], W)
    negatives = tl.zeros([CHUNK], W)
    for i in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        if row < num_rows:
            zs = load_row(logits, row, start, LAYOUT, CHUNK, 1, 0)
            label, legal, weight, factor = row_of(row, labels, row_weights, denominator, scale, LAYOUT, W)
            row_scale = scale_of(row, legal, weight, factor, None, LAYOUT)
            dead = (row_scale == 0) | ~legal
            loss, slopes, own_slope, own_here = row_terms(
                zs, start, row, label, weight, logits, class_table, row_table, rng, counts, None,
                LINK, REWEIGHT, LAYOUT, CHUNK, 1, W,
            )  # fmt: skip
            own = (columns == label) & own_here
            value = tl.where(dead, 0.0, tl.where(own, own_slope, slopes[0]))
            positives += tl.where(own, tl.abs(value), 0.0)
            negatives += tl.where(own, 0.0, tl.abs(value))
            losses = row_loss + tl.program_id(1).to(tl.int64) * num_rows + row
            tl.store(losses, tl.where(dead, row_scale, loss * row_scale))
            if grad is not None:
                scaled = tl.where(dead, row_scale, value * factor)
                tl.store(grad + row * LAYOUT.grad_stride + columns, scaled, valid)
    sums = statistics + tl.program_id(0).to(tl.int64) * (2 * LAYOUT.columns) + columns
    tl.store(sums, positives, valid)
    tl.store(sums + LAYOUT.columns, negatives, valid)


# --- on the host ---------------------------------------------------------------------------------
class _Tables(NamedTuple):
    class_table: Tensor | None
    row_table: Tensor | None
    rng: Tensor | None


def _tables(op: str, a: BernoulliArguments) -> _Tables:
    """The tables of a reweighting as the kernels read them. Raises: ValueError where one does not fit."""
    k, table = a.logits.shape[1], a.class_table
    if a.reweight == "none":
        return _Tables(None, None, None)
    shapes = {"eql": (k,), "drop": (k,), "federated": (k,), "acsl": (k,), "weights": (2, k), "seesaw": (k,)}
    if a.reweight not in shapes:
        raise ValueError(f"{op}: unknown reweight {a.reweight!r}")
    if a.reweight == "seesaw" and table is not None:
        table = table[:k]
    if table is None or tuple(table.shape) != shapes[a.reweight]:
        got = None if table is None else list(table.shape)
        raise ValueError(f"{op}: {a.reweight} needs class_table {list(shapes[a.reweight])}, got {got}")
    row_table = rng = None
    if a.reweight == "drop":
        if a.rng is None or tuple(a.rng.shape) != (2,) or a.rng.dtype != torch.int64:
            raise ValueError(f"{op}: DropLoss needs rng, an int64 tensor of (seed, offset)")
        rng = a.rng.contiguous()
    if a.reweight == "acsl":
        if a.row_table is None or a.row_table.shape != a.labels.shape:
            raise ValueError(f"{op}: acsl needs row_table, one number for each of {a.labels.shape[0]} rows")
        row_table = a.row_table.contiguous()
    return _Tables(dense_bytes(table), row_table, rng)


class _Result(NamedTuple):
    row_loss: Tensor | None  # [blocks, N]
    grad: Tensor | None
    statistics: Tensor | None  # [groups, 2, K]


def _run(
    op: str,
    a: BernoulliArguments,
    upstream: Tensor | None,
    compute_loss: bool,
    compute_grad: bool,
    compute_statistics: bool,
) -> _Result:
    tables = _tables(op, a)
    rows = prepare(
        op,
        a.rows,
        upstream,
        rare=tables.class_table if a.reweight == "drop" else None,
        class_counts=tables.class_table if a.reweight == "seesaw" else None,
        p=a.p,
    )
    if a.reweight == "seesaw":
        tables = tables._replace(class_table=rows.log_powers)
    n, k = rows.logits.shape
    dtype = loss_dtype(rows.logits)
    plan = columns_plan(k, dtype, MAX_PRODUCT)
    chunks = 1 if compute_statistics else plan.chunks
    blocks = cdiv(k, plan.chunk * chunks)
    groups = cdiv(n, _STATISTICS_ROWS)
    result = _Result(
        rows.logits.new_empty((blocks, n), dtype=dtype) if compute_loss else None,
        rows.logits.new_empty((n, k)) if compute_grad else None,
        rows.logits.new_empty((groups, 2, k), dtype=dtype) if compute_statistics else None,
    )
    row_arguments = (rows.logits, rows.labels, rows.row_weights, rows.denominator)
    drop_counts = rows.counts if a.reweight == "drop" else None
    constants: dict[str, Any] = {
        "LINK": Link(a.link, a.temperature, a.clip_min, a.clip_max, a.slope),
        "REWEIGHT": Reweight(a.reweight, max(a.q, 0.0), math.log2(a.eps), a.logit_threshold),
        "LAYOUT": rows.layout,
        "CHUNK": plan.chunk,
        "W": plan.number,
        "num_warps": 1,
    }
    if compute_statistics:
        launch(
            statistics_kernel,
            (groups, blocks),
            rows.logits.device,
            *(*row_arguments, rows.scale, *tables, drop_counts, result.grad, result.row_loss),
            *(result.statistics, n),
            ROWS=_STATISTICS_ROWS,
            **constants,
        )
    else:
        launch(
            rows_kernel,
            (n, blocks),
            rows.logits.device,
            *(*row_arguments, upstream, rows.scale, *tables, drop_counts, result.grad, result.row_loss),
            CHUNKS=chunks,
            **constants,
        )
    return result


def bernoulli_loss(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op of this name."""
    a = BernoulliArguments(*arguments[:-2])
    compute_grad, compute_statistics = arguments[-2:]
    result = _run("bernoulli_loss", a, None, True, compute_grad, compute_statistics)
    assert result.row_loss is not None
    none = a.logits.new_empty((0,))
    if result.statistics is None:
        statistics = none.new_empty((0,), dtype=torch.float64)
    else:
        statistics = result.statistics.sum(0, dtype=torch.float64)
    return reduce_rows(result.row_loss, a.reduction), none if result.grad is None else result.grad, statistics


def bernoulli_grad(grad_loss: Tensor, *arguments: Any) -> Tensor:
    """The op of this name."""
    grad = _run(
        "bernoulli_grad", BernoulliArguments(*arguments), grad_loss.contiguous(), False, True, False
    ).grad
    assert grad is not None
    return grad
