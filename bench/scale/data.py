"""Annotations, loading and rasterising at LVIS's size."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.ops import roi_align

from bench.records import Row
from bench.scale.files import TRAIN, VAL, Size
from bench.scale.findings import Spent, finding, kilobytes, peak_mb, private_mb, spent
from bench.timing import CpuTimer, interleave, quantiles, speed_up
from detector.config import DataConfig
from detector.data import (
    FlipAndResize,
    InstanceMasks,
    LvisAnnotations,
    LvisDataset,
    SampleRef,
    build_train_loader,
    collate,
)
from detector.data.dataset import read_image

MASK_CELLS = 28
SIDES = (320, 640, 1280, 2560, 5120)
WORKERS, BATCH = 2, 2


def data(folder: Path, size: Size) -> list[Row]:
    """The training annotations once, then what loads samples from them."""
    imports = peak_mb() / 1024
    with spent() as taken:
        annotations = LvisAnnotations.from_file(folder / TRAIN)
    peak = peak_mb() / 1024
    if (len(annotations), annotations.num_instances) != (size.train_images, size.train_instances):
        raise AssertionError(f"{len(annotations)} images, {annotations.num_instances} instances were read")
    what = f"read the annotations of {len(annotations):,} images, {annotations.num_instances:,} instances"
    file_mb = (folder / TRAIN).stat().st_size / 2**20
    return [
        finding(what, taken.cpu, "s", at_most=60, beside={"wall clock, s": taken.wall}, file_mb=file_mb),
        finding("its peak memory", peak, "GiB", at_most=2, beside={"imports alone, GiB": imports}),
        *_workers(annotations, folder, size),
        *_one_core(annotations, folder, size),
    ]


def _workers(annotations: LvisAnnotations, folder: Path, size: Size) -> list[Row]:
    """What a worker of the training loader has for itself: at first, and after many samples."""
    config = DataConfig()
    loader, sampler = build_train_loader(
        annotations,
        folder,
        batch_size=BATCH,
        min_sizes=config.min_sizes,
        max_size=config.max_size,
        num_workers=WORKERS,
    )
    sampler.set_position(0)
    batches, steps = iter(loader), size.samples // BATCH
    next(batches)
    pids = [process.pid for process in multiprocessing.active_children() if process.pid]
    at_first = max(map(private_mb, pids))
    with spent() as taken:
        for _ in islice(batches, steps - 1):
            pass
    most = max(map(private_mb, pids))
    resident = max(kilobytes(f"/proc/{pid}/smaps_rollup", "Rss:") / 1024 for pid in pids)
    each = steps * BATCH // WORKERS
    beside = {"after the first sample, MiB": at_first, "resident, mostly shared, MiB": resident}
    rate = (steps - 1) * BATCH / taken.wall
    return [
        finding(f"a worker's own memory after {each} samples", most, "MiB", at_most=100, beside=beside),
        finding(
            f"loaded by 8 workers, taken as {8 // WORKERS} times what {WORKERS} did (wall clock)",
            8 // WORKERS * rate,
            "images/s",
            at_least=20,
            beside={f"{WORKERS} workers, images/s": rate},
        ),
    ]


def _one_core(annotations: LvisAnnotations, folder: Path, size: Size) -> list[Row]:
    """Training samples on one core, by stage: decode, targets, flip and resize, batch."""
    torch.set_num_threads(1)
    config = DataConfig()
    transform = FlipAndResize(config.min_sizes, config.max_size, config.flip)
    dataset = LvisDataset(annotations, folder, training=True)
    names = ("of which decode", "decode and targets", "flip and resize", "batch")
    stages = {name: Spent() for name in names}
    references = [SampleRef(int(k), int(k)) for k in np.linspace(0, len(dataset) - 1, size.samples // 4)]
    for reference in references:
        with spent() as decode:
            read_image(folder, annotations.image(reference.index))
        with spent() as both:
            image, target = dataset[reference]
        with spent() as resize:
            sample = transform(image, target, np.random.default_rng(reference.seed))
        with spent() as batch:
            collate([sample])
        for name, taken in zip(names, (decode, both, resize, batch), strict=True):
            stages[name].cpu += taken.cpu
    ms = {name: 1000 * stage.cpu / len(references) for name, stage in stages.items()}
    rate = 1000 / (ms["decode and targets"] + ms["flip and resize"] + ms["batch"])
    beside = {f"{name}, ms": value for name, value in ms.items()}
    what = "full-size training images made by one core, JPEGs in the page cache"
    return [finding(what, rate, "images/s", at_least=2.5, beside=beside)]


def rasterise(folder: Path, size: Size) -> list[Row]:
    """The same outlines and boxes in ever larger images, beside whole-image masks cropped by RoIAlign."""
    torch.set_num_threads(1)
    annotations = LvisAnnotations.from_file(folder / VAL)
    found = [annotations.instances(k) for k in range(len(annotations))]
    shrink = SIDES[0] / 640
    outlines = [[part * shrink for part in parts] for each in found for parts in each.segmentations]
    boxes = torch.from_numpy(np.concatenate([each.boxes for each in found])[: size.masks] * shrink)
    masks, index = InstanceMasks(outlines[: size.masks]), torch.arange(len(boxes))
    few = index[:20]
    steps: dict[str, Callable[[], Tensor]] = {}
    for side in SIDES:
        scale = side / SIDES[0]
        scaled = masks.scale(scale, scale)
        steps[f"{side}"] = _bind(scaled.crop, scale * boxes, index, MASK_CELLS)
        if side <= 1280:
            steps[f"whole {side}"] = _bind(_whole_image, scaled[few], scale * boxes[few], side)
    ours = [steps[f"{side}"]() for side in SIDES]
    if any((planes != ours[0]).float().mean() > 1e-3 for planes in ours):
        raise AssertionError("the scaled masks differ")
    samples = interleave(steps, CpuTimer(1), rounds=size.rounds, min_ms=5 * size.rounds)
    medians = {name: quantiles([sample.ms for sample in samples[name]])["p50"] for name in steps}
    us = {
        name: 1000 * ms / (len(few) if name.startswith("whole") else len(index))
        for name, ms in medians.items()
    }
    first = samples[f"{SIDES[0]}"]
    over_first = {f"{side}": 1 / speed_up(samples[f"{side}"], first) for side in SIDES[1:]}
    what = f"rasterise a mask: dearest image side of {SIDES[1]} to {SIDES[-1]} over side {SIDES[0]}"
    dearest = max(over_first.values())
    return [finding(what, dearest, "times", at_most=1.25, beside=over_first, microseconds=us)]


def _bind(function: Callable[..., Tensor], *arguments: object) -> Callable[[], Tensor]:
    return lambda: function(*arguments)


def _whole_image(masks: InstanceMasks, boxes: Tensor, side: int) -> Tensor:
    """The usual way: a mask of the image's size for each object, cropped and resized."""
    planes = torch.from_numpy(coco_mask.decode(masks.to_rle(side, side))).permute(2, 0, 1)
    rois = torch.cat([torch.arange(len(boxes))[:, None].float(), boxes], dim=1)
    return roi_align(planes[:, None].float(), rois, (MASK_CELLS, MASK_CELLS), aligned=True)
