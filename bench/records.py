"""The record file: one JSON object a line, only ever appended to. Tables and plots are made from it alone.

A line of kind "speed" is one provider on one case under one malloc mode; of kind "accuracy", one provider's
errors on one case; of kind "device", one provider on one case at one size on a GPU. Each says by itself when,
where and with what it was measured.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gol_kernels import info

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent


def environment() -> Row:
    """What every row of a run shares."""
    now = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
    report = info.report()
    commit = _git("rev-parse", "--short=12", "HEAD")
    return {
        "run": now.strftime("%Y%m%dT%H%M%SZ"),
        "date": now.isoformat(),
        "commit": commit,
        "dirty": None if commit is None else bool(_git("status", "--porcelain")),
        "versions": {**report["versions"], "compiler": report["build"]["compiler"]},
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "platform": f"{platform.system()} {platform.machine()}",
            "gpus": report["machine"]["gpus"],
        },
    }


def cpu_model() -> str:
    """Name, family and model as Linux knows them, else what Python knows."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    facts = {}
    for line in text.split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        facts[key.strip()] = value.strip()
    if "model name" not in facts:
        return platform.machine()
    return f"{facts['model name']} (family {facts.get('cpu family')}, model {facts.get('model')})"


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def append(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows in a single write, so that a broken run leaves nothing behind."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(lines)


def read(path: Path) -> list[Row]:
    """All rows. Raises: ValueError naming file and line of what is not a JSON object."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object")
        rows.append(row)
    return rows


def newest_complete(rows: Sequence[Row], cases: Iterable[str], malloc_modes: Iterable[str]) -> list[Row]:
    """Rows of the last run that has ours and the released formula for every case and malloc mode.

    Raises: ValueError when there is none.
    """
    needed = {(case, malloc) for case in cases for malloc in malloc_modes}
    for run in reversed(list(dict.fromkeys(row["run"] for row in rows))):
        chosen = [row for row in rows if row["run"] == run]
        speed = [row for row in chosen if row["kind"] == "speed"]
        released, ours = (
            {(row["case"], row["malloc"]) for row in speed if row["provider"].startswith(prefix)}
            for prefix in ("released", "ours")
        )
        if needed <= released & ours:
            return chosen
    raise ValueError(f"no run is complete: each needs every one of {sorted(needed)}")
