"""``python -m bench learning``: one detector, one data set, one budget, and one loss after the other.

Every run is a process of the trainer, as a user would start it, on a made-up set with LVIS's long tail and
random sampling. A run that has finished is not made again and one that was stopped is continued, so that a
machine may be had for minutes at a time.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detector.config import load_config
from detector.engine.run_folder import CHECKPOINT, CONFIG, METRICS

from .demo import record
from .records import ROOT, Row, append, read

BEGIN, END = "<!-- bench:learning:begin -->", "<!-- bench:learning:end -->"
DETECTOR = (sys.executable, "-m", "detector")
COLUMNS = ("AP", "APr", "APc", "APf")


@dataclass(frozen=True)
class Loss:
    """What is trained. options: of the trainer. paper: the mask AP / r / c / f of a paper's row that comes
    closest, Mask R-CNN R50 on LVIS v1 with random sampling; see detector/configs/README.md."""

    title: str
    options: tuple[str, ...]
    paper: str = "-"


LOSSES = {
    "softmax": Loss("softmax", ("loss.name=softmax",), "15.2 / 0.0 / 10.6 / 26.9"),
    "sigmoid": Loss("sigmoid", ("loss.name=sigmoid",), "16.4 / 0.8 / 12.7 / 27.3"),
    "gumbel_released": Loss(
        "Gumbel, gradients as released", ("loss.name=gumbel", "loss.compat=gol"), "19.0 / 4.9 / 16.8 / 27.6"
    ),
    "gumbel": Loss("Gumbel", ("loss.name=gumbel",)),
    "gumbel_straight_through": Loss(
        "Gumbel, the edge's slope outside the clip", ("loss.name=gumbel", "loss.outside=straight_through")
    ),
    "seesaw": Loss("Seesaw", ("loss.name=seesaw",), "25.0 (2x)"),
    "gol": Loss("GOL", ("loss.name=gol",), "22.0 / 10.0"),
    "gumbel_mitigation": Loss("Gumbel with Seesaw's mitigation", ("loss.name=gumbel_seesaw",)),
    "gumbel_seesaw": Loss(
        "Gumbel with both of Seesaw's factors, q = 2", ("loss.name=gumbel_seesaw", "loss.q=2")
    ),
}


def run(options: argparse.Namespace) -> int:
    """Trains what is not trained yet and records what has finished; 1 where a run failed.

    Raises: SystemExit for a loss that is not known, options that no data set can be made with, and where a
    finished run has other settings.
    """
    options.losses = options.losses or list(LOSSES)
    unknown = sorted(set(options.losses) - set(LOSSES))
    if unknown:
        raise SystemExit(f"no loss {', '.join(unknown)}; there are {', '.join(LOSSES)}")
    end = time.monotonic() + options.budget_s
    data = options.folder / "data"
    if not (data / "annotations").exists():
        made = [*DETECTOR, "make-synthetic", str(data), "--config", options.config, *options.set]
        if subprocess.run(made, cwd=ROOT, check=False).returncode:
            raise SystemExit("no data set was made")
    commands = {}
    for seed in options.seeds:
        for name in options.losses:
            folder = options.folder / f"{name}-seed{seed}"
            settings = ["data.repeat_threshold=0", f"data.root={data}", *options.set, *LOSSES[name].options]
            settings.append(f"seed={seed}")
            if (folder / METRICS).exists():
                _check_same(folder, load_config(options.config, settings))
            elif (folder / CHECKPOINT).exists():
                commands[folder] = ["train", "--resume", str(folder)]
            else:
                fresh = ["--config", options.config, "--output", str(folder), "--overwrite"]
                commands[folder] = ["train", *fresh, *settings]
    failed = _run_all(commands, options.jobs, end)
    rows = _finished(options)
    known = read(options.records) if options.records.exists() else []
    append(options.records, [row for row in rows if row not in known])
    if rows:
        print(table(rows))
    print(f"{len(rows)} runs finished, {len(options.seeds) * len(options.losses) - len(rows)} to go")
    return int(failed > 0)


def _check_same(folder: Path, config: Any) -> None:
    """Raises: SystemExit where a finished run was made with other settings."""
    found = load_config(folder / CONFIG)
    for section in ("data", "model", "loss", "train", "eval", "synthetic", "seed"):
        if getattr(found, section) != getattr(config, section):
            raise SystemExit(f"{folder} was made with other settings of {section}: choose another --folder")


def _run_all(commands: dict[Path, list[str]], jobs: int, end: float) -> int:
    """Runs the commands, `jobs` at a time, each with a log beside its folder; stops them at `end`, as a
    SIGTERM from elsewhere would. How many failed."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    waiting, running, failed = list(commands.items()), {}, 0
    while (waiting or running) and time.monotonic() < end:
        while waiting and len(running) < jobs:
            folder, arguments = waiting.pop(0)
            with folder.with_suffix(".log").open("ab") as log:
                running[folder] = subprocess.Popen(
                    [*DETECTOR, *arguments], cwd=ROOT, env=environment, stdout=log, stderr=log
                )
        time.sleep(0.2)
        for folder, process in list(running.items()):
            if process.poll() is not None:
                print(f"{folder.name}: exit status {process.returncode}", flush=True)
                failed += process.returncode != 0
                del running[folder]
    for process in running.values():
        process.send_signal(signal.SIGTERM)
    for process in running.values():
        process.wait()
    return failed


def _finished(options: argparse.Namespace) -> list[Row]:
    rows = []
    for name in options.losses:
        for seed in options.seeds:
            folder = options.folder / f"{name}-seed{seed}"
            if (folder / METRICS).exists():
                synthetic = load_config(folder / CONFIG).synthetic
                facts = {
                    "kind": "learning",
                    "variant": name,
                    "options": options.set,
                    "classes": synthetic.num_classes,
                    "train_images": synthetic.num_train,
                    "val_images": synthetic.num_val,
                }
                rows.append(record(folder) | facts)
    return rows


def newest(rows: Sequence[Row]) -> list[Row]:
    """The newest row of every loss and seed among those with the settings of the last row."""

    def setting(row: Row) -> list[Any]:
        return [row[key] for key in ("config", "options", "classes", "train_images", "steps")]

    alike = [row for row in rows if setting(row) == setting(rows[-1])]
    return list({(row["variant"], row["seed"]): row for row in alike}.values())


def table(rows: Sequence[Row]) -> str:
    """Markdown: the mean over the seeds and, where there are several, half of the range between them."""
    rows = newest(rows)
    head = ["loss", *(f"{kind} {column}" for kind in ("box", "mask") for column in COLUMNS)]
    head += ["papers' mask AP / r / c / f"]
    lines = [head, ["---", *["---:"] * (len(head) - 2), "---"]]
    for name, loss in LOSSES.items():
        runs = [row["metrics"] for row in rows if row["variant"] == name]
        if runs:
            cells = [_spread([r[kind][c] for r in runs]) for kind in ("bbox", "segm") for c in COLUMNS]
            lines.append([loss.title, *cells, loss.paper])
    last = rows[-1]
    seeds = sorted({row["seed"] for row in rows})
    commits = ", ".join(dict.fromkeys(row["commit"] + " with changes" * row["dirty"] for row in rows))
    gpus = ", ".join(last["machine"]["gpus"])
    return (
        "\n".join("| " + " | ".join(line) + " |" for line in lines)
        + f"\n\n{last['classes']} classes, {last['train_images']} training and {last['val_images']} "
        f"validation images, preset {' '.join([last['config'], *last['options']])}; {last['steps']} steps, "
        f"random sampling, seeds {', '.join(map(str, seeds))}: mean ± half of the range. "
        f"{last['protocol'].split(';')[0]}. {gpus or last['machine']['cpu']}; torch "
        f"{last['versions']['torch']}; commit {commits}. "
        "Made by `python -m bench readme` from [bench/records/learning.jsonl](bench/records/learning.jsonl)."
    )


def _spread(values: Sequence[float]) -> str:
    """Percent; "-" where a metric does not exist."""
    if min(values) < 0:
        return "-"
    half = 50 * (max(values) - min(values))
    return f"{100 * statistics.mean(values):.1f}" + (f" ± {half:.1f}" if len(values) > 1 else "")
