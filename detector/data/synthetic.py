"""Writes a small long-tailed data set in LVIS v1 format: JPEGs, polygons, federated negatives, r/c/f."""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils

from detector.data.annotations import frequency_group
from detector.data.drawing import MAX_CLASSES, Appearance, Placement, appearance, ground, outlines, paint

# ln(images per category) at quantile u of LVIS v1's 1203 categories, sorted: a cubic in u by least squares to
# the image counts published with lvis_v1_train.json (Gupta et al. 2019, "LVIS", figure 7 shows the curve).
# Mean absolute error 0.11. It gives 341 rare, 439 common and 423 frequent categories, where LVIS v1 has 337,
# 461 and 405.
LVIS_LOG_IMAGES = (-0.172, 11.915, -13.481, 9.995)

CLASSES_PER_IMAGE = 2.2  # mean
MAX_CLASSES_PER_IMAGE = 6
MAX_OBJECTS_PER_IMAGE = 8
ANOTHER_INSTANCE = 0.35  # probability that one more object of the same class follows
WITHOUT_OBJECTS = 0.02  # share of the images
NEGATIVES_PER_IMAGE = 12  # classes verified to be absent
NOT_EXHAUSTIVE = (
    0.04  # probability, per class with several instances in an image, that one is left unannotated
)
VAL_FLATNESS = (
    0.3  # validation counts go with the training counts to this power, so that rare classes can be measured
)
RADIUS = (0.055, 0.22)  # of an object, in image sizes
MANY_IMAGES = 4000  # of a split: they are drawn by several processes
SMALLEST_VISIBLE = 0.15  # share of an object that must be seen, else it counts as hidden
CLOSEST = 0.5  # distance of two centres in sums of their radii


class SyntheticFiles(NamedTuple):
    train: Path
    val: Path
    image_root: Path


class _Object(NamedTuple):
    category: int  # 0-based
    polygons: list[list[float]]


def write_synthetic(
    root: str | Path,
    *,
    num_train: int = 1200,
    num_val: int = 200,
    num_classes: int = 24,
    image_size: int = 160,
    seed: int = 0,
) -> SyntheticFiles:
    """Write ``root/annotations/lvis_synth_{train,val}.json`` and ``root/images/*.jpg``; the image folder is
    ``root``.

    Images per class follow LVIS v1's long tail in the training split, bent down at the head so that an image
    holds about two classes; the validation split is flatter and holds every class. Groups r, c, f go by
    training images, as in LVIS (up to 10, up to 100, more). Equal arguments give equal bytes.

    Raises ValueError if the numbers cannot be met, e.g. more classes than the images can hold.
    """
    if not 1 <= num_classes <= MAX_CLASSES:
        raise ValueError(f"num_classes must lie in 1..{MAX_CLASSES}, got {num_classes}")
    if num_train < 1 or num_val < 1 or image_size < 32 or seed < 0:
        raise ValueError(
            "expected num_train >= 1, num_val >= 1, image_size >= 32 and seed >= 0, "
            f"got {num_train}, {num_val}, {image_size}, {seed}"
        )
    root = Path(root)
    (root / "images").mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    rng = np.random.default_rng([seed, num_classes])
    rank = rng.permutation(num_classes)  # how frequent a class is does not go with what it looks like
    train_counts = train_image_counts(num_classes, num_train)[rank]
    val_counts = val_image_counts(train_counts, num_val)

    looks = [appearance(k) for k in range(num_classes)]
    splits = {}
    first_id = 1
    for split, counts, num_images in (("train", train_counts, num_train), ("val", val_counts, num_val)):
        contents = _deal_classes(counts, num_images, rng)
        splits[split] = _write_images(root, looks, contents, image_size, seed, first_id, split)
        first_id += num_images
    categories = _categories(looks, splits["train"][1])
    paths = {split: root / "annotations" / f"lvis_synth_{split}.json" for split in splits}
    for split, lists in splits.items():
        _write_json(paths[split], *lists, categories)
    return SyntheticFiles(paths["train"], paths["val"], root)


def train_image_counts(num_classes: int, num_images: int) -> np.ndarray:
    """Images per class, ascending int64 [C]: LVIS v1's curve n(u), bent to n * cap / (n + cap).

    ``cap`` is at most the number of images, and such that an image holds `CLASSES_PER_IMAGE` classes at most.
    """
    quantile = (np.arange(num_classes) + 0.5) / num_classes
    curve = np.exp(np.polynomial.Polynomial(LVIS_LOG_IMAGES)(quantile))
    low, high = 1e-3, float(num_images)
    for _ in range(60):
        cap = (low + high) / 2
        fits = (curve * cap / (curve + cap)).sum() <= CLASSES_PER_IMAGE * num_images
        low, high = (cap, high) if fits else (low, cap)
    return np.maximum(1, np.rint(curve * low / (curve + low))).astype(np.int64)


def val_image_counts(train_counts: np.ndarray, num_images: int) -> np.ndarray:
    """Validation images per class, int64 [C]: the training counts flattened, at least 1."""
    flat = train_counts**VAL_FLATNESS
    counts = np.rint(flat * (CLASSES_PER_IMAGE * num_images / flat.sum()))
    return counts.clip(1, num_images).astype(np.int64)


def _deal_classes(counts: np.ndarray, num_images: int, rng: np.random.Generator) -> list[list[int]]:
    """The classes of every image: class c is in counts[c] images, and the images are filled about evenly."""
    load = np.zeros(num_images)
    load[rng.permutation(num_images)[: int(WITHOUT_OBJECTS * num_images)]] = np.inf
    contents: list[list[int]] = [[] for _ in range(num_images)]
    for c in np.argsort(-counts, kind="stable"):
        room = np.flatnonzero(load < MAX_CLASSES_PER_IMAGE)
        if len(room) == 0:
            raise ValueError(f"{num_images} images cannot hold {len(counts)} classes; ask for more images")
        chosen = room[np.argsort(load[room] + 3 * rng.random(len(room)))][: counts[c]]
        load[chosen] += 1
        for image in chosen:
            contents[image].append(int(c))
    return contents


def _write_images(
    root: Path,
    looks: list[Appearance],
    contents: list[list[int]],
    size: int,
    seed: int,
    first_id: int,
    split: str,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Draw and save every image of a split; returns the lists 'images' and 'annotations'."""
    write = partial(_write_image, root, looks, size, seed, split)
    numbered = list(enumerate(contents, start=first_id))
    if len(numbered) < MANY_IMAGES:
        written = [write(image) for image in numbered]
    else:  # processes that start from nothing: this one may have threads
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
            written = list(pool.map(write, numbered, chunksize=MANY_IMAGES // 32))
    annotations = [annotation for _, found in written for annotation in found]
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    return [image for image, _ in written], annotations


def _write_image(
    root: Path, looks: list[Appearance], size: int, seed: int, split: str, image: tuple[int, list[int]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Draws and saves the image (id, classes), by its own random numbers; its entry and its annotations."""
    image_id, classes = image
    for attempt in range(20):
        rng = np.random.default_rng([seed, image_id, attempt])
        picture, objects = _scene(looks, classes, size, rng)
        if {found.category for found in objects} == set(classes):
            break
    else:
        raise ValueError(f"no scene of {size} pixels shows the classes {classes}; ask for larger images")
    name = f"{split}_{image_id:012d}.jpg"
    Image.fromarray(picture).save(root / "images" / name, quality=90)
    objects, not_exhaustive = _leave_out(objects, rng)
    absent = np.setdiff1d(np.arange(len(looks)), classes)
    negatives = rng.permutation(absent)[:NEGATIVES_PER_IMAGE]
    entry = {
        "id": image_id,
        "width": size,
        "height": size,
        "license": 1,
        "coco_url": f"http://synthetic.invalid/images/{name}",
        "flickr_url": "",
        "date_captured": "2000-01-01 00:00:00",
        "neg_category_ids": sorted(int(c) + 1 for c in negatives),
        "not_exhaustive_category_ids": [c + 1 for c in not_exhaustive],
    }
    return entry, [_annotation(image_id, found, size) for found in objects]


def _scene(
    looks: list[Appearance], classes: list[int], size: int, rng: np.random.Generator
) -> tuple[np.ndarray, list[_Object]]:
    """A picture, uint8 [size, size, 3], of objects of these classes, and what is visible of each of them."""
    order = rng.permutation(_multiply(classes, rng))
    canvas = ground(rng, size)
    placed: list[Placement] = []
    covers: list[np.ndarray] = []
    for c in order:
        placed.append(_find_place(placed, size, rng))
        covers.append(paint(canvas, looks[c], placed[-1], rng))
    objects = []
    uncovered = np.ones((size, size), dtype=np.float32)
    for c, cover in zip(order[::-1], covers[::-1], strict=True):  # from the front to the back
        visible = cover * uncovered
        uncovered *= 1 - cover
        if visible.sum() >= SMALLEST_VISIBLE * cover.sum() and (polygons := outlines(visible)):
            objects.append(_Object(int(c), polygons))
    return canvas.round().clip(0, 255).astype(np.uint8), objects[::-1]


def _multiply(classes: list[int], rng: np.random.Generator) -> list[int]:
    """Each class at least once, and at most `MAX_OBJECTS_PER_IMAGE` objects in all."""
    objects = list(classes)
    for c in classes:
        while len(objects) < MAX_OBJECTS_PER_IMAGE and rng.random() < ANOTHER_INSTANCE:
            objects.append(c)
    return objects


def _find_place(placed: list[Placement], size: int, rng: np.random.Generator) -> Placement:
    """A random place whose overlap with the earlier ones is moderate, or the freest of 30 tries."""
    radius = size * rng.uniform(*RADIUS)
    best, best_gap = None, -1.0
    for _ in range(30):
        x, y = rng.uniform(0.6 * radius, size - 0.6 * radius, size=2)
        gap = min((np.hypot(x - p.x, y - p.y) / (radius + p.radius) for p in placed), default=np.inf)
        if gap > best_gap:
            best, best_gap = Placement(x, y, radius, rng.uniform(0, 2 * np.pi)), gap
        if gap >= CLOSEST:
            break
    assert best is not None
    return best


def _leave_out(objects: list[_Object], rng: np.random.Generator) -> tuple[list[_Object], list[int]]:
    """Now and then one of several instances is not annotated, and its class is marked as not exhaustive."""
    categories = [found.category for found in objects]
    marked = []
    for c in sorted(set(categories)):
        if categories.count(c) > 1 and rng.random() < NOT_EXHAUSTIVE:
            marked.append(c)
            objects.remove(next(found for found in objects if found.category == c))
    return objects, marked


def _annotation(image_id: int, found: _Object, size: int) -> dict[str, Any]:
    """All but its number, which counts over all images."""
    points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in found.polygons])
    (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0)
    rle = mask_utils.merge(mask_utils.frPyObjects(found.polygons, size, size))
    return {
        "id": 0,
        "image_id": image_id,
        "category_id": found.category + 1,
        "area": float(mask_utils.area(rle)),
        "bbox": [round(float(v), 2) for v in (x0, y0, x1 - x0, y1 - y0)],
        "segmentation": found.polygons,
    }


def _categories(looks: list[Appearance], annotations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The list 'categories', with the counts of the training split."""
    images: list[set[int]] = [set() for _ in looks]
    instances = [0] * len(looks)
    for annotation in annotations:
        c = annotation["category_id"] - 1
        images[c].add(annotation["image_id"])
        instances[c] += 1
    return [
        {
            "id": c + 1,
            "name": look.name,
            "synset": f"{look.name}.n.01",
            "synonyms": [look.name],
            "def": f"a {look.texture} {look.colour} {look.shape}",
            "frequency": frequency_group(len(images[c])),
            "image_count": len(images[c]),
            "instance_count": instances[c],
        }
        for c, look in enumerate(looks)
    ]


def _write_json(path: Path, images: list[Any], annotations: list[Any], categories: list[Any]) -> None:
    content = {
        "info": {
            "description": "Synthetic long-tailed data set in the format of LVIS v1",
            "version": "1",
            "year": 2000,
            "contributor": "detector make-synthetic",
            "url": "",
            "date_created": "2000-01-01 00:00:00",
        },
        "licenses": [{"id": 1, "name": "CC0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"}],
        "categories": categories,
        "images": images,
        "annotations": annotations,
    }
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")
    os.replace(unfinished, path)
