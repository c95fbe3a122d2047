"""Where the objects of a class lie in the image: true and predicted distributions, and how far they are
apart.

Gumbel Optimized Loss (ECCV 2022, figures 2, 5 and 8) compares distributions of object locations over the
image scaled to [0, 1]^2. Here an object lies wherever its box is: to each cell of a G x G grid it adds the
share of the cell that the box covers, so a map divided by the number of images is the expected number of
objects of the class over a point of the cell. Boxes and not their centres, because a detector classifies all
that a box covers, and because the few centres of a rare class leave nearly all cells empty: their divergence
would measure the smoothing. A detection counts as much as its score.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from detector.data.annotations import LvisAnnotations
from detector.evaluation import iterate_results

CHUNK = 1 << 16  # detections taken at a time

Maps = NDArray[np.float64]  # [C, G, G]: class, row (from the top), column


@dataclass(frozen=True)
class Divergences:
    """KL(truth || predicted) of one run, in nats; NaN where one of the two has no objects."""

    per_class: NDArray[np.float64]  # [C]
    mean: dict[str, float]  # by group, over its classes in `compared`
    pooled: dict[str, float]  # by group, of the sums over its classes
    undetected: dict[str, int]  # by group, classes with objects and without any detection


def axis_coverage(low: NDArray[np.float64], high: NDArray[np.float64], grid: int) -> NDArray[np.float64]:
    """[M, grid]: the share of each of `grid` equal parts of [0, 1] that low..high ([M] each) covers."""
    edges = np.arange(grid + 1) / grid
    overlap = np.minimum(high[:, None], edges[1:]) - np.maximum(low[:, None], edges[:-1])
    return grid * np.maximum(overlap, 0.0)


def add_coverage(
    maps: Maps, labels: NDArray[np.int64], boxes: NDArray[np.float64], weights: NDArray[np.float64]
) -> None:
    """Adds to maps[label] the shares of the cells that the boxes cover, times their weights.

    labels [M] in 0..C-1; boxes [M, 4], xyxy in shares of the image's sides, what is outside of it adds
    nothing; weights [M]. A box's coverage is a product of its coverages along both axes, so a class is one
    matrix product.
    """
    grid = maps.shape[-1]
    order = np.argsort(labels, kind="stable")
    ends = np.cumsum(np.bincount(labels, minlength=len(maps)))
    for label in np.unique(labels):
        rows = order[ends[label - 1] if label else 0 : ends[label]]
        x0, y0, x1, y1 = boxes[rows].T
        vertical = axis_coverage(y0, y1, grid) * weights[rows, None]
        maps[label] += vertical.T @ axis_coverage(x0, x1, grid)


def true_maps(annotations: LvisAnnotations, grid: int) -> Maps:
    """The maps [C, grid, grid] of all annotated objects; crowd regions do not count."""
    maps = np.zeros((annotations.num_classes, grid, grid))
    _, labels, boxes = annotations.object_boxes()
    for start in range(0, len(labels), CHUNK):
        part = slice(start, start + CHUNK)
        add_coverage(maps, labels[part], boxes[part], np.ones(len(labels[part])))
    return maps


def predicted_maps(annotations: LvisAnnotations, results: Path, grid: int) -> Maps:
    """The maps [C, grid, grid] of a LVIS results file.

    As in the LVIS protocol a detection counts only where the image is known to hold its class or to be free
    of it (Gupta et al. 2019, section 5): elsewhere nobody knows whether it is right.

    Raises ValueError, naming the file and the detection: not a results file, or not of these annotations;
    OSError.
    """
    maps = np.zeros((annotations.num_classes, grid, grid))
    scales, judged = annotations.box_scales(), annotations.judged_pairs()
    for images, labels, boxes, scores in _chunks(annotations, results):
        if judged is None:
            kept = np.ones(len(labels), dtype=bool)
        else:
            kept = np.isin(images * annotations.num_classes + labels, judged)
        add_coverage(maps, labels[kept], (boxes / scales[images])[kept], scores[kept])
    return maps


def _chunks(annotations: LvisAnnotations, results: Path) -> Iterator[tuple[NDArray, ...]]:
    """Image index, label, box in pixels (xyxy) and score of up to CHUNK detections at a time."""
    image_of = {int(image_id): index for index, image_id in enumerate(annotations.image_ids)}
    label_of = {int(category_id): label for label, category_id in enumerate(annotations.category_ids)}
    places: list[tuple[int, int]] = []
    numbers: list[list[float]] = []

    def columns() -> tuple[NDArray, ...]:
        images, labels = np.array(places, dtype=np.int64).reshape(-1, 2).T
        boxes, scores = np.split(np.array(numbers, dtype=np.float64).reshape(-1, 5), [4], axis=1)
        boxes[:, 2:] += boxes[:, :2]
        return images, labels, boxes, scores[:, 0]

    for number, record in enumerate(iterate_results(results)):
        for key, known in (("image_id", image_of), ("category_id", label_of)):
            if record[key] not in known:
                raise ValueError(
                    f"{results}: detection {number} has the {key} {record[key]}, which the annotations lack"
                )
        row = [*record.get("bbox", ()), record["score"]]
        if len(row) != 5 or not math.isfinite(sum(row)) or min(row[2:]) < 0:
            raise ValueError(
                f"{results}: detection {number} needs a finite bbox [x, y, w, h] and a score, got {row}"
            )
        places.append((image_of[record["image_id"]], label_of[record["category_id"]]))
        numbers.append(row)
        if len(places) == CHUNK:
            yield columns()
            places.clear()
            numbers.clear()
    yield columns()


def distributions(maps: Maps, smoothing: float = 0.0) -> Maps:
    """The maps divided by their sums; NaN where a map is empty.

    smoothing: share of the uniform distribution that is mixed in, P' = (1 - s) P + s / G^2.
    """
    total = maps.sum(axis=(-2, -1), keepdims=True)
    with np.errstate(invalid="ignore"):
        return (1 - smoothing) * (maps / total) + smoothing / (maps.shape[-1] * maps.shape[-2])


def kl_divergence(truth: Maps, predicted: Maps, smoothing: float) -> NDArray[np.float64]:
    """KL(P || Q) = sum_u P(u) ln(P(u) / Q(u)) of the distributions of two stacks of maps [..., G, G], in
    nats.

    Both are smoothed alike (see `distributions`), so equal maps have 0 and none exceeds ln(G^2 / smoothing);
    a share rather than a count per cell, since scores of different activations have different sizes. NaN
    where either map is empty.
    """
    p, q = distributions(truth, smoothing), distributions(predicted, smoothing)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * np.log(p / q), p)  # 0 ln 0 = 0, and NaN stays NaN
    return terms.sum(axis=(-2, -1))


def compare(
    truth: Maps, predicted: Mapping[str, Maps], frequency: Sequence[str], smoothing: float
) -> tuple[dict[str, Divergences], NDArray[np.bool_]]:
    """The divergences of every run, and which classes ([C]) the groups' means are over.

    Those are the classes that have objects and that every run has detected: a mean over other classes for
    each run would not compare the runs. frequency: group of each class.
    """
    groups = {group: np.array([name == group for name in frequency]) for group in dict.fromkeys(frequency)}
    per_class = {run: kl_divergence(truth, maps, smoothing) for run, maps in predicted.items()}
    compared = np.all([np.isfinite(values) for values in per_class.values()], axis=0)
    there = truth.any(axis=(-2, -1))
    found = {}
    for run, maps in predicted.items():
        means = {
            group: float(per_class[run][members & compared].mean())
            if (members & compared).any()
            else math.nan
            for group, members in groups.items()
        }
        pooled = {
            group: float(kl_divergence(truth[members].sum(axis=0), maps[members].sum(axis=0), smoothing))
            for group, members in groups.items()
        }
        missed = there & ~maps.any(axis=(-2, -1))
        undetected = {group: int((missed & members).sum()) for group, members in groups.items()}
        found[run] = Divergences(per_class[run], means, pooled, undetected)
    return found, compared
