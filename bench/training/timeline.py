"""Where the time of a training step goes: marks that the trainer passes, on the clocks of host and GPU."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

PARTS = ("data", "prepare", "forward", "loss", "backward", "optimizer", "other")
"""data: waiting for the loader. prepare: targets to the device, seeds. forward, backward: without the loss;
backward has the reading of the losses. loss: forward and backward pass of the classification loss. other:
logging and whatever else is between two steps."""


@dataclass(frozen=True)
class Mark:
    """Where a part begins: seconds of the host's clock, and on a GPU the event that it passes there."""

    part: str
    at: float
    event: torch.cuda.Event | None


@dataclass(frozen=True)
class StepTimes:
    """Milliseconds of each part of one step; they add up to the step. device: None without a GPU.

    A part's time on the host lasts until the host is done with it, its time on the device until the GPU is:
    each clock has the waits for the other in it.
    """

    host: dict[str, float]
    device: dict[str, float] | None


class Timeline:
    """A part lasts from its mark to the next one, whatever that is, so that no time is lost between parts."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[Mark] = []

    def begin(self, part: str) -> None:
        """Never waits for the GPU."""
        event = None
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self.marks.append(Mark(part, time.perf_counter(), event))

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """What the loader gives; waiting for it is the part "data", and a step begins with it."""
        batches = iter(loader)
        while True:
            self.begin("data")
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.begin("prepare")
            yield batch

    def steps(self) -> list[StepTimes]:
        """All steps that another one has followed. Waits for the GPU."""
        if self.on_gpu:
            torch.cuda.synchronize()
        # At an epoch's end the loader is asked twice: the second "data" goes on with the first one's step.
        first = [
            k
            for k, mark in enumerate(self.marks)
            if mark.part == "data" and (k == 0 or self.marks[k - 1].part != "data")
        ]
        return [_times(self.marks[begin : end + 1]) for begin, end in pairwise(first)]


def _times(marks: list[Mark]) -> StepTimes:
    host, device = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0.0)
    for mark, following in pairwise(marks):
        host[mark.part] += 1e3 * (following.at - mark.at)
        if mark.event is not None and following.event is not None:
            device[mark.part] += mark.event.elapsed_time(following.event)
    return StepTimes(host, None if marks[0].event is None else device)


class Passing(torch.autograd.Function):
    """The identity; a part begins when the backward pass comes through.

    Autograd runs the youngest node that is ready. Put around a loss's logits and its result, the two are the
    first and the last to run of all that belong to the loss, with nothing of others in between.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, timeline: Timeline, part: str) -> Tensor:
        ctx.timeline, ctx.part = timeline, part
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.timeline.begin(ctx.part)
        return gradient, None, None
