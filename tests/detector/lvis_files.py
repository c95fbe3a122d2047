"""Small annotation files for the tests of the data room."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

TRIANGLE = [10.0, 10.0, 30.0, 10.0, 10.0, 40.0]


def image_entry(image_id: int = 1, width: int = 64, height: int = 48, **changes: Any) -> dict[str, Any]:
    """An image as LVIS v1 lists it."""
    entry = {
        "id": image_id,
        "width": width,
        "height": height,
        "coco_url": f"http://images.cocodataset.org/train2017/{image_id:012d}.jpg",
        "neg_category_ids": [],
        "not_exhaustive_category_ids": [],
    }
    return {**entry, **changes}


def annotation_entry(annotation_id: int = 1, image_id: int = 1, **changes: Any) -> dict[str, Any]:
    """A triangle of category 3 with corners (10, 10), (30, 10), (10, 40)."""
    entry = {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": 3,
        "bbox": [10.0, 10.0, 20.0, 30.0],
        "area": 300.0,
        "segmentation": [TRIANGLE],
    }
    return {**entry, **changes}


def category_entry(category_id: int, frequency: str = "f") -> dict[str, Any]:
    return {"id": category_id, "name": f"thing {category_id}", "frequency": frequency}


def lvis_file(
    images: list[dict[str, Any]] | None = None,
    annotations: list[dict[str, Any]] | None = None,
    categories: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """A whole file; as in lvis_v1_train.json, the annotations come before what they refer to."""
    return {
        "info": {"version": "1"},
        "annotations": [annotation_entry()] if annotations is None else annotations,
        "images": [image_entry()] if images is None else images,
        "licenses": [],
        "categories": [category_entry(k) for k in (3, 7, 9)] if categories is None else categories,
    }


def write_json(folder: Path, content: Any) -> Path:
    path = folder / "annotations.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_image(root: Path, image: dict[str, Any], mode: str = "RGB", **options: Any) -> Path:
    """A picture whose red channel is a ramp from left to right, where COCO keeps it: train2017/<id>.jpg."""
    path = root / "train2017" / f"{image['id']:012d}.jpg"
    path.parent.mkdir(exist_ok=True)
    width, height = image["width"], image["height"]
    ramp = Image.linear_gradient("L").rotate(90).resize((width, height))
    green, blue = (Image.new("L", (width, height), value) for value in (40, 90))
    picture = Image.merge("RGB", [ramp, green, blue])
    picture.convert(mode).save(path, quality=95, **options)
    return path
