"""Draws and averages that are the same however a batch is spread over processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def with_generators(targets: list[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """The targets, each with a "generator" seeded by its "seed"; None, the default one, where it has no seed.

    What is drawn for an image then depends neither on its neighbours in the batch nor on its process.
    """

    def generator(target: dict[str, Any]) -> torch.Generator | None:
        return torch.Generator(device).manual_seed(target["seed"]) if "seed" in target else None

    return [{**target, "generator": generator(target)} for target in targets]


def draw_balanced(
    positive: Tensor, negative: Tensor, count: int, share: float, generator: torch.Generator | None = None
) -> Tensor:
    """Ascending indices, int64, of at most `count` entries, drawn without replacement.

    positive, negative: bool [N]. At most `share` of the count is positive, the rest negative, as far as there
    are enough (Fast R-CNN, section 2.3).
    """
    positive, negative = positive.nonzero().squeeze(1), negative.nonzero().squeeze(1)
    num_positive = min(len(positive), int(count * share))
    num_negative = min(len(negative), count - num_positive)
    parts = [
        part[torch.randperm(len(part), generator=generator, device=part.device)[:number]]
        for part, number in ((positive, num_positive), (negative, num_negative))
    ]
    return torch.cat(parts).sort().values


def mean_over_ranks(count: int, device: torch.device) -> Tensor:
    """Mean of a count over the processes, 0-d, or 1 where all counts are 0. Every process has to call it.

    Divided by it, the sums of the processes' rows average to the mean over all rows: the gradients that
    data-parallel training averages are those of one process with the whole batch.
    """
    mean = torch.full((), float(count), device=device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return torch.where(mean > 0, mean, 1.0)
