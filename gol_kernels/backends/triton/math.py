"""Numbers in a kernel: float32 by the GPU's own approximate instructions, float64 by precise functions.

Work is done in base 2, where an exponential is one exp2 and a logarithm one log2. W is the dtype worked in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# tl.exp2 and its like rescale subnormal numbers, which costs instructions; the .ftz instructions do not.
# Another vendor's GPU and the interpreter take tl's.
PTX = tl.constexpr(not triton.knobs.runtime.interpret and torch.version.hip is None)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def number(value, W: tl.constexpr):
    """A constant or a scalar as a number of dtype W, without a detour through float32."""
    return tl.full((), value, W)


@triton.jit
def append(items, item):
    """A tuple and one more."""
    return items + (item,)  # noqa: RUF005 - a kernel has no starred expressions


@triton.jit
def exp2(x):
    if PTX and x.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def exp2_of_minus(x):
    """2^-x. The instruction can negate its operand; Triton's own minus would be another instruction."""
    if PTX and x.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; neg.f32 t, $1; ex2.approx.ftz.f32 $0, t; }",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.exp2(-x)


@triton.jit
def log2(x):
    if PTX and x.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def reciprocal(x):
    if PTX and x.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def equal(a, b):
    """1 where a == b, else 0. LLVM gathers a row's comparisons in bit fields; set.eq it leaves alone."""
    if PTX and a.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            "set.eq.f32.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.where(a == b, number(1.0, a.dtype), number(0.0, a.dtype))


@triton.jit
def log1p(x):
    """Kahan's form: the rounding error of u = 1 + x is in both log u and u - 1."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))


@triton.jit
def minimum(a, b):
    """NaN where either is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def maximum(a, b):
    """NaN where either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def one_minus_exp2_over(x):
    """(1 - 2^-x) / x for 0 <= x < 1/2, where the direct difference would lose digits.

    float32: minimax polynomial, relative error 1.3e-8. float64: the rounding error of u = 2^-x is in both
    1 - u and log2 u.
    """
    if x.dtype == tl.float64:
        u = exp2(-x)
        is_one = u == 1.0
        return tl.where(is_one, number(LN_2, x.dtype), (u - 1.0) / tl.where(is_one, 1.0, log2(u)))
    else:
        p = x * 1.154452266e-3 - 9.541281076e-3
        p = p * x + 5.549040644e-2
        p = p * x - 2.402256428e-1
        return p * x + 6.931471717e-1
