"""The trainer with marks around its parts: what a step of it does is what it does for a user."""

from __future__ import annotations

import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.meters import sync_warnings
from bench.records import ROOT, Row
from bench.training.formulas import RELEASED, in_place_of
from bench.training.profiled import profiler, summary
from bench.training.timeline import Passing, StepTimes, Timeline
from detector.config import Config
from detector.engine.distributed import Process
from detector.engine.run_folder import LOG
from detector.engine.train import Trainer
from detector.model.mask_rcnn import STRIDE
from gol_kernels.losses import LongTailLoss

FORMS = ("ours", "released")
WARM_UP, MEASURED, SYNCS, PROFILE = "warm-up", "measured", "syncs", "profile"


class Planned(NamedTuple):
    """What a step is for, and the form of the loss in it."""

    purpose: str
    form: str


@dataclass(frozen=True)
class Effort:
    """Steps: of each form those to warm up and to measure, in blocks that take turns; then of each form those
    whose syncs are counted (on a GPU), and of ours those that are profiled."""

    warm_up: int
    measured: int
    block: int
    syncs: int
    profiled: int

    def __post_init__(self) -> None:
        if self.block < 1 or self.profiled < 1 or self.syncs < 0 or self.measured < 1 or self.warm_up < 1:
            raise ValueError(f"expected positive numbers of steps, got {self}")
        if self.warm_up % self.block or self.measured % self.block:
            raise ValueError(
                f"{self.warm_up} steps to warm up and {self.measured} to measure are not whole blocks of "
                f"{self.block}"
            )

    def plan(self, *, count_syncs: bool) -> list[Planned]:
        """All steps in order; the second of two blocks goes first in the next pair. A last step ends the
        last one that is looked at."""
        steps: list[Planned] = []
        for purpose, number in ((WARM_UP, self.warm_up), (MEASURED, self.measured)):
            for pair in range(number // self.block):
                for form in FORMS if pair % 2 == 0 else FORMS[::-1]:
                    steps += [Planned(purpose, form)] * self.block
        if count_syncs:
            steps += [Planned(SYNCS, form) for form in FORMS for _ in range(self.syncs)]
        return [*steps, *[Planned(PROFILE, FORMS[0])] * self.profiled, Planned(WARM_UP, FORMS[0])]


class MeasuredTrainer(Trainer):
    """Runs the planned steps; config.train.max_steps has to be as many.

    Of every step: peak_mb; padded, (height, width) of the batch; labels, those of the first stage's RoIs.
    Of some: synced_at, by form and line of code the waits for the GPU; profile, see `profiled.summary`.
    """

    def __init__(self, config: Config, process: Process, plan: Sequence[Planned]) -> None:
        super().__init__(config, process, None)
        self.plan = plan
        self.timeline = Timeline(process.device)
        self.peak_mb: list[float] = []
        self.padded: list[tuple[int, int]] = []
        self.labels: list[Tensor] = []
        self.synced_at: dict[str, Counter[str]] = {form: Counter() for form in FORMS}
        self.profile: Row = {}
        self.profiler = profiler(process.device)
        self.full_loader, self.loader = self.loader, _Marked(self.loader, self.timeline)
        begin = self.timeline.begin
        self.model.register_forward_pre_hook(lambda *_: begin("forward"))
        self.model.register_forward_hook(lambda *_: begin("backward"))
        self.optimizer.register_step_pre_hook(lambda *_: begin("optimizer"))
        self.losses = [module for module in self.model.modules() if isinstance(module, LongTailLoss)]
        for loss in self.losses:
            loss.register_forward_pre_hook(self._enter_loss)
            loss.register_forward_hook(self._leave_loss)

    def _enter_loss(self, module: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        logits, labels, *rest = arguments
        if module is self.losses[0]:
            self.labels.append(labels)
        logits = Passing.apply(logits, self.timeline, "backward")
        self.timeline.begin("loss")
        return (logits, labels, *rest)

    def _leave_loss(self, module: torch.nn.Module, arguments: tuple[Any, ...], loss: Tensor) -> Tensor:
        self.timeline.begin("forward")
        return Passing.apply(loss, self.timeline, "loss")

    def _update(self, images: list[Tensor], targets: list[dict[str, Any]]) -> bool:
        planned, on_gpu = self.plan[self.step], self.process.device.type == "cuda"
        sides = zip(*(image.shape[-2:] for image in images), strict=True)
        height, width = (-(-max(side) // STRIDE) * STRIDE for side in sides)
        self.padded.append((height, width))
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        with ExitStack() as stack:
            if planned.form == "released":
                for loss in self.losses:
                    stack.enter_context(in_place_of(loss, RELEASED[self.config.loss.name]))
            if planned.purpose == SYNCS:
                stack.enter_context(self._counted(planned.form))
            if planned.purpose == PROFILE and self.plan[self.step - 1].purpose != PROFILE:
                self.profiler.start()
            stopping = super()._update(images, targets)
        if planned.purpose == PROFILE and self.plan[self.step + 1].purpose != PROFILE:
            if on_gpu:
                torch.cuda.synchronize()
            self.profiler.stop()
            self.profile = summary(self.profiler, sum(step.purpose == PROFILE for step in self.plan))
        self.peak_mb.append(self.logger.memory_mb())
        self.timeline.begin("other")
        return stopping

    @contextmanager
    def _counted(self, form: str) -> Iterator[None]:
        with sync_warnings() as found:
            yield
        self.synced_at[form].update(f"{_short(warning.filename)}:{warning.lineno}" for warning in found)

    def times(self, form: str) -> list[StepTimes]:
        """Of the measured steps with this form of the loss."""
        return [
            times
            for times, planned in zip(self.timeline.steps(), self.plan, strict=False)
            if planned == (MEASURED, form)
        ]

    def numbers(self, form: str) -> list[int]:
        """Which steps these are, from 0."""
        return [k for k, planned in enumerate(self.plan) if planned == (MEASURED, form)]

    def logged(self, form: str, block: int) -> list[Row]:
        """The rows that the trainer itself has logged of them, one for each block."""
        ends = {number + 1 for number in self.numbers(form)}
        lines = (self.config.run_dir / LOG).read_text(encoding="utf-8").splitlines()
        return [row for row in map(json.loads, lines) if row["step"] in ends and row["step"] % block == 0]


class _Marked:
    """A loader whose batches the timeline waits for."""

    def __init__(self, loader: Any, timeline: Timeline) -> None:
        self.loader, self.timeline = loader, timeline

    def __iter__(self) -> Iterator[Any]:
        return self.timeline.batches(self.loader)


def _short(path: str) -> str:
    """Of a file of this tree its path there, of another package's its path among the packages."""
    for folder in (sysconfig.get_path("purelib"), str(ROOT)):
        if path.startswith(folder + os.sep):
            return Path(path).relative_to(folder).as_posix()
    return path
