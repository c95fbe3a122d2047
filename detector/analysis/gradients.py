"""How strongly positives pull each class's logit over training (Gumbel Optimized Loss, figure 7)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class GradientHistory:
    """What a run's gradients.jsonl holds of one stage (from 1): sums from step 0 up to each of S steps.

    steps int64 [S] ascending; positives int64 [S, C], RoIs with the class as label; positive_gradient float64
    [S, C], the sum of |d loss / d z| over them, where the loss of a RoI is not yet divided by their number.
    """

    stage: int
    steps: NDArray[np.int64]
    positives: NDArray[np.int64]
    positive_gradient: NDArray[np.float64]

    def mean_in_intervals(self) -> NDArray[np.float64]:
        """[S, C]: mean |d loss / d z| of the positives since the step before; NaN without any."""
        return _ratio(
            np.diff(self.positive_gradient, axis=0, prepend=0), np.diff(self.positives, axis=0, prepend=0)
        )

    def mean_so_far(self) -> NDArray[np.float64]:
        """[C]: mean over all of training, ClassStats.mean_positive_gradient at its end; NaN without any."""
        return _ratio(self.positive_gradient[-1], self.positives[-1])


def _ratio(sums: NDArray[np.float64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def read_gradients(path: Path, num_classes: int) -> list[GradientHistory]:
    """The history of each stage; a line that a kill has cut off is passed over.

    Raises ValueError, naming the file: no row, a line that is none, or another number of classes; OSError.
    """
    rows: dict[int, dict[int, tuple[list[int], list[float]]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        try:
            stage, step = row["stage"], row["step"]
            counts, sums = row["label_counts"][:-1], row["positive_gradient"]
        except (KeyError, TypeError):
            raise ValueError(f"{path}: a line is no row of gradients: {line[:80]}") from None
        if len(counts) != num_classes or len(sums) != num_classes:
            raise ValueError(f"{path}: step {step} has {len(sums)} classes, the run has {num_classes}")
        rows.setdefault(stage, {})[step] = counts, sums
    if not rows:
        raise ValueError(f"{path} holds no row yet")
    return [_history(stage, rows[stage]) for stage in sorted(rows)]


def _history(stage: int, rows: dict[int, tuple[list[int], list[float]]]) -> GradientHistory:
    steps = sorted(rows)
    return GradientHistory(
        stage,
        np.array(steps, dtype=np.int64),
        np.array([rows[step][0] for step in steps], dtype=np.int64),
        np.array([rows[step][1] for step in steps], dtype=np.float64),
    )


def mean_of_group(means: NDArray[np.float64], members: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Mean over a group's classes ([C] bool) of [..., C], each class counting alike, NaN left out."""
    part = means[..., members]
    known = np.isfinite(part)
    return _ratio(np.where(known, part, 0.0).sum(axis=-1), known.sum(axis=-1))
