"""The training loop: steps, log rows, checkpoints, interruption and the evaluation at the end."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils import deterministic

from detector.config import Config, ConfigError, save_config, to_dict
from detector.data.annotations import LvisAnnotations
from detector.data.loader import build_train_loader
from detector.engine.capture import BATCHES, capture_batches
from detector.engine.checkpoint import (
    LAST,
    CheckpointError,
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)
from detector.engine.distributed import Process, process_group
from detector.engine.infer import evaluate_model
from detector.engine.log import LossMeter, RunLogger
from detector.engine.report import write_report
from detector.engine.schedule import is_finished, learning_rate
from detector.model import ClassTable, build_model
from detector.model.weights import load_weights

Metrics = dict[str, dict[str, float]]

RUN_FILES = (
    LAST,
    "log.jsonl",
    "events.out.tfevents.*",
    "metrics.json",
    "results.json",
    "plots/*.png",
    "predictions.png",
    f"{BATCHES}/*.pt",
)


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the run was saved and can be resumed."""

    def __init__(self, signum: int, step: int, run_dir: Path) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}; continue with --resume {run_dir}"
        )
        self.signum = signum


def train(config: Config, *, resume: bool = False, overwrite: bool = False) -> Metrics | None:
    """Train as `config` says, evaluate, and leave everything in config.run_dir; the metrics on rank 0.

    resume: continue from the run's last checkpoint, as if it had never stopped.
    Raises ConfigError, CheckpointError, FloatingPointError (a loss that is not finite) and Interrupted.
    """
    with process_group(config.device) as process, _repeatable(process.device):
        metrics = _train(config, process, resume, overwrite)
        process.barrier()  # nobody leaves while another still needs the group
    return metrics


def _train(config: Config, process: Process, resume: bool, overwrite: bool) -> Metrics | None:
    if config.train.batch_size % process.world_size:
        raise ConfigError(
            f"train.batch_size={config.train.batch_size} cannot be shared by {process.world_size} processes"
        )
    checkpoint = config.run_dir / LAST
    if checkpoint.exists() and not (resume or overwrite):
        raise ConfigError(
            f"{config.run_dir} already holds a checkpoint: continue it with --resume {config.run_dir}, "
            f"replace it with --overwrite, or choose another --output"
        )
    process.barrier()  # no rank may write before all have looked
    if process.is_main and not resume:
        _clear(config.run_dir)
    trainer = Trainer(config, process, load_checkpoint(checkpoint) if resume else None)
    try:
        trainer.run()
        return trainer.finish()
    finally:
        trainer.logger.close()


def _clear(run_dir: Path) -> None:
    """Remove what an earlier run wrote there: left behind, its checkpoint could pass for the new run's."""
    for name in RUN_FILES:
        for path in run_dir.glob(name):
            path.unlink()


class Trainer:
    """One training run on one rank."""

    def __init__(self, config: Config, process: Process, state: dict[str, Any] | None) -> None:
        self.config = config
        self.process = process
        self.step, self.epoch, self.batch = 0, 0, 0
        torch.manual_seed(config.seed)  # every rank starts with the same model
        annotations = LvisAnnotations.from_file(config.data.train_file)
        self.classes = ClassTable.from_annotations(annotations)
        self.loader, self.sampler = build_train_loader(
            annotations,
            config.data.image_folder,
            min_sizes=config.data.min_sizes,
            max_size=config.data.max_size,
            flip_probability=config.data.flip,
            repeat_threshold=config.data.repeat_threshold,
            batch_size=config.train.batch_size // process.world_size,
            seed=config.seed,
            rank=process.rank,
            world_size=process.world_size,
            num_workers=config.data.workers,
            pin_memory=True,
        )
        fresh = state is None and not config.train.init_from
        self.model = build_model(config, self.classes, load_weights=fresh).to(process.device)
        if config.train.init_from and state is None:
            source = Path(config.train.init_from)
            load_weights(self.model, load_checkpoint(source)["model"], source)
        self.optimizer = torch.optim.SGD(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            lr=config.train.lr,
            momentum=config.train.momentum,
            weight_decay=config.train.weight_decay,
        )
        torch.manual_seed(config.seed + 1 + process.rank)  # from here on each rank draws its own RoIs
        if state is not None:
            self._restore(state)
        self.parallel = self._parallel()
        self.meter = LossMeter(process)
        self.logger = RunLogger(
            config.run_dir, process, start_step=self.step, total_steps=self._total_steps()
        )
        if process.is_main:
            save_config(config, config.run_dir / "config.yaml")
            if config.train.capture_steps:
                capture_batches(
                    self.model.roi_heads.loss,
                    config.loss,
                    self.classes.stats,
                    steps=config.train.capture_steps,
                    folder=config.run_dir,
                    current_step=lambda: self.step + 1,
                )

    def run(self) -> None:
        """Train to the end of the schedule; leaves a checkpoint of the end."""
        self.model.train()
        with _stop_signals() as stop:
            while not is_finished(self.config.train, self.step, self.epoch):
                self._run_epoch(stop)
        self._log()
        self.save()

    def _run_epoch(self, stop: list[int]) -> None:
        self.sampler.set_position(self.epoch, self.batch)
        self._start_interval()
        waiting = time.perf_counter()
        for images, targets in self.loader:
            self.data_s += time.perf_counter() - waiting
            self._update(images, targets)
            self.step += 1
            self.batch += 1
            self.logger.progress(self._total_steps())
            stopping = self.process.any(bool(stop))
            saving = stopping or self.step % self.config.train.checkpoint_interval == 0
            if saving or self.step % self.config.train.log_interval == 0:
                self._log()  # also the check that what is saved is finite
            if saving:
                self.save()
            if stopping:
                raise Interrupted(stop[0] if stop else signal.SIGTERM, self.step, self.config.run_dir)
            if self.config.train.max_steps and self.step >= self.config.train.max_steps:
                return
            waiting = time.perf_counter()
        self.epoch += 1
        self.batch = 0

    def _update(self, images: list[Tensor], targets: list[dict[str, Any]]) -> None:
        """One step of SGD. No loss is read here: only data-dependent shapes make the host wait."""
        train, device = self.config.train, self.process.device
        targets = [
            {**target, **{key: target[key].to(device, non_blocking=True) for key in ("boxes", "labels")}}
            for target in targets
        ]
        rate = learning_rate(train, self.step, self.epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16"):
            losses = self.parallel(images, targets)
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        if train.clip_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), train.clip_grad_norm)
        self.optimizer.step()
        self.meter.add(losses)
        self.interval_steps += 1

    def _start_interval(self) -> None:
        self.interval_start, self.interval_steps, self.data_s = time.perf_counter(), 0, 0.0

    def _log(self) -> None:
        losses = self.meter.read(self.step)
        if not losses:
            return
        seconds = (time.perf_counter() - self.interval_start) / max(self.interval_steps, 1)
        self.logger.losses(
            {
                "step": self.step,
                "epoch": self.epoch,
                "lr": self.optimizer.param_groups[0]["lr"],
                "loss": sum(losses.values()),
                **losses,
                "data_s": self.data_s / max(self.interval_steps, 1),
                "step_s": seconds,
                "images_per_s": self.config.train.batch_size / seconds,
                "memory_mb": self.logger.memory_mb(),
            }
        )
        self._start_interval()

    def finish(self) -> Metrics | None:
        """Evaluate, write metrics.json, plots and the page of predictions; print the table (rank 0)."""
        evaluation = evaluate_model(self.model, self.config, self.classes, self.process)
        if evaluation is None:
            return None
        self.logger.evaluation(self.step, self.epoch, evaluation.metrics)
        self.logger.close()
        write_report(self.config, self.classes, evaluation)
        return evaluation.metrics

    def save(self) -> None:
        """Write the checkpoint; every rank takes part, as each has its own random stream."""
        streams = self.process.gather(random_state(self.process.device))
        if not self.process.is_main:
            return
        save_checkpoint(
            self.config.run_dir / LAST,
            {
                "step": self.step,
                "epoch": self.epoch,
                "batch": self.batch,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "random": streams,
                "classes": self.classes.to_dict(),
                "config": to_dict(self.config),
            },
        )

    def _restore(self, state: dict[str, Any]) -> None:
        streams = state["random"]
        if len(streams) != self.process.world_size:
            raise CheckpointError(
                f"{self.config.run_dir / LAST} was written by {len(streams)} processes, this run has "
                f"{self.process.world_size}: resume with as many, or start a new run with train.init_from"
            )
        if state["classes"]["category_ids"] != self.classes.category_ids:
            raise CheckpointError(
                f"{self.config.run_dir / LAST} was trained on {len(state['classes']['category_ids'])} "
                f"categories that "
                f"are not the {self.classes.num_classes} of {self.config.data.train_file}"
            )
        load_weights(self.model, state["model"], self.config.run_dir / LAST)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.epoch, self.batch = state["step"], state["epoch"], state["batch"]
        set_random_state(streams[self.process.rank], self.process.device)

    def _parallel(self) -> torch.nn.Module:
        if self.process.world_size == 1:
            return self.model
        devices = [self.process.device] if self.process.device.type == "cuda" else None
        # The losses keep their own state equal on all ranks; broadcasting would overwrite it with rank 0's
        # each step.
        return DistributedDataParallel(self.model, device_ids=devices, broadcast_buffers=False)

    def _total_steps(self) -> int:
        """Steps of the whole run; epochs differ a little in length, so later ones count as this one."""
        train = self.config.train
        if train.max_steps or is_finished(train, self.step, self.epoch):
            return train.max_steps or self.step
        return self.step - self.batch + (train.epochs - self.epoch) * self.sampler.batches_in(self.epoch)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM so that the current step can be finished; a second one acts at once."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        signal.signal(signum, previous[signum])

    for signum in (signal.SIGINT, signal.SIGTERM):
        previous[signum] = signal.signal(signum, note)
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


@contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """On the CPU every run repeats bit for bit; on a GPU the deterministic RoIAlign would cost most speed."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filled = deterministic.fill_uninitialized_memory
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = filled
