"""``python -m bench training``: make the files, run the trainer with each loss, print and record its step."""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torchvision.models import get_model
from torchvision.models.resnet import BasicBlock, Bottleneck

from bench.records import Row, append, environment
from bench.scale.files import Size, write_annotations, write_images
from bench.timing import quantiles
from bench.training.options import RECORDS
from bench.training.report import lines, problems
from bench.training.timeline import PARTS
from bench.training.trainer import FORMS, Effort, MeasuredTrainer, Planned
from detector.config import Config, load_config
from detector.engine.distributed import Process, process_group

PACKAGES = ("torchvision", "numpy", "pillow")
LOSSES = ("gol", "seesaw")
INSTANCES = 12.7  # of an image, as in LVIS v1
SPARE = 1.25  # images of the epoch over those of the planned steps: no step waits for an epoch to begin
BRANCH = 0.25  # scale of a residual branch: random weights then pass sixteen blocks on at about their size
RATE = 1e-6  # learning rate: random weights must not diverge, and no cost of a step depends on it
FIXED = ("data.root", "data.train", "data.val", "data.images", "output", "loss.name", "train.lr")

# What a user would set on this machine; --set goes over it.
REAL = ("train.precision=bf16", "train.batch_size=16")
DRY = (
    "device=cpu",
    "data.min_sizes=[64]",
    "data.max_size=96",
    "data.workers=0",
    "model.backbone=resnet18",
    "model.fpn_channels=64",
    "model.anchor_sizes=[8, 16, 32, 64, 128]",
    "model.canonical_size=64",
    "model.pre_nms_train=100",
    "model.post_nms_train=50",
    "model.rois_per_image=32",
    "model.box_head_width=64",
    "model.mask_head_width=32",
    "model.mask_head_layers=1",
    "train.batch_size=2",
)
REAL_SIZE, DRY_SIZE = Size(train_images=2000, jpegs=96), Size(train_images=60, classes=200, jpegs=4)
REAL_EFFORT, DRY_EFFORT = Effort(10, 40, 5, syncs=2, profiled=3), Effort(1, 2, 1, syncs=1, profiled=1)


def run(options: argparse.Namespace) -> int:
    """0; 1 when a loss could not be measured, or a step's parts do not add up to what the trainer logged."""
    config, effort = _config(options), _effort(options)
    facts = environment(*PACKAGES)
    facts |= {"run": options.run or facts["run"], "set": options.set}
    records = RECORDS if options.records is None and not options.dry_run else options.records
    end, good = time.monotonic() + options.budget_s, True
    losses = options.losses or LOSSES
    with process_group(config.device) as process, tempfile.TemporaryDirectory() as scratch:
        plan = effort.plan(count_syncs=process.device.type == "cuda")
        prepared = _prepare(config, options.folder or Path(scratch), plan, effort.block, dry=options.dry_run)
        for done, name in enumerate(losses):
            if time.monotonic() > end:
                print(f"time is used up: {', '.join(losses[done:])} not measured")
                break
            own = replace(
                prepared,
                loss=replace(prepared.loss, name=name),
                output=str(Path(scratch) / name),
            )
            load = {"load_average": list(os.getloadavg())}
            try:
                found = measure(own, process, effort, plan)
            except (RuntimeError, ArithmeticError):  # of torch, or a loss that is no number: others may run
                traceback.print_exc()
                print(f"FAIL {name}: not measured", flush=True)
                good = False
                continue
            rows = [facts | load | row for row in found]
            if records is not None:
                append(records, rows)
            for text in lines(rows):
                print(text, flush=True)
            good = good and not problems(rows)
    return int(not good)


def measure(config: Config, process: Process, effort: Effort, plan: Sequence[Planned]) -> list[Row]:
    """A row for each form of the loss."""
    trainer = MeasuredTrainer(config, process, plan)
    try:
        trainer.run()
    finally:
        trainer.logger.close()
    shared = _described(config, process, effort) | {"loader_images_per_s": _loader_rate(trainer)}
    rows = [shared | _row(trainer, form, effort) for form in FORMS]
    del trainer
    gc.collect()  # modules and hooks refer to each other
    if process.device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


# --- what is run ----------------------------------------------------------------------------------
def _config(options: argparse.Namespace) -> Config:
    """Raises: SystemExit, ConfigError where the options cannot be measured."""
    fixed = [item for item in options.set if item.partition("=")[0] in FIXED]
    if fixed:
        raise SystemExit(f"python -m bench training: {', '.join(fixed)} cannot be set, the bench does")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SystemExit("python -m bench training measures one process, torchrun started several")
    workers = f"data.workers={max((os.cpu_count() or 1) - 2, 0)}"  # one core for the trainer, one to pin
    config = load_config(options.config, [*(DRY if options.dry_run else (*REAL, workers)), *options.set])
    if config.device == "auto" and not torch.cuda.is_available():
        raise SystemExit(
            "python -m bench training: torch sees no GPU (--dry-run goes through it on the CPU, "
            "--set device=cpu measures the CPU)"
        )
    return config


def _effort(options: argparse.Namespace) -> Effort:
    effort = DRY_EFFORT if options.dry_run else REAL_EFFORT
    given = {"warm_up": options.warm_up, "measured": options.steps, "block": options.block}
    try:
        return replace(effort, **{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise SystemExit(f"python -m bench training: {error}") from None


def _prepare(config: Config, folder: Path, plan: Sequence[Planned], block: int, *, dry: bool) -> Config:
    """The configuration with files of enough images for the plan, and no more than the plan's steps."""
    size = DRY_SIZE if dry else REAL_SIZE
    images = max(size.train_images, round(SPARE * len(plan) * config.train.batch_size))
    name = f"train_{images}_{size.classes}.json"
    write_images(folder / "train2017", size.jpegs)
    if not (folder / name).exists():
        write_annotations(folder / f"{name}.tmp", images, round(INSTANCES * images), size)
        (folder / f"{name}.tmp").rename(folder / name)
    model = config.model
    if model.weights != "none":
        model = replace(model, weights=str(_random_weights(folder, model.backbone)))
    # A checkpoint is written at the end alone, and each block has a row of the log.
    train = replace(
        config.train,
        lr=RATE,
        max_steps=len(plan),
        milestones=(len(plan),),
        checkpoint_interval=len(plan) + 1,
        log_interval=block,
    )
    data = replace(config.data, root=str(folder), train=name, val=name, images=".")
    return replace(config, data=data, model=model, train=train, eval=replace(config.eval, interval=0))


def _random_weights(folder: Path, backbone: str) -> Path:
    """Of a backbone as the preset has it, with frozen norms: a machine without network has no others."""
    torch.manual_seed(0)
    model = get_model(backbone, weights=None)
    for block in model.modules():
        if isinstance(block, (BasicBlock, Bottleneck)):
            last = block.bn3 if isinstance(block, Bottleneck) else block.bn2
            torch.nn.init.constant_(last.weight, BRANCH)
    path = folder / f"{backbone}.pt"
    torch.save(model.state_dict(), path)
    return path


def _loader_rate(trainer: MeasuredTrainer) -> float:
    """Images a second that the loader alone gives, once each worker has given a batch."""
    workers = max(trainer.config.data.workers, 1)
    trainer.sampler.set_position(trainer.epoch + 1, 0)
    batches = iter(trainer.full_loader)
    for _ in islice(batches, workers):
        pass
    begin = time.perf_counter()
    count = sum(len(images) for images, _ in islice(batches, 2 * workers))
    return count / (time.perf_counter() - begin)


# --- what is found --------------------------------------------------------------------------------
def _described(config: Config, process: Process, effort: Effort) -> Row:
    model, train, data = config.model, config.train, config.data
    return {
        "kind": "training",
        "config": config.name,
        "loss": config.loss.name,
        "architecture": model.architecture,
        "backbone": model.backbone,
        "norm": model.norm,
        "trainable_stages": model.trainable_stages,
        "rois_per_image": model.rois_per_image,
        "batch_size": train.batch_size,
        "dtype": train.precision,
        "channels_last": train.channels_last,
        "min_sizes": list(data.min_sizes),
        "max_size": data.max_size,
        "workers": data.workers,
        "device": process.device.type,
        "warm_up": effort.warm_up,
        "steps": effort.measured,
        "block": effort.block,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
    }


def _row(trainer: MeasuredTrainer, form: str, effort: Effort) -> Row:
    times, numbers = trainer.times(form), trainer.numbers(form)
    walls = [sum(step.host.values()) for step in times]
    host, device = _mean([step.host for step in times]), None
    on_device = [step.device for step in times if step.device is not None]
    if on_device:
        device = _mean(on_device)
    parts, step_ms = device or host, statistics.fmean(walls)
    logged = trainer.logged(form, effort.block)
    padded, labels = [trainer.padded[k] for k in numbers], [trainer.labels[k] for k in numbers]
    classes = trainer.classes.num_classes
    profile = trainer.profile if form == FORMS[0] else None
    return {
        "form": form,
        "classes": classes,
        "padded": [statistics.fmean(sides) for sides in zip(*padded, strict=True)],
        "rows": statistics.fmean(len(each) for each in labels),
        "foreground": statistics.fmean(int((each < classes).sum()) for each in labels),
        "step_ms": quantiles(walls) | {"mean": step_ms},
        "images_per_s": 1e3 * trainer.config.train.batch_size / step_ms,
        "host_ms": host,
        "device_ms": device,
        "logged_ms": {
            key: 1e3 * statistics.fmean(row[f"{key}_s"] for row in logged) for key in ("step", "data")
        },
        "loss_share": parts["loss"] / sum(parts.values()),
        "peak_mb": max(trainer.peak_mb[k] for k in numbers),
        **_syncs(trainer, form, effort),
        "bound": _bound(parts, on_gpu=device is not None, profile=profile),
        "profile": profile,
    }


def _mean(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {part: statistics.fmean(step[part] for step in steps) for part in PARTS}


def _syncs(trainer: MeasuredTrainer, form: str, effort: Effort) -> Row:
    """Waits of the host for the GPU in a step, and by line of code; None where there is no GPU."""
    if trainer.process.device.type != "cuda":
        return {"host_syncs": None, "synced_at": None}
    per_step = {place: count / effort.syncs for place, count in trainer.synced_at[form].most_common()}
    return {"host_syncs": sum(per_step.values()), "synced_at": per_step}


def _bound(parts: Mapping[str, float], *, on_gpu: bool, profile: Row | None) -> dict[str, float | None]:
    """Shares of a step. device: in which the GPU worked. data: it had nothing to do, and the next batch was
    not there. host: the rest, in which the GPU waits for the host, which waits for it or prepares its work.

    The GPU's work is that of the profiled steps, which a slower host does not change. Without a GPU, and
    where nothing was profiled, only the share of the data is known.
    """
    step = sum(parts.values())
    data, device = parts["data"] / step, None
    if on_gpu and profile is not None and profile["busy_ms"] is not None:
        device = profile["busy_ms"] / step
    return {"device": device, "data": data, "host": None if device is None else 1 - device - data}
