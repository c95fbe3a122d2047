"""The links of the Bernoulli family; the formulas and their sources stand in csrc/loss_math.h."""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
import triton.language as tl

from .math import (
    LN_2,
    LOG2_E,
    exp2,
    exp2_of_minus,
    log2,
    maximum,
    minimum,
    number,
    one_minus_exp2_over,
    reciprocal,
)

MAX_PRODUCT = 8
"""Factors of negative terms to multiply before a logarithm is taken: each is at least 2^-15."""

LOG2_LOG2_E = tl.constexpr(0.5287663729448977)
BCE_FLOOR = tl.constexpr(9.999999960041972e-13)  # ATen's floor under p(1-p): 1e-12 rounded to float32
NORMAL_DENSITY_0 = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
SQRT_HALF = tl.constexpr(0.7071067811865476)


@dataclass(frozen=True)
class Link:
    """A link and its options, a compile-time constant of a kernel."""

    kind: str  # "gumbel", "sigmoid" or "probit"
    temperature: float
    clip_min: float
    clip_max: float
    slope: str  # "zero_outside", "straight_through" or "released"

    @property
    def cuts_slope(self) -> bool:
        """Whether the slope is 0 outside the clip."""
        return self.slope != "straight_through"

    @property
    def rate(self) -> float:
        return -math.log2(math.e) / self.temperature

    @property
    def unit(self) -> float:
        """What negative's slopes are to be multiplied by."""
        return math.log(2) / self.temperature if self.kind == "gumbel" else 1.0

    @property
    def neutral(self) -> float:
        """A logit whose negative term is 0, loss and slope: it takes the place of what does not count."""
        return {"gumbel": -80.0 * self.temperature, "sigmoid": -math.inf, "probit": -1e4}[self.kind]

    @property
    def has_linear(self) -> bool:
        """Whether a negative's loss has a linear part. Gumbel's 1 - p can be the factor up to z/T = 10."""
        return self.kind != "gumbel" or self.clip_max / self.temperature > 10


@triton.jit
def clip(z, LINK: tl.constexpr):
    if LINK.kind == "sigmoid":
        return z
    else:
        low, high = number(LINK.clip_min, z.dtype), number(LINK.clip_max, z.dtype)
        return maximum(minimum(z, high), low)


@triton.jit
def negative(z, LINK: tl.constexpr):
    """(linear, factor, slope) of a clipped logit of target 0.

    loss = ln 2 (linear - log2 factor), without linear unless LINK.has_linear; d loss / d z = LINK.unit slope.
    """
    if LINK.kind == "gumbel":
        return gumbel_negative(z, LINK)
    elif LINK.kind == "sigmoid":
        w = exp2(tl.abs(z) * -LOG2_E)
        r = reciprocal(1.0 + w)
        return tl.maximum(z, 0.0) * LOG2_E, r, tl.where(z < 0.0, w, 1.0) * r
    else:
        return normal_upper(z)


@triton.jit
def positive(z, LINK: tl.constexpr):
    """(loss, d loss / d z) of a clipped logit of target 1."""
    if LINK.kind == "gumbel":
        e2 = exp2(z * LINK.rate + LOG2_LOG2_E)
        slope = e2 * -LINK.unit
        if LINK.slope == "released":
            p = exp2_of_minus(e2)
            small = e2 < 0.5
            slope *= released(p, tl.where(small, one_minus_exp2_over(e2) * e2, 1.0 - p))
        return e2 * LN_2, slope
    else:
        linear, factor, slope = negative(-z, LINK)
        return (linear - log2(factor)) * LN_2, -slope


@triton.jit
def log2_probability(z, LINK: tl.constexpr):
    """log2 of a clipped logit's probability."""
    if LINK.kind == "gumbel":
        return -exp2(z * LINK.rate + LOG2_LOG2_E)
    else:
        linear, factor, _ = negative(-z, LINK)
        return log2(factor) - linear


@triton.jit
def released(p, q):
    """min(1, p(1-p)/1e-12): what autograd makes of the released code's slope."""
    return tl.minimum(p * q * (1.0 / BCE_FLOOR), 1.0)


@triton.jit
def gumbel_negative(z, LINK: tl.constexpr):
    log2_e2 = z * LINK.rate + LOG2_LOG2_E
    e2 = exp2(log2_e2)  # exp(-z/T) in base 2
    p = exp2_of_minus(e2)
    small = e2 < 0.5
    series = one_minus_exp2_over(e2)
    if LINK.has_linear:
        # 1 - p = e2 * series for a small e: its logarithm is known, and slope = p * e2 / (1 - p) loses e2.
        factor = tl.where(small, series, 1.0 - p)
        numerator = p * tl.where(small, 1.0, e2)
        q = tl.where(small, series * e2, factor)
        linear = tl.where(small, -log2_e2, 0.0)
    else:
        factor = tl.where(small, series * e2, 1.0 - p)
        numerator = p * e2
        q = factor
        linear = tl.zeros_like(z)
    if LINK.slope == "released":
        numerator *= released(p, q)
    return linear, factor, numerator * reciprocal(factor)


@triton.jit
def normal_upper(x):
    """``negative`` of the probit link: -log Phi(-x)."""
    half_square = x * x * 0.5
    r = scaled_normal_tail(tl.abs(x))
    g = exp2(half_square * -LOG2_E)
    is_tail = x > 0.0
    factor = tl.where(is_tail, r, 1.0 - g * r)
    linear = tl.where(is_tail, half_square * LOG2_E, 0.0)
    return linear, factor, tl.where(is_tail, 1.0, g) * NORMAL_DENSITY_0 * reciprocal(factor)


@triton.jit
def scaled_normal_tail(a):
    """erfcx(a / sqrt 2) / 2 for a >= 0: the smaller of Phi(a), Phi(-a) is exp(-a^2/2) times it."""
    if a.dtype == tl.float64:
        near = tl.exp(a * a * 0.5) * (1.0 - tl.math.erf(a * SQRT_HALF)) * 0.5
        # Laplace's continued fraction 1/(a + 1/(a + 2/(a + ...))), from the inside out.
        tail = a
        for k in tl.static_range(60):
            tail = a + (60 - k) / tail
        return tl.where(a < 2.5, near, NORMAL_DENSITY_0 / tail)
    else:
        t = reciprocal(a * 0.25 + 1.0)
        q = t * 0.0197820116914 - 0.0808773179738
        q = q * t + 0.0955970902208
        q = q * t - 0.0317175221847
        q = q * t + 0.0636991069001
        q = q * t + 0.0589751527492
        q = q * t + 0.0816031078805
        q = q * t + 0.0934663554622
        q = q * t + 0.0997364316014
        q = q * t + 0.0997355667234
        return q * t
