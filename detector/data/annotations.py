"""LVIS and COCO annotation files, checked and held in a few flat arrays.

Python objects per annotation would cost gigabytes, and again as much in every loader worker, because touching
an object's reference count copies its page of memory after a fork. Here everything lies in numpy arrays:
fixed-width columns per image and per instance, and one byte buffer with the outlines (float32 points,
compressed run lengths) and file names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detector.data.annotation_reader import POLYGONS, AnnotationError, Columns, Problem, read_columns

RARE_UP_TO, COMMON_UP_TO = 10, 100  # images per category; the groups of LVIS (Gupta et al. 2019, section 6)


@dataclass(frozen=True)
class ImageRecord:
    """One image. Labels are contiguous, 0..C-1."""

    image_id: int
    file_name: str  # relative to the image folder
    height: int
    width: int
    neg_category_labels: np.ndarray  # int64: classes verified to be absent
    not_exhaustive_category_labels: np.ndarray  # int64: classes not all of whose instances are annotated


@dataclass(frozen=True)
class InstanceRecord:
    """The M annotations of one image, in original pixels."""

    boxes: np.ndarray  # float32 [M, 4] xyxy
    labels: np.ndarray  # int64 [M]
    areas: np.ndarray  # float64 [M]
    annotation_ids: np.ndarray  # int64 [M]
    segmentations: list[Any]  # per instance: float32 polygons [x0, y0, x1, y1, ...], or a compressed RLE
    crowd: np.ndarray  # bool [M]


class LvisAnnotations:
    """An annotation file: LVIS v1, LVIS v0.5 or COCO.

    version: "LVIS v1", "LVIS v0.5" or "COCO". category_ids: int64 [C] ascending; label = position there.
    category_names, category_frequency ("r", "c" or "f" as the file says, else by images in this file): lists
    of C. image_count, instance_count: int64 [C], images with the class and instances of it;
    num_images_with_annotations. Crowd regions do not count. image_ids: int64 [I] in file order;
    aspect_ratios: float64 [I], width / height.
    """

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self.version = columns.version
        self.category_ids = columns.category_ids
        self.category_names = columns.category_names
        self.num_classes = len(columns.category_ids)
        self.image_ids = columns.image_ids
        self.aspect_ratios = columns.sizes[:, 1] / columns.sizes[:, 0]
        images, labels = self.image_label_pairs()
        self.image_count = np.bincount(labels, minlength=self.num_classes)
        self.instance_count = np.bincount(columns.labels[~columns.crowd], minlength=self.num_classes)
        self.num_images_with_annotations = len(np.unique(images))
        self.category_frequency = columns.category_frequency or [frequency_group(n) for n in self.image_count]

    @classmethod
    def from_file(cls, path: str | Path) -> LvisAnnotations:
        """Read a file and check all of it.

        Raises AnnotationError, naming the file and the id of the first broken entry; OSError if it cannot be
        opened.
        """

        def refuse(problem: Problem) -> None:
            raise AnnotationError(f"{path}: {problem}")

        return cls(read_columns(path, refuse))

    def __len__(self) -> int:
        """Number of images, those without annotations included."""
        return len(self.image_ids)

    @property
    def num_instances(self) -> int:
        return len(self._columns.annotation_ids)

    def image(self, i: int) -> ImageRecord:
        """Image i of the file, 0 <= i < len(self), else IndexError."""
        self._check_index(i)
        columns = self._columns
        start, length = columns.names[i]
        return ImageRecord(
            image_id=int(columns.image_ids[i]),
            file_name=columns.buffer[start : start + length].tobytes().decode(),
            height=int(columns.sizes[i, 0]),
            width=int(columns.sizes[i, 1]),
            neg_category_labels=columns.negatives[i],
            not_exhaustive_category_labels=columns.not_exhaustive[i],
        )

    def instances(self, i: int) -> InstanceRecord:
        """The annotations of image i in file order."""
        self._check_index(i)
        columns = self._columns
        rows = slice(columns.instance_offsets[i], columns.instance_offsets[i + 1])
        return InstanceRecord(
            boxes=columns.boxes[rows],
            labels=columns.labels[rows],
            areas=columns.areas[rows],
            annotation_ids=columns.annotation_ids[rows],
            segmentations=[
                _unpack_outline(columns.buffer[start : start + length], kind)
                for (start, length), kind in zip(columns.outlines[rows], columns.kinds[rows], strict=True)
            ],
            crowd=columns.crowd[rows],
        )

    def object_boxes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Every instance that is no crowd: image index int64 [M], label int64 [M], and its box float64 [M,
        4], xyxy in shares of the image's width and height."""
        columns = self._columns
        rows = np.flatnonzero(~columns.crowd)
        images = np.repeat(np.arange(len(self)), np.diff(columns.instance_offsets))[rows]
        return images, columns.labels[rows], columns.boxes[rows] / self.box_scales()[images]

    def box_scales(self) -> np.ndarray:
        """float64 [I, 4]: (width, height, width, height) of every image."""
        return np.tile(self._columns.sizes[:, ::-1], 2).astype(np.float64)

    def judged_pairs(self) -> np.ndarray | None:
        """Every image index * C + label, int64 ascending, where the image is known to hold the class or to be
        free of it; None: that is known everywhere (COCO)."""
        if self.version == "COCO":
            return None
        images, labels = self.image_label_pairs()
        negatives = self._columns.negatives
        absent = (
            np.repeat(np.arange(len(self)), np.diff(negatives.offsets)) * self.num_classes + negatives.values
        )
        return np.union1d(images * self.num_classes + labels, absent)

    def _check_index(self, i: int) -> None:
        if not 0 <= i < len(self):
            raise IndexError(f"image index {i} does not lie in 0..{len(self) - 1}")

    def image_label_pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Every (image index, label) with an instance that is no crowd, once: two int64 arrays, by image."""
        columns = self._columns
        images = np.repeat(np.arange(len(self)), np.diff(columns.instance_offsets))
        pairs = np.unique((images * max(self.num_classes, 1) + columns.labels)[~columns.crowd])
        return np.divmod(pairs, max(self.num_classes, 1))


def frequency_group(image_count: int) -> str:
    """LVIS's group of a category seen in that many training images: "r", "c" or "f"."""
    return "r" if image_count <= RARE_UP_TO else "c" if image_count <= COMMON_UP_TO else "f"


def _unpack_outline(data: np.ndarray, kind: int) -> list[np.ndarray] | dict[str, Any]:
    if kind != POLYGONS:
        return {"size": data[:8].view(np.int32).tolist(), "counts": data[8:].tobytes()}
    header = 4 * (1 + int(data[:4].view(np.int32)[0]))
    lengths = data[4:header].view(np.int32)
    return np.split(data[header:].view(np.float32), np.cumsum(lengths)[:-1])
