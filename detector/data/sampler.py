"""Which images a training step sees: repeat factors and a resumable, aspect-ratio-grouped batch sampler.

Repeat-factor sampling is Gupta et al., "LVIS" (CVPR 2019), section 4.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch.utils.data import Sampler

if TYPE_CHECKING:
    from detector.data.annotations import LvisAnnotations


class SampleRef(NamedTuple):
    """One draw of an image: its index, and the seed all randomness of this draw comes from."""

    index: int
    seed: int


def repeat_factors(annotations: LvisAnnotations, threshold: float) -> np.ndarray:
    """How often each image is shown per epoch on average: float64 [I], at least 1.

    r(c) = max(1, sqrt(threshold / f_c)) with f_c = images containing c / images in the file; r(I) = max over
    the categories c in image I. An image without annotations has r(I) = 1. ``threshold=0`` turns resampling
    off.
    """
    if threshold < 0:
        raise ValueError(f"the repeat threshold must not be negative, got {threshold}")
    frequency = annotations.image_count / max(len(annotations), 1)
    with np.errstate(divide="ignore"):
        per_class = (
            np.maximum(1.0, np.sqrt(threshold / frequency)) if threshold > 0 else np.ones_like(frequency)
        )
    factors = np.ones(len(annotations))
    images, labels = annotations.image_label_pairs()
    np.maximum.at(factors, images, per_class[labels])
    return factors


class TrainBatchSampler(Sampler[list[SampleRef]]):
    """Batches of one epoch for one rank, the same on every machine for the same (seed, epoch).

    Each epoch's list repeats image i floor(r_i) times, and once more with probability r_i - floor(r_i), drawn
    from (seed, epoch) alone; it is shuffled, and cut into global batches of ``batch_size * world_size``
    images of one aspect-ratio group (width < height, and the rest), of which each rank takes its share. What
    the two groups have left over is batched together, so only the last incomplete global batch of the epoch
    is lost.

    Iterating does not move the position: it yields what is left of the epoch that ``set_position`` named, so
    that a loader may fetch ahead, and a resumed run sees exactly the batches an uninterrupted one would.

    factors: float [I] repeat factors, or the number of images. aspect_ratios: float [I], width / height.
    batch_size: images per rank and step.
    """

    def __init__(
        self,
        factors: np.ndarray | int,
        aspect_ratios: np.ndarray,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.factors = np.ones(factors) if isinstance(factors, int) else np.asarray(factors, dtype=np.float64)
        aspect_ratios = np.asarray(aspect_ratios, dtype=np.float64)
        if self.factors.ndim != 1 or aspect_ratios.shape != self.factors.shape:
            raise ValueError(
                f"expected one repeat factor and one aspect ratio per image, "
                f"got shapes {self.factors.shape} and {aspect_ratios.shape}"
            )
        if not np.isfinite(self.factors).all() or (self.factors < 0).any():
            raise ValueError("repeat factors must be finite and not negative")
        if batch_size < 1 or world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"expected batch_size >= 1 and 0 <= rank < world_size, "
                f"got batch_size={batch_size}, rank={rank}, world_size={world_size}"
            )
        if seed < 0:
            raise ValueError(f"the seed must not be negative, got {seed}")
        guaranteed = int(np.floor(self.factors).sum())
        if guaranteed < batch_size * world_size:
            raise ValueError(
                f"{guaranteed} images per epoch do not fill one batch of {batch_size} on {world_size} rank(s)"
            )
        self.portrait = aspect_ratios < 1
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.next_batch = 0
        self._cached: tuple[int, np.ndarray, np.ndarray] | None = None

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """Let iteration begin at batch ``batch`` of epoch ``epoch`` (both from 0)."""
        batches = self.batches_in(epoch)
        if not 0 <= batch <= batches:
            raise ValueError(f"epoch {epoch} has {batches} batches, cannot start at batch {batch}")
        self.epoch = epoch
        self.next_batch = batch

    def batches_in(self, epoch: int) -> int:
        """Batches of each rank in that epoch; varies a little, as the fractional repeats are drawn anew."""
        return len(self._batches(epoch)[0])

    def __len__(self) -> int:
        """Batches left in the current epoch."""
        return self.batches_in(self.epoch) - self.next_batch

    def __iter__(self) -> Iterator[list[SampleRef]]:
        batches, seeds = self._batches(self.epoch)
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        for k in range(self.next_batch, len(batches)):
            yield [
                SampleRef(int(index), int(seed))
                for index, seed in zip(batches[k, mine], seeds[k, mine], strict=True)
            ]

    def epoch_indices(self, epoch: int) -> np.ndarray:
        """The shuffled image indices of an epoch, int64 [n], before they are grouped into batches."""
        return self._draw(epoch)[0]

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.random.Generator]:
        if epoch < 0:
            raise ValueError(f"the epoch must not be negative, got {epoch}")
        rng = np.random.default_rng([self.seed, epoch])
        whole = np.floor(self.factors)
        repeats = whole + (rng.random(len(self.factors)) < self.factors - whole)
        return rng.permutation(np.repeat(np.arange(len(self.factors)), repeats.astype(np.int64))), rng

    def _batches(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Image indices and sample seeds of all global batches: int64 [batches, batch_size * world_size]."""
        if self._cached is None or self._cached[0] != epoch:
            order, rng = self._draw(epoch)
            size = self.batch_size * self.world_size
            grouped: list[np.ndarray] = []
            left: list[np.ndarray] = []
            for group in (False, True):
                positions = np.flatnonzero(self.portrait[order] == group)
                full = len(positions) // size * size
                grouped.append(positions[:full].reshape(-1, size))
                left.append(positions[full:])
            batches = np.concatenate(grouped)
            # A batch takes its turn when its last image has come up, as if images arrived one by one.
            batches = batches[np.argsort(batches[:, -1])]
            rest = np.sort(np.concatenate(left))
            batches = np.concatenate([batches, rest[: len(rest) // size * size].reshape(-1, size)])
            seeds = rng.integers(0, 2**63 - 1, size=batches.shape)
            self._cached = (epoch, order[batches], seeds)
        return self._cached[1], self._cached[2]
