"""Lengths of the classifier's weights against how often a class is seen (Gumbel Optimized Loss, figure 1 ii).

A classifier trained on a long tail gives frequent classes longer weights, and with them higher scores.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

CLASSIFIER = re.compile(r"roi_heads\.stages\.(\d+)\.box_predictor\.classifier\.weight")


@dataclass(frozen=True)
class WeightNorms:
    """L2 norm of every foreground class's classifier row, float64 [C], in one stage (from 1)."""

    stage: int
    norms: NDArray[np.float64]


def classifier_norms(weights: Mapping[str, Tensor], num_classes: int) -> list[WeightNorms]:
    """The norms in each stage of a detector's state dict; rows past the classes (background, objectness) are
    left out. Of a cosine classifier these are the raw lengths, which it divides by.

    Raises ValueError where there is no classifier of so many classes.
    """
    stages = {
        int(found[1]): tensor for key, tensor in weights.items() if (found := CLASSIFIER.fullmatch(key))
    }
    if not stages or any(tensor.dim() != 2 or len(tensor) < num_classes for tensor in stages.values()):
        raise ValueError(f"the checkpoint holds no box classifier of {num_classes} classes")
    return [
        WeightNorms(stage + 1, tensor[:num_classes].double().norm(dim=1).numpy())
        for stage, tensor in sorted(stages.items())
    ]


def pearson(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Pearson's correlation of two [n]; NaN where one of them does not vary."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def spearman(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Spearman's correlation: Pearson's of the ranks, where equal values share the mean of their ranks."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
