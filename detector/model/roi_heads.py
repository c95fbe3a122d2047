"""Box and mask heads with the classification loss injected: one stage is Mask R-CNN, three are a cascade.

The loss decides how many logits a class needs, how they become scores and how the classifier starts; nothing
here knows which loss it is. Labels: foreground 0..C-1, background C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image

from detector.model.postprocess import DetectionSettings, select_detections
from detector.model.predictors import BoxPredictor, MaskHead, MaskPredictor
from detector.model.rois import RoiSampler, SampledRois, Target
from detector.model.sampling import mean_over_ranks
from detector.transfer import OnTheWay
from gol_kernels.losses import LongTailLoss

SMOOTH_L1_BETA = 1 / 9  # torchvision's roi_heads.fastrcnn_loss


@dataclass(frozen=True)
class StageSettings:
    """What tells one stage of a cascade from the next.

    iou: overlap from which a RoI is foreground; weight: of all losses of the stage; box_weights: inverse
    deviation of the box targets (x, y, w, h), larger where the boxes are better already.
    """

    iou: float
    weight: float
    box_weights: tuple[float, float, float, float]


CASCADE = (
    # Cai & Vasconcelos 2019, sections 4 and 5; the first is Fast R-CNN's, and all there is of Mask R-CNN.
    StageSettings(iou=0.5, weight=1.0, box_weights=(10.0, 10.0, 5.0, 5.0)),
    StageSettings(iou=0.6, weight=0.5, box_weights=(20.0, 20.0, 10.0, 10.0)),
    StageSettings(iou=0.7, weight=0.25, box_weights=(30.0, 30.0, 15.0, 15.0)),
)


class Stage(nn.Module):
    """Heads that classify boxes, refine them and outline what they hold, with a loss whose state is theirs.

    `loss` is a gol_kernels loss module (num_logits, activation, call); `box_head`: pooled features -> [N, D];
    the others are those of detector.model.predictors.
    """

    def __init__(
        self,
        settings: StageSettings,
        *,
        sampler: RoiSampler,
        loss: LongTailLoss,
        loss_weight: float,
        box_head: nn.Module,
        box_predictor: BoxPredictor,
        mask_head: MaskHead,
        mask_predictor: MaskPredictor,
    ) -> None:
        super().__init__()
        self.weight = settings.weight
        self.box_coder = BoxCoder(settings.box_weights)
        self.sampler = sampler
        self.loss = loss
        self.loss_weight = loss_weight
        self.box_head = box_head
        self.box_predictor = box_predictor
        self.mask_head = mask_head
        self.mask_predictor = mask_predictor

    def classify(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """logits [N, loss.num_logits] and box deltas [N, C or 1, 4] of pooled RoIs."""
        return self.box_predictor(self.box_head(pooled))

    def refine(self, boxes: list[Tensor], deltas: Tensor, image_sizes: list[tuple[int, int]]) -> list[Tensor]:
        """The boxes moved by class-agnostic deltas [N, 1, 4], inside their images; no gradient passes."""
        moved = self.box_coder.decode_single(deltas.detach()[:, 0], torch.cat(boxes))
        counts = [len(part) for part in boxes]
        return [
            clip_boxes_to_image(part, size)
            for part, size in zip(moved.split(counts), image_sizes, strict=True)
        ]

    def box_losses(self, logits: Tensor, deltas: Tensor, rois: SampledRois) -> dict[str, Tensor]:
        """loss_cls and loss_box, divided by all sampled RoIs of the batch, background too (as mmdet)."""
        num_rois = mean_over_ranks(len(rois), logits.device)
        return {
            "loss_cls": self.loss(logits, rois.labels, avg_factor=num_rois) * self.loss_weight,
            "loss_box": self.box_loss(deltas, rois) / num_rois,
        }

    def box_loss(self, deltas: Tensor, rois: SampledRois) -> Tensor:
        """Sum of smooth L1 over the foreground RoIs; deltas [R, C or 1, 4]."""
        positive = rois.positive
        group = rois.labels[positive] if deltas.shape[1] > 1 else torch.zeros_like(positive)
        wanted = self.box_coder.encode_single(rois.truth[positive], torch.cat(rois.boxes)[positive])
        return F.smooth_l1_loss(deltas[positive, group], wanted, beta=SMOOTH_L1_BETA, reduction="sum")


class RoIHeads(nn.Module):
    """The stages of a cascade, each on the boxes that the one before has refined.

    `interleaved`: masks are learned on the boxes that their own stage has just refined (Hybrid Task Cascade,
    section 3.1), not on those that came into it. `scores` turns averaged logits [N, loss.num_logits] into
    class scores [N, C]: the activation of the loss, or a calibration.
    """

    def __init__(
        self,
        stages: list[Stage],
        *,
        box_pool: MultiScaleRoIAlign,
        mask_pool: MultiScaleRoIAlign,
        settings: DetectionSettings,
        scores: Callable[[Tensor], Tensor],
        interleaved: bool,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.box_pool = box_pool
        self.mask_pool = mask_pool
        self.settings = settings
        self.interleaved = interleaved
        self.scores = scores

    def __iter__(self) -> Iterator[Stage]:
        return iter(cast("list[Stage]", self.stages))

    def training_losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        padded: list[tuple[int, int]],
        image_sizes: list[tuple[int, int]],
        targets: list[Target],
    ) -> dict[str, Tensor]:
        """loss_cls, loss_box, loss_mask of a batch, in a cascade as loss_cls_1, ... for each stage.

        padded: the batch's padded (height, width), once per image; image_sizes: (height, width) of the images
        themselves.
        """
        losses = {}
        for number, stage in enumerate(self):
            last = number == len(self.stages) - 1
            rois = stage.sampler(proposals, targets)
            logits, deltas = stage.classify(self.box_pool(features, rois.boxes, padded))
            parts = stage.box_losses(logits, deltas, rois)
            if self.interleaved or not last:
                refined = stage.refine(rois.boxes, deltas, image_sizes)
                proposals = [
                    boxes[proposed]
                    for boxes, proposed in zip(refined, rois.proposed.split(rois.counts), strict=True)
                ]
            if self.interleaved:
                rois = stage.sampler(proposals, targets)
            parts["loss_mask"] = self._mask_loss(number, features, rois, padded, targets)
            suffix = f"_{number + 1}" if len(self.stages) > 1 else ""
            losses.update({key + suffix: value * stage.weight for key, value in parts.items()})
        return losses

    def _mask_loss(
        self,
        number: int,
        features: dict[str, Tensor],
        rois: SampledRois,
        padded: list[tuple[int, int]],
        targets: list[Target],
    ) -> Tensor:
        """Mean binary cross-entropy of the foreground RoIs' own class planes (Mask R-CNN, section 3)."""
        positive, counts = rois.positive, rois.positive_counts
        boxes = torch.cat(rois.boxes)[positive]
        # Wanted on the host, which draws the objects' masks while a GPU is busy with the mask head.
        on_the_way = OnTheWay(rois.matched[positive]), OnTheWay(boxes)
        pooled = self.mask_pool(features, list(boxes.split(counts)), padded)
        stage = list(self)[number]
        planes = stage.mask_predictor(self._mask_features(number, pooled), rois.labels[positive])
        count = mean_over_ranks(planes.numel(), planes.device)
        if len(positive) == 0:
            return planes.sum()  # zero, and every parameter still takes part
        matched, boxes = (tensor.read() for tensor in on_the_way)
        wanted = torch.cat(
            [
                target["masks"].crop(box, index, planes.shape[-1])
                for target, box, index in zip(
                    targets, boxes.split(counts), matched.split(counts), strict=True
                )
            ]
        )
        loss = F.binary_cross_entropy_with_logits(planes, wanted.to(planes.device), reduction="sum")
        return loss / count

    def _mask_features(self, number: int, pooled: Tensor) -> Tensor:
        """Features of a mask head; where information flows, those before it look at the same RoIs first."""
        head = list(self)[number].mask_head
        before = self._mask_features(number - 1, pooled) if head.flow is not None else None
        return head(pooled, before)

    def detect(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        padded: list[tuple[int, int]],
        image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Per image: boxes [D, 4], scores [D] descending, labels [D] in 0..C-1, masks [D, M, M] in 0..1.

        Boxes go through all stages; the logits of the stages are averaged and become scores once. All mask
        heads look at the final boxes, and their probabilities are averaged.
        """
        stages, logits = list(self), []
        for number, stage in enumerate(stages, start=1):
            made, deltas = stage.classify(self.box_pool(features, proposals, padded))
            logits.append(made.float())
            if number < len(stages):
                proposals = stage.refine(proposals, deltas, image_sizes)
        scores = self.scores(torch.stack(logits).mean(dim=0))
        counts = [len(boxes) for boxes in proposals]
        found = [
            select_detections(score, delta, boxes, stage.box_coder, size, self.settings)
            for score, delta, boxes, size in zip(
                scores.split(counts), deltas.split(counts), proposals, image_sizes, strict=True
            )
        ]
        labels = torch.cat([labels for _, _, labels in found])
        masks = self._masks(self.mask_pool(features, [boxes for boxes, _, _ in found], padded), labels)
        return [
            {"boxes": boxes, "scores": score, "labels": labels, "masks": mask}
            for (boxes, score, labels), mask in zip(
                found, masks.split([len(boxes) for boxes, _, _ in found]), strict=True
            )
        ]

    def _masks(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """Probabilities [D, M, M] of the labels' masks, averaged over the stages."""
        planes, carried = [], None
        for stage in self:
            carried = stage.mask_head(pooled, carried)
            planes.append(stage.mask_predictor(carried, labels).sigmoid())
        return torch.stack(planes).mean(dim=0)
