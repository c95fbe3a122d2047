"""Batches that the trainer saved (``train.capture_steps``), for the benches to replay."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from .cases import CASES, Batch, Case


@dataclass(frozen=True)
class Captured:
    """What the classification loss of a training step received, on the CPU.

    logits [N, K]; labels [N] int64 in 0..C; rare bool [C]; counts int64 [C]. loss: its name in the
    configuration of the run.
    """

    loss: str
    step: int
    logits: torch.Tensor
    labels: torch.Tensor
    rare: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def load(cls, path: Path) -> Captured:
        """Raises: ValueError where the file is something else."""
        content = torch.load(path, map_location="cpu", weights_only=True)
        names = tuple(cls.__dataclass_fields__)
        if not isinstance(content, dict) or not set(names) <= set(content):
            raise ValueError(f"{path}: not a captured batch, which has {', '.join(names)}")
        batch = cls(**{name: content[name] for name in names})
        n, c = len(batch.labels), len(batch.counts)
        if batch.logits.dim() != 2 or len(batch.logits) != n or len(batch.rare) != c:
            raise ValueError(
                f"{path}: logits {list(batch.logits.shape)}, labels [{n}], counts [{c}] and rare "
                f"[{len(batch.rare)}] do not fit together"
            )
        return batch

    def cases(self) -> list[str]:
        """The losses whose logits have as many columns for as many classes."""
        extra = self.logits.shape[1] - len(self.counts)
        return [name for name, case in CASES.items() if case.extra_logits == extra]

    def batch(self, case: Case, device: str = "cpu", dtype: torch.dtype | None = None) -> Batch:
        """As ``case`` takes it: without background rows where it has none. dtype: None is the file's."""
        rows = slice(None) if case.background else self.labels < len(self.counts)
        logits = self.logits[rows].to(device, dtype)
        tensors = (x.to(device) for x in (self.labels[rows], self.rare, self.counts))
        return Batch(logits, *tensors, upstream=case.upstream(logits))
