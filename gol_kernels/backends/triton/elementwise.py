"""What is done to each number alone: the Gumbel activation, and scaling a gradient in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops import loss_dtype
from .links import LOG2_LOG2_E, Link, clip
from .math import equal, exp2, exp2_of_minus
from .rows import cdiv, launch

_BLOCK = 1024
_SCALE_PROGRAMS = 1024  # each goes through many blocks: where the scale is 1 they only have to end


@triton.jit
def activation_block(logits, upstream, output, offsets, mask, LINK: tl.constexpr, W: tl.constexpr):
    z = tl.load(logits + offsets, mask).to(W)
    clipped = clip(z, LINK)
    e2 = exp2(clipped * LINK.rate + LOG2_LOG2_E)  # exp(-z/T) in base 2
    value = exp2_of_minus(e2)
    if upstream is not None:
        value *= e2 * LINK.unit * tl.load(upstream + offsets, mask).to(W)
        if LINK.cuts_slope:
            value *= equal(clipped, z)
    tl.store(output + offsets, value, mask)


@triton.jit(do_not_specialize=["numel"])
def activation_kernel(
    logits, upstream, output, numel, LINK: tl.constexpr, BLOCK: tl.constexpr, W: tl.constexpr
):
    """output = p, or upstream * dp/dz."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # A mask that depends on a number of run time would make the loads scalar: only the last block has one.
    if (tl.program_id(0) + 1).to(tl.int64) * BLOCK <= numel:
        activation_block(logits, upstream, output, offsets, None, LINK, W)
    else:
        activation_block(logits, upstream, output, offsets, offsets < numel, LINK, W)


@triton.jit
def scale_block(
    grad, offsets, mask, first, second, SPLIT: tl.constexpr, COLUMNS: tl.constexpr, W: tl.constexpr
):
    factor = first
    if SPLIT < COLUMNS:
        factor = tl.where(offsets % COLUMNS < SPLIT, first, second)
    tl.store(grad + offsets, tl.load(grad + offsets, mask).to(W) * factor, mask)


@triton.jit(do_not_specialize=["numel"])
def scale_kernel(
    grad,
    first,
    second,
    numel,
    SPLIT: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    W: tl.constexpr,
):
    a, b = tl.load(first).to(W), tl.load(second).to(W)
    if (a != 1) | (b != 1):
        whole = (numel // BLOCK) * BLOCK
        start = tl.program_id(0).to(tl.int64) * BLOCK
        while start < whole:
            scale_block(grad, start + tl.arange(0, BLOCK), None, a, b, SPLIT, COLUMNS, W)
            start += tl.num_programs(0).to(tl.int64) * BLOCK
        if tl.program_id(0) == 0:
            offsets = whole + tl.arange(0, BLOCK)
            scale_block(grad, offsets, offsets < numel, a, b, SPLIT, COLUMNS, W)


# --- on the host ---------------------------------------------------------------------------------
def _number(tensor: Tensor) -> tl.dtype:
    return tl.float64 if loss_dtype(tensor) == torch.float64 else tl.float32


def _activation(
    logits: Tensor, upstream: Tensor | None, temperature: float, clip_min: float, clip_max: float
) -> Tensor:
    z = logits.contiguous()
    output = torch.empty_like(z)
    launch(
        activation_kernel,
        (cdiv(z.numel(), _BLOCK),),
        z.device,
        *(z, None if upstream is None else upstream.contiguous(), output, z.numel()),
        LINK=Link("gumbel", temperature, clip_min, clip_max, "zero_outside"),
        BLOCK=_BLOCK,
        W=_number(z),
    )
    return output


def gumbel_activation(logits: Tensor, temperature: float, clip_min: float, clip_max: float) -> Tensor:
    """The op of this name."""
    return _activation(logits, None, temperature, clip_min, clip_max)


def gumbel_activation_grad(
    grad_output: Tensor, logits: Tensor, temperature: float, clip_min: float, clip_max: float
) -> Tensor:
    """The op of this name."""
    return _activation(logits, grad_output, temperature, clip_min, clip_max)


def scale_grad_(grad: Tensor, first: Tensor, second: Tensor, split: int) -> None:
    """The op of this name. Raises: ValueError where grad is not contiguous."""
    if grad.dim() != 2 or not grad.is_contiguous():
        raise ValueError(f"scale_grad_: a contiguous [N, K] is expected, got strides {grad.stride()}")
    launch(
        scale_kernel,
        (min(_SCALE_PROGRAMS, cdiv(grad.numel(), _BLOCK)),),
        grad.device,
        *(grad, first, second, grad.numel()),
        SPLIT=split,
        COLUMNS=grad.shape[1],
        BLOCK=_BLOCK,
        W=_number(grad),
    )
