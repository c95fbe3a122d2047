"""Training in several processes on one machine, for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from detector.config import Config, save_config

ROOT = Path(__file__).parents[2]


def start_ranks(ranks: int, *program: str) -> subprocess.Popen[str]:
    """A Python program, as -m module or as a file, in `ranks` processes of one thread under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [sys.executable, *torchrun, *program],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


TRAIN_ONLY = """
import sys
import torch
from detector.config import load_config
from detector.engine import train as module

def finish(trainer):
    torch.save(trainer.model.state_dict(), trainer.config.run_dir / f"model_of_rank{trainer.process.rank}.pt")

module.Trainer.finish = finish
torch.set_num_threads(1)
module.train(load_config(sys.argv[1]), resume="resume" in sys.argv)
"""


def train_only(ranks: int, config: Config, *, resume: bool = False) -> str:
    """Train in `ranks` processes, without the evaluation; every rank leaves its model. Returns stderr."""
    folder = config.run_dir.with_name(config.run_dir.name + ".start")
    folder.mkdir(exist_ok=True)
    save_config(config, folder / "config.yaml")
    (folder / "script.py").write_text(TRAIN_ONLY)
    arguments = [str(folder / "script.py"), str(folder / "config.yaml"), *(["resume"] if resume else [])]
    process = start_ranks(ranks, *arguments)
    errors = process.communicate(timeout=240)[1]
    assert process.returncode == 0, errors
    return errors


def error_lines(errors: str) -> list[str]:
    """What the ranks said in the end; it may stand behind the progress bar of another one."""
    return [line[line.index("error: ") :] for line in errors.splitlines() if "error: " in line]


def training_rows(run: Path) -> list[dict[str, Any]]:
    """The rows of losses in a run's log."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]
