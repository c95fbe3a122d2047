"""Timing steps against each other on a machine that does other things as well."""

from __future__ import annotations

import random
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

Step = Callable[[], Any]


@dataclass(frozen=True)
class Sample:
    """Means over the calls of one round: milliseconds that count, of the wall clock, page faults."""

    ms: float
    wall_ms: float
    page_faults: float


class Timer(Protocol):
    """Runs a step ``calls`` times. ``clock`` says what its ``ms`` are."""

    clock: str

    def __call__(self, step: Step, calls: int) -> Sample: ...


class CpuTimer:
    """One thread: the process's CPU time, which does not grow while another process has the core. The wall
    clock would be unfair: long steps are interrupted more often than short ones. More threads: wall clock.
    """

    def __init__(self, threads: int) -> None:
        self.clock = "process CPU time" if threads == 1 else "wall clock"
        self._wall = threads > 1

    def __call__(self, step: Step, calls: int) -> Sample:
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        cpu, wall = time.process_time_ns(), time.perf_counter_ns()
        for _ in range(calls):
            step()
        wall_ms = (time.perf_counter_ns() - wall) / 1e6 / calls
        cpu_ms = (time.process_time_ns() - cpu) / 1e6 / calls
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        return Sample(wall_ms if self._wall else cpu_ms, wall_ms, faults / calls)


def interleave(
    steps: Mapping[str, Step], timer: Timer, *, rounds: int, min_ms: float, seed: int = 0
) -> dict[str, list[Sample]]:
    """Every step once a round, in an order drawn anew; a round is one untimed call and then as many calls
    as take about ``min_ms``. Sample r of one step and sample r of another saw the same machine.
    """
    calls = {}
    for name, step in steps.items():
        timer(step, 1)
        calls[name] = max(1, round(min_ms / max(timer(step, 1).ms, 1e-3)))
    order, shuffle = list(steps), random.Random(seed).shuffle
    samples: dict[str, list[Sample]] = {name: [] for name in steps}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            timer(steps[name], 1)
            samples[name].append(timer(steps[name], calls[name]))
    return samples


def quantiles(values: list[float]) -> dict[str, float]:
    """20, 50 and 80 %, interpolated."""
    if len(values) == 1:
        return dict.fromkeys(("p20", "p50", "p80"), values[0])
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"p20": fifths[0], "p50": statistics.median(values), "p80": fifths[3]}


def speed_up(samples: list[Sample], baseline: list[Sample]) -> float:
    """Median over the rounds of baseline / samples, each ratio within its round."""
    return statistics.median(b.ms / s.ms for s, b in zip(samples, baseline, strict=True))
