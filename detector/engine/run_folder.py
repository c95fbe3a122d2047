"""A run's folder: what lies in it, what each file is, and where and with what the run was made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from detector.config import Config
from detector.engine.capture import BATCHES
from detector.engine.distributed import Process
from gol_kernels import info

CHECKPOINT = "checkpoints/last.pt"
CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
LOG = "log.jsonl"
METRICS = "metrics.json"
GRADIENTS = "gradients.jsonl"
ANALYSIS = "analysis"
RESULTS = "results.json"
PREDICTIONS = "predictions.png"
BAD_LOSS = "bad_loss"

FILES = {
    "README.txt": "this text",
    CONFIG: "every option of the run; train --config takes it, too",
    ENVIRONMENT: "where and with what the run was made, one entry for each start",
    LOG: "one JSON object a line: losses, learning rate and times, metrics of evaluations",
    "events.out.tfevents.*": "the same for TensorBoard",
    CHECKPOINT: "the newest checkpoint: model, optimizer, position in the data, classes, options",
    f"{BAD_LOSS}/step_*": "a step with a broken loss: the processes' batches, and the checkpoint before it",
    RESULTS: "the detections on the validation images, in the format of LVIS results",
    METRICS: "the metrics of the last evaluation, with the AP of every class",
    GRADIENTS: "by train.gradient_interval: sums of each class's positive and negative gradients so far",
    f"{BATCHES}/*.pt": "what the classification loss received in chosen steps, for the benches",
    "plots/*.png": "losses, learning rate and AP, drawn from log.jsonl",
    PREDICTIONS: "predictions beside the truth on some validation images",
    f"{ANALYSIS}/*": "what `analyze` has found: pictures, and their numbers in analysis.json",
}

PACKAGES = ("torchvision", "numpy", "pillow", "pycocotools", "lvis", "hotcoco")


def clear(run_dir: Path) -> None:
    """Remove what an earlier run wrote there: left behind, its checkpoint could pass for the new run's."""
    for pattern in FILES:
        for path in run_dir.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def describe(config: Config, process: Process, start_step: int) -> None:
    """Write README.txt, and add this start to environment.json. Every rank takes part, rank 0 writes."""
    devices = process.gather(_device_name(process.device))
    if not process.is_main:
        return
    (config.run_dir / "README.txt").write_text(_readme(config), encoding="utf-8")
    path = config.run_dir / ENVIRONMENT
    starts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    here = {"start_step": start_step, "processes": process.world_size, "devices": devices}
    starts.append({**here, **info.environment(*PACKAGES)})
    path.write_text(json.dumps(starts, indent=1) + "\n", encoding="utf-8")


def read_environment(run_dir: Path) -> list[dict[str, Any]]:
    """The starts of a run, oldest first. Raises OSError where there is no environment.json."""
    return json.loads((run_dir / ENVIRONMENT).read_text(encoding="utf-8"))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _readme(config: Config) -> str:
    width = max(map(len, FILES)) + 2
    run = config.run_dir
    return "\n".join(
        [
            f"{config.name}: a training run of `python -m detector`. Not every file is there at every time.",
            "",
            *(f"  {name:<{width}}{text}" for name, text in FILES.items()),
            "",
            f"continue:  python -m detector train --resume {run}",
            f"judge:     python -m detector evaluate --run {run}",
            f"use:       python -m detector predict --run {run} --output drawn PHOTO.jpg",
            f"analyze:   python -m detector analyze {run}",
            f"watch:     tensorboard --logdir {run}",
            "",
        ]
    )
