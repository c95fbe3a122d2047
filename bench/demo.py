"""The demo's runs as records, and the README's table of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from detector.config import load_config
from detector.engine.run_folder import CONFIG, LOG, METRICS, PREDICTIONS, read_environment
from detector.evaluation import format_markdown

from .records import Row, named

BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"
PICTURE_WIDTH, PICTURE_SHAPE = 1200, 0.84  # pixels, and height over width: three rows of the page


def record(run_dir: Path) -> Row:
    """A finished run folder as one row; commit, versions and machine are those that trained it.

    Raises: OSError where the run is not finished, ValueError where it was continued by another commit.
    """
    starts = read_environment(run_dir)
    commits = sorted({str(start["commit"]) for start in starts})
    if len(commits) > 1:
        raise ValueError(
            f"{run_dir} was trained by {len(commits)} commits, expected one: {', '.join(commits)}"
        )
    config = load_config(run_dir / CONFIG)
    evaluation = json.loads((run_dir / METRICS).read_text(encoding="utf-8"))
    log = [json.loads(line) for line in (run_dir / LOG).read_text(encoding="utf-8").splitlines()]
    losses = [row for row in log if "loss" in row]
    steps = [row["step"] for row in losses]
    return named(starts[-1]) | {
        "dirty": any(start["dirty"] for start in starts),
        "kind": "demo",
        "config": config.name,
        "loss": config.loss.name,
        "seed": config.seed,
        "steps": steps[-1],
        "train_minutes": sum(
            row["step_s"] * (row["step"] - before)
            for row, before in zip(losses, [0, *steps[:-1]], strict=True)
        )
        / 60,
        "protocol": evaluation["protocol"],
        "metrics": evaluation["metrics"],
    }


def draw(run_dir: Path, path: Path) -> None:
    """The upper part of a run's page of predictions, small enough for the README, as JPEG."""
    with Image.open(run_dir / PREDICTIONS) as page:
        top = page.convert("RGB").crop((0, 0, page.width, round(PICTURE_SHAPE * page.width)))
    top.resize((PICTURE_WIDTH, round(PICTURE_SHAPE * PICTURE_WIDTH))).save(path, quality=88)


def table(rows: Sequence[Row]) -> str:
    """Markdown: the newest row of each seed."""
    newest = {row["seed"]: row for row in rows}
    parts = []
    for seed, row in sorted(newest.items()):
        parts.append(
            f"Seed {seed}, {row['steps']} steps in {row['train_minutes']:.1f} minutes:\n\n"
            + format_markdown(row["metrics"])
        )
    last = rows[-1]
    parts.append(
        f"{last['protocol'].split(';')[0]}. {last['machine']['cpu']}, {last['machine']['cores']} cores; "
        f"torch {last['versions']['torch']}; commit {last['commit']}"
        f"{' with changes' if last['dirty'] else ''}. Made by `python -m bench readme` from "
        "[bench/records/demo.jsonl](bench/records/demo.jsonl)."
    )
    return "\n\n".join(parts)
