"""The record file: one JSON object a line, only ever appended to. Tables and plots are made from it alone.

A line of kind "speed" is one provider on one case under one malloc mode; of kind "accuracy", one provider's
errors on one case; of kind "device", one provider on one case at one size on a GPU; of kind "scale", one
figure of the trainer at LVIS's size with its limit; of kind "training", the trainer's step with one form of a
loss; of kinds "demo" and "learning", a finished run. Each says by itself when, where and with what it was
measured.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gol_kernels import info

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent


def environment(*packages: str) -> Row:
    """What every row of a run shares, with these packages' versions beside torch's and our own."""
    facts = named(info.environment(*packages))
    # A copy of the tree without its repository may be told what it is a copy of.
    facts["commit"] = facts["commit"] or os.environ.get("GOL_KERNELS_COMMIT")
    return facts


def named(facts: Row) -> Row:
    """The facts of `info.environment`, and in front the run's name: its date, YYYYmmddTHHMMSSZ."""
    date = datetime.datetime.fromisoformat(facts["date"])
    return {"run": date.strftime("%Y%m%dT%H%M%SZ"), **facts}


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
