"""Detect objects on images that no annotation file knows."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.v2 import functional as F

from detector.config import ConfigError
from detector.data.transforms import resized_size
from detector.engine.distributed import process_group
from detector.engine.infer import load_run, to_detections
from detector.evaluation import Detections
from detector.model import ClassTable
from detector.visualize import draw_detections

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


def predict(run: Path, sources: Sequence[Path], output: Path, threshold: float) -> int:
    """Draw what the model of `run` sees on every image into `output`; returns their number.

    output/predictions.json lists {file, category_id, category, bbox [x, y, w, h], score, segmentation RLE} in
    pixels of the file, for scores of at least `threshold`.
    Raises ConfigError for sources without images, CheckpointError, OSError for an unreadable image.
    """
    files = find_images(sources)
    names = _output_names(files)
    config, classes, model = load_run(run)
    output.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    with process_group(config.device) as process, torch.inference_mode():
        model.to(process.device)
        for image_id, (file, name) in enumerate(zip(files, names, strict=True), start=1):
            picture = _read(file)
            height, width = resized_size(
                picture.height, picture.width, config.data.test_size, config.data.max_size
            )
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
            resized = F.resize(pixels, [height, width], antialias=True)
            scale = (width / picture.width, height / picture.height)
            found = to_detections(model([resized])[0], image_id, scale, (picture.height, picture.width))
            found = found.select(found.scores >= threshold)
            draw_detections(picture, found, classes.names).save(output / name)
            records += _records(file, found, classes)
    text = json.dumps(records, indent=1) + "\n"
    (output / "predictions.json").write_text(text, encoding="utf-8")
    return len(files)


def find_images(sources: Sequence[Path]) -> list[Path]:
    """The given files, and the images directly inside the given folders, in order of name."""
    files = []
    for source in sources:
        inside = (
            sorted(p for p in source.iterdir() if p.suffix.lower() in SUFFIXES)
            if source.is_dir()
            else [source]
        )
        if not inside:
            raise ConfigError(f"{source} holds no images ({', '.join(sorted(SUFFIXES))})")
        files += inside
    for file in files:
        if not file.is_file():
            raise ConfigError(f"{file} does not exist")
    return files


def _output_names(files: Sequence[Path]) -> list[str]:
    """One picture name per file; a name that is taken gets a number."""
    names: list[str] = []
    for file in files:
        candidates = itertools.chain([file.stem], (f"{file.stem}-{k}" for k in itertools.count(2)))
        names.append(next(name for stem in candidates if (name := f"{stem}.png") not in names))
    return names


def _read(file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{file} cannot be decoded: {error}") from None


def _records(file: Path, found: Detections, classes: ClassTable) -> list[dict[str, Any]]:
    rows = zip(
        found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), found.masks or [], strict=True
    )
    return [
        {
            "file": str(file),
            "category_id": classes.category_ids[label],
            "category": classes.names[label],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": score,
            "segmentation": mask,
        }
        for (x0, y0, x1, y1), score, label, mask in rows
    ]
