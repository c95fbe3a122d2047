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
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from detector.engine.distributed import Process
from detector.engine.run_folder import LOG


class LossMeter:
    """Losses of the steps since the last log row."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.rows: list[dict[str, float]] = []

    def add(self, losses: dict[str, float]) -> None:
        self.rows.append(losses)

    def read(self) -> dict[str, float]:
        """Mean of every loss over the steps and the ranks; forgets them. All ranks have as many steps."""
        rows, self.rows = self.rows, []
        if not rows:
            return {}
        means = [math.fsum(row[name] for row in rows) / len(rows) for name in rows[0]]
        means = self.process.mean(torch.tensor(means, dtype=torch.float64)).tolist()
        return dict(zip(rows[0], means, strict=True))


class RunLogger:
    """Writes rows of numbers; only the main process has one that does anything."""

    def __init__(self, run_dir: Path, process: Process, *, start_step: int, total_steps: int) -> None:
        self.enabled = process.is_main
        self.device = process.device
        if not self.enabled:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / LOG
        kept = drop_rows_after(self.path, start_step)
        self.evaluated = {row["step"] for row in kept if "eval" in row}
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
        self.evaluated.add(step)

    def has_evaluation(self, step: int) -> bool:
        """Whether this rank has logged one for that step."""
        return self.enabled and step in self.evaluated

    def bad_step(self, row: dict[str, Any]) -> None:
        """A step that was skipped; "text" says why."""
        if self.enabled:
            self._write(row)
            self.message(f"skipped: {row['text']}")

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


def drop_rows_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Forget what an interrupted run logged after its last checkpoint; the resumed run logs it again."""
    if not path.is_file():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # a line cut off by the kill
        if row["step"] <= step:
            kept.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return kept
