"""What a run says: the targets, and the README's tables. Everything comes from the rows of one run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cases import CASES
from .measure import MALLOC_MODES
from .records import Row

BEGIN, END = "<!-- bench:cpu:begin -->", "<!-- bench:cpu:end -->"
TARGETS = (
    # case, provider, baseline, at least
    ("gumbel", "ours avx512", "released", 30.0),
    ("gol", "ours avx512", "released", 30.0),
    ("gumbel", "ours avx512", "compiled", 3.5),
    ("gol", "ours avx512", "compiled", 3.5),
    ("gumbel", "ours avx512", "compiled, 1-exp(-e)", 3.5),
    ("gol", "ours avx512", "compiled, 1-exp(-e)", 3.5),
    ("gumbel", "ours avx2", "released", 15.0),
    ("gol", "ours avx2", "released", 15.0),
    ("seesaw", "ours avx512", "released", 15.0),
)
NAMES = {"ours avx512": "AVX-512", "ours avx2": "AVX2", "ours generic": "plain C++"}
_MALLOC = {
    "kept": "Freed memory is kept (`MALLOC_MMAP_THRESHOLD_`, `MALLOC_TRIM_THRESHOLD_` raised)",
    "default": "glibc's malloc as it is: big temporaries go back to the kernel and cost page faults",
}


def find(rows: Sequence[Row], **wanted: Any) -> Row | None:
    """The row that has all these values."""
    return next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), None)


def target_lines(rows: Sequence[Row]) -> list[str]:
    """PASS or FAIL for every target and malloc mode that the rows can judge."""
    lines = []
    for case, provider, baseline, least in TARGETS:
        for malloc in MALLOC_MODES:
            row = find(rows, kind="speed", case=case, provider=provider, malloc=malloc)
            if row is None or baseline not in row["speed_up"]:
                continue
            ratio = row["speed_up"][baseline]
            verdict = "PASS" if ratio >= least else "FAIL"
            lines.append(
                f"{verdict} {case:<7} {provider:<11} {ratio:5.1f}x {baseline} (at least {least:g}x), "
                f"malloc {malloc}"
            )
    return lines


def tables(rows: Sequence[Row]) -> str:
    """Markdown: speed under each malloc mode, accuracy, and where it was measured."""
    first = next(row for row in rows if row["kind"] == "speed")
    versions, machine = first["versions"], first["machine"]
    state = f"commit {first['commit']}{' with changes' if first['dirty'] else ''}"
    loads = [row["load_average"][0] for row in rows if row["kind"] == "speed"]
    parts = [
        f"Loss and gradient of float32 logits [{first['N']}, {first['K']}], {first['threads']} thread"
        f"{'s' if first['threads'] > 1 else ''}; median of {first['rounds']} interleaved rounds "
        f"({first['clock']}); a ratio is the median of the ratios within the rounds.",
        *(_speed_table(rows, malloc) for malloc in MALLOC_MODES),
        _accuracy_table(rows),
        f"{machine['cpu']}, {machine['cores']} cores, load average {min(loads):.1f} to {max(loads):.1f}; "
        f"Python {versions['python']}, torch {versions['torch']}, gol_kernels {versions['gol_kernels']} "
        f"built by {versions['compiler']}; {state}; {first['date'][:10]}. Made by `python -m bench readme` "
        "from [bench/records/cpu.jsonl](bench/records/cpu.jsonl).",
    ]
    return "\n\n".join(parts)


def _speed_table(rows: Sequence[Row], malloc: str) -> str:
    rows = [row for row in rows if row["kind"] == "speed" and row["malloc"] == malloc]
    ours = [name for name in NAMES if find(rows, provider=name)]
    header = ["Loss", "released, ms", "`torch.compile`, ms", "copy, ms"]
    for name in ours:
        header += [f"{NAMES[name]}, ms", "vs. released", "vs. compiled"]
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        cells = [CASES[case].title]
        for provider in ("released", "compiled", "copy"):
            cells.append(_ms(find(rows, case=case, provider=provider)))
        for name in ours:
            row = find(rows, case=case, provider=name)
            speed_up = {} if row is None else row["speed_up"]
            cells.append(_ms(row, bold=name == ours[0]))
            cells += [f"{speed_up[b]:.1f}" if b in speed_up else "" for b in ("released", "compiled")]
        lines.append(cells)
    return f"{_MALLOC[malloc]}:\n\n" + markdown(header, lines) + _fewer_digits(rows)


def _fewer_digits(rows: Sequence[Row]) -> str:
    """The compiled form that is faster still, and what it gives up."""
    found = [row for row in rows if row["provider"] == "compiled, 1-exp(-e)"]
    if not found:
        return ""
    times = ", ".join(f"{CASES[row['case']].title} {_ms(row)} ms" for row in found)
    return (
        "\n\n`torch.compile` with 1 - exp(-e) in the place of -expm1(-e), which near z = 10 is wrong by up "
        f"to 7e-4 (the released formula by 1e-3), but faster: {times}."
    )


def _accuracy_table(rows: Sequence[Row]) -> str:
    rows = [row for row in rows if row["kind"] == "accuracy"]
    columns = [name for name in (*NAMES, "torch closed form", "released") if find(rows, provider=name)]
    header = ["Loss", *(NAMES.get(name, name) for name in columns)]
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        found = [find(rows, case=case, provider=name) for name in columns]
        cells = ["" if row is None else f"{row['errors']['gradient']:.1e}" for row in found]
        lines.append([CASES[case].title, *cells])
    return "Relative L2 error of the float32 gradient against float64:\n\n" + markdown(header, lines)


def _ms(row: Row | None, *, bold: bool = False) -> str:
    if row is None:
        return ""
    text = f"{row['ms']['p50']:.2f}" if row["ms"]["p50"] < 100 else f"{row['ms']['p50']:.0f}"
    return f"**{text}**" if bold else text


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def replace_between(path: Path, begin: str, end: str, text: str) -> None:
    """Puts ``text`` between two markers of a file. Raises: ValueError unless each is there once, in order."""
    before = path.read_text(encoding="utf-8")
    if before.count(begin) != 1 or before.count(end) != 1 or before.index(begin) > before.index(end):
        raise ValueError(f"{path}: expected {begin} and then {end}, each once")
    head, tail = before.split(begin)[0], before.split(end)[1]
    path.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")
