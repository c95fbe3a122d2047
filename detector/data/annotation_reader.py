"""Reads and checks an LVIS v1, LVIS v0.5 or COCO annotation file into flat columns.

Every fault becomes a `Problem`. The caller decides what a problem means: reading for training raises at the
first, check-data collects them all while the broken entries are left out.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from detector.data.json_stream import JsonError, iter_members
from detector.data.masks import rle_counts

POLYGONS, RUN_LENGTHS = 0, 1  # kinds of outline in the buffer


class AnnotationError(ValueError):
    """An annotation file that cannot be used; the message names the file and the entry at fault."""


@dataclass(frozen=True)
class Problem:
    """One fault: in which list of the file, at which id (None if the entry has none), and what is wrong."""

    kind: str  # "annotation", "image", "category" or "file"
    id: int | None
    reason: str

    def __str__(self) -> str:
        where = self.kind if self.kind == "file" else f"{self.kind} {self.id}"
        return f"{where}: {self.reason}"


OnProblem = Callable[[Problem], None]


@dataclass(frozen=True)
class Columns:
    """An annotation file as arrays: I images in file order, A instances grouped by image, C classes by id."""

    version: str  # "LVIS v1", "LVIS v0.5" or "COCO"
    category_ids: np.ndarray  # int64 [C]
    category_names: list[str]
    category_frequency: list[str] | None  # None when the file does not say it for every category
    image_ids: np.ndarray  # int64 [I]
    sizes: np.ndarray  # int64 [I, 2]: height, width
    names: np.ndarray  # int64 [I, 2]: first byte in the buffer, bytes
    negatives: Ragged
    not_exhaustive: Ragged
    instance_offsets: np.ndarray  # int64 [I + 1]: rows of the instance columns
    annotation_ids: np.ndarray  # int64 [A]
    labels: np.ndarray  # int64 [A]
    boxes: np.ndarray  # float32 [A, 4] xyxy, pixels
    areas: np.ndarray  # float64 [A], square pixels, as the file states them
    crowd: np.ndarray  # bool [A]
    kinds: np.ndarray  # uint8 [A]: POLYGONS or RUN_LENGTHS
    outlines: np.ndarray  # int64 [A, 2]: first byte in the buffer, bytes
    buffer: np.ndarray  # uint8: outlines and file names


@dataclass(frozen=True)
class Ragged:
    """Lists of labels of varying length: row i is values[offsets[i]:offsets[i + 1]]."""

    values: np.ndarray
    offsets: np.ndarray

    def __getitem__(self, i: int) -> np.ndarray:
        return self.values[self.offsets[i] : self.offsets[i + 1]]


class _Fault(ValueError):
    """What is wrong with the entry being read."""


def read_columns(path: str | Path, on_problem: OnProblem) -> Columns:
    """Read the file; every broken entry is given to ``on_problem`` and left out.

    Raises AnnotationError if the file is not readable as JSON, whatever ``on_problem`` does.
    """
    reader = _Reader(on_problem)
    try:
        for key, element in iter_members(path):
            reader.take(key, element)
    except JsonError as error:
        raise AnnotationError(f"{path}: {error}") from None
    return reader.finish()


class _Reader:
    """Appends entries to growing arrays; ids are resolved at the end, since the lists come in any order."""

    def __init__(self, on_problem: OnProblem) -> None:
        self.on_problem = on_problem
        self.takers = {"images": self._image, "annotations": self._annotation, "categories": self._category}
        self.seen: set[str] = set()
        self.known_ids: dict[str, set[int]] = {key: set() for key in self.takers}
        self.places = dict.fromkeys(self.takers, 0)
        self.buffer = bytearray()
        self.categories: dict[int, tuple[str, Any]] = {}
        self.image_ids, self.sizes, self.names = array("q"), array("q"), array("q")
        self.negatives, self.not_exhaustive = (array("q"), array("q")), (array("q"), array("q"))
        self.with_file_name = self.with_negatives = 0
        self.annotation_ids, self.links, self.outlines = array("q"), array("q"), array("q")
        self.boxes, self.areas = array("d"), array("d")
        self.flags = bytearray()  # crowd, kind

    def take(self, key: str, entry: Any) -> None:
        """One entry of the top-level list ``key``."""
        self.seen.add(key)
        if key not in self.takers or entry == []:
            return
        place = self.places[key]
        self.places[key] += 1
        entry_id = entry.get("id") if isinstance(entry, dict) else None
        entry_id = entry_id if _is_int(entry_id) else None
        try:
            if entry_id is None:
                raise _Fault(f"entry {place} of {key!r} has no integer 'id'")
            if entry_id in self.known_ids[key]:
                raise _Fault("the id appears twice")
            self.known_ids[key].add(entry_id)
            self.takers[key](entry_id, entry)
        except _Fault as fault:
            self.on_problem(Problem(_SINGULAR[key], entry_id, str(fault)))

    def _category(self, category_id: int, category: dict[str, Any]) -> None:
        _need(category, "name")
        self.categories[category_id] = (str(category["name"]), category.get("frequency"))

    def _image(self, image_id: int, image: dict[str, Any]) -> None:
        _need(image, "height", "width")
        height, width = image["height"], image["width"]
        if not _is_side(height) or not _is_side(width):
            raise _Fault(f"height and width must be positive integers, got {_show((height, width))}")
        name = _relative_path(image)
        lists = [image.get(key, []) for key in ("neg_category_ids", "not_exhaustive_category_ids")]
        if any(not isinstance(ids, list) or not all(map(_is_int, ids)) for ids in lists):
            raise _Fault("neg_category_ids and not_exhaustive_category_ids must be lists of integers")
        self.image_ids.append(image_id)
        self.sizes.extend((height, width))
        self.names.extend((len(self.buffer), len(name)))
        self.buffer += name
        for (values, ends), ids in zip((self.negatives, self.not_exhaustive), lists, strict=True):
            values.extend(ids)
            ends.append(len(values))
        self.with_file_name += "file_name" in image
        self.with_negatives += "neg_category_ids" in image

    def _annotation(self, annotation_id: int, annotation: dict[str, Any]) -> None:
        _need(annotation, "image_id", "category_id", "bbox", "area", "segmentation")
        links = (annotation["image_id"], annotation["category_id"])
        if not all(map(_is_int, links)):
            raise _Fault(f"image_id and category_id must be integers, got {_show(links)}")
        box, area = _box(annotation["bbox"]), annotation["area"]
        if not _is_number(area) or area < 0:
            raise _Fault(f"area must be a finite number of at least 0, got {_show(area)}")
        crowd = annotation.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise _Fault(f"iscrowd must be 0 or 1, got {_show(crowd)}")
        kind, outline = _pack_segmentation(annotation["segmentation"])
        self.annotation_ids.append(annotation_id)
        self.links.extend(links)
        self.boxes.extend(box)
        self.areas.append(area)
        self.flags += bytes((int(crowd), kind))
        self.outlines.extend((len(self.buffer), len(outline)))
        self.buffer += outline

    def finish(self) -> Columns:
        for key in self.takers:
            if key not in self.seen:
                self.on_problem(Problem("file", None, f"the key {key!r} is missing"))
        self.known_ids.clear()
        category_ids = np.array(sorted(self.categories), dtype=np.int64)
        entries = [self.categories[int(i)] for i in category_ids]
        stated = [frequency for _, frequency in entries if frequency in ("r", "c", "f")]
        image_ids = np.array(self.image_ids, dtype=np.int64)
        sizes = np.array(self.sizes, dtype=np.int64).reshape(-1, 2)
        buffer = np.frombuffer(self.buffer, dtype=np.uint8)
        version = "COCO" if not self.with_negatives else "LVIS v0.5" if self.with_file_name else "LVIS v1"
        return Columns(
            version=version,
            category_ids=category_ids,
            category_names=[name for name, _ in entries],
            category_frequency=stated if len(stated) == len(entries) else None,
            image_ids=image_ids,
            sizes=sizes,
            names=np.array(self.names, dtype=np.int64).reshape(-1, 2),
            negatives=self._ragged("neg_category_ids", *self.negatives, category_ids, image_ids),
            not_exhaustive=self._ragged(
                "not_exhaustive_category_ids", *self.not_exhaustive, category_ids, image_ids
            ),
            buffer=buffer,
            **self._instances(category_ids, image_ids, sizes, buffer),
        )

    def _instances(
        self, category_ids: np.ndarray, image_ids: np.ndarray, sizes: np.ndarray, buffer: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The instance columns, grouped by image in file order, without the rows whose ids lead nowhere."""
        annotation_ids = np.array(self.annotation_ids, dtype=np.int64)
        links = np.array(self.links, dtype=np.int64).reshape(-1, 2)
        flags = np.frombuffer(bytes(self.flags), dtype=np.uint8).reshape(-1, 2)
        outlines = np.array(self.outlines, dtype=np.int64).reshape(-1, 2)
        images, labels = _positions(links[:, 0], image_ids), _positions(links[:, 1], category_ids)
        good = (images >= 0) & (labels >= 0)
        for row in np.flatnonzero(~good):
            what = f"image id {links[row, 0]}" if images[row] < 0 else f"category id {links[row, 1]}"
            self.on_problem(Problem("annotation", int(annotation_ids[row]), f"unknown {what}"))
        for row in np.flatnonzero(good & (flags[:, 1] == RUN_LENGTHS)):
            size = buffer[outlines[row, 0] :][:8].view(np.int32)
            if (size != sizes[images[row]]).any():
                reason = f"RLE size {size.tolist()} differs from the image's {sizes[images[row]].tolist()}"
                self.on_problem(Problem("annotation", int(annotation_ids[row]), reason))
                good[row] = False
        rows = np.flatnonzero(good)
        rows = rows[np.argsort(images[rows], kind="stable")]
        return {
            "instance_offsets": np.concatenate(
                [[0], np.cumsum(np.bincount(images[rows], minlength=len(image_ids)))]
            ),
            "annotation_ids": annotation_ids[rows],
            "labels": labels[rows],
            "boxes": np.array(self.boxes, dtype=np.float32).reshape(-1, 4)[rows],
            "areas": np.array(self.areas, dtype=np.float64)[rows],
            "crowd": flags[rows, 0] == 1,
            "kinds": flags[rows, 1],
            "outlines": outlines[rows],
        }

    def _ragged(
        self, key: str, values: array[int], ends: array[int], category_ids: np.ndarray, image_ids: np.ndarray
    ) -> Ragged:
        """Lists of category ids as lists of labels, without the unknown ones."""
        ids, offsets = np.array(values, dtype=np.int64), np.concatenate([[0], np.array(ends, dtype=np.int64)])
        labels = _positions(ids, category_ids)
        for place in np.flatnonzero(labels < 0):
            image = int(image_ids[np.searchsorted(offsets, place, side="right") - 1])
            self.on_problem(Problem("image", image, f"unknown category id {ids[place]} in {key}"))
        kept = np.concatenate([[0], np.cumsum(labels >= 0)])
        return Ragged(labels[labels >= 0], kept[offsets])


_SINGULAR = {"images": "image", "annotations": "annotation", "categories": "category"}


def _positions(ids: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Where each id stands in the table of distinct ids, -1 where it does not."""
    if len(table) == 0:
        return np.full(len(ids), -1, dtype=np.int64)
    order = np.argsort(table)
    place = order[np.searchsorted(table, ids, sorter=order).clip(max=len(table) - 1)]
    return np.where(table[place] == ids, place, -1)


def _need(entry: dict[str, Any], *keys: str) -> None:
    missing = [key for key in keys if key not in entry]
    if missing:
        raise _Fault(f"missing key {missing[0]!r}")


def _is_int(value: Any) -> bool:
    """Whether it is an integer of at most 64 bits; True and False are not."""
    return type(value) is int and -(1 << 63) <= value < 1 << 63


def _is_side(value: Any) -> bool:
    return _is_int(value) and 1 <= value < 1 << 31


def _is_number(value: Any) -> bool:
    """Whether it is a number that float32 holds, and the sum of two of them, too."""
    return (_is_int(value) or type(value) is float) and abs(value) < 1e38


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _box(bbox: Any) -> tuple[float, float, float, float]:
    """COCO [x, y, width, height] as xyxy."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_number, bbox)):
        raise _Fault(f"bbox must be four finite numbers, got {_show(bbox)}")
    x, y, w, h = bbox
    if w < 0 or h < 0:
        raise _Fault(f"bbox must not have a negative side, got {_show(bbox)}")
    return x, y, x + w, y + h


_PLAIN_PATH = re.compile(r"(?:\w+/)*\w+\.\w+", re.ASCII)


def _relative_path(image: dict[str, Any]) -> bytes:
    """The image's path below the image folder, in UTF-8.

    LVIS v1 has only coco_url, whose last two parts are the folder and the file; v0.5 repeats the names of
    COCO 2014 (COCO_val2014_000000000139.jpg), while the images are published as train2017/000000000139.jpg.
    """
    name, url = image.get("file_name"), image.get("coco_url")
    if (name is None or str(name).startswith("COCO_")) and url is not None:
        name = "/".join(str(url).partition("?")[0].split("/")[-2:])
    if name is None:
        raise _Fault("it has neither 'file_name' nor 'coco_url'")
    name = str(name)
    if _PLAIN_PATH.fullmatch(name):  # nearly all; the readings below cost more than the rest of the entry
        return name.encode()
    readings = (PurePosixPath(name), PureWindowsPath(name))
    if not readings[0].name or "\0" in name or any(p.anchor or ".." in p.parts for p in readings):
        raise _Fault(f"the image path {_show(name)} must be relative and stay below the image folder")
    try:
        return name.encode()
    except UnicodeEncodeError:
        raise _Fault(f"the image path {_show(name)} is not text") from None


def _pack_segmentation(segmentation: Any) -> tuple[int, bytes]:
    """(kind, bytes): number of polygons, their lengths, their points; or height, width, compressed counts."""
    if isinstance(segmentation, dict):
        return RUN_LENGTHS, _pack_rle(segmentation)
    if not isinstance(segmentation, list) or not segmentation:
        raise _Fault("segmentation must be an RLE or a list of at least one polygon")
    lengths, points = array("i", [len(segmentation)]), array("f")
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            size = f"{len(polygon)} numbers" if isinstance(polygon, list) else _show(polygon)
            raise _Fault(
                f"broken segmentation: a polygon needs an even count of at least 6 numbers, got {size}"
            )
        try:
            points.extend(polygon)
        except (TypeError, OverflowError):
            raise _Fault("broken segmentation: a polygon holds something that is not a number") from None
        lengths.append(len(polygon))
    if not np.isfinite(np.frombuffer(points, dtype=np.float32)).all():
        raise _Fault("broken segmentation: a polygon holds a number that is not finite")
    return POLYGONS, lengths.tobytes() + points.tobytes()


def _pack_rle(rle: dict[str, Any]) -> bytes:
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, list) or len(size) != 2 or not all(map(_is_side, size)):
        raise _Fault(f"broken segmentation: RLE size must be [height, width], got {_show(size)}")
    if not isinstance(counts, (str, list)):
        raise _Fault("broken segmentation: RLE counts must be a string or a list")
    try:
        rle_counts(counts, *size)
    except ValueError as error:
        raise _Fault(f"broken segmentation: {error}") from None
    if isinstance(counts, list):
        counts = mask_utils.frPyObjects({"size": size, "counts": counts}, *size)["counts"]
    return array("i", size).tobytes() + (counts.encode("ascii") if isinstance(counts, str) else counts)
