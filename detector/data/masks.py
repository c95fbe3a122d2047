"""Instance masks kept as polygons or run lengths, rasterised only inside the boxes that ask for it.

Pixel convention, the one of COCO: coordinates are continuous, pixel (column i, row j) is the unit square [i,
i+1) x [j, j+1), and its centre is (i + 0.5, j + 0.5). A cell of any grid is 1 exactly if its *centre* lies
inside the mask: inside an odd number of turns of some polygon, or in a set pixel of a run-length mask. A
rectangle with integer corners therefore covers exactly its pixels, flips and scalings are exact, and no
image-sized mask is ever made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pycocotools import mask as mask_utils

Segmentation = Sequence[Any] | dict[str, Any]


def rle_counts(counts: bytes | str | Sequence[int], height: int, width: int) -> np.ndarray:
    """Run lengths int64 [n] of a COCO RLE, column-major, beginning with zeros.

    ``counts`` is the list of an uncompressed RLE or the string of a compressed one: little-endian groups of
    five bits in printable characters, each run after the third stored as the difference to the run two before
    it.

    Raises ValueError unless the runs are not negative and sum to height * width.
    """
    if isinstance(counts, (bytes, str)):
        runs = _unpack_counts(counts.encode("ascii") if isinstance(counts, str) else counts)
    else:
        if any(type(run) is not int or abs(run) >= 1 << 62 for run in counts):
            raise ValueError("RLE counts must be integers")
        runs = np.array(counts, dtype=np.int64)
    if (runs < 0).any() or int(runs.sum()) != height * width:
        raise ValueError(
            f"RLE counts must be runs that sum to {height} * {width}, they sum to {int(runs.sum())}"
        )
    return runs


def _unpack_counts(text: bytes) -> np.ndarray:
    groups = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    if len(groups) == 0:
        return groups
    if groups.min() < 0 or groups.max() > 63 or groups[-1] & 32:
        raise ValueError(
            "the compressed RLE counts hold a character outside the code, or end inside a number"
        )
    last = np.flatnonzero(groups & 32 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    shift = 5 * (np.arange(len(groups)) - np.repeat(first, last - first + 1))
    if shift.max() > 50:
        raise ValueError("the compressed RLE counts hold a number of more than 50 bits")
    values = np.add.reduceat((groups & 31) << shift, first)
    values -= np.where(groups[last] & 16, 1 << (shift[last] + 5), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


@dataclass(frozen=True)
class RunLengthMask:
    """One mask as the ends of its column-major runs, int64 [n]; odd runs are set."""

    ends: np.ndarray
    height: int
    width: int

    @classmethod
    def from_rle(cls, rle: dict[str, Any]) -> RunLengthMask:
        height, width = (int(side) for side in rle["size"])
        return cls(np.cumsum(rle_counts(rle["counts"], height, width)), height, width)

    def sample(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """bool [len(y), len(x)]: the mask at points (x, y) in mask pixels; 0 outside the image."""
        column, row = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
        inside = ((row >= 0) & (row < self.height))[:, None] & ((column >= 0) & (column < self.width))[None]
        place = column[None] * self.height + row[:, None]
        return inside & (np.searchsorted(self.ends, place, side="right") % 2 == 1)


@dataclass(frozen=True)
class _Axes:
    """The map from a mask's own coordinates to the current image's: x' = ax * x + bx, y' = ay * y."""

    ax: float = 1.0
    bx: float = 0.0
    ay: float = 1.0


class InstanceMasks:
    """The masks of one image's instances, in the image's pixels.

    Flipping and scaling only change an affine map and are exact; cropping costs in proportion to the outlines
    of the instances asked for, not to the image.
    """

    def __init__(self, segmentations: Sequence[Segmentation] = ()) -> None:
        """segmentations: per instance a list of polygons [x0, y0, x1, y1, ...] or a COCO RLE dictionary."""
        shapes: list[tuple[np.ndarray, ...] | RunLengthMask] = []
        for k, segmentation in enumerate(segmentations):
            if isinstance(segmentation, dict):
                shapes.append(RunLengthMask.from_rle(segmentation))
            else:
                shapes.append(tuple(_points(polygon, k) for polygon in segmentation))
        self._shapes = shapes
        self._axes = _Axes()

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, index: torch.Tensor | np.ndarray | slice | Sequence[int]) -> InstanceMasks:
        """The instances at ``index``: a slice, integers, or a boolean mask of length len(self)."""
        if isinstance(index, slice):
            return self._with(self._shapes[index], self._axes)
        chosen = index.detach().cpu().numpy() if isinstance(index, torch.Tensor) else np.asarray(index)
        if chosen.dtype == bool:
            if chosen.shape != (len(self),):
                raise IndexError(f"a boolean index needs shape ({len(self)},), got {chosen.shape}")
            chosen = np.flatnonzero(chosen)
        return self._with([self._shapes[int(k)] for k in chosen], self._axes)

    def flip(self, width: float) -> InstanceMasks:
        """Mirrored left to right in an image of that width."""
        axes = self._axes
        return self._with(self._shapes, _Axes(-axes.ax, width - axes.bx, axes.ay))

    def scale(self, sx: float, sy: float) -> InstanceMasks:
        """Stretched about the origin."""
        if not (sx > 0 and sy > 0 and math.isfinite(sx) and math.isfinite(sy)):
            raise ValueError(f"scales must be positive and finite, got {sx}, {sy}")
        axes = self._axes
        return self._with(self._shapes, _Axes(axes.ax * sx, axes.bx * sx, axes.ay * sy))

    def crop(self, boxes: torch.Tensor, indices: torch.Tensor, size: int) -> torch.Tensor:
        """Instance ``indices[k]`` seen through ``boxes[k]``: float32 [P, size, size] of 0 and 1 on the boxes'
        device.

        boxes: float [P, 4] xyxy. Cell (row, column) samples the centre of its share of the box; a box of no
        extent sees nothing.
        """
        if boxes.ndim != 2 or boxes.shape[1] != 4 or indices.shape != boxes.shape[:1]:
            raise ValueError(
                f"expected boxes [P, 4] and indices [P], got {tuple(boxes.shape)}, {tuple(indices.shape)}"
            )
        corners = boxes.detach().cpu().double().numpy()
        chosen = indices.detach().cpu().numpy()
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < len(self):
            raise IndexError(f"indices must lie in 0..{len(self) - 1}, got {chosen.min()}..{chosen.max()}")
        planes = self._rasterise(corners, chosen, size, size)
        return torch.from_numpy(planes.astype(np.float32)).to(boxes.device)

    def to_rle(self, height: int, width: int) -> list[dict[str, Any]]:
        """COCO compressed RLEs (counts as bytes) of the whole masks in an image of that size.

        Polygons are drawn by pycocotools, as the LVIS evaluation draws them, so a flip or scale of 1 gives
        its masks.
        """
        return [self._encode(k, height, width) for k in range(len(self))]

    def _with(self, shapes: list[Any], axes: _Axes) -> InstanceMasks:
        masks = InstanceMasks()
        masks._shapes, masks._axes = shapes, axes
        return masks

    def _encode(self, k: int, height: int, width: int) -> dict[str, Any]:
        shape, axes = self._shapes[k], self._axes
        if isinstance(shape, RunLengthMask):
            plane = self._rasterise(np.array([[0.0, 0.0, width, height]]), np.array([k]), height, width)[0]
            return mask_utils.encode(np.asfortranarray(plane))
        polygons = [(part * (axes.ax, axes.ay) + (axes.bx, 0.0)).ravel().tolist() for part in shape]
        return mask_utils.merge(mask_utils.frPyObjects(polygons, height, width))

    def _rasterise(self, boxes: np.ndarray, chosen: np.ndarray, height: int, width: int) -> np.ndarray:
        """uint8 [P, height, width]: instance chosen[k] at the cell centres of a grid laid over boxes[k]."""
        axes = self._axes
        planes = np.zeros((len(chosen), height, width), dtype=np.uint8)
        with_area = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        parts: list[np.ndarray] = []
        owners: list[int] = []
        for k in np.flatnonzero(with_area):
            shape = self._shapes[chosen[k]]
            x0, y0, x1, y1 = boxes[k]
            if isinstance(shape, RunLengthMask):
                x = x0 + (np.arange(width) + 0.5) * ((x1 - x0) / width)
                y = y0 + (np.arange(height) + 0.5) * ((y1 - y0) / height)
                planes[k] = shape.sample((x - axes.bx) / axes.ax, y / axes.ay)
            else:
                parts.extend(shape)
                owners.extend([int(k)] * len(shape))
        if parts:
            lengths = np.array([len(part) for part in parts])
            points = np.concatenate(parts) * (axes.ax, axes.ay) + (axes.bx, 0.0)
            x0, y0, x1, y1 = np.repeat(boxes[owners], lengths, axis=0).T
            cells = np.stack(
                [(points[:, 0] - x0) * width / (x1 - x0), (points[:, 1] - y0) * height / (y1 - y0)], axis=1
            )
            np.maximum.at(planes, owners, _fill(cells, lengths, height, width))
        return planes


def _points(polygon: Sequence[float] | np.ndarray, instance: int) -> np.ndarray:
    points = np.asarray(polygon, dtype=np.float64)
    if points.ndim != 1 or len(points) < 6 or len(points) % 2:
        raise ValueError(
            f"instance {instance}: a polygon needs an even count of at least 6 numbers, got {points.shape}"
        )
    return points.reshape(-1, 2)


def _fill(points: np.ndarray, lengths: np.ndarray, height: int, width: int) -> np.ndarray:
    """Even-odd fill of closed polygons at cell centres: uint8 [parts, height, width].

    points: float64 [sum(lengths), 2] in cells. Scan lines: an edge crosses the centre line y of every row
    with min(ya, yb) <= y < max(ya, yb); a cell is inside if an odd number of crossings lie at or left of its
    centre.
    """
    ends = np.cumsum(lengths)
    following = np.arange(1, len(points) + 1)
    following[ends - 1] = ends - lengths
    xa, ya = points.T
    xb, yb = points[following].T
    first_row = np.clip(np.ceil(np.minimum(ya, yb) - 0.5), 0, height).astype(np.int64)
    end_row = np.clip(np.ceil(np.maximum(ya, yb) - 0.5), 0, height).astype(np.int64)
    crossings = end_row - first_row
    edge = np.repeat(np.arange(len(points)), crossings)
    row = first_row[edge] + np.arange(len(edge)) - np.repeat(np.cumsum(crossings) - crossings, crossings)
    x = xa[edge] + (row + 0.5 - ya[edge]) * ((xb - xa)[edge] / (yb - ya)[edge])
    column = np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)
    part = np.repeat(np.arange(len(lengths)), lengths)[edge]
    place = (part * height + row) * (width + 1) + column
    toggles = np.bincount(place, minlength=len(lengths) * height * (width + 1))
    odd = (toggles & 1).astype(np.uint8).reshape(len(lengths), height, width + 1)
    return np.bitwise_xor.accumulate(odd, axis=2)[:, :, :width]
