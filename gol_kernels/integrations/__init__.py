"""The losses in other people's detectors, and their label conventions.

gol_kernels has background last: foreground 0..C-1, background C, as Detectron2 and MMDetection. torchvision
and MMDetection 1.x have it first: background 0, foreground 1..C.
"""

from __future__ import annotations

from torch import Tensor


def background_last(labels: Tensor, num_classes: int) -> Tensor:
    """0 -> C and k -> k-1: labels with background first, as gol_kernels wants them.

    Negative labels (ignored rows) stay. Args: labels integer, any shape; num_classes C.
    """
    moved = (labels - 1).masked_fill(labels == 0, num_classes)
    return moved.where(labels >= 0, labels)


def background_first(labels: Tensor, num_classes: int) -> Tensor:
    """C -> 0 and k -> k+1: the inverse of ``background_last``."""
    moved = (labels + 1).masked_fill(labels == num_classes, 0)
    return moved.where(labels >= 0, labels)
