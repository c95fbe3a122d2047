"""Writes during training what each class's logit has been pulled by: the gradient sums of the losses'
ClassStats."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from detector.engine.distributed import Process
from detector.engine.log import drop_rows_after
from detector.engine.run_folder import GRADIENTS
from gol_kernels.losses import LongTailLoss
from gol_kernels.losses.bernoulli import BernoulliLoss

STATISTICS = ("label_counts", "positive_gradient", "negative_gradient")  # buffers of ClassStats


class GradientLog:
    """Adds to run_dir/gradients.jsonl every `interval` steps (0: never) one row for the loss of each stage.

    A row is {"step", "stage" (from 1), "label_counts" [C+1], "positive_gradient" [C], "negative_gradient"
    [C]}: the sums over all RoIs, all ranks and all steps so far, see gol_kernels.ClassStats. The sums are
    part of the checkpoint; rows that an interrupted run wrote after `start_step` are dropped, and come again.
    """

    def __init__(
        self,
        run_dir: Path,
        process: Process,
        losses: Sequence[LongTailLoss],
        *,
        interval: int,
        start_step: int,
    ) -> None:
        self.path = run_dir / GRADIENTS
        self.interval = interval
        self.enabled = interval > 0 and process.is_main  # every rank holds the same sums
        gathered = [loss.gradient_stats for loss in losses if isinstance(loss, BernoulliLoss)]
        self.stages = [stats for stats in gathered if stats is not None]
        kept = drop_rows_after(self.path, start_step) if self.enabled else []
        self.last_step = max((row["step"] for row in kept), default=0)

    def after(self, step: int) -> None:
        """Called after every step."""
        if self.enabled and step % self.interval == 0:
            self.write(step)

    def write(self, step: int) -> None:
        """Write the rows of `step`, unless they are there."""
        if not self.enabled or step <= self.last_step:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            for number, stats in enumerate(self.stages, start=1):
                sums = {name: getattr(stats, name).tolist() for name in STATISTICS}
                file.write(json.dumps({"step": step, "stage": number, **sums}) + "\n")
        self.last_step = step
