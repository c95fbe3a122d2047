"""The process group of a run: started by torchrun, or a single process without one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from detector.config import ConfigError

# Rank 0 judges the results while the others wait, which takes minutes on LVIS.
PATIENCE = timedelta(hours=12)

T = TypeVar("T")


class LostProcess(RuntimeError):
    """Another process of the run has ended, or keeps this one waiting for too long."""


@dataclass(frozen=True)
class Process:
    """This process among those of the run."""

    rank: int
    world_size: int
    device: torch.device
    patient: dist.ProcessGroup | None = None  # in which a wait may take hours

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is set on some rank. Runs on the CPU, so it never waits for the GPU."""
        if self.world_size == 1:
            return flags
        votes = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(votes)
        return tuple(vote > 0 for vote in votes.tolist())

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
            values /= self.world_size
        return values

    def gather(self, value: T) -> list[T]:
        """Every rank's picklable `value`, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until every rank is here, however long one of them works alone."""
        if self.world_size > 1:
            dist.all_reduce(torch.zeros(1), group=self.patient)


@contextmanager
def process_group(device: str, timeout_minutes: float = 30.0) -> Iterator[Process]:
    """Join the group that torchrun's environment variables describe, if there is one; leave it at the end.

    Raises LostProcess where another rank ends early, or lets the others wait for `timeout_minutes` outside of
    `Process.wait`.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = _device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size == 1:
        yield Process(0, 1, chosen)
        return
    # gloo beside nccl carries the few messages that must not wait for the GPU
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
    try:
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield Process(dist.get_rank(), world_size, chosen, patient)
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        raise LostProcess(
            "another process of the run has ended or does not answer; its own message, if it had time for "
            f"one, says why. Here: {str(error).splitlines()[0]}. --resume continues from the last checkpoint"
        ) from error
    finally:
        dist.destroy_process_group()


def _is_lost_connection(error: RuntimeError) -> bool:
    """gloo raises plain RuntimeErrors that name its source file."""
    return isinstance(error, dist.DistError) or "gloo/" in str(error)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:<index>, got {name!r}") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"device={name} was asked for, but torch {torch.__version__} sees no GPU")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if device.index >= torch.cuda.device_count():
            raise ConfigError(
                f"{device} was asked for, but this machine has {torch.cuda.device_count()} GPUs"
            )
    return device
