"""Box and mask heads of Mask R-CNN with the classification loss injected.

The loss decides how many logits a class needs, how they become scores and how the classifier starts; nothing
here knows which loss it is. Labels: foreground 0..C-1, background C.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher
from torchvision.ops import MultiScaleRoIAlign, box_iou

from detector.model.postprocess import select_detections

BOX_WEIGHTS = (
    10.0,
    10.0,
    5.0,
    5.0,
)  # Fast R-CNN's target deviations of 0.1 and 0.2, as torchvision and mmdet
SMOOTH_L1_BETA = 1 / 9  # torchvision's roi_heads.fastrcnn_loss
FOREGROUND_IOU = 0.5

Target = dict[str, Any]


@dataclass(frozen=True)
class DetectionSettings:
    """When a scored box counts as a detection."""

    score_threshold: float
    nms_threshold: float
    max_detections: int


@dataclass(frozen=True)
class SampledRois:
    """The RoIs of a batch that are trained on, images one after the other.

    boxes: one [R_b, 4] per image; labels int64 [R], background C; matched int64 [R]: the ground-truth index
    within its image, meaningful for foreground only; truth [R, 4]: that object's box (zeros for background).
    """

    boxes: list[Tensor]
    labels: Tensor
    matched: Tensor
    truth: Tensor

    def __len__(self) -> int:
        return len(self.labels)


class RoiSampler:
    """Label proposals by their best overlap and draw a fixed share of foreground."""

    def __init__(self, num_classes: int, rois_per_image: int, positive_fraction: float) -> None:
        self.num_classes = num_classes
        self.matcher = Matcher(FOREGROUND_IOU, FOREGROUND_IOU, allow_low_quality_matches=False)
        self.draw = BalancedPositiveNegativeSampler(rois_per_image, positive_fraction)

    def __call__(self, proposals: list[Tensor], targets: list[Target]) -> SampledRois:
        parts = [self._one_image(boxes, target) for boxes, target in zip(proposals, targets, strict=True)]
        boxes, labels, matched, truth = (list(column) for column in zip(*parts, strict=True))
        return SampledRois(boxes, torch.cat(labels), torch.cat(matched), torch.cat(truth))

    def _one_image(self, proposals: Tensor, target: Target) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        truth = target["boxes"]
        # The objects themselves are proposals too: without them an early RPN gives the head nothing to learn
        # from.
        boxes = torch.cat([proposals, truth])
        if len(truth) == 0:
            labels = torch.full((len(boxes),), self.num_classes, dtype=torch.int64, device=boxes.device)
            matched = torch.zeros_like(labels)
            matched_truth = torch.zeros_like(boxes)
        else:
            match = self.matcher(box_iou(truth, boxes))
            matched = match.clamp(min=0)
            labels = torch.where(match >= 0, target["labels"][matched], self.num_classes)
            matched_truth = truth[matched]
        positive, negative = self.draw([(labels < self.num_classes).to(torch.int64)])
        chosen = (positive[0] | negative[0]).nonzero().squeeze(1)
        return boxes[chosen], labels[chosen], matched[chosen], matched_truth[chosen]


class RoIHeads(nn.Module):
    """Classify, refine and outline the proposals.

    `loss` is a gol_kernels loss module (num_logits, activation, call). The other modules: `box_head` pooled
    features -> [N, D], `box_predictor` and `mask_predictor` of detector.model.predictors, `mask_head` [P, F,
    S, S] -> same S.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        loss: nn.Module,
        loss_weight: float,
        sampler: RoiSampler,
        settings: DetectionSettings,
        box_pool: MultiScaleRoIAlign,
        box_head: nn.Module,
        box_predictor: nn.Module,
        mask_pool: MultiScaleRoIAlign,
        mask_head: nn.Module,
        mask_predictor: nn.Module,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.loss = loss
        self.loss_weight = loss_weight
        self.sampler = sampler
        self.settings = settings
        self.box_coder = BoxCoder(BOX_WEIGHTS)
        self.box_pool = box_pool
        self.box_head = box_head
        self.box_predictor = box_predictor
        self.mask_pool = mask_pool
        self.mask_head = mask_head
        self.mask_predictor = mask_predictor

    def training_losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        padded: list[tuple[int, int]],
        targets: list[Target],
    ) -> dict[str, Tensor]:
        """loss_cls, loss_box, loss_mask of a batch; `padded`: its padded (height, width), once per image."""
        rois = self.sampler(proposals, targets)
        logits, deltas = self.box_predictor(self.box_head(self.box_pool(features, rois.boxes, padded)))
        # mmdet's denominator: every sampled RoI of the batch, foreground and background
        num_rois = max(len(rois), 1)
        positive = (rois.labels < self.num_classes).nonzero().squeeze(1)
        return {
            "loss_cls": self.loss(logits, rois.labels, avg_factor=num_rois) * self.loss_weight,
            "loss_box": self._box_loss(deltas, rois, positive) / num_rois,
            "loss_mask": self._mask_loss(features, rois, positive, padded, targets),
        }

    def _box_loss(self, deltas: Tensor, rois: SampledRois, positive: Tensor) -> Tensor:
        """Sum of smooth L1 over the foreground RoIs; deltas [R, C or 1, 4]."""
        group = rois.labels[positive] if deltas.shape[1] > 1 else torch.zeros_like(positive)
        wanted = self.box_coder.encode_single(rois.truth[positive], torch.cat(rois.boxes)[positive])
        return F.smooth_l1_loss(deltas[positive, group], wanted, beta=SMOOTH_L1_BETA, reduction="sum")

    def _mask_loss(
        self,
        features: dict[str, Tensor],
        rois: SampledRois,
        positive: Tensor,
        padded: list[tuple[int, int]],
        targets: list[Target],
    ) -> Tensor:
        """Mean binary cross-entropy of the foreground RoIs' own class planes (Mask R-CNN, section 3)."""
        sizes = [len(boxes) for boxes in rois.boxes]
        image = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(positive.device)
        boxes = torch.cat(rois.boxes)[positive]
        per_image = torch.bincount(image[positive], minlength=len(sizes)).tolist()
        pooled = self.mask_pool(features, list(boxes.split(per_image)), padded)
        planes = self.mask_predictor(self.mask_head(pooled), rois.labels[positive])
        if len(positive) == 0:
            return planes.sum()  # zero, and every parameter still takes part
        matched, boxes = rois.matched[positive].cpu(), boxes.cpu()
        wanted = torch.cat(
            [
                target["masks"].crop(box, index, planes.shape[-1])
                for target, box, index in zip(
                    targets, boxes.split(per_image), matched.split(per_image), strict=True
                )
            ]
        )
        return F.binary_cross_entropy_with_logits(planes, wanted.to(planes.device))

    def detect(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        padded: list[tuple[int, int]],
        image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Per image: boxes [D, 4], scores [D] descending, labels [D] in 0..C-1, masks [D, M, M] in 0..1."""
        logits, deltas = self.box_predictor(self.box_head(self.box_pool(features, proposals, padded)))
        scores = self.loss.activation(logits.float())
        counts = [len(boxes) for boxes in proposals]
        found = [
            select_detections(
                score,
                delta,
                boxes,
                self.box_coder,
                size,
                score_threshold=self.settings.score_threshold,
                nms_threshold=self.settings.nms_threshold,
                max_detections=self.settings.max_detections,
            )
            for score, delta, boxes, size in zip(
                scores.split(counts), deltas.split(counts), proposals, image_sizes, strict=True
            )
        ]
        pooled = self.mask_pool(features, [boxes for boxes, _, _ in found], padded)
        planes = self.mask_predictor(
            self.mask_head(pooled), torch.cat([labels for _, _, labels in found])
        ).sigmoid()
        return [
            {"boxes": boxes, "scores": score, "labels": labels, "masks": masks}
            for (boxes, score, labels), masks in zip(
                found, planes.split([len(f[0]) for f in found]), strict=True
            )
        ]
