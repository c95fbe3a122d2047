"""Run a model over images and write what it finds, in the pixels of the original images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detector.config import Config, ConfigError, from_dict, with_overrides
from detector.data.annotations import LvisAnnotations
from detector.data.loader import build_eval_loader
from detector.engine.checkpoint import load_checkpoint
from detector.engine.distributed import Process, process_group
from detector.engine.paste import encode_mask
from detector.engine.report import write_report
from detector.engine.run_folder import CHECKPOINT, RESULTS
from detector.evaluation import (
    Detections,
    Evaluation,
    ResultsWriter,
    merge_results,
    part_path,
    run_evaluation,
)
from detector.model import ClassTable, MaskRCNN, build_model
from detector.model.weights import load_weights


def load_run(run: Path, overrides: Sequence[str] = ()) -> tuple[Config, ClassTable, MaskRCNN]:
    """Configuration, classes and model (on the CPU, in evaluation mode) of a run's folder or a checkpoint."""
    path = run / CHECKPOINT if run.is_dir() else run
    state = load_checkpoint(path)
    config = with_overrides(from_dict(state["config"]), overrides)
    classes = ClassTable.from_dict(state["classes"])
    model = build_model(config, classes, load_weights=False)
    load_weights(model, state["model"], path)
    return config, classes, model.eval()


def to_detections(
    found: dict[str, Tensor], image_id: int, scale: tuple[float, float], original_size: tuple[int, int]
) -> Detections:
    """The model's output for one image, with boxes and masks moved to its original (height, width).

    scale: (sx, sy) that the original was resized by before the model saw it.
    """
    height, width = original_size
    (sx, sy) = scale
    moved = found["boxes"].cpu() / torch.tensor([sx, sy, sx, sy])
    boxes = torch.minimum(moved, torch.tensor([width, height, width, height]).float()).numpy()
    planes = found["masks"].cpu().numpy()
    masks = [encode_mask(plane, box, height, width) for plane, box in zip(planes, boxes, strict=True)]
    return Detections(image_id, boxes, found["scores"].cpu().numpy(), found["labels"].cpu().numpy(), masks)


@torch.inference_mode()
def detect_all(
    model: nn.Module,
    batches: Iterable[tuple[list[Tensor], list[dict[str, Any]]]],
    use: Callable[[Detections], None],
) -> None:
    """Give `use` the detections of every image; `batches` are what a validation loader yields."""
    model.eval()
    for images, targets in batches:
        for found, target in zip(model(images), targets, strict=True):
            use(to_detections(found, target["image_id"], target["scale"], target["original_size"]))


def evaluate_model(
    model: nn.Module, config: Config, classes: ClassTable, process: Process
) -> Evaluation | None:
    """Detect on the validation images, write the run's results.json and judge it; None on other ranks than 0.

    Each rank takes every world_size-th image, so no image is seen twice and none is left out.
    """
    annotations = LvisAnnotations.from_file(config.data.val_file)
    if [int(i) for i in annotations.category_ids] != classes.category_ids:
        raise ConfigError(
            f"{config.data.val_file} has {annotations.num_classes} categories that are not the "
            f"{classes.num_classes} the "
            f"model was trained on"
        )
    loader = build_eval_loader(
        annotations,
        config.data.image_folder,
        min_size=config.data.test_size,
        max_size=config.data.max_size,
        rank=process.rank,
        world_size=process.world_size,
        num_workers=config.data.workers,
        pin_memory=True,
    )
    results = config.run_dir / RESULTS
    with ResultsWriter(part_path(results, process.rank), classes.category_ids) as writer:
        detect_all(model, loader, writer.add)
    process.wait()
    if not process.is_main:
        return None
    merge_results([part_path(results, rank) for rank in range(process.world_size)], results)
    return run_evaluation(
        config.data.val_file,
        results,
        backend=config.eval.backend,
        max_dets=config.eval.max_detections,
        groups=dict(zip(classes.category_ids, classes.frequency, strict=True)),
    )


def evaluate_run(run: Path, overrides: Sequence[str] = (), output: Path | None = None) -> None:
    """Evaluate a run's folder or a checkpoint; the report goes to `output` (default: the run's folder)."""
    config, classes, model = load_run(run, overrides)
    config = replace(config, output=str(output or (run if run.is_dir() else run.parent)))
    config.run_dir.mkdir(parents=True, exist_ok=True)
    with process_group(config.device, config.train.timeout) as process:
        evaluation = evaluate_model(model.to(process.device), config, classes, process)
        process.wait()  # nobody leaves while another still needs the group
    if evaluation is not None:
        write_report(config, classes, evaluation)
