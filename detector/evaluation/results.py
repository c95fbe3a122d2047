"""Detections and the LVIS results file: a JSON list of {image_id, category_id, bbox, score, segmentation}.

`bbox` is [x, y, width, height], `segmentation` a compressed run-length encoding. One detection stands on one
line, so a file of millions of detections is written and read as a stream.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

READ_CHUNK = 1 << 20  # characters read at a time
MAX_RECORD = 1 << 24  # one detection longer than this is a broken file, not a detection
IMAGE_FIELD = '{"image_id": '  # what ResultsWriter begins every line with

CategoryIds = Sequence[int] | NDArray[np.integer]  # category id of each label, in label order: [C]


@dataclass
class Detections:
    """The detections of one image, or its annotations when they are drawn beside them.

    Args:
        image_id: id of the image in the annotation file.
        boxes: float [D, 4], (x1, y1, x2, y2) in pixels of the original image.
        scores: float [D].
        labels: integer [D], contiguous labels 0..C-1 (ascending category id).
        masks: D run-length encodings {"size": [height, width], "counts": compressed str or bytes}, or None.

    Arrays and CPU tensors are both accepted and are kept as NumPy arrays (float32, float32, int64).

    Raises:
        TypeError: labels that are not integers.
        ValueError: wrong shapes or lengths, values that are not finite, a box with x2 < x1 or y2 < y1,
            negative labels, masks that are not run-length encodings.
    """

    image_id: int
    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    masks: list[dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        where = f"detections of image {self.image_id}"
        self.boxes = _float_array(self.boxes, f"{where}: boxes")
        self.scores = _float_array(self.scores, f"{where}: scores")
        labels = np.asarray(self.labels)
        if labels.size and not np.issubdtype(labels.dtype, np.integer):
            raise TypeError(f"{where}: labels must be integers, got {labels.dtype}")
        self.labels = labels.astype(np.int64)

        count = len(self.labels) if self.labels.ndim == 1 else -1
        if self.boxes.size == 0 and count == 0:
            self.boxes = self.boxes.reshape(0, 4)
        if count < 0 or self.boxes.shape != (count, 4) or self.scores.shape != (count,):
            raise ValueError(
                f"{where}: expected boxes [D, 4], scores [D] and labels [D], got {list(self.boxes.shape)}, "
                f"{list(self.scores.shape)} and {list(self.labels.shape)}"
            )
        reversed_rows = np.flatnonzero((self.boxes[:, 2:] < self.boxes[:, :2]).any(axis=1))
        if len(reversed_rows):
            row = reversed_rows[0]
            raise ValueError(f"{where}: box {row} must be (x1, y1, x2, y2), got {self.boxes[row].tolist()}")
        if count and self.labels.min() < 0:
            raise ValueError(f"{where}: labels must be >= 0, got {self.labels.min()}")
        if self.masks is not None:
            if len(self.masks) != count:
                raise ValueError(f"{where}: expected {count} masks, got {len(self.masks)}")
            self.masks = [_text_rle(mask, where) for mask in self.masks]

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: NDArray[np.integer] | NDArray[np.bool_]) -> Detections:
        """The detections at `rows` (indices or a boolean mask), in that order."""
        rows = np.arange(len(self))[rows]
        masks = None if self.masks is None else [self.masks[row] for row in rows]
        return Detections(self.image_id, self.boxes[rows], self.scores[rows], self.labels[rows], masks)


def _float_array(values: ArrayLike, what: str) -> NDArray[np.float32]:
    array = np.asarray(values, dtype=np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{what} must be finite, got {array[~np.isfinite(array)][0]}")
    return array


def _text_rle(mask: dict[str, Any], where: str) -> dict[str, Any]:
    """A compressed run-length encoding with `counts` as text, which JSON can hold."""
    known = isinstance(mask, dict) and len(mask.get("size", ())) == 2
    if not known or not isinstance(mask.get("counts"), (str, bytes)):
        expected = "{'size': [height, width], 'counts': str or bytes}"
        raise ValueError(f"{where}: a mask must be {expected}, got {str(mask)[:80]}")
    counts = mask["counts"]
    return {
        "size": [int(side) for side in mask["size"]],
        "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
    }


@contextmanager
def _atomic_json_array(path: str | os.PathLike[str]) -> Iterator[Callable[[str], None]]:
    """Yields a function that appends one encoded item to the JSON array at `path`, one item on each line.

    The file takes its name only when complete (a rename is atomic); after an exception nothing is left. The
    temporary name is fixed, so what a killed process left behind is overwritten by the next one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            separator = "["

            def append(item: str) -> None:
                nonlocal separator
                file.write(f"{separator}\n{item}")
                separator = ","

            yield append
            file.write("[]\n" if separator == "[" else "\n]\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class ResultsWriter:
    """Writes detections image by image as a LVIS results file. Use it as a context manager.

    Args:
        path: the file to write; it appears, or replaces an older one, when the block ends well.
        category_ids: category id of each label, in label order ([C]).

    Raises (in `add`):
        ValueError: a label outside 0..C-1, an image added twice.
    """

    def __init__(self, path: str | os.PathLike[str], category_ids: CategoryIds) -> None:
        self.path = Path(path)
        self.category_ids = [int(category_id) for category_id in category_ids]
        self._images: set[int] = set()
        self._array = _atomic_json_array(path)
        self._append: Callable[[str], None] | None = None

    def __enter__(self) -> ResultsWriter:
        self._append = self._array.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._append = None
        self._array.__exit__(*exception)

    def add(self, detections: Detections) -> None:
        if self._append is None:
            raise RuntimeError("enter the writer first: with ResultsWriter(path, category_ids) as writer")
        image_id, num_classes = int(detections.image_id), len(self.category_ids)
        if image_id in self._images:
            raise ValueError(f"image {image_id} was added twice to {self.path}")
        outside = detections.labels[detections.labels >= num_classes]
        if len(outside):
            raise ValueError(f"image {image_id}: expected labels 0..{num_classes - 1}, got {outside[0]}")
        self._images.add(image_id)

        boxes, scores = detections.boxes.tolist(), detections.scores.tolist()
        categories = [self.category_ids[label] for label in detections.labels.tolist()]
        masks = detections.masks or [None] * len(detections)
        for (x1, y1, x2, y2), score, category_id, mask in zip(boxes, scores, categories, masks, strict=True):
            # Nine digits give every float32 back exactly; rounding scores would make ties and move AP.
            bbox = f"[{x1:.9g}, {y1:.9g}, {x2 - x1:.9g}, {y2 - y1:.9g}]"
            segmentation = "" if mask is None else f', "segmentation": {json.dumps(mask)}'
            self._append(
                f'{IMAGE_FIELD}{image_id}, "category_id": {category_id}, "bbox": {bbox}, '
                f'"score": {score:.9g}{segmentation}}}'
            )


def part_path(path: str | os.PathLike[str], rank: int) -> Path:
    """Where a rank of a distributed run writes its share of the results file `path`."""
    return Path(f"{os.fspath(path)}.rank{rank}")


def merge_results(parts: Iterable[str | os.PathLike[str]], path: str | os.PathLike[str]) -> int:
    """Joins the ranks' files, as ResultsWriter left them, into one and removes them; returns the number of
    detections.

    An image of an earlier part is skipped in later ones: a sampler that pads gives an image to two ranks.
    Lines are copied as they are: to decode and encode six million detections would take a minute.

    Raises:
        FileNotFoundError: a part is missing (its rank did not finish); nothing is written or removed.
        ValueError: a part is not a file of ResultsWriter.
    """
    files = [Path(part) for part in parts]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"no results from {len(missing)} of {len(files)} ranks: {', '.join(missing)}")
    count = 0
    finished: set[str] = set()
    with _atomic_json_array(path) as append:
        for file in files:
            in_part = set()
            for image, record in _iterate_lines(file):
                if image not in finished:
                    append(record)
                    in_part.add(image)
                    count += 1
            finished |= in_part
    for file in files:
        file.unlink()
    return count


def _iterate_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(the field of the image, the whole record) of each line that ResultsWriter wrote."""
    index = 0
    with path.open(encoding="utf-8") as file:
        opening = file.readline()
        if opening == "[]\n":
            return
        for line in file if opening == "[\n" else ():
            if line == "]\n":
                return
            image, _, _ = line.partition(", ")
            record = line.rstrip(",\n")
            if not image.startswith(IMAGE_FIELD) or not record.endswith("}"):
                break
            yield image, record
            index += 1
    raise ValueError(f"{path}: broken or cut off at detection {index}")


def iterate_results(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yields the records of a results file one by one, in constant memory.

    Raises:
        ValueError: the file is not a JSON list, ends early, or holds a record without integer image_id and
            category_id, a score, and a bbox or segmentation; the message names the file and the record.
    """
    decode = json.JSONDecoder().raw_decode
    with open(path, encoding="utf-8") as file:
        characters = iter(lambda: file.read(1), "")
        if next((character for character in characters if not character.isspace()), "") != "[":
            raise ValueError(f"{path}: a results file must be a JSON list of detections")
        buffer, start, index = "", 0, 0
        while True:
            while start < len(buffer) and buffer[start] in ", \t\r\n":
                start += 1
            if buffer.startswith("]", start):
                return
            try:
                record, start = decode(buffer, start)
            except json.JSONDecodeError as error:
                more = file.read(READ_CHUNK)
                if not more or len(buffer) - start > MAX_RECORD:
                    problem = error.msg if start < len(buffer) else "the list is not closed"
                    message = f"{path}: broken or cut off at detection {index} ({problem})"
                    raise ValueError(message) from None
                buffer, start = buffer[start:] + more, 0
            else:
                _check_record(record, f"{path}: detection {index}")
                yield record
                index += 1


def _check_record(record: object, where: str) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"{where} must be an object, got {str(record)[:80]}")
    for key, kind in (("image_id", int), ("category_id", int), ("score", (int, float))):
        if not isinstance(record.get(key), kind):
            raise ValueError(f"{where} needs a number as {key}, got {record.get(key)!r}")
    if "bbox" not in record and "segmentation" not in record:
        raise ValueError(f"{where} has neither bbox nor segmentation")


def read_results(
    path: str | os.PathLike[str], category_ids: CategoryIds, image_ids: Iterable[int] | None = None
) -> dict[int, Detections]:
    """Reads a results file into one `Detections` per image that has any, highest score first.

    Args:
        category_ids: category id of each label, in label order ([C]).
        image_ids: keep these images only.

    Raises:
        ValueError: not a results file, an unknown category, a detection without a bbox.
    """
    label_of = {int(category_id): label for label, category_id in enumerate(category_ids)}
    wanted = None if image_ids is None else {int(image_id) for image_id in image_ids}
    rows: dict[int, list[dict[str, Any]]] = {}
    for index, record in enumerate(iterate_results(path)):
        if record["category_id"] not in label_of:
            raise ValueError(f"{path}: detection {index} has the unknown category id {record['category_id']}")
        if "bbox" not in record:
            raise ValueError(f"{path}: detection {index} lacks bbox")
        if wanted is None or record["image_id"] in wanted:
            rows.setdefault(record["image_id"], []).append(record)

    def detections_of(image_id: int, records: list[dict[str, Any]]) -> Detections:
        records = sorted(records, key=lambda record: -record["score"])
        boxes = np.array([record["bbox"] for record in records], dtype=np.float64)
        boxes[:, 2:] += boxes[:, :2]
        with_masks = all("segmentation" in record for record in records)
        return Detections(
            image_id,
            boxes,
            np.array([record["score"] for record in records]),
            np.array([label_of[record["category_id"]] for record in records]),
            [record["segmentation"] for record in records] if with_masks else None,
        )

    return {image_id: detections_of(image_id, records) for image_id, records in rows.items()}
