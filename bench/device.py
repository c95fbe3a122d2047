"""Measuring on a GPU: every loss at many sizes, in a CUDA graph and eagerly, with what a call costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from itertools import product
from typing import TypeVar

import torch

from . import records
from .cases import CASES, Batch, Case
from .meters import Meter
from .providers import YARDSTICKS, Provider, Refused, check, device_providers
from .records import Row
from .timing import Sample, Step, interleave, quantiles, speed_up

Result = TypeVar("Result")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BYTES_FORMULA = "2*N*K*itemsize + N*8: logits read, gradient written, labels read"
DEVICE_CASES = ("gumbel", "gol", "eql", "seesaw", "gumbel_seesaw", "eqlv2", "softmax")
"""What is measured on a GPU unless others are asked for: every way through the kernels."""

CHECKED_ELEMENTS = 2**27
"""A larger batch is checked in its first rows: its float64 truth would not fit beside the rest."""

CHECKED_ROWS = 2048
EAGER_SETS = 8
"""Of the inputs that a graph rotates over, so many in eager calls: small ones are bound by the host."""


def environment() -> Row:
    """What every row of a run shares, with the yardsticks' versions."""
    facts = records.environment()
    for name, package in YARDSTICKS.items():
        try:
            facts["versions"][name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts["versions"][name] = None
    return facts


@dataclass(frozen=True)
class Setting:
    """One loss at one size. compiled: torch.compile takes part, which costs seconds for each form."""

    case: Case
    rows: int
    columns: int
    dtype: str
    compiled: bool


@dataclass(frozen=True)
class Profile:
    """Sizes in the order in which they are measured; compiled_rows come last, with torch.compile."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    dtypes: tuple[str, ...]
    compiled_rows: tuple[int, ...] = ()

    def settings(self, cases: Sequence[str]) -> Iterator[Setting]:
        """torch.compile is measured at the first number of columns alone."""
        for columns, rows, dtype, name in product(self.columns, self.rows, self.dtypes, cases):
            yield Setting(CASES[name], rows, columns, dtype, False)
        for rows, dtype, name in product(self.compiled_rows, self.dtypes, cases):
            yield Setting(CASES[name], rows, self.columns[0], dtype, True)


PROFILES = {
    "check": Profile((65536, 8192, 512), (1204,), ("float32", "bfloat16"), (65536,)),
    "full": Profile(
        (65536, 8192, 2048, 512),
        (1204, 1203, 1205, 8192, 21841),
        ("float32", "bfloat16", "float16"),
        (65536, 8192, 2048, 512),
    ),
    "dry": Profile((24,), (37,), ("float32", "bfloat16", "float16"), (24,)),
}


@dataclass(frozen=True)
class Effort:
    """Of the timing: rounds in each of which every provider runs for about ``min_ms``, but those to skip."""

    rounds: int
    min_ms: float
    skip: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """A provider that computes the loss: its step on each of the batches, its errors and costs."""

    steps: list[Step]
    facts: Row


@dataclass(frozen=True)
class Outcome:
    """Of one setting: rows, by name why others have none, and who is not installed."""

    rows: list[Row]
    refused: dict[str, str]
    absent: list[str]


def measure(
    settings: Sequence[tuple[Setting, Batch | None]],
    meter: Meter,
    effort: Effort,
    *,
    budget_s: float,
    write: Callable[[list[Row]], None],
    report: Callable[[str], None] = print,
) -> bool:
    """Measures until all is done or the time is used up; rows are written after each setting.

    A batch that comes with its setting is used as it is, else one is made.
    Returns: whether none of our providers was refused.
    """
    end, good, absent = time.monotonic() + budget_s, True, set[str]()
    for done, (setting, batch) in enumerate(settings):
        if time.monotonic() > end:
            report(f"time is used up: {len(settings) - done} of {len(settings)} settings were not measured")
            break
        report(f"{setting.case.name} [{setting.rows}, {setting.columns}] {setting.dtype}")
        try:
            outcome = measure_setting(setting, batch, meter, effort)
        except torch.OutOfMemoryError as error:
            report(f"  not measured: {str(error).splitlines()[0]}")
            meter.release()
            continue
        write(outcome.rows)
        for reason in sorted(set(outcome.absent) - absent):
            report(f"absent: {reason}")
        absent.update(outcome.absent)
        for row in outcome.rows:
            report(_line(row))
        for name, reason in outcome.refused.items():
            report(f"  refused: {name}: {reason}")
        good = good and not any(name.startswith("ours") for name in outcome.refused)
    return good


def measure_setting(setting: Setting, batch: Batch | None, meter: Meter, effort: Effort) -> Outcome:
    """Every provider is checked and its costs taken; then all are timed in turn, in graphs and eagerly."""
    case, origin = setting.case, "made" if batch is None else "captured"
    if batch is None:
        dtype = DTYPES[setting.dtype]
        batch = case.batch(setting.rows, setting.columns, dtype=dtype, device=meter.device)
    providers, absent = device_providers(case, meter.device, compiled=setting.compiled)
    providers = [provider for provider in providers if provider.name not in effort.skip]
    checked = _first_rows(batch)
    copies = [batch, *(_copy(batch) for _ in range(meter.sets(batch.logits.nbytes) - 1))]
    refused: dict[str, str] = {}
    not_in_graph: dict[str, str] = {}
    prepared = dict(
        _tried(providers, lambda p: _prepare(p, case, checked, copies, meter), refused, meter),
    )
    able = [provider for provider in providers if provider.name in prepared]
    graphs = dict(_tried(able, lambda p: _graph(prepared[p.name], meter), not_in_graph, meter))
    in_graph = interleave(graphs, meter.timer, rounds=effort.rounds, min_ms=effort.min_ms)
    graphs.clear()  # and with them the memory of their results
    meter.release()
    sweeps = {name: _sweep(found.steps[:EAGER_SETS]) for name, found in prepared.items()}
    eager = interleave(sweeps, meter.timer, rounds=effort.rounds, min_ms=effort.min_ms)
    n, k = batch.logits.shape
    shared: Row = {
        "kind": "device",
        "case": case.name,
        "dtype": setting.dtype,
        "N": n,
        "K": k,
        "batch": origin,
        "checked_rows": len(checked.logits),
        "sets": len(copies),
        "clock": meter.timer.clock,
        "rounds": effort.rounds,
        "bytes": 2 * batch.logits.nbytes + 8 * n,
        "bytes_formula": BYTES_FORMULA,
        "gradient_bytes": batch.logits.nbytes,
        "upstream": batch.upstream,
    }
    rows = []
    for name, found in prepared.items():
        samples = {"graph": (in_graph, len(copies)), "eager": (eager, min(EAGER_SETS, len(copies)))}
        times = _times(name, samples, shared["bytes"])
        rows.append(shared | {"provider": name, "not_in_graph": not_in_graph.get(name)} | found.facts | times)
    return Outcome(rows, refused, absent)


def _tried(
    providers: Iterable[Provider],
    function: Callable[[Provider], Result],
    failed: dict[str, str],
    meter: Meter,
) -> Iterator[tuple[str, Result]]:
    """(name, result) of each provider. One that fails, by its own fault or for want of memory, leaves its
    reason in ``failed``, and the others go on."""
    for provider in providers:
        try:
            result = function(provider)
        except Exception as error:  # other projects' code, compilers and drivers: each raises its own
            text = str(error).strip().splitlines() or [""]
            failed[provider.name] = (
                text[0] if isinstance(error, Refused) else f"{type(error).__name__}: {text[0]}"
            )
            meter.release()
            continue
        yield provider.name, result


def _prepare(
    provider: Provider, case: Case, checked: Batch, copies: Sequence[Batch], meter: Meter
) -> Prepared:
    found = check(provider, case, checked) if provider.computes else None
    steps = [provider.step(batch) for batch in copies]
    costs = meter.costs(steps[0])
    return Prepared(steps, {"errors": found} | asdict(costs))


def _graph(prepared: Prepared, meter: Meter) -> Step:
    if prepared.facts["host_syncs"]:
        raise Refused(f"it waits for the GPU {prepared.facts['host_syncs']} times in a call")
    return meter.graph(prepared.steps)


def _sweep(steps: Sequence[Step]) -> Step:
    return lambda: [step() for step in steps]


def _first_rows(batch: Batch) -> Batch:
    """The whole batch, or of a large one some rows."""
    if batch.logits.numel() <= CHECKED_ELEMENTS:
        return batch
    return replace(batch, logits=batch.logits[:CHECKED_ROWS], labels=batch.labels[:CHECKED_ROWS])


def _copy(batch: Batch) -> Batch:
    return replace(batch, logits=batch.logits.clone(), labels=batch.labels.clone())


def _times(name: str, samples: Mapping[str, tuple[Mapping[str, list[Sample]], int]], size: int) -> Row:
    """Milliseconds of a call in each mode, and how many times faster it is than each other provider.

    samples: by mode those of each provider, and over how many calls each went.
    """
    row: Row = {"speed_up": {}}
    for mode, (found, calls) in samples.items():
        own = found.get(name)
        row[f"{mode}_ms"] = own and quantiles([sample.ms / calls for sample in own])
        if own:
            row["speed_up"][mode] = {other: speed_up(own, theirs) for other, theirs in found.items()}
    ms = (row["graph_ms"] or row["eager_ms"])["p50"]
    return row | {"gb_per_s": size / ms / 1e6}


def _line(row: Row) -> str:
    def text(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    graph = row["graph_ms"] and row["graph_ms"]["p50"] * 1e3
    of_copy = row["speed_up"].get("graph", {}).get("copy")
    peak = None if row["peak_bytes"] is None else row["peak_bytes"] / row["gradient_bytes"]
    return (
        f"  {row['provider']:<20} graph {text(graph, '.1f'):>9} us {text(row['gb_per_s'], '.0f'):>5} GB/s "
        f"{text(of_copy, '.0%'):>5} of copy, eager {row['eager_ms']['p50'] * 1e3:9.1f} us, host "
        f"{row['host_us']:7.1f} us, memory {text(peak, '.2f'):>5} x gradient, "
        f"{text(row['launches'], 'd'):>3} launches, {text(row['host_syncs'], 'd'):>2} syncs"
    )
