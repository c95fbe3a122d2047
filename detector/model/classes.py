"""The classes a detector knows: what a checkpoint must carry to be used without the annotation file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import gol_kernels as gk

if TYPE_CHECKING:
    from detector.data.annotations import LvisAnnotations


@dataclass(frozen=True)
class ClassTable:
    """Contiguous labels 0..C-1 with the names, ids and training-set statistics of their categories."""

    category_ids: list[int]
    names: list[str]
    frequency: list[str]  # "r", "c" or "f" per class
    stats: gk.ClassStats

    @property
    def num_classes(self) -> int:
        return len(self.category_ids)

    @classmethod
    def from_annotations(cls, annotations: LvisAnnotations) -> ClassTable:
        return cls(
            category_ids=[int(i) for i in annotations.category_ids],
            names=list(annotations.category_names),
            frequency=list(annotations.category_frequency),
            stats=gk.ClassStats(
                image_count=torch.as_tensor(annotations.image_count),
                instance_count=torch.as_tensor(annotations.instance_count),
                num_images=annotations.num_images_with_annotations,
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values and tensors that `torch.load(weights_only=True)` accepts."""
        return {
            "category_ids": self.category_ids,
            "names": self.names,
            "frequency": self.frequency,
            "image_count": self.stats.image_count,
            "instance_count": self.stats.instance_count,
            "num_images": int(self.stats.num_images),
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> ClassTable:
        counts = {key: state[key] for key in ("image_count", "instance_count", "num_images")}
        stats = gk.ClassStats(**counts)
        return cls(state["category_ids"], state["names"], state["frequency"], stats)
