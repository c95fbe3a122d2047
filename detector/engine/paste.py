"""From the small mask of a detection to a COCO run-length code, never touching more than its box."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

MASK_THRESHOLD = 0.5


def encode_mask(
    mask: NDArray[np.float32], box: NDArray[np.float32], height: int, width: int
) -> dict[str, Any]:
    """Compressed RLE (size, counts as text) of a mask [M, M] in 0..1 that fills `box` (xyxy, continuous
    pixels).

    Pixel centres are sampled bilinearly, with zero outside the mask's cells, and set where the value reaches
    1/2. The cost follows the box, not the image: 300 detections need no 300 images of memory.
    """
    x0, y0 = np.clip(np.floor(box[:2]), 0, (width, height)).astype(int)
    x1, y1 = np.clip(np.ceil(box[2:]), 0, (width, height)).astype(int)
    rows = _bilinear(box[1], box[3], len(mask), y0, y1)
    columns = _bilinear(box[0], box[2], len(mask), x0, x1)
    counts = _column_runs(rows @ mask @ columns.T >= MASK_THRESHOLD, x0, y0, height, width)
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def _bilinear(low: float, high: float, cells: int, start: int, stop: int) -> NDArray[np.float32]:
    """[stop - start, cells]: how much each cell of low..high gives to each pixel start..stop-1."""
    scale = cells / max(float(high) - float(low), 1e-6)
    position = (np.arange(start, stop) + 0.5 - low) * scale - 0.5
    return np.maximum(0.0, 1.0 - np.abs(position[:, None] - np.arange(cells))).astype(np.float32)


def _column_runs(inside: NDArray[np.bool_], x0: int, y0: int, height: int, width: int) -> list[int]:
    """Alternating runs of 0 and 1, column by column, of an image that is zero outside a window at x0, y0."""
    rows, columns = inside.shape
    padded = np.zeros((columns, rows + 2), dtype=np.int8)  # a zero before and after each column ends its runs
    padded[:, 1:-1] = inside.T
    change = np.diff(padded, axis=1)  # [columns, rows + 1]: +1 where a run starts, -1 just after its end
    column, row = np.nonzero(change == 1)
    start = (x0 + column) * height + y0 + row
    column, row = np.nonzero(change == -1)
    end = (x0 + column) * height + y0 + row
    joined = np.flatnonzero(end[:-1] == start[1:])  # a run that goes on at the top of the next column
    start, end = np.delete(start, joined + 1), np.delete(end, joined)
    edges = np.stack([start, end], axis=1).ravel()
    runs = [int(run) for run in np.diff(edges, prepend=0, append=height * width)]
    return runs[:-1] if runs[-1] == 0 else runs  # COCO's own encoder ends without an empty run
