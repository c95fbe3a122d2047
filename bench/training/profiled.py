"""What torch's profiler says of some steps: how long the GPU works, what the host calls and waits for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType

from bench.meters import count_launches
from bench.records import Row

LONGEST = 15  # operators and calls that are kept


def profiler(device: torch.device) -> torch.profiler.profile:
    """Not started."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities, acc_events=True)


def summary(profile: torch.profiler.profile, steps: int) -> Row:
    """Of a step, from a profile of `steps`: milliseconds and calls.

    busy_ms: in which the GPU computed or copied, launches: what did so; both None without a GPU. calls: the
    host's calls of CUDA that took longest in all; a wait is in the call that waits. operators: those that
    took longest by themselves, on the GPU or without one on the CPU. The profiler makes a step's host slower.
    """
    events = list(profile.events())
    work = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    calls = [e for e in events if e.device_type == DeviceType.CPU and e.name.startswith(("cuda", "cuLaunch"))]
    host: dict[str, list[float]] = {}
    for call in calls:
        host.setdefault(call.name, []).append(_microseconds(call))
    on_gpu = bool(work)
    averages = [
        average
        for average in profile.key_averages()
        if average.device_type == DeviceType.CPU and average.key not in host
    ]
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    averages.sort(key=lambda average: -getattr(average, own))
    return {
        "steps": steps,
        "busy_ms": union((e.time_range.start, e.time_range.end) for e in work) / 1e3 / steps
        if work
        else None,
        "launches": count_launches(events) / steps if work else None,
        "calls": [
            {"name": name, "calls": len(spent) / steps, "ms": sum(spent) / 1e3 / steps}
            for name, spent in sorted(host.items(), key=lambda item: -sum(item[1]))[:LONGEST]
        ],
        "operators": [
            {
                "name": average.key,
                "calls": average.count / steps,
                "device_ms": average.self_device_time_total / 1e3 / steps if on_gpu else None,
                "host_ms": average.self_cpu_time_total / 1e3 / steps,
            }
            for average in averages[:LONGEST]
        ],
    }


def union(intervals: Iterable[Sequence[float]]) -> float:
    """Length that intervals (begin, end) cover together: kernels of two streams overlap."""
    covered, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered


def _microseconds(event: Any) -> float:
    return event.time_range.end - event.time_range.start
