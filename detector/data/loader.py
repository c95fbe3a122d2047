"""The two loaders of a run: resumable training batches, and every validation image once.

Workers give the same samples whatever their number, since each sample carries its own seed; PyTorch limits
every worker to one thread.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from detector.data.annotations import LvisAnnotations
from detector.data.dataset import LvisDataset, collate
from detector.data.sampler import TrainBatchSampler, repeat_factors
from detector.data.transforms import FlipAndResize


def build_train_loader(
    annotations: LvisAnnotations,
    image_root: str | Path,
    *,
    batch_size: int,
    min_sizes: int | Sequence[int],
    max_size: int,
    flip_probability: float = 0.5,
    repeat_threshold: float = 1e-3,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> tuple[DataLoader[Any], TrainBatchSampler]:
    """(loader, sampler) of one rank; batch_size is per rank.

    Iterating the loader gives what is left of the epoch named by ``sampler.set_position(epoch, batch)``.
    """
    dataset = LvisDataset(
        annotations, image_root, transform=FlipAndResize(min_sizes, max_size, flip_probability), training=True
    )
    factors = repeat_factors(annotations, repeat_threshold)
    sampler = TrainBatchSampler(
        factors, annotations.aspect_ratios, batch_size, seed=seed, rank=rank, world_size=world_size
    )
    loader = DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collate, **_worker_options(num_workers, pin_memory)
    )
    return loader, sampler


def build_eval_loader(
    annotations: LvisAnnotations,
    image_root: str | Path,
    *,
    min_size: int,
    max_size: int,
    batch_size: int = 1,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """Every ``world_size``-th image from ``rank`` on, in file order: the ranks together see each once."""
    if not 0 <= rank < world_size:
        raise ValueError(f"expected 0 <= rank < world_size, got rank={rank}, world_size={world_size}")
    dataset = LvisDataset(
        annotations, image_root, transform=FlipAndResize(min_size, max_size), training=False
    )
    return DataLoader(
        Subset(dataset, range(rank, len(dataset), world_size)),
        batch_size=batch_size,
        collate_fn=collate,
        **_worker_options(num_workers, pin_memory),
    )


def _worker_options(num_workers: int, pin_memory: bool) -> dict[str, Any]:
    return {
        "num_workers": num_workers,
        "pin_memory": pin_memory and torch.cuda.is_available(),
        "persistent_workers": num_workers > 0,
        "worker_init_fn": _leave_what_is_shared,
        # Starting a loader draws a seed: not from the global stream, which a resumed run must find unchanged.
        "generator": torch.Generator(),
    }


def _leave_what_is_shared(worker: int) -> None:
    """Keeps the garbage collector off what was there before the fork.

    To visit an object is to write to it, and so to copy its page of memory.
    """
    gc.freeze()
