"""The README's table of what the trainer does at LVIS's size, from the last run of each part."""

from __future__ import annotations

from collections.abc import Sequence

from bench.records import Row
from bench.report import markdown

BEGIN, END = "<!-- bench:scale:begin -->", "<!-- bench:scale:end -->"
VERDICTS = {True: "passed", False: "**missed**", None: ""}


def line(row: Row) -> str:
    """One finding as a line of text."""
    verdict = {True: "PASS", False: "FAIL", None: "    "}[row["passed"]]
    return f"{verdict} {row['what']}: {_value(row)} {_limit(row)} {_beside(row)}".rstrip()


def newest(rows: Sequence[Row]) -> list[Row]:
    """What the last run of each part at the full size found, parts in the order of the first run."""
    rows = [row for row in rows if row["size"] == "full"]
    if not rows:
        raise ValueError("nothing was measured at the full size")
    last = {row["part"]: row["run"] for row in rows}
    return [row for part in last.items() for row in rows if (row["part"], row["run"]) == part]


def table(rows: Sequence[Row]) -> str:
    """Markdown: every figure with its limit, how rasterising depends on the image's size, and the machine."""
    rows = newest(rows)
    lines = [[row["what"], _value(row), _limit(row), VERDICTS[row["passed"]], _beside(row)] for row in rows]
    last = rows[-1]
    runs = ", ".join(
        dict.fromkeys(f"{row['commit']}{' with changes' if row['dirty'] else ''}" for row in rows)
    )
    loads = [row["load_average"][0] for row in rows]
    parts = [
        "Seconds are CPU time of all threads, about what an idle machine takes at most; memory is the peak "
        "of the whole process, or what it grew by.",
        markdown(["At LVIS's size", "found", "limit", "", "beside"], lines),
        *(_by_side(row["microseconds"]) for row in rows if "microseconds" in row),
        f"{last['machine']['cpu']}, {last['machine']['cores']} cores, load average {min(loads):.1f} to "
        f"{max(loads):.1f}; torch {last['versions']['torch']}; commit {runs}; {last['date'][:10]}. Made by "
        "`python -m bench readme` from [bench/records/scale.jsonl](../records/scale.jsonl).",
    ]
    return "\n\n".join(parts)


def _by_side(microseconds: dict[str, float]) -> str:
    sides = [name for name in microseconds if not name.startswith("whole")]
    lines = [
        [
            title,
            *(f"{microseconds[key]:.0f}" if (key := prefix + side) in microseconds else "" for side in sides),
        ]
        for title, prefix in (("inside the sampled boxes", ""), ("whole image, then RoIAlign", "whole "))
    ]
    return "Microseconds to rasterise a mask to 28 x 28, by the image's side:\n\n" + markdown(
        ["", *sides], lines
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _value(row: Row) -> str:
    return f"{_number(row['value'])} {row['unit']}".rstrip()


def _limit(row: Row) -> str:
    if row["at_most"] is not None:
        return f"≤ {_number(row['at_most'])}"
    return "" if row["at_least"] is None else f"≥ {_number(row['at_least'])}"


def _beside(row: Row) -> str:
    return "; ".join(f"{name}: {_number(value)}" for name, value in row["beside"].items())
