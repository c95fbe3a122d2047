"""Made-up files of LVIS's size: annotations, photo-like JPEGs, detections. Equal seeds give equal files.

What costs time and memory is drawn as LVIS v1 has it: 1203 classes, of which 28 % are in at most 10 of the
100,170 images and 34 % in more than 100; 12.7 instances an image; polygons of about fifty points; images of
about 640 x 480 pixels. What the pictures show and where the objects lie is noise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TextIO

import numpy as np
from numpy.random import Generator
from PIL import Image

from detector.data.annotations import LvisAnnotations, frequency_group
from detector.evaluation import Detections

SIDES = ((480, 640), (640, 480), (427, 640), (480, 640), (640, 427), (375, 500))  # height, width
CHUNK = 20_000  # instances drawn at a time
LOG_IMAGES = NormalDist(3.64, 2.29)  # of the logarithm of a class's number of images
MOST_IMAGES, OF_IMAGES = (
    1977,
    100_170,
)  # LVIS v1: a class is annotated in at most so many of the training images
NEGATIVES, NOT_EXHAUSTIVE = 8, 1  # classes of an image, on average


@dataclass(frozen=True)
class Size:
    """How much is made."""

    train_images: int = OF_IMAGES
    train_instances: int = 1_270_141
    val_images: int = 19_809
    val_instances: int = 244_707
    classes: int = 1203
    detections: int = 300
    jpegs: int = 48
    subset: int = 1_001  # validation images that the lvis package can hold; odd, so that two ranks differ
    samples: int = 1_000  # training images that are loaded
    proposals: int = 1_000
    anchors: tuple[int, int] = (800, 1008)  # image (height, width) with 200,655 anchors on five levels
    objects: int = 500
    masks: int = 300  # rasterised at a time
    rounds: int = 9  # of what is timed against each other


FULL = Size()
SMALL = Size(60, 700, 21, 240, 40, 12, 4, 11, 16, 50, (96, 128), 20, 20, 3)


SIZES = {"full": FULL, "small": SMALL}
TRAIN, VAL, SUBSET = "train.json", "val.json", "subset.json"


def make_files(folder: Path, size: Size) -> None:
    """All files for one size. A complete one is left as it is: equal sizes give equal files."""
    write_images(folder / "train2017", size.jpegs)
    wanted = {
        TRAIN: (size.train_images, size.train_instances),
        VAL: (size.val_images, size.val_instances),
        SUBSET: (size.subset, size.subset * size.val_instances // size.val_images),
    }
    for seed, (name, (images, instances)) in enumerate(wanted.items()):
        if not (folder / name).exists():
            write_annotations(folder / f"{name}.tmp", images, instances, size, seed)
            (folder / f"{name}.tmp").rename(folder / name)


def write_images(folder: Path, count: int, seed: int = 0) -> None:
    """JPEGs of quality 90 with the spectrum of photographs, amplitude 1 / frequency, and some hard edges."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, 1])
    for k in range(count):
        height, width = SIDES[k % len(SIDES)]
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]) + 1 / width
        noise = np.fft.rfft2(rng.standard_normal((3, height, width))) / frequency
        plane = np.fft.irfft2(noise, s=(height, width))
        plane = 0.7 * plane.mean(axis=0) + 0.3 * plane  # channels of a photograph go together
        for _ in range(12):
            top, left = rng.integers(height), rng.integers(width)
            edge = (slice(top, top + 20 + rng.integers(150)), slice(left, left + 20 + rng.integers(150)))
            plane[(slice(None), *edge)] += rng.normal(0, plane.std())
        pixels = (128 + 55 * plane / plane.std()).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / _image_name(k), quality=90)


def _image_name(k: int) -> str:
    return f"{k + 1:012d}.jpg"


def write_annotations(path: Path, images: int, instances: int, size: Size, seed: int = 0) -> None:
    """An LVIS v1 file whose images are the `size.jpegs` files in turn; written as a stream."""
    rng = np.random.default_rng([seed, 2])
    image_of, label_of, counts = _draw_instances(images, instances, size.classes, rng)
    sides = np.array([SIDES[k % len(SIDES)] for k in range(size.jpegs)])[np.arange(images) % size.jpegs]
    with path.open("w", encoding="utf-8") as file:
        file.write('{"info": {"description": "made up"}, "annotations": [')
        for start in range(0, instances, CHUNK):
            rows = slice(start, min(start + CHUNK, instances))
            file.write(", " if start else "")
            _write_chunk(file, start, image_of[rows], label_of[rows], sides[image_of[rows]], rng)
        file.write('], "images": [')
        present = np.split(label_of, np.searchsorted(image_of, np.arange(1, images)))
        for k in range(images):
            file.write((", " if k else "") + _image_entry(k, sides[k], present[k], size, rng))
        categories = [
            {"id": c + 1, "name": f"class_{c + 1}", "frequency": frequency_group(n), "image_count": n}
            for c, n in enumerate(counts.tolist())
        ]
        file.write(f'], "licenses": [], "categories": {json.dumps(categories)}}}')


def _draw_instances(
    images: int, instances: int, classes: int, rng: Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image (ascending) and label of each instance, and each class's number of images."""
    quantiles = (np.arange(classes) + 0.5) / classes
    expected = np.exp([LOG_IMAGES.inv_cdf(q) for q in quantiles]).clip(max=MOST_IMAGES) * images / OF_IMAGES
    counts = rng.permutation(expected.round().clip(1, images).astype(np.int64))
    image = np.concatenate([rng.choice(images, n, replace=False) for n in counts])
    label = np.repeat(np.arange(classes), counts)
    if len(image) > instances:
        raise ValueError(f"{instances} instances are fewer than the {len(image)} images of all classes")
    rich = rng.lognormal(0, 1.5, len(image)) * rng.lognormal(0, 0.5, images)[image]
    copies = 1 + rng.multinomial(instances - len(image), rich / rich.sum())
    image, label = np.repeat(image, copies), np.repeat(label, copies)
    order = np.argsort(image, kind="stable")
    return image[order], label[order], counts


def draw_boxes(sides: np.ndarray, rng: Generator) -> np.ndarray:
    """Boxes [n, 4] xyxy inside images of `sides` [n, 2] (height, width): half are below 37 pixels."""
    extent = np.exp(rng.normal(3.6, 1.0, (len(sides), 1)) + rng.normal(0, 0.35, (len(sides), 2)))
    extent = extent.clip(4, 0.95 * sides)
    corner = rng.random((len(sides), 2)) * (sides - extent)
    return np.concatenate([corner, corner + extent], axis=1)[:, [1, 0, 3, 2]]


_HUNDREDTHS = [repr(k / 100) for k in range(100 * 640 + 1)]  # a coordinate's text, made once


def _write_chunk(
    file: TextIO, first: int, image: np.ndarray, label: np.ndarray, sides: np.ndarray, rng: Generator
) -> None:
    boxes = draw_boxes(sides, rng)
    points = np.exp(rng.normal(3.7, 0.6, len(boxes))).clip(6, 400).astype(np.int64)
    ends = np.cumsum(points)
    owner = np.repeat(np.arange(len(boxes)), points)
    turn = 2 * np.pi * (np.arange(len(owner)) - (ends - points)[owner]) / points[owner]
    radius = 0.5 - 0.1 * rng.random(len(owner))
    centre, extent = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    ring = np.stack([np.cos(turn), np.sin(turn)], axis=1) * radius[:, None]
    outline = (100 * (centre[owner] + extent[owner] * ring)).round().astype(np.int64)
    low = np.minimum.reduceat(outline, ends - points) / 100
    extent = np.maximum.reduceat(outline, ends - points) / 100 - low
    x, y = outline.T / 100
    following = np.arange(1, len(owner) + 1)
    following[ends - 1] = ends - points
    areas = np.abs(np.add.reduceat(x * y[following] - x[following] * y, ends - points)) / 2
    numbers = [_HUNDREDTHS[k] for k in outline.ravel().tolist()]
    entries = []
    for k, (end, count) in enumerate(zip(ends.tolist(), points.tolist(), strict=True)):
        polygon = ", ".join(numbers[2 * (end - count) : 2 * end])
        bbox = ", ".join(f"{side:.2f}" for side in (*low[k], *extent[k]))
        entries.append(
            f'{{"area": {areas[k]:.2f}, "id": {first + k + 1}, "segmentation": [[{polygon}]], '
            f'"image_id": {image[k] + 1}, "bbox": [{bbox}], "category_id": {label[k] + 1}}}'
        )
    file.write(", ".join(entries))


def _image_entry(k: int, sides: np.ndarray, present: np.ndarray, size: Size, rng: Generator) -> str:
    absent = np.setdiff1d(rng.integers(size.classes, size=rng.poisson(NEGATIVES)), present)
    partial = np.unique(present)[: rng.poisson(NOT_EXHAUSTIVE)]
    name = _image_name(k % size.jpegs)
    return json.dumps(
        {
            "date_captured": "2013-11-14 17:02:52",
            "neg_category_ids": (absent + 1).tolist(),
            "id": k + 1,
            "license": 4,
            "height": int(sides[0]),
            "width": int(sides[1]),
            "flickr_url": f"http://farm7.staticflickr.com/6116/{k:010d}_30c7ef3f0b_z.jpg",
            "coco_url": f"http://images.cocodataset.org/train2017/{name}",
            "not_exhaustive_category_ids": (partial + 1).tolist(),
        }
    )


def draw_detections(
    truth: LvisAnnotations, count: int, *, masks: bool, images: range, seed: int = 0
) -> Iterator[Detections]:
    """`count` detections for each of the images, the same for an image whatever the others are.

    Up to half lie near an object, most of these with its class; the rest are anywhere, half of them with a
    class that is verified in the image. Masks are ellipses in the boxes.
    """
    for k in images:
        rng = np.random.default_rng([seed, 3, k])
        record, objects = truth.image(k), truth.instances(k)
        sides = np.tile([record.height, record.width], (count, 1))
        boxes, labels = draw_boxes(sides, rng), rng.integers(truth.num_classes, size=count)
        verified = np.concatenate([objects.labels, record.neg_category_labels])
        if len(verified):
            labels[: 3 * count // 4] = rng.choice(verified, 3 * count // 4)
        near = min(count // 2, 3 * len(objects.labels))
        chosen = np.arange(near) % max(len(objects.labels), 1)
        extent = np.tile(objects.boxes[chosen, 2:] - objects.boxes[chosen, :2], 2)
        boxes[:near] = objects.boxes[chosen] + 0.08 * extent * rng.standard_normal((near, 4))
        right = rng.random(near) < 0.8
        labels[:near][right] = objects.labels[chosen][right]
        scores = rng.beta(1, 8, count)
        scores[:near] = rng.beta(2, 3, near)
        boxes = _whole_pixels(boxes, record.height, record.width) if masks else _inside(boxes, *sides[0])
        order = np.argsort(-scores)
        boxes = boxes[order]
        codes = ellipses(boxes.astype(np.int64), record.height, record.width) if masks else None
        yield Detections(record.image_id, boxes, scores[order], labels[order], codes)


def _inside(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    low = boxes[:, :2].clip(0, (width - 4, height - 4))
    return np.concatenate([low, boxes[:, 2:].clip(low + 1, (width, height))], axis=1)


def _whole_pixels(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    low = boxes[:, :2].round().clip(0, (width - 4, height - 4))
    return np.concatenate([low, boxes[:, 2:].round().clip(low + 1, (width - 1, height - 1))], axis=1)


def ellipses(boxes: np.ndarray, height: int, width: int) -> list[dict[str, object]]:
    """Compressed COCO RLEs of the ellipses in whole-pixel boxes [D, 4], at least a pixel in every column."""
    widths = boxes[:, 2] - boxes[:, 0]
    owner = np.repeat(np.arange(len(boxes)), widths)
    first = np.cumsum(widths) - widths
    column = np.arange(len(owner)) - first[owner]
    tall = (boxes[:, 3] - boxes[:, 1])[owner]
    run = (tall * np.sqrt(1 - ((2 * column + 1) / widths[owner] - 1) ** 2)).astype(np.int64).clip(1)
    start = (boxes[owner, 0] + column) * height + boxes[owner, 1] + (tall - run) // 2
    edges = np.stack([start, start + run], axis=1).ravel()
    # Each ellipse's edges, and the end of the image behind them; counts are the differences.
    edges = np.insert(edges, 2 * (first + widths), height * width)
    lengths = 2 * widths + 1
    counts = np.diff(edges, prepend=0)
    begins = np.cumsum(lengths) - lengths
    counts[begins] = edges[begins]
    texts = _compress(counts, begins)
    return [{"size": [height, width], "counts": text} for text in texts]


def _compress(counts: np.ndarray, begins: np.ndarray) -> list[str]:
    """COCO's text of runs, one for each stretch that begins at `begins`.

    From the fourth run on, differences to the run two before; groups of five bits, low first, in characters
    from 48 on, 32 added where more follow.
    """
    place = np.arange(len(counts)) - np.repeat(begins, np.diff(begins, append=len(counts)))
    value = counts.copy()
    value[2:] -= np.where(place[2:] > 2, counts[:-2], 0)
    groups, present = np.zeros((len(counts), 5), dtype=np.uint8), np.zeros((len(counts), 5), dtype=bool)
    more = np.ones(len(counts), dtype=bool)
    for k in range(5):  # 25 bits: images of up to 16 million pixels
        present[:, k] = more
        bits = value & 31
        value >>= 5
        more = more & (value != np.where(bits & 16, -1, 0))
        groups[:, k] = 48 + bits + 32 * more
    text = groups[present].tobytes().decode("ascii")
    ends = np.cumsum(np.add.reduceat(present.sum(axis=1), begins)).tolist()
    return [text[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
