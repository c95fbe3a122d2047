"""A figure with its limit, and the seconds and memory that it comes from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bench.records import Row
from bench.timing import CpuTimer, interleave, quantiles, speed_up


def finding(
    what: str,
    value: float,
    unit: str,
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    beside: dict[str, Any] | None = None,
    **details: Any,
) -> Row:
    """A figure, whether it keeps its limit (None where it has none), and `beside`: what else the run saw."""
    passed = None
    if at_most is not None or at_least is not None:
        passed = (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
    limits = {"at_most": at_most, "at_least": at_least, "passed": passed}
    return {"what": what, "value": value, "unit": unit, **limits, "beside": beside or {}, **details}


@dataclass
class Spent:
    """Seconds of a block: CPU time of all threads of the process, and of the wall clock."""

    cpu: float = 0.0
    wall: float = 0.0


@contextmanager
def spent() -> Iterator[Spent]:
    taken, cpu, wall = Spent(), time.process_time(), time.perf_counter()
    yield taken
    taken.cpu, taken.wall = time.process_time() - cpu, time.perf_counter() - wall


def peak_mb() -> float:
    """Most memory of this program, MiB; getrusage would give at least that of the one that started it."""
    return kilobytes("/proc/self/status", "VmHWM:") / 1024


def forget_peak() -> float:
    """Let `peak_mb` begin again at what the program has at this moment, and give that (Linux, proc(5))."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_mb()


def kilobytes(path: str, *fields: str) -> int:
    """The sum of fields of one of Linux's accounts of memory."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(fields))


def private_mb(pid: int) -> float:
    """Memory that only this process has, MiB: pages of its own, and those it copied by writing to them."""
    return kilobytes(f"/proc/{pid}/smaps_rollup", "Private_Clean:", "Private_Dirty:") / 1024


def compare(
    what: str, ours: Callable[[], Any], plain: Callable[[], Any], *, rounds: int, faster: bool, **details: Any
) -> list[Row]:
    """Time, growth of the peak memory and equal results of our way and the plain one.

    Both give a tensor or a tuple of tensors. `faster`: ours has to be.
    """
    growth, results = {}, {}
    for name, way in (("ours", ours), ("plain", plain)):
        before = forget_peak()
        results[name] = way()
        growth[name] = peak_mb() - before
    pairs = zip(*(found if isinstance(found, tuple) else (found,) for found in results.values()), strict=True)
    different = sum(_different(one, other) for one, other in pairs)
    samples = interleave({"ours": ours, "plain": plain}, CpuTimer(1), rounds=rounds, min_ms=1)
    ms = {name: quantiles([sample.ms for sample in samples[name]])["p50"] for name in samples}
    ratio = speed_up(samples["ours"], samples["plain"])
    beside = {"plain way, ms": ms["plain"], "times faster": ratio}
    limit = {"at_most": ms["plain"]} if faster else {}
    memory = {"plain way, MiB": growth["plain"]}
    return [
        finding(f"{what}: time", ms["ours"], "ms", beside=beside, **limit, **details),
        finding(
            f"{what}: memory", growth["ours"], "MiB", at_most=max(growth["plain"] / 10, 64), beside=memory
        ),
        finding(f"{what}: values that differ", different, "", at_most=0),
    ]


def _different(one: Tensor, other: Tensor) -> int:
    return int((one != other).sum()) if one.shape == other.shape else max(one.numel(), other.numel())
