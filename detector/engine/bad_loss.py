"""Steps whose loss is not finite, or too high to mean anything: what is kept of them, when a run gives up."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detector.engine.checkpoint import save_checkpoint
from detector.engine.distributed import Process
from detector.transfer import OnTheWay

KEPT = 3  # bad steps of which batch and state are written, 400 MB each for a ResNet-50
ADVICE = "A lower train.lr, train.clip_grad_norm or a longer train.warmup_steps may help."
PATIENCE = 10  # bad steps in a row after which skipping more is hopeless

Losses = dict[str, float]


class PendingLosses:
    """The losses of a step on their way to the host, to be read when the backward pass has been queued."""

    def __init__(self, losses: dict[str, Tensor]) -> None:
        self.names = list(losses)
        self.values = OnTheWay(torch.stack([value.detach().float() for value in losses.values()]))

    def read(self) -> Losses:
        return dict(zip(self.names, self.values.read().tolist(), strict=True))


def is_bad(losses: Losses, limit: float) -> bool:
    """Whether the sum of the losses is above `limit`, or not a number."""
    return not sum(losses.values()) <= limit


class BadSteps:
    """Counts the bad steps of a run, keeps what reproduces the first of them, and says when it is enough.

    action: "stop" at the first one, or "skip" them.
    """

    def __init__(self, folder: Path, process: Process, action: str) -> None:
        self.folder = folder
        self.process = process
        self.action = action
        self.kept = 0
        self.in_a_row = 0

    def good(self) -> None:
        self.in_a_row = 0

    def bad(
        self,
        step: int,
        losses: Losses,
        images: list[Tensor],
        targets: list[dict[str, Any]],
        state: dict[str, Any],
    ) -> dict[str, Any]:
        """Note a step that is bad on some rank; every rank takes part, and returns what the log shall say.

        state: the checkpoint from before the step: resumed, it comes to the same step with the same draws.
        Raises FloatingPointError where the run shall stop.
        """
        self.in_a_row += 1
        parts = self.process.gather((losses, [int(target["image_id"]) for target in targets]))
        where = ""
        if self.kept < KEPT:
            self.kept += 1
            where = f" Batch and state are in {self._save(step, losses, images, targets, state)}."
        per_rank = "; ".join(_describe(losses, ids) for losses, ids in parts)
        text = f"the loss is not finite or too high at step {step}: {per_rank}.{where}"
        if self.action == "stop":
            raise FloatingPointError(f"{text} {ADVICE}")
        if self.in_a_row == PATIENCE:
            raise FloatingPointError(f"{text} These were {PATIENCE} such steps in a row. {ADVICE}")
        return {
            "bad_loss": [losses for losses, _ in parts],
            "image_ids": [ids for _, ids in parts],
            "text": text,
        }

    def _save(
        self,
        step: int,
        losses: Losses,
        images: list[Tensor],
        targets: list[dict[str, Any]],
        state: dict[str, Any],
    ) -> Path:
        """One file of each rank with its batch, and state.pt."""
        folder = self.folder / f"step_{step}"
        plain = (int, float, bool, tuple, Tensor)
        batch = {
            "step": step,
            "losses": losses,
            "images": images,
            "targets": [{k: v for k, v in target.items() if isinstance(v, plain)} for target in targets],
        }
        save_checkpoint(folder / f"batch_rank{self.process.rank}.pt", batch)
        if self.process.is_main:
            save_checkpoint(folder / "state.pt", state)
        self.process.wait()  # torchrun ends the other ranks when the first one leaves
        return folder


def _describe(losses: Losses, image_ids: list[int]) -> str:
    """Such as "loss_cls=nan, loss_box=0.1 on images 3, 5"; the worst first."""
    worst_first = sorted(losses.items(), key=lambda item: (math.isfinite(item[1]), -item[1]))
    values = ", ".join(f"{name}={value:.4g}" for name, value in worst_first)
    return f"{values} on images {', '.join(map(str, image_ids))}"
