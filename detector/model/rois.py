"""The regions of interest that a head is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from detector.model.matching import match_boxes
from detector.model.sampling import draw_balanced

Target = dict[str, Any]


@dataclass(frozen=True)
class SampledRois:
    """The RoIs of a batch that are trained on, images one after the other.

    boxes: one [R_b, 4] per image; labels int64 [R], background C; matched int64 [R]: the ground-truth index
    within its image, negative for background; truth [R, 4]: that object's box, meaningless for background;
    proposed bool [R]: a proposal, not one of the objects that were put among them.
    """

    boxes: list[Tensor]
    labels: Tensor
    matched: Tensor
    truth: Tensor
    proposed: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def counts(self) -> list[int]:
        """RoIs of each image."""
        return [len(boxes) for boxes in self.boxes]

    @cached_property
    def positive(self) -> Tensor:
        """int64 [P]: which RoIs are foreground."""
        return (self.matched >= 0).nonzero().squeeze(1)

    @cached_property
    def positive_counts(self) -> list[int]:
        """Foreground RoIs of each image."""
        return torch.stack([part.sum() for part in (self.matched >= 0).split(self.counts)]).tolist()


class RoiSampler:
    """Label proposals by their best overlap and draw a fixed share of foreground.

    A proposal is foreground from an overlap of `iou`, background below it.
    """

    def __init__(
        self, num_classes: int, rois_per_image: int, positive_fraction: float, iou: float = 0.5
    ) -> None:
        self.num_classes = num_classes
        self.iou = iou
        self.rois_per_image = rois_per_image
        self.positive_fraction = positive_fraction

    def __call__(self, proposals: list[Tensor], targets: list[Target]) -> SampledRois:
        parts = [self._one_image(boxes, target) for boxes, target in zip(proposals, targets, strict=True)]
        boxes, labels, matched, truth, proposed = (list(column) for column in zip(*parts, strict=True))
        return SampledRois(
            boxes, torch.cat(labels), torch.cat(matched), torch.cat(truth), torch.cat(proposed)
        )

    def _one_image(self, proposals: Tensor, target: Target) -> tuple[Tensor, ...]:
        """boxes, labels, matched, truth and proposed of SampledRois for one image."""
        truth = target["boxes"]
        # The objects themselves are proposals too: without them an early RPN gives the head nothing to learn
        # from.
        boxes = torch.cat([proposals, truth])
        matched = match_boxes(truth, boxes, foreground=self.iou, background=self.iou)
        if len(truth):
            index = matched.clamp(min=0)
            labels = torch.where(matched >= 0, target["labels"][index], self.num_classes)
            matched_truth = truth[index]
        else:
            labels, matched_truth = torch.full_like(matched, self.num_classes), boxes
        chosen = draw_balanced(
            matched >= 0, matched < 0, self.rois_per_image, self.positive_fraction, target.get("generator")
        )
        return boxes[chosen], labels[chosen], matched[chosen], matched_truth[chosen], chosen < len(proposals)
