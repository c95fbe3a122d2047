"""The meter of a GPU, gone through on a stand-in for CUDA."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from bench import meters
from bench.cases import CASES
from bench.device import Effort, Setting, measure_setting
from bench.meters import CudaMeter, CudaTimer, count_launches


class _Cuda:
    """Of torch.cuda what the meter uses; ``log`` says what was done, and in which stream or graph."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.where = "default"
        self.clock = 0.0
        self.allocated = self.peak = 1000
        log, owner = self.log, self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                owner.clock += 0.5
                self.at = owner.clock

            def synchronize(self) -> None:
                log.append("wait")

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        class Inside:
            def __init__(self, name: str) -> None:
                self.name = name

            def __enter__(self) -> None:
                self.before, owner.where = owner.where, self.name

            def __exit__(self, *_: object) -> None:
                owner.where = self.before

        stream = SimpleNamespace(wait_stream=lambda other: None)
        graph = SimpleNamespace(replay=lambda: log.append("replay"))
        stand_ins = {
            "Event": Event,
            "Stream": lambda: stream,
            "stream": lambda _: Inside("side"),
            "current_stream": lambda: stream,
            "CUDAGraph": lambda: graph,
            "graph": lambda _: Inside("graph"),
            "synchronize": lambda: None,
            "empty_cache": lambda: log.append("empty"),
            "current_device": lambda: 0,
            "get_device_properties": lambda _: SimpleNamespace(L2_cache_size=60 * 2**20),
            "reset_peak_memory_stats": self._reset,
            "memory_allocated": lambda: self.allocated,
            "max_memory_allocated": lambda: self.peak,
            "set_sync_debug_mode": lambda mode: log.append(f"sync {mode}"),
        }
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def _reset(self) -> None:
        self.peak = self.allocated

    def step(self) -> str:
        """Takes 2 ms and 500 bytes, and waits for the GPU once."""
        self.log.append(self.where)
        self.clock += 2.0
        self.peak = max(self.peak, self.allocated + 500)
        if "sync warn" in self.log[-2:]:
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
        return self.where


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> _Cuda:
    return _Cuda(monkeypatch)


def test_rotation_is_three_times_the_l2(cuda: _Cuda) -> None:
    meter = CudaMeter()
    assert meter.sets(2**30) == 1
    assert meter.sets(100 * 2**20) == 2
    assert meter.sets(2**20) == meters.MAX_SETS
    assert meter.sets(2 * 2**20) == 90


def test_event_timer(cuda: _Cuda) -> None:
    sample = CudaTimer()(cuda.step, 5)
    assert sample.ms == pytest.approx((5 * 2 + 0.5) / 5)
    assert cuda.log == ["default"] * 5 + ["wait"]


def test_capture(cuda: _Cuda) -> None:
    """Warmed up on a side stream, every step captured once, and the results kept while the graph lives."""
    replay = CudaMeter().graph([cuda.step] * 3)
    assert cuda.log == ["side", "side", "graph", "graph", "graph"]
    assert replay() == ["graph"] * 3
    assert cuda.log[-1] == "replay"


def test_costs(cuda: _Cuda) -> None:
    costs = CudaMeter().costs(cuda.step)
    assert costs.peak_bytes == 500
    assert costs.host_syncs == 1
    assert costs.launches == 0  # none of the events is of a GPU
    assert costs.host_us > 0
    assert cuda.log.count("sync warn") == cuda.log.count("sync default") == 1


def test_launches_are_the_work_on_the_gpu() -> None:
    def event(kind: DeviceType, annotation: bool = False) -> SimpleNamespace:
        return SimpleNamespace(device_type=kind, is_user_annotation=annotation)

    kernel, call, range_ = event(DeviceType.CUDA), event(DeviceType.CPU), event(DeviceType.CUDA, True)
    assert count_launches([call, kernel, call, kernel, range_]) == 2


def test_a_setting_on_the_stand_in(cuda: _Cuda) -> None:
    meter = CudaMeter()
    meter.device = "cpu"
    meter.l2_bytes = 300  # the logits are 456 bytes: two sets
    setting = Setting(CASES["softmax"], 6, 19, "float32", False)
    for row in measure_setting(setting, None, meter, Effort(2, 0.0)).rows:
        assert row["clock"] == "CUDA events"
        assert row["sets"] == 2
