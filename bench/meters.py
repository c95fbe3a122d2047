"""What one call costs: time, memory, kernel launches, host syncs; on a GPU, or in a dry run on the CPU."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.autograd import DeviceType

from .timing import CpuTimer, Sample, Step, Timer

MAX_SETS = 160
HOST_CALLS, HOST_ROUNDS, HOST_S = 10, 15, 0.3


@dataclass(frozen=True)
class Costs:
    """Of one eager call: None where the device has no such number.

    peak_bytes: memory beyond what was allocated before, the results included. launches: kernels, copies and
    fills put on the GPU. host_syncs: waits of the host for the GPU. host_us: microseconds until the call
    returns, the GPU's work still under way.
    """

    peak_bytes: int | None
    launches: int | None
    host_syncs: int | None
    host_us: float


class Meter(Protocol):
    """``timer`` runs a step; see ``CudaMeter`` for the rest."""

    device: str
    timer: Timer

    def sets(self, size: int) -> int: ...

    def costs(self, step: Step) -> Costs: ...

    def graph(self, steps: Sequence[Step]) -> Step: ...

    def release(self) -> None: ...


class CudaTimer:
    """Time between two events on the GPU, around calls that are enqueued without a wait."""

    clock = "CUDA events"

    def __call__(self, step: Step, calls: int) -> Sample:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        wall = time.perf_counter_ns()
        start.record()
        for _ in range(calls):
            step()
        end.record()
        end.synchronize()
        wall_ms = (time.perf_counter_ns() - wall) / 1e6
        return Sample(start.elapsed_time(end) / calls, wall_ms / calls, 0.0)


class CudaMeter:
    """Measures on the current CUDA device."""

    device = "cuda"

    def __init__(self) -> None:
        self.timer: Timer = CudaTimer()
        self.l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size

    def sets(self, size: int) -> int:
        """How many inputs of ``size`` bytes to rotate over, for three times the L2 cache between two uses."""
        return min(MAX_SETS, max(1, math.ceil(3 * self.l2_bytes / max(size, 1))))

    def costs(self, step: Step) -> Costs:
        """Of a step that ran before: what compiles and loads at its first call is not counted."""
        step()
        return Costs(
            _peak_bytes(step), _launches(step), _host_syncs(step), host_us(step, torch.cuda.synchronize)
        )

    def graph(self, steps: Sequence[Step]) -> Step:
        """The replay of a CUDA graph of all steps. Raises: RuntimeError where they cannot be captured.

        The results stay alive within the graph, so that each step writes to memory of its own.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for step in steps[:2]:
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [step() for step in steps]

        def replay() -> Any:
            graph.replay()
            return results

        return replay

    def release(self) -> None:
        """Gives cached memory back."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class HostMeter:
    """For dry runs: the same way through the harness, CPU time, and no numbers of a GPU."""

    device = "cpu"

    def __init__(self) -> None:
        self.timer: Timer = CpuTimer(threads=1)

    def sets(self, size: int) -> int:
        return 2

    def costs(self, step: Step) -> Costs:
        return Costs(None, None, None, host_us(step, lambda: None))

    def graph(self, steps: Sequence[Step]) -> Step:
        return lambda: [step() for step in steps]

    def release(self) -> None:
        pass


def host_us(step: Step, synchronize: Callable[[], None]) -> float:
    """Median microseconds until a call returns; the GPU's queue is emptied in between: a full one blocks."""
    samples: list[float] = []
    end = time.monotonic() + HOST_S
    while len(samples) < HOST_ROUNDS and (not samples or time.monotonic() < end):
        synchronize()
        begin = time.perf_counter_ns()
        for _ in range(HOST_CALLS):
            step()
        samples.append((time.perf_counter_ns() - begin) / 1e3 / HOST_CALLS)
    synchronize()
    return statistics.median(samples)


def _peak_bytes(step: Step) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


def _launches(step: Step) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    return count_launches(profile.events())


def count_launches(events: Iterable[Any]) -> int:
    """Kernels, copies and fills among the profiler's events."""
    return sum(event.device_type == DeviceType.CUDA and not event.is_user_annotation for event in events)


def _host_syncs(step: Step) -> int:
    with sync_warnings() as found:
        step()
    return len(found)


@contextmanager
def sync_warnings() -> Iterator[list[warnings.WarningMessage]]:
    """torch's warnings of the block's waits for the GPU, complete when it has ended.

    A wait for an event gives none, and what another library does without torch gives none either.
    """
    found: list[warnings.WarningMessage] = []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found += [warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
