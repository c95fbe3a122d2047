"""Saves what the classification loss of chosen training steps receives: real batches for the benches."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

import gol_kernels as gk
from detector.config import LossConfig

BATCHES = "batches"


def capture_batches(
    loss: nn.Module,
    config: LossConfig,
    stats: gk.ClassStats,
    *,
    steps: Collection[int],
    folder: Path,
    current_step: Callable[[], int],
) -> RemovableHandle:
    """From now on writes <folder>/batches/step<step>.pt in each of `steps` (from 1), in training only.

    A file is a dict that torch.load(weights_only=True) reads: logits [N, K] in their own dtype; labels [N]
    int64 in 0..C; rare bool [C], by the configuration's threshold; counts int64 [C], the loss's own running
    counts after this batch, or where it keeps none the instances of the training set; loss, its name; step.
    """

    def save(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        step = current_step()
        if step not in steps or not module.training:
            return
        logits, labels = arguments[:2]
        running = getattr(module, "class_stats", None)
        counts = stats.instance_count if running is None else running.label_counts[:-1]
        content = {
            "logits": logits.detach(),
            "labels": labels.to(torch.int64),
            "rare": stats.rare(config.threshold),
            "counts": counts,
        }
        (folder / BATCHES).mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in content.items()}
        torch.save(tensors | {"loss": config.name, "step": step}, folder / BATCHES / f"step{step:06d}.pt")

    return loss.register_forward_hook(save, with_kwargs=True)
