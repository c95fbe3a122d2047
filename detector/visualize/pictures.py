"""Detections drawn on images, and pages that show them beside the truth."""

from __future__ import annotations

import colorsys
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from pycocotools import mask as coco_mask
from torchvision.ops import nms

from detector.evaluation.results import Detections, read_results

if TYPE_CHECKING:
    from detector.config import Config
    from detector.data.annotations import LvisAnnotations
    from detector.model.classes import ClassTable

MASK_OPACITY = 0.35
SAME_PLACE_IOU = 0.5
LABEL_OVERLAP = 0.1  # share of a label that others may cover
SMALLEST_SIDE = (
    640  # pictures of one image are enlarged to at least this long side, so that labels can be read
)
MARGIN, GAP, HEADER = 24, 8, 26  # of a page, in pixels
INK, PALE = (25, 25, 25), (110, 110, 110)

Colour = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]  # x1, y1, x2, y2


def class_colour(label: int) -> Colour:
    """The colour of a class, the same in every picture: hues a golden section apart, in three shades."""
    hue = (0.02 + 0.6180339887 * label) % 1.0
    saturation, value = ((0.95, 1.0), (0.75, 0.85), (0.55, 1.0))[label % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_detections(
    image: Any,
    detections: Detections,
    class_names: Sequence[str],
    *,
    score_threshold: float = 0.0,
    max_detections: int = 100,
    show_scores: bool = True,
    long_side: int | None = None,
) -> Image.Image:
    """The image with masks, boxes, class names and scores drawn over it.

    Where the labels of better detections leave no room, a detection keeps its colour but gets no label.

    Args:
        image: PIL image, uint8 array [H, W, 3] or uint8 tensor [3, H, W].
        detections: boxes and masks in the image's pixels.
        class_names: name of each label ([C]).
        score_threshold: detections with a lower score are left out.
        max_detections: at most that many are drawn, highest scores first.
        long_side: longer side of the result; by default that of the image, but at least SMALLEST_SIDE.

    Raises:
        TypeError, ValueError: not an image; a label without a name; a mask of another size than the image.
    """
    picture = _as_picture(image)
    shown = _best(detections, score_threshold, max_detections)
    _check_fit(shown, class_names, picture.size)
    scale = (long_side or max(*picture.size, SMALLEST_SIDE)) / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.BICUBIC)

    order = range(len(shown) - 1, -1, -1)  # the best last, on top
    if shown.masks is not None:
        for row in order:
            _paint_mask(picture, shown.masks[row], class_colour(int(shown.labels[row])))
    canvas = ImageDraw.Draw(picture)
    boxes = shown.boxes.astype(np.float64) * scale
    line = max(2, max(size) // 320)
    for row in order:
        canvas.rectangle(boxes[row].tolist(), outline=class_colour(int(shown.labels[row])), width=line)

    font = _font(max(13, max(size) // 42))
    height = sum(font.getmetrics())
    taken: list[Rectangle] = []
    for row in range(len(shown)):
        text = class_names[shown.labels[row]] + (f" {shown.scores[row]:.2f}" if show_scores else "")
        place = _place_label(canvas.textlength(text, font=font) + 6, height, boxes[row].tolist(), size, taken)
        if place is not None:
            taken.append(place)
            colour = class_colour(int(shown.labels[row]))
            canvas.rectangle(place, fill=colour)
            canvas.text((place[0] + 3, place[1]), text, fill=_readable_on(colour), font=font)
    return picture


@dataclass
class Example:
    """An image with its annotations and what the detector found; `truth` needs no meaningful scores."""

    image: Any  # as in draw_detections
    truth: Detections
    predictions: Detections
    title: str = ""


def draw_page(
    path: str | os.PathLike[str],
    examples: Sequence[Example],
    class_names: Sequence[str],
    *,
    title: str = "",
    score_threshold: float = 0.3,
    max_detections: int = 20,
    pairs_per_row: int = 2,
    panel: int = 480,
) -> Path:
    """Writes a picture with each example as a pair: truth on the left, predictions on the right.

    Args:
        path: file to write; the ending says the format.
        title: a line at the top of the page.
        panel: pixels of the longer side of each image on the page, whatever its size.

    Raises:
        ValueError: no examples; see also `draw_detections`.
    """
    if not examples:
        raise ValueError("a page needs at least one example")
    pairs = [_draw_pair(example, class_names, score_threshold, max_detections, panel) for example in examples]
    columns = min(pairs_per_row, len(pairs))
    rows = [pairs[start : start + columns] for start in range(0, len(pairs), columns)]
    pair_width = 2 * panel + GAP
    top = MARGIN + (40 if title else 0)
    height = top + sum(max(pair.height for pair in row) + MARGIN for row in rows)
    page = Image.new("RGB", (MARGIN + columns * (pair_width + MARGIN), height), "white")
    if title:
        ImageDraw.Draw(page).text((MARGIN, MARGIN - 4), title, fill=INK, font=_font(22))
    for row in rows:
        for column, pair in enumerate(row):
            page.paste(pair, (MARGIN + column * (pair_width + MARGIN), top))
        top += max(pair.height for pair in row) + MARGIN
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)
    return path


def draw_run_page(config: Config, classes: ClassTable) -> Path | None:
    """Draws run_dir/predictions.png from run_dir/results.json; None if no validation image is annotated."""
    from detector.data.annotations import LvisAnnotations
    from detector.data.dataset import read_image

    annotations = LvisAnnotations.from_file(config.data.val_file)
    indices = choose_images(annotations, config.eval.pictures)
    if not indices:
        return None
    records = [annotations.image(index) for index in indices]
    image_ids = [record.image_id for record in records]
    found = read_results(config.run_dir / "results.json", classes.category_ids, image_ids)
    nothing = np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64)
    examples = []
    for index, record in zip(indices, records, strict=True):
        picture = Image.fromarray(read_image(config.data.image_folder, record).permute(1, 2, 0).numpy())
        predictions = found.get(record.image_id) or Detections(record.image_id, *nothing)
        examples.append(
            Example(picture, truth_of(annotations, index), predictions, f"image {record.image_id}")
        )
    return draw_page(config.run_dir / "predictions.png", examples, classes.names, title=config.run_dir.name)


def choose_images(annotations: LvisAnnotations, count: int) -> list[int]:
    """Indices of up to `count` annotated images, evenly spread from those with the rarest classes upwards."""
    images, labels = annotations.image_label_pairs()
    if count < 1 or len(images) == 0:
        return []
    rarity = np.full(len(annotations), np.iinfo(np.int64).max)
    np.minimum.at(rarity, images, annotations.image_count[labels])
    annotated = np.unique(images)
    ordered = annotated[np.argsort(rarity[annotated], kind="stable")]
    return ordered[
        np.unique(np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int))
    ].tolist()


def truth_of(annotations: LvisAnnotations, index: int) -> Detections:
    """The annotations of an image, crowd regions left out, as detections of score 1."""
    from detector.data.masks import InstanceMasks

    image, instances = annotations.image(index), annotations.instances(index)
    rows = np.flatnonzero(~instances.crowd)
    masks = InstanceMasks(instances.segmentations)[rows].to_rle(image.height, image.width)
    return Detections(
        image.image_id, instances.boxes[rows], np.ones(len(rows)), instances.labels[rows], masks
    )


def _draw_pair(
    example: Example, class_names: Sequence[str], score_threshold: float, max_detections: int, panel: int
) -> Image.Image:
    truth, predictions = example.truth, example.predictions
    distinct = _best_class_at_each_place(predictions)
    left = draw_detections(
        example.image, truth, class_names, max_detections=len(truth), show_scores=False, long_side=panel
    )
    right = draw_detections(
        example.image,
        distinct,
        class_names,
        score_threshold=score_threshold,
        max_detections=max_detections,
        long_side=panel,
    )
    above = int((predictions.scores >= score_threshold).sum())
    if above:
        drawn = min(int((distinct.scores >= score_threshold).sum()), max_detections)
        summary = f"best class at each of {drawn} places, score ≥ {score_threshold:g}"
    elif len(predictions):
        summary = f"none with score ≥ {score_threshold:g}, the highest is {predictions.scores.max():.2g}"
    else:
        summary = "none"
    pair = Image.new("RGB", (2 * panel + GAP, HEADER + left.height), "white")
    canvas, font = ImageDraw.Draw(pair), _font(15)
    count = f"{len(truth)} object{'s' * (len(truth) != 1)}"
    for start, head, rest in (
        (0, "truth", ", ".join(filter(None, [example.title, count]))),
        (panel + GAP, "predictions", summary),
    ):
        canvas.text((start, 2), head, fill=INK, font=font)
        canvas.text((start + canvas.textlength(head + "   ", font=font), 2), rest, fill=PALE, font=font)
    pair.paste(left, (0, HEADER))
    pair.paste(right, (panel + GAP, HEADER))
    return pair


def _as_picture(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    array = np.asarray(image)
    if not isinstance(image, np.ndarray) and array.ndim == 3:  # a tensor [3, H, W]
        array = array.transpose(1, 2, 0)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise TypeError(
            "expected a PIL image, a uint8 array [H, W, 3] or a uint8 tensor [3, H, W], "
            f"got {type(image).__name__} of {array.dtype} {list(np.shape(image))}"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _best(detections: Detections, score_threshold: float, max_detections: int) -> Detections:
    order = np.argsort(-detections.scores, kind="stable")
    return detections.select(order[detections.scores[order] >= score_threshold][:max_detections])


def _best_class_at_each_place(detections: Detections) -> Detections:
    """For a person: of the classes that claim one object, the likeliest (NMS over all classes)."""
    if len(detections) == 0:
        return detections
    boxes = torch.from_numpy(np.ascontiguousarray(detections.boxes, dtype=np.float32))
    scores = torch.from_numpy(np.ascontiguousarray(detections.scores, dtype=np.float32))
    return detections.select(nms(boxes, scores, SAME_PLACE_IOU).numpy())


def _check_fit(detections: Detections, class_names: Sequence[str], size: tuple[int, int]) -> None:
    where = f"detections of image {detections.image_id}"
    if len(detections) and detections.labels.max() >= len(class_names):
        raise ValueError(
            f"{where}: label {detections.labels.max()} has no name, there are {len(class_names)}"
        )
    for mask in detections.masks or []:
        if mask["size"] != [size[1], size[0]]:
            raise ValueError(f"{where}: mask of size {mask['size']}, the image has [{size[1]}, {size[0]}]")


def _paint_mask(picture: Image.Image, mask: dict[str, Any], colour: Colour) -> None:
    """Tints the mask's inside and draws its outline, both at the picture's resolution."""
    small = Image.fromarray(255 * coco_mask.decode(mask))
    inside = small.resize(picture.size, Image.Resampling.BILINEAR).point(lambda value: 255 * (value > 127))
    inner = inside.filter(ImageFilter.MinFilter(3))
    outline = Image.fromarray(np.asarray(inside) - np.asarray(inner))
    tint = inside.point(lambda value: round(value * MASK_OPACITY))
    picture.paste(colour, mask=tint)
    picture.paste(colour, mask=outline)


def _place_label(
    width: float, height: float, box: Sequence[float], limits: tuple[int, int], taken: Sequence[Rectangle]
) -> Rectangle | None:
    """Where a label of that size lies at its box, inside the picture (`limits`) and clear of `taken`.

    None if every such place would cover more than LABEL_OVERLAP of the label.
    """
    x1, y1, x2, y2 = box
    lefts = (x1, x2 - width, (x1 + x2 - width) / 2)
    tops = (y1 - height, *np.arange(y1, max(y2 - height, y1) + 1, height).tolist(), y2)
    places = []
    for top in tops:
        for left in lefts:
            x = min(max(left, 0.0), max(limits[0] - width, 0.0))
            y = min(max(top, 0.0), max(limits[1] - height, 0.0))
            places.append((x, y, x + width, y + height))
    covered = [sum(_overlap(place, other) for other in taken) for place in places]
    best = int(np.argmin(covered))
    return places[best] if covered[best] <= LABEL_OVERLAP * width * height else None


def _readable_on(colour: Colour) -> str:
    luma = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]  # ITU-R BT.601
    return "black" if luma > 130 else "white"


def _overlap(first: Rectangle, second: Rectangle) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(width, 0.0) * max(height, 0.0)


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which Matplotlib brings along: it has the letters of most languages."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
