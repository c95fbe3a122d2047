"""Layers and initialisations that go with the losses."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def gumbel_prior_bias(num_classes: int) -> float:
    """-ln ln(1+C): the bias at which one positive and C negatives balance (Gumbel Optimized Loss, eq. 11-12).

    e = C e / expm1(e) gives e = ln(1+C); -1.959 for LVIS's 1203 classes, where the paper takes -2.
    """
    return -math.log(math.log1p(num_classes))


def sigmoid_prior_bias(prior: float) -> float:
    """-ln((1-p)/p): the bias at which a sigmoid starts at probability ``prior``."""
    return -math.log((1 - prior) / prior)


def _normalized(x: Tensor, dims: tuple[int, ...], power: float, eps: float) -> Tensor:
    """x / (||x||^power + eps) over ``dims``, in float32: a float16 sum of squares overflows.

    A vector that is exactly zero (a feature after ReLU) is constant here: its derivative would be 1/eps.
    """
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True)
    alive = norm > 0
    x = torch.where(alive, x, x.detach())
    return x / (torch.where(alive, norm, torch.ones_like(norm)) ** power * alive + eps)


class NormedLinear(nn.Linear):
    """Cosine classifier (Seesaw Loss, section 3.3): T * x/(||x||^p + eps) . w/(||w||^p + eps) + b.

    Input [..., in_features], output [..., out_features] in the input's dtype. The bias is not scaled.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        temperature: float = 20.0,
        power: float = 1.0,
        eps: float = 1e-6,
        bias: bool = True,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.temperature, self.power, self.eps = temperature, power, eps
        nn.init.normal_(self.weight, std=0.01)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        weight = _normalized(self.weight, (1,), self.power, self.eps)
        x = _normalized(input, (-1,), self.power, self.eps) * self.temperature
        dtype = input.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), weight.to(dtype), bias)


class NormedConv2d(nn.Conv2d):
    """Cosine convolution (Seesaw Loss, section 3.3; GOL's mask predictor).

    The input [N, C, H, W] is normalised over channels at each pixel, the weight over input channels at
    each tap, or over the whole kernel with ``norm_over_kernel``; for a 1x1 kernel both are the same.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        temperature: float = 20.0,
        power: float = 1.0,
        eps: float = 1e-6,
        norm_over_kernel: bool = False,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        self.temperature, self.power, self.eps = temperature, power, eps
        self.norm_over_kernel = norm_over_kernel
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        dims = (1, 2, 3) if self.norm_over_kernel else (1,)
        weight = _normalized(self.weight, dims, self.power, self.eps)
        x = _normalized(input, (1,), self.power, self.eps) * self.temperature
        dtype = input.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.conv2d(x.to(dtype), weight.to(dtype), bias, self.stride, self.padding)
