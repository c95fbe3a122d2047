"""What is said of the trainer's step: lines, what does not add up, and the README's table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.records import Row
from bench.report import find, markdown
from bench.training.timeline import PARTS

BEGIN, END = "<!-- bench:training:begin -->", "<!-- bench:training:end -->"
SLACK = 0.05  # of a step, by which sums of parts may differ from what was measured another way
TOP = 8  # places and operators in the printed lines


def problems(rows: Sequence[Row]) -> list[str]:
    """Where the parts do not add up to the step.

    The trainer's own clock stops while it writes its log, which is in "other": what it logged as its step is
    between the sums of parts without and with that. Its wait for data is "data". On a GPU, the parts take as
    long in all as on the host's clock, since each waits for the other.
    """
    return [problem for row in rows for problem in _problems(row)]


def _problems(row: Row) -> Iterator[str]:
    step, slack, name = (
        row["step_ms"]["mean"],
        SLACK * row["step_ms"]["mean"],
        f"{row['loss']}, {row['form']}",
    )
    logged, parts = row["logged_ms"], row["host_ms"]
    if not step - parts["other"] - slack <= logged["step"] <= step + slack:
        yield (
            f"FAIL {name}: parts add up to {step:.1f} ms, {parts['other']:.1f} of them other; the trainer "
            f"logged {logged['step']:.1f}"
        )
    if abs(parts["data"] - logged["data"]) > slack:
        yield f"FAIL {name}: {parts['data']:.1f} ms of data, the trainer logged {logged['data']:.1f}"
    on_device = None if row["device_ms"] is None else sum(row["device_ms"].values())
    if on_device is not None and abs(on_device - step) > slack:
        yield f"FAIL {name}: parts add up to {on_device:.1f} ms on the GPU, {step:.1f} on the host"


def lines(rows: Sequence[Row]) -> list[str]:
    """What was found, for people: a paragraph for each row, and what does not add up."""
    return [text for row in rows for text in _lines(row)] + problems(rows)


def _lines(row: Row) -> Iterator[str]:
    ms = row["step_ms"]
    yield (
        f"{row['loss']}, {row['form']}: {row['images_per_s']:.1f} images/s, step {ms['p50']:.1f} ms "
        f"({ms['p20']:.1f} to {ms['p80']:.1f}), loss {row['loss_share']:.2%}, peak {row['peak_mb']:.0f} MiB, "
        f"{_count(row['host_syncs'])} syncs; {row['rows']:.0f} RoIs, {row['foreground']:.0f} foreground; "
        f"the loader alone {row['loader_images_per_s']:.1f} images/s"
    )
    for clock in ("device_ms", "host_ms"):
        if row[clock] is not None:
            yield f"  {clock}: " + ", ".join(f"{part} {row[clock][part]:.2f}" for part in PARTS)
    shares = {name: share for name, share in row["bound"].items() if share is not None}
    yield "  bound: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    for place, count in list((row["synced_at"] or {}).items())[:TOP]:
        yield f"  {count:6.1f} syncs at {place}"
    if row["profile"] is not None:
        for kind in ("calls", "operators"):
            for entry in row["profile"][kind][:TOP]:
                spent = ", ".join(
                    f"{key} {entry[key]:.2f}" for key in ("ms", "device_ms", "host_ms") if entry.get(key)
                )
                yield f"  {kind[:-1]} {entry['name']}: {entry['calls']:.1f} times, {spent}"


def newest(rows: Sequence[Row]) -> list[Row]:
    """The rows of the last run on a GPU. Raises: ValueError where there is none."""
    rows = [row for row in rows if row["device"] == "cuda"]
    if not rows:
        raise ValueError("no step was measured on a GPU")
    return [row for row in rows if row["run"] == rows[-1]["run"]]


def table(rows: Sequence[Row]) -> str:
    """Markdown: the step with each loss in each form, what bounds it, and where it was measured."""
    rows = newest(rows)
    first = rows[0]
    header = ["Loss", "images/s", "step, ms", *PARTS, "loss's share", "peak, GiB", "syncs"]
    cells = []
    for row in rows:
        ms = row["step_ms"]
        step = f"{ms['p50']:.0f} ({ms['p20']:.0f} to {ms['p80']:.0f})"
        parts = [_digits(row["device_ms"][part]) for part in PARTS]
        shown = [f"{row['loss']}, {row['form']}", f"{row['images_per_s']:.1f}", step, *parts]
        cells.append(
            [*shown, f"{row['loss_share']:.2%}", f"{row['peak_mb'] / 1024:.1f}", _count(row["host_syncs"])]
        )
    versions, machine = first["versions"], first["machine"]
    state = f"commit {first['commit']}{' with changes' if first['dirty'] else ''}"
    height, width = first["padded"]
    about = (
        f"`{first['config']}`: {first['backbone']}, {first['classes']} classes, batches of "
        f"{first['batch_size']} images, on average {height:.0f} x {width:.0f} with their padding, "
        f"{first['dtype']}, {first['workers']} loader processes. Median step of {first['steps']} (20 to 80 "
        "%); mean milliseconds of its parts between events on the GPU, waits for the host included. "
        '"released" is the trainer with the released eager formula in the place of our loss.'
    )
    where = (
        f"{', '.join(machine['gpus'])}, {machine['cpu']}, {machine['cores']} cores, driver "
        f"{versions['driver']}, CUDA {versions['cuda']}, torch {versions['torch']}, torchvision "
        f"{versions['torchvision']}, Python {versions['python']}; {state}; {first['date'][:10]}. Made by "
        "`python -m bench readme` from [bench/records/training.jsonl](bench/records/training.jsonl)."
    )
    return "\n\n".join([about, markdown(header, cells), *_bounds(rows), where])


def _bounds(rows: Sequence[Row]) -> Iterator[str]:
    for loss in dict.fromkeys(row["loss"] for row in rows):
        row = find(rows, loss=loss, form="ours")
        if row is not None and row["bound"]["device"] is not None:
            bound = row["bound"]
            yield (
                f"{loss}: the GPU works {bound['device']:.0%} of a step, {bound['data']:.0%} it waits for "
                f"data, {bound['host']:.0%} for the host; the loader alone gives "
                f"{row['loader_images_per_s']:.1f} images/s."
            )


def _digits(ms: float) -> str:
    return f"{ms:.2f}" if ms < 10 else f"{ms:.0f}"


def _count(number: float | None) -> str:
    return "-" if number is None else f"{number:.0f}"
