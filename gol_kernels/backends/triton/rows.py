"""What every loss does for a row before its columns: label, weight, factor; and the prologue that counts."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops import RowArguments, loss_dtype
from ..reference import check_labels
from .math import LOG2_E, append, number

_BLOCK = 1024  # labels, or classes, that a program of the prologue takes at once
_PARTS = 32  # programs of the prologue, and so many partial counts does a row add up
PARTS = tl.constexpr(_PARTS)


@dataclass(frozen=True)
class Layout:
    """Shape, strides and options of the rows, a compile-time constant of a kernel."""

    columns: int  # that a kernel goes through
    num_classes: int
    ignore_index: int
    row_stride: int
    grad_stride: int
    vector: int  # columns that one load or store may take: every row begins at a multiple of their size
    label_stride: int
    weight_stride: int = 0
    upstream_stride: int = 0  # of the loss's gradient; 0: one number for all rows
    average: str = ""  # what the denominator points to: "counts", "avg_factor", or nothing


# --- in a kernel ---------------------------------------------------------------------------------
@triton.jit
def row_of(row, labels, row_weights, denominator, scale, LAYOUT: tl.constexpr, W: tl.constexpr):
    """(label, legal, weight, factor) of a row, whose loss is multiplied by weight * factor.

    A row that is ignored is legal and has weight 0. label is 0 for a row that is ignored or illegal.
    """
    label = tl.load(labels + row * LAYOUT.label_stride).to(tl.int64)
    ignored = label == LAYOUT.ignore_index
    legal = (label >= 0) & (label <= LAYOUT.num_classes)
    exists = legal & (label != LAYOUT.ignore_index)
    weight = number(1.0, W)
    if row_weights is not None:
        weight = tl.load(row_weights + row * LAYOUT.weight_stride).to(W)
    factor = number(scale, W)
    if LAYOUT.average == "counts":
        factor = over(factor, total(denominator, 0).to(W))
    elif LAYOUT.average == "avg_factor":
        factor = over(factor, tl.load(denominator).to(W))
    weight = tl.where(exists, weight, number(0.0, W))
    return tl.where(exists, label, 0).to(tl.int32), legal | ignored, weight, factor


@triton.jit
def scale_of(row, legal, weight, factor, upstream, LAYOUT: tl.constexpr):
    """What the row's loss, or with ``upstream`` its gradient, is multiplied by: NaN for an illegal row."""
    scale = tl.where(legal, weight * factor, number(float("nan"), factor.dtype))
    if upstream is not None:
        scale *= tl.load(upstream + row * LAYOUT.upstream_stride).to(factor.dtype)
    return scale


@triton.jit
def load_row(
    logits, row, start, LAYOUT: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, OTHER: tl.constexpr
):
    """All loads of a row's chunks, before anything waits for one of them; OTHER past the last column."""
    zs = ()
    for k in tl.static_range(CHUNKS):
        columns = start + k * CHUNK + tl.arange(0, CHUNK)
        z = tl.load(logits + row * LAYOUT.row_stride + columns, columns < LAYOUT.columns, OTHER)
        zs = append(zs, z)
    return zs


@triton.jit
def fill_row(grad, row, start, value, LAYOUT: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """The gradient of a row that does not exist or has no meaning, whatever its logits hold."""
    for k in tl.range(CHUNKS, loop_unroll_factor=1):
        columns = start + k * CHUNK + tl.arange(0, CHUNK)
        values = tl.zeros([CHUNK], value.dtype) + value
        tl.store(grad + row * LAYOUT.grad_stride + columns, values, columns < LAYOUT.columns)


@triton.jit
def table_at(table, columns, LAYOUT: tl.constexpr):
    """Pointers to a class table's columns, which look no better aligned than the rows are.

    Loads of another width than the gradient's stores would be rearranged through shared memory. The third
    index of a program is 0, which the compiler does not know.
    """
    return table + (columns + tl.program_id(2) * LAYOUT.vector)


@triton.jit
def over(factor, denominator):
    """factor / denominator; there is nothing to average over where that is 0."""
    return factor / tl.where(denominator == 0, number(1.0, factor.dtype), denominator)


@triton.jit
def total(counts, kind: tl.constexpr):
    """A count of the prologue: rows that are not ignored (0), rare (1) and all (2) foreground labels."""
    return tl.sum(tl.load(counts + kind * PARTS + tl.arange(0, PARTS)), 0)


@triton.jit(do_not_specialize=["num_rows"])
def prologue(
    labels,
    rare,
    counts,
    class_counts,
    log_powers,
    num_rows,
    p: tl.float64,
    NUM_POWERS: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """counts int32 [1 or 3, PARTS]: each program's share of ``total``. log_powers [C] = p log2 max(n, 1)."""
    part = tl.program_id(0)
    if counts is not None:
        counted = tl.zeros([BLOCK], tl.int32)
        num_rare = tl.zeros([BLOCK], tl.int32)
        foreground = tl.zeros([BLOCK], tl.int32)
        start = part * BLOCK
        while start < num_rows:
            rows = start + tl.arange(0, BLOCK)
            label = tl.load(labels + rows.to(tl.int64) * LAYOUT.label_stride, rows < num_rows, 0).to(tl.int64)
            exists = (rows < num_rows) & (label != LAYOUT.ignore_index)
            counted += exists.to(tl.int32)
            if rare is not None:
                is_class = exists & (label >= 0) & (label < LAYOUT.columns)
                foreground += is_class.to(tl.int32)
                num_rare += tl.load(rare + label, is_class, 0).to(tl.int32)
            start += PARTS * BLOCK
        tl.store(counts + part, tl.sum(counted, 0))
        if rare is not None:
            tl.store(counts + PARTS + part, tl.sum(num_rare, 0))
            tl.store(counts + 2 * PARTS + part, tl.sum(foreground, 0))
    if log_powers is not None:
        start = part * BLOCK
        while start < NUM_POWERS:
            classes = start + tl.arange(0, BLOCK)
            n = tl.load(class_counts + classes, classes < NUM_POWERS, 1).to(tl.float64)
            log2_n = tl.log(tl.maximum(n, number(1.0, tl.float64))) * LOG2_E
            tl.store(log_powers + classes, log2_n * number(p, tl.float64), classes < NUM_POWERS)
            start += PARTS * BLOCK


@triton.jit(do_not_specialize=["num_rows"])
def count_labels(labels, counts, num_rows, LAYOUT: tl.constexpr, BLOCK: tl.constexpr):
    """Adds the labels to counts int64 [C+1]: integers, so that their order does not matter."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels + rows.to(tl.int64) * LAYOUT.label_stride, rows < num_rows, -1).to(tl.int64)
    counted = (label >= 0) & (label <= LAYOUT.num_classes) & (label != LAYOUT.ignore_index)
    tl.atomic_add(counts + label, tl.full([BLOCK], 1, tl.int64), counted & (rows < num_rows))


# --- on the host ---------------------------------------------------------------------------------
class Rows(NamedTuple):
    """The arguments that every row kernel takes."""

    logits: Tensor  # [N, K], dense in the last dimension
    labels: Tensor
    row_weights: Tensor | None
    denominator: Tensor | None  # avg_factor or counts, as layout.average says
    scale: float
    counts: Tensor | None  # int32 [1 or 3, PARTS]
    log_powers: Tensor | None  # [C] in the working dtype
    layout: Layout


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **constants: Any
) -> None:
    """Runs a kernel on the tensors' device; an empty grid is nothing to run."""
    if 0 in grid:
        return
    guard: AbstractContextManager[Any] = nullcontext()
    if device.type == "cuda":
        guard = torch.cuda.device(device)
    with guard:
        kernel[grid](*arguments, **constants)


def prepare(
    op: str,
    a: RowArguments,
    upstream: Tensor | None = None,
    rare: Tensor | None = None,
    class_counts: Tensor | None = None,
    p: float = 0.0,
) -> Rows:
    """Checks a loss's rows and runs the prologue where something of it is needed.

    Args:
        upstream: the gradient of the loss, 0-d or dense [N], where it is known.
        rare: bool [K], to count DropLoss's rare labels; class_counts [C]: to make n^p of.

    Raises:
        ValueError: shapes that do not fit, an illegal label (where asked to validate).
    """
    n, columns = _check_rows(op, a)
    if upstream is not None and tuple(upstream.shape) not in ((), (n,)):
        raise ValueError(f"{op}: the upstream gradient must be 0-d or [{n}], got {list(upstream.shape)}")
    logits = a.logits if a.logits.stride(1) == 1 else a.logits.contiguous()
    counts_rows = a.reduction == "mean" and a.avg_factor is None
    layout = Layout(
        columns=columns,
        num_classes=a.num_classes,
        ignore_index=a.ignore_index,
        row_stride=logits.stride(0),
        grad_stride=columns,
        vector=_vector(logits),
        label_stride=a.labels.stride(0),
        weight_stride=0 if a.row_weights is None else a.row_weights.stride(0),
        upstream_stride=0 if upstream is None else upstream.dim(),
        average="" if a.reduction != "mean" else "counts" if counts_rows else "avg_factor",
    )
    device = logits.device
    counts = log_powers = None
    if counts_rows or rare is not None:
        counts = torch.empty((1 if rare is None else 3, _PARTS), dtype=torch.int32, device=device)
    if class_counts is not None:
        log_powers = torch.empty(class_counts.shape, dtype=loss_dtype(logits), device=device)
    if n > 0 and (counts is not None or log_powers is not None):
        launch(
            prologue,
            (_PARTS,),
            device,
            a.labels,
            rare,
            counts,
            class_counts,
            log_powers,
            n,
            max(p, 0.0),
            NUM_POWERS=0 if class_counts is None else class_counts.shape[0],
            LAYOUT=layout,
            BLOCK=_BLOCK,
        )
    denominator = counts if counts_rows else a.avg_factor if a.reduction == "mean" else None
    return Rows(logits, a.labels, a.row_weights, denominator, a.scale, counts, log_powers, layout)


def _vector(logits: Tensor) -> int:
    """The columns that 16 bytes hold, or fewer where rows begin in between."""
    if logits.data_ptr() % 16 != 0:
        return 1
    return math.gcd(logits.stride(0), logits.shape[1], 16 // logits.element_size())


def _check_rows(op: str, a: RowArguments) -> tuple[int, int]:
    if a.logits.dim() != 2:
        raise ValueError(f"{op}: logits must be [N, K], got {list(a.logits.shape)}")
    n, columns = a.logits.shape
    for name, tensor in (("labels", a.labels), ("row_weights", a.row_weights)):
        if tensor is not None and tuple(tensor.shape) != (n,):
            raise ValueError(f"{op}: {name} must be [{n}] like the rows of logits, got {list(tensor.shape)}")
    if not 0 <= a.num_classes <= columns:
        raise ValueError(
            f"{op}: num_classes must lie in [0, {columns}], the columns of logits, got {a.num_classes}"
        )
    if a.validate:
        check_labels(op, a.labels, a.num_classes, a.ignore_index)
    return n, columns


class ColumnsPlan(NamedTuple):
    """How a row is cut: chunks of ``chunk`` columns, ``chunks`` of them in a program of one warp."""

    chunk: int
    chunks: int
    number: tl.dtype  # that is worked in


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; triton.cdiv is made for kernels and slow on the host."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << (n - 1).bit_length()


def columns_plan(columns: int, dtype: torch.dtype, most_chunks: int) -> ColumnsPlan:
    """Of a chunk each thread of a warp has eight columns, of float64 four."""
    widest = 256 if dtype == torch.float32 else 128
    chunk = min(widest, max(32, power_of_2(columns)))
    total_chunks = cdiv(columns, chunk)
    blocks = cdiv(total_chunks, most_chunks)
    number_type = tl.float32 if dtype == torch.float32 else tl.float64
    return ColumnsPlan(chunk, cdiv(total_chunks, blocks), number_type)


def dense_bytes(table: Tensor) -> Tensor:
    """A table dense, and bool as bytes."""
    return (table.view(torch.uint8) if table.dtype == torch.bool else table).contiguous()


def reduce_rows(row_loss: Tensor, reduction: str) -> Tensor:
    """[blocks, N] -> 0-d, or [N] for "none". torch adds in the same order in every run."""
    if reduction != "none":
        return row_loss.sum()
    return row_loss[0] if row_loss.shape[0] == 1 else row_loss.sum(0)


def label_counts(labels: Tensor, num_classes: int, ignore_index: int, validate: bool) -> Tensor:
    """The op of this name."""
    if validate:
        check_labels("label_counts", labels, num_classes, ignore_index)
    counts = torch.zeros(num_classes + 1, dtype=torch.int64, device=labels.device)
    layout = Layout(0, num_classes, ignore_index, 0, 0, 1, labels.stride(0))
    n = labels.shape[0]
    launch(count_labels, (cdiv(n, _BLOCK),), labels.device, labels, counts, n, LAYOUT=layout, BLOCK=_BLOCK)
    return counts
