"""Random flip and multi-scale resize of an image with its target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torchvision.transforms.v2 import functional as F

Target = dict[str, Any]


class FlipAndResize:
    """Flip with a probability, then resize the short side to a size drawn from ``min_sizes``, the long side
    bounded.

    ``min_sizes`` is one size, a list, or a ``range(640, 801)``; every entry is equally likely. The aspect
    ratio is kept up to rounding to whole pixels: scale = min(min_size / short, max_size / long). All chance
    comes from the generator given with the call.
    """

    def __init__(self, min_sizes: int | Sequence[int], max_size: int, flip_probability: float = 0.0) -> None:
        self.min_sizes = (min_sizes,) if isinstance(min_sizes, int) else min_sizes
        self.max_size = max_size
        self.flip_probability = flip_probability
        if len(self.min_sizes) == 0 or min(self.min_sizes) < 1 or max_size < 1:
            raise ValueError(f"sizes must be positive, got min_sizes={min_sizes!r}, max_size={max_size}")
        if not 0 <= flip_probability <= 1:
            raise ValueError(f"the flip probability must lie in [0, 1], got {flip_probability}")

    def __call__(
        self, image: torch.Tensor, target: Target, rng: np.random.Generator
    ) -> tuple[torch.Tensor, Target]:
        """image: uint8 [3, H, W]; target as LvisDataset describes it."""
        flip = rng.random() < self.flip_probability
        short_side = int(self.min_sizes[int(rng.integers(len(self.min_sizes)))])
        if flip:
            image, target = _flip(image, target)
        height, width = resized_size(image.shape[-2], image.shape[-1], short_side, self.max_size)
        return _resize(image, target, height, width)


def resized_size(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """(height, width) with the short side scaled to ``min_size``, the long side at most ``max_size``."""
    scale = min(min_size / min(height, width), max_size / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _flip(image: torch.Tensor, target: Target) -> tuple[torch.Tensor, Target]:
    width = image.shape[-1]
    boxes = target["boxes"]
    mirrored = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
    return image.flip(-1), {
        **target,
        "boxes": mirrored,
        "masks": target["masks"].flip(width),
        "flipped": True,
    }


def _resize(image: torch.Tensor, target: Target, height: int, width: int) -> tuple[torch.Tensor, Target]:
    if (height, width) == tuple(image.shape[-2:]):
        return image, target
    sx, sy = width / image.shape[-1], height / image.shape[-2]
    image = F.resize(image, [height, width], antialias=True)
    return image, {
        **target,
        "boxes": target["boxes"] * torch.tensor([sx, sy, sx, sy]),
        "masks": target["masks"].scale(sx, sy),
        "scale": (sx, sy),
    }
