"""A detector and pictures small enough that a test trains on them in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import gol_kernels as gk
from detector.config import Config, load_config
from detector.data.masks import InstanceMasks
from detector.model import ClassTable

NUM_CLASSES = 6
IMAGE_COUNT = [1, 5, 20, 60, 150, 400]  # of 1000 images
TINY = (
    "model.backbone=resnet18",
    "model.weights=none",
    "model.norm=gn",
    "model.trainable_stages=5",
    "model.fpn_channels=64",
    "model.anchor_sizes=[8, 16, 32, 64, 128]",
    "model.canonical_size=64",
    "model.pre_nms_train=100",
    "model.post_nms_train=50",
    "model.pre_nms_test=50",
    "model.post_nms_test=50",
    "model.rois_per_image=32",
    "model.box_head_width=64",
    "model.mask_head_width=32",
    "model.mask_head_layers=1",
    "loss.threshold=0.03",
)


def tiny_config(*overrides: str) -> Config:
    return load_config("mask_rcnn_r50_fpn_1x", [*TINY, *overrides])


def tiny_classes() -> ClassTable:
    counts = torch.tensor(IMAGE_COUNT)
    return ClassTable(
        category_ids=[3, 5, 8, 9, 12, 20],
        names=["ant", "bee", "cat", "dog", "eel", "fox"],
        frequency=["r", "r", "c", "c", "f", "f"],
        stats=gk.ClassStats(image_count=counts, instance_count=2 * counts, num_images=1000),
    )


def picture(objects: list[tuple[int, list[int]]], size: int = 96, seed: int = 0) -> tuple[Tensor, dict]:
    """A noisy image with one coloured rectangle per (label, [x0, y0, x1, y1]), and its target."""
    image = torch.randint(
        0, 60, (3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    for label, (x0, y0, x1, y1) in objects:
        colour = torch.tensor([(37 * label + 90) % 256, (101 * label + 150) % 256, (211 * label + 30) % 256])
        image[:, y0:y1, x0:x1] = colour[:, None, None].to(torch.uint8)
    boxes = torch.tensor([box for _, box in objects], dtype=torch.float32).reshape(-1, 4)
    polygons = [[[x0, y0, x1, y0, x1, y1, x0, y1]] for _, (x0, y0, x1, y1) in objects]
    return image, {
        "boxes": boxes,
        "labels": torch.tensor([label for label, _ in objects], dtype=torch.int64),
        "masks": InstanceMasks(polygons),
        "image_id": seed,
    }


def two_pictures() -> tuple[list[Tensor], list[dict]]:
    """Eight objects of all six classes on two images."""
    first = picture(
        [(0, [6, 8, 40, 44]), (1, [50, 10, 90, 40]), (2, [10, 55, 50, 90]), (3, [58, 52, 92, 92])], seed=1
    )
    second = picture(
        [(4, [4, 4, 34, 50]), (5, [44, 6, 92, 36]), (4, [8, 60, 60, 90]), (5, [66, 46, 90, 88])], seed=2
    )
    return [first[0], second[0]], [first[1], second[1]]


def write_data_set(root: Path, num_images: int = 10, size: int = 64) -> None:
    """A LVIS file of `num_images` pictures with one or two rectangles each, the last one with none."""
    (root / "images").mkdir(parents=True)
    ids, names = tiny_classes().category_ids, tiny_classes().names
    images, annotations = [], []
    for k in range(num_images):
        spots = [(k % NUM_CLASSES, [4 + k, 6, 30 + k, 34]), ((k + 2) % NUM_CLASSES, [26, 36, 58, 60])]
        objects = [] if k == num_images - 1 else spots[: 1 + k % 2]
        Image.fromarray(picture(objects, size, seed=k)[0].permute(1, 2, 0).numpy()).save(
            root / "images" / f"{k}.png"
        )
        images.append(
            {
                "id": k + 1,
                "file_name": f"{k}.png",
                "height": size,
                "width": size,
                "neg_category_ids": [],
                "not_exhaustive_category_ids": [],
            }
        )
        for label, (x0, y0, x1, y1) in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": k + 1,
                    "category_id": ids[label],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
                }
            )
    categories = [
        {"id": i, "name": name, "frequency": group, "image_count": 1, "instance_count": 1}
        for i, name, group in zip(ids, names, tiny_classes().frequency, strict=True)
    ]
    data = {"images": images, "annotations": annotations, "categories": categories}
    (root / "all.json").write_text(json.dumps(data), encoding="utf-8")


def run_config(root: Path, *overrides: str) -> Config:
    """A run of a few steps on `write_data_set(root / "data")`."""
    return tiny_config(
        f"data.root={root / 'data'}",
        "data.train=all.json",
        "data.val=all.json",
        "data.images=images",
        "data.min_sizes=[64]",
        "data.test_size=64",
        "data.workers=0",
        "device=cpu",
        "train.batch_size=2",
        "train.warmup_steps=0",
        "train.log_interval=2",
        f"output={root / 'run'}",
        *overrides,
    )
