"""The training loop: steps, log rows, checkpoints, evaluations, interruption.

All chance in a step follows from (seed, step, rank) and the seeds of its samples. No random stream is
carried from step to step, so none has to be saved, and nothing between two steps can disturb the next one.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils import deterministic

from detector.config import Config, ConfigError, save_config, to_dict
from detector.data.annotations import LvisAnnotations
from detector.data.loader import build_train_loader
from detector.engine.bad_loss import ADVICE, BadSteps, PendingLosses, is_bad
from detector.engine.capture import capture_batches
from detector.engine.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from detector.engine.distributed import Process, process_group
from detector.engine.gradient_log import GradientLog
from detector.engine.infer import evaluate_model
from detector.engine.log import LossMeter, RunLogger
from detector.engine.report import summary, write_report
from detector.engine.run_folder import BAD_LOSS, CHECKPOINT, CONFIG, clear, describe
from detector.engine.schedule import is_finished, learning_rate
from detector.model import ClassTable, build_model
from detector.model.weights import load_start, load_weights
from detector.visualize import plot_curves
from gol_kernels.losses import LongTailLoss

Metrics = dict[str, dict[str, float]]


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
    Raises ConfigError, CheckpointError, FloatingPointError (a loss that is not finite), LostProcess and
    Interrupted.
    """
    with process_group(config.device, config.train.timeout) as process, _repeatable(process.device):
        metrics = _train(config, process, resume, overwrite)
        process.wait()  # nobody leaves while another still needs the group
    return metrics


def _train(config: Config, process: Process, resume: bool, overwrite: bool) -> Metrics | None:
    if config.train.batch_size % process.world_size:
        raise ConfigError(
            f"train.batch_size={config.train.batch_size} cannot be shared by {process.world_size} processes"
        )
    checkpoint = config.run_dir / CHECKPOINT
    if checkpoint.exists() and not (resume or overwrite):
        raise ConfigError(
            f"{config.run_dir} already holds a checkpoint: continue it with --resume {config.run_dir}, "
            f"replace it with --overwrite, or choose another --output"
        )
    process.wait()  # no rank may write before all have looked
    trainer = Trainer(config, process, load_checkpoint(checkpoint) if resume else None)
    try:
        trainer.run()
        return trainer.finish()
    finally:
        trainer.logger.close()


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
            load_start(self.model, load_checkpoint(source)["model"], source)
        self.optimizer = torch.optim.SGD(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            lr=config.train.lr,
            momentum=config.train.momentum,
            weight_decay=config.train.weight_decay,
        )
        notes = [] if state is None else self._restore(state)
        losses = [module for module in self.model.modules() if isinstance(module, LongTailLoss)]
        self.loss_buffers = [buffer for loss in losses for buffer in loss.buffers()]  # counts that grow
        self.parallel = self._parallel()
        self.meter = LossMeter(process)
        self.bad_steps = BadSteps(config.run_dir / BAD_LOSS, process, config.train.on_bad_loss)
        self.stop_signals: list[int] = []
        if process.is_main and state is None:
            clear(config.run_dir)  # not before all that can be refused has been accepted
        self.logger = RunLogger(
            config.run_dir, process, start_step=self.step, total_steps=self._total_steps()
        )
        for note in notes:
            self.logger.message(note)
        self.gradients = GradientLog(
            config.run_dir,
            process,
            losses,
            interval=config.train.gradient_interval,
            start_step=self.step,
        )
        if process.is_main:
            save_config(config, config.run_dir / CONFIG)
            if config.train.capture_steps:
                capture_batches(
                    next(iter(self.model.roi_heads)).loss,  # the first stage's
                    config.loss,
                    self.classes.stats,
                    steps=config.train.capture_steps,
                    folder=config.run_dir,
                    current_step=lambda: self.step + 1,
                )
        describe(config, process, self.step)

    def run(self) -> None:
        """Train to the end of the schedule; leaves a checkpoint of the end."""
        self.model.train()
        with _stop_signals() as self.stop_signals:
            self._evaluate_if_due()  # a run that was killed while it evaluated
            while not is_finished(self.config.train, self.step, self.epoch):
                self._run_epoch()
                self._evaluate_if_due()
        self._log()
        self.gradients.write(self.step)
        self.save()

    def _run_epoch(self) -> None:
        """To the end of the epoch, or of the run."""
        train = self.config.train
        self.sampler.set_position(self.epoch, self.batch)
        self._start_interval()
        waiting = time.perf_counter()
        for images, targets in self.loader:
            self.data_s += time.perf_counter() - waiting
            stopping = self._update(images, targets)
            self.step += 1
            self.batch += 1
            self.logger.progress(self._total_steps())
            self.gradients.after(self.step)
            saving = stopping or self.step % train.checkpoint_interval == 0
            if saving or self.step % train.log_interval == 0:
                self._log()
            if saving:
                self.save()
            if stopping:
                first = [*self.stop_signals, signal.SIGTERM][0]  # the signal may have come to another rank
                raise Interrupted(first, self.step, self.config.run_dir)
            if train.max_steps and self.step >= train.max_steps:
                return
            self._evaluate_if_due()
            waiting = time.perf_counter()
        self.epoch += 1
        self.batch = 0

    def _update(self, images: list[Tensor], targets: list[dict[str, Any]]) -> bool:
        """One step of SGD; whether a signal to stop came to some rank.

        The losses are read while the GPU is busy with the backward pass, so that a bad step is never made.
        """
        train, device = self.config.train, self.process.device
        before = [buffer.clone() for buffer in self.loss_buffers]
        self._seed()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(train, self.step, self.epoch)
        with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16"):
            losses = self.parallel(images, [_on_device(target, device) for target in targets])
        pending = PendingLosses(losses)
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        values = pending.read()
        bad, stopping = self.process.any(is_bad(values, train.max_loss), bool(self.stop_signals))
        if bad:
            for buffer, value in zip(self.loss_buffers, before, strict=True):
                buffer.copy_(value)
            row = self.bad_steps.bad(self.step + 1, values, images, targets, self._state())
            self.logger.bad_step({"step": self.step + 1, "epoch": self.epoch, **row})
            return stopping
        self.bad_steps.good()
        if train.clip_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), train.clip_grad_norm)
        self.optimizer.step()
        self.meter.add(values)
        self.interval_steps += 1
        return stopping

    def _seed(self) -> None:
        """Give the default generators the stream of this step."""
        entropy = np.random.SeedSequence([self.config.seed, self.step, self.process.rank])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))

    def _start_interval(self) -> None:
        self.interval_start, self.interval_steps, self.data_s = time.perf_counter(), 0, 0.0

    def _log(self) -> None:
        losses = self.meter.read()
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

    def _evaluate_if_due(self) -> None:
        """Evaluate after every `eval.interval` epochs, or steps; `finish` does it at the end of the run."""
        train, interval = self.config.train, self.config.eval.interval
        position = self.step if train.max_steps else self.epoch
        within = not train.max_steps and self.batch > 0
        if not interval or not position or within or position % interval:
            return
        logged = self.process.any(self.logger.has_evaluation(self.step))[0]
        if logged or is_finished(train, self.step, self.epoch):
            return
        self._log()
        self.save()
        evaluation = evaluate_model(self.model, self.config, self.classes, self.process)
        self.model.train()
        if evaluation is not None:
            self.logger.evaluation(self.step, self.epoch, evaluation.metrics)
            self.logger.message(f"step {self.step}: {summary(evaluation)}")
            plot_curves(self.config.run_dir)
        self.process.wait()
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
        """Write the checkpoint (rank 0). Raises FloatingPointError where a parameter is not finite."""
        path = self.config.run_dir / CHECKPOINT
        if not math.isfinite(torch.nn.utils.get_total_norm(self.model.parameters())):
            raise FloatingPointError(
                f"a parameter is not finite after step {self.step}, though the losses were: a gradient was "
                f"not. {path}, if it is there, is from before that. {ADVICE}"
            )
        if self.process.is_main:
            save_checkpoint(path, self._state())

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "processes": self.process.world_size,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "classes": self.classes.to_dict(),
            "config": to_dict(self.config),
        }

    def _restore(self, state: dict[str, Any]) -> list[str]:
        """Take up where `state` was saved; what the owner should know about it."""
        path, notes = self.config.run_dir / CHECKPOINT, []
        if state["classes"]["category_ids"] != self.classes.category_ids:
            raise CheckpointError(
                f"{path} was trained on {len(state['classes']['category_ids'])} categories that are not the "
                f"{self.classes.num_classes} of {self.config.data.train_file}"
            )
        interval = state["config"]["train"].get("gradient_interval", 0)
        if (interval > 0) != (self.config.train.gradient_interval > 0):
            raise ConfigError(
                f"train.gradient_interval was {interval} when {path} was written: gradients are gathered "
                f"from the first step or not at all"
            )
        load_weights(self.model, state["model"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.epoch, self.batch = state["step"], state["epoch"], state["batch"]
        before, now = state["config"]["train"]["batch_size"], self.config.train.batch_size
        if before != now:
            self.batch = min(self.batch * before // now, self.sampler.batches_in(self.epoch))
            notes.append(
                f"{path} was made with batches of {before} images, now they have {now}: the epoch goes on "
                f"after as many images, but not the same"
            )
        if state["processes"] != self.process.world_size:
            notes.append(
                f"{path} was written by {state['processes']} processes, now there are "
                f"{self.process.world_size}: the batches stay the same, sums are rounded in another order"
            )
        return notes

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


def _on_device(target: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The target with what the model computes with on the device."""
    return {**target, **{key: target[key].to(device, non_blocking=True) for key in ("boxes", "labels")}}


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
