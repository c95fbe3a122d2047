"""What a run tells its owner: progress bar, log.jsonl, TensorBoard."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from detector.engine.distributed import Process


class LossMeter:
    """Losses of the steps since the last log row, kept on the device: only reading them waits."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.names: list[str] = []
        self.rows: list[Tensor] = []

    def add(self, losses: dict[str, Tensor]) -> None:
        self.names = list(losses)
        self.rows.append(torch.stack([value.detach().float() for value in losses.values()]))

    def read(self, last_step: int) -> dict[str, float]:
        """Mean of every loss over the steps up to `last_step` and over the ranks; forgets them.

        Raises FloatingPointError naming the first step, and its losses, that is not finite.
        """
        if not self.rows:
            return {}
        rows = self.process.mean(torch.stack(self.rows)).tolist()
        self.rows = []
        for step, row in enumerate(rows, start=last_step - len(rows) + 1):
            if not all(math.isfinite(value) for value in row):
                parts = ", ".join(f"{name}={value:.4g}" for name, value in zip(self.names, row, strict=True))
                raise FloatingPointError(
                    f"the loss is not finite at step {step}: {parts}. The last checkpoint is from before it; "
                    f"a lower "
                    f"train.lr, train.clip_grad_norm or a longer train.warmup_steps may help"
                )
        return {
            name: math.fsum(column) / len(rows)
            for name, column in zip(self.names, zip(*rows, strict=True), strict=True)
        }


class RunLogger:
    """Writes rows of numbers; only the main process has one that does anything."""

    def __init__(self, run_dir: Path, process: Process, *, start_step: int, total_steps: int) -> None:
        self.enabled = process.is_main
        self.device = process.device
        if not self.enabled:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / "log.jsonl"
        _drop_rows_after(self.path, start_step)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the logger
        self.board = SummaryWriter(str(run_dir), purge_step=start_step + 1)
        self.bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            dynamic_ncols=True,
            file=sys.stderr,
            mininterval=0.5,
        )
        self.clock = time.perf_counter()

    def progress(self, total_steps: int) -> None:
        if self.enabled:
            self.bar.total = max(total_steps, self.bar.n + 1)
            self.bar.update()

    def losses(self, row: dict[str, float]) -> None:
        """One row of training: step, epoch, lr, losses and times."""
        if not self.enabled:
            return
        self._write(row)
        for name, value in row.items():
            if name not in ("step", "epoch"):
                group = "loss" if name.startswith("loss") else "run"
                self.board.add_scalar(f"{group}/{name}", value, row["step"])
        self.bar.set_postfix_str(
            f"loss {row['loss']:.3f}, {row['images_per_s']:.1f} images/s, {row['memory_mb']:.0f} MB"
        )

    def evaluation(self, step: int, epoch: int, metrics: dict[str, dict[str, float]]) -> None:
        if not self.enabled:
            return
        self._write({"step": step, "epoch": epoch, "eval": metrics})
        for kind, values in metrics.items():
            for name, value in values.items():
                self.board.add_scalar(f"{kind}/{name}", value, step)

    def message(self, text: str) -> None:
        if self.enabled:
            self.bar.write(text, file=sys.stderr)

    def memory_mb(self) -> float:
        """Peak memory: of the GPU where there is one, else of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    def close(self) -> None:
        if self.enabled:
            self.bar.close()
            self.board.close()
            self.file.close()

    def _write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()


def _drop_rows_after(path: Path, step: int) -> None:
    """Forget what an interrupted run logged after its last checkpoint; the resumed run logs it again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # a line cut off by the kill
        if row["step"] <= step:
            kept.append(line + "\n")
    path.write_text("".join(kept), encoding="utf-8")
