"""Checked input of an evaluation: annotations in one form for every backend, and results that fit them."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detector.data.annotations import frequency_group
from detector.data.json_stream import JsonError, iter_members
from detector.evaluation.results import iterate_results

FREQUENCIES = ("r", "c", "f")
BEYOND_ALL_AREAS = 1e11  # above the largest area range of the protocol, 1e10

Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Truth:
    """The annotations as the backends read them, and what is needed to check results against them."""

    dataset: dict[str, Records]  # images, annotations and categories; images and categories by ascending id
    image_sizes: dict[int, tuple[int, int]]  # image id -> (height, width)
    category_ids: frozenset[int]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ResultsSummary:
    count: int
    may_hold_empty: bool  # some detection has no area, or no bbox that would tell


def load_truth(
    path: str | os.PathLike[str], *, with_masks: bool, groups: Mapping[int, str] | None = None
) -> Truth:
    """Reads an LVIS (or COCO) annotation file.

    groups: frequency group ("r", "c", "f") by category id, for categories of which the file tells nothing.

    Raises:
        ValueError: the file is no annotation file or holds a record that cannot be evaluated; names it.
    """
    raw = _read_sections(path, with_masks)
    notes: list[str] = []
    categories = sorted(raw["categories"], key=lambda category: category["id"])
    images = _load_images(raw["images"], [category["id"] for category in categories], path, notes)
    image_sizes = {image["id"]: (image["height"], image["width"]) for image in images}
    category_ids = frozenset(category["id"] for category in categories)
    for annotation in raw["annotations"]:
        where = f"{path}: annotation {annotation.get('id')}"
        _check_annotation(annotation, where, image_sizes, category_ids, with_masks)
    annotations = _prepare_annotations(raw["annotations"], path, notes, with_masks)
    dataset = {
        "images": images,
        "annotations": annotations,
        "categories": _load_categories(categories, annotations, groups or {}, path, notes),
    }
    return Truth(dataset, image_sizes, category_ids, tuple(notes))


def _read_sections(path: str | os.PathLike[str], with_masks: bool) -> dict[str, Records]:
    """The three lists of the file, of the annotations only what the evaluation looks at.

    Read as a stream: a decoded file of LVIS's size takes gigabytes, and the garbage collector goes through it
    again and again while it grows.
    """
    sections: dict[str, Records] = {"images": [], "annotations": [], "categories": []}
    keys, seen = {*_annotation_keys(with_masks), "id", "ignore", "iscrowd"}, set()
    try:
        for section, entry in iter_members(os.fspath(path)):
            seen.add(section)
            if section not in sections or entry == []:
                continue
            if not isinstance(entry, dict):
                raise ValueError(f"{path}: an entry of {section!r} must be an object, got {str(entry)[:80]}")
            if section == "annotations":
                entry = {key: value for key, value in entry.items() if key in keys}
            sections[section].append(entry)
    except JsonError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from None
    if not seen >= set(sections):
        raise ValueError(f"{path}: an annotation file must hold the lists {', '.join(sections)}")
    return sections


def _load_images(images: Records, category_ids: list[int], path: object, notes: list[str]) -> Records:
    """Images with their federated lists. Without any in the file (COCO) all classes are annotated in all."""
    federated = any("neg_category_ids" in image for image in images)
    keys = ["id", "height", "width"]
    if federated:
        keys += ["neg_category_ids", "not_exhaustive_category_ids"]
    else:
        notes.append(f"{path} has no neg_category_ids: every image counts as annotated for all classes")
    prepared = {}
    for image in images:
        missing = [key for key in keys if key not in image]
        if missing:
            raise ValueError(f"{path}: image {image.get('id')} lacks {', '.join(missing)}")
        if image["id"] in prepared:
            raise ValueError(f"{path}: image {image['id']} is listed twice")
        exhaustive = {"neg_category_ids": category_ids, "not_exhaustive_category_ids": []}
        prepared[image["id"]] = exhaustive | {key: image[key] for key in keys}
    return [prepared[image_id] for image_id in sorted(prepared)]


def _annotation_keys(with_masks: bool) -> list[str]:
    return ["image_id", "category_id", "bbox", "area"] + ["segmentation"] * with_masks


def _check_annotation(
    annotation: dict[str, Any],
    where: str,
    image_sizes: dict[int, tuple[int, int]],
    category_ids: frozenset[int],
    with_masks: bool,
) -> None:
    missing = [key for key in _annotation_keys(with_masks) if key not in annotation]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    for key, known in (("image_id", image_sizes), ("category_id", category_ids)):
        if annotation[key] not in known:
            raise ValueError(f"{where} has the unknown {key} {annotation[key]}")
    if with_masks and isinstance(annotation["segmentation"], list):
        lengths = [len(polygon) for polygon in annotation["segmentation"]]
        if not lengths or any(length < 6 or length % 2 for length in lengths):
            raise ValueError(f"{where} needs polygons of 3 or more points, got {lengths} numbers")


def _prepare_annotations(annotations: Records, path: object, notes: list[str], with_masks: bool) -> Records:
    """Annotations that the backends treat alike, numbered from 1 since lvis takes number 0 for no match."""
    keys = _annotation_keys(with_masks)
    kept = [annotation for annotation in annotations if annotation["area"] > 0]
    prepared = []
    for number, annotation in enumerate(kept, start=1):
        record = {key: annotation[key] for key in keys} | {"id": number}
        if annotation.get("ignore"):
            # Outside every area range an annotation is ignored in all of them: what lvis makes of `ignore`.
            record["area"] = BEYOND_ALL_AREAS
        prepared.append(record)
    empty = len(annotations) - len(kept)
    if empty:
        notes.append(f"{path}: {empty} annotations of zero area are left out, as the lvis package does")
    crowd = sum(bool(annotation.get("iscrowd")) for annotation in kept)
    if crowd:
        notes.append(f"{path}: {crowd} crowd annotations count as ordinary ones: LVIS has no crowd regions")
    return prepared


def _load_categories(
    categories: Records, annotations: Records, groups: Mapping[int, str], path: object, notes: list[str]
) -> Records:
    """Categories with their frequency group, which is one of the training set: this file's own images tell it
    only where nothing else does."""
    images_of: dict[int, set[int]] = defaultdict(set)
    for annotation in annotations:
        images_of[annotation["category_id"]].add(annotation["image_id"])
    prepared, derived = [], 0
    for category in categories:
        frequency = category.get("frequency")
        if frequency is None and "image_count" in category:
            frequency = frequency_group(category["image_count"])
        if frequency is None:
            frequency = groups.get(category["id"])
        if frequency is None:
            frequency = frequency_group(len(images_of[category["id"]]))
            derived += 1
        elif frequency not in FREQUENCIES:
            raise ValueError(f"{path}: category {category['id']} has frequency {frequency!r}, not r, c or f")
        prepared.append({"id": category["id"], "name": category["name"], "frequency": frequency})
    if derived:
        notes.append(
            f"{path}: {derived} categories without frequency, derived from their images in this file"
        )
    return prepared


def check_results(path: str | os.PathLike[str], truth: Truth, iou_types: Sequence[str]) -> ResultsSummary:
    """Reads the results once as a stream and refuses what a backend would crash on or silently misjudge.

    Raises:
        ValueError: names the file, the number of the detection and what is wrong with it.
    """
    count, may_hold_empty, first_has_bbox = 0, False, None
    for count, record in enumerate(iterate_results(path), start=1):
        size = truth.image_sizes.get(record["image_id"])
        bbox, mask = record.get("bbox"), record.get("segmentation")
        has_bbox = bbox is not None
        first_has_bbox = has_bbox if first_has_bbox is None else first_has_bbox
        problem = None
        if size is None:
            problem = f"has image_id {record['image_id']}, which is not in the annotation file"
        elif record["category_id"] not in truth.category_ids:
            problem = f"has category_id {record['category_id']}, which is not in the annotation file"
        elif not math.isfinite(record["score"]):
            problem = f"has the score {record['score']}"
        elif not has_bbox and (first_has_bbox or "bbox" in iou_types):
            problem = "has no bbox"
        elif has_bbox and not (first_has_bbox and _is_bbox(bbox)):
            problem = f"needs a finite bbox [x, y, width, height], as all or none, got {bbox}"
        elif "segm" in iou_types and not isinstance(mask, (dict, list)):
            problem = "has no segmentation; boxes alone are evaluated with iou_types=('bbox',)"
        elif "segm" in iou_types and isinstance(mask, dict) and tuple(mask.get("size", ())) != size:
            problem = f"has a mask of size {mask.get('size')}, its image has (height, width) {size}"
        if problem:
            raise ValueError(f"{path}: detection {count - 1} {problem}")
        may_hold_empty = may_hold_empty or not has_bbox or bbox[2] * bbox[3] == 0
    return ResultsSummary(count, may_hold_empty)


def _is_bbox(bbox: Sequence[float]) -> bool:
    return len(bbox) == 4 and math.isfinite(sum(bbox)) and bbox[2] >= 0 and bbox[3] >= 0
