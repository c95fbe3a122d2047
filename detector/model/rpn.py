"""The region proposal network of torchvision, in float32 and without the matrix of all overlaps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from detector.config import ModelConfig
from detector.model.matching import BETWEEN, match_boxes
from detector.model.rois import Target
from detector.model.sampling import draw_balanced, mean_over_ranks

SMOOTH_L1_BETA = 1 / 9  # torchvision's rpn.compute_loss
FOREGROUND_IOU, BACKGROUND_IOU, NMS_IOU = 0.7, 0.3, 0.7  # Faster R-CNN, sections 3.1.2 and 3.3


class Float32Anchors(AnchorGenerator):
    """torchvision's anchors have the dtype of the features: in bfloat16 pixel 801 would be pixel 800."""

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        return super().forward(image_list, [level[:1, :1].float() for level in feature_maps])


class Float32Head(RPNHead):
    """torchvision's head with float32 results, for the same reason."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [level.float() for level in logits], [level.float() for level in deltas]


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's network; anchors find their objects by `match_boxes`."""

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[Target]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Per image: labels float [N], of the drawn anchors 1 (object) or 0 (background), of all others -1,
        and the objects' boxes [N, 4]."""
        labels, matched = [], []
        for boxes, target in zip(anchors, targets, strict=True):
            truth = target["boxes"]
            match = match_boxes(
                truth, boxes, foreground=FOREGROUND_IOU, background=BACKGROUND_IOU, keep_best=True
            )
            drawn = draw_balanced(
                match >= 0,
                (match < 0) & (match != BETWEEN),
                self.fg_bg_sampler.batch_size_per_image,
                self.fg_bg_sampler.positive_fraction,
                target.get("generator"),
            )
            label = torch.full((len(boxes),), -1.0, device=boxes.device)
            label[drawn] = (match[drawn] >= 0).float()
            labels.append(label)
            matched.append(truth[match.clamp(min=0)] if len(truth) else torch.zeros_like(boxes))
        return labels, matched

    def compute_loss(
        self, objectness: Tensor, deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Objectness and box loss, both divided by the drawn anchors of the batch."""
        label, wanted = torch.cat(labels), torch.cat(regression_targets)
        drawn, positive = (label >= 0).nonzero().squeeze(1), (label > 0).nonzero().squeeze(1)
        count = mean_over_ranks(len(drawn), label.device)
        logits = objectness.flatten()[drawn]
        objects = F.binary_cross_entropy_with_logits(logits, label[drawn], reduction="sum")
        boxes = F.smooth_l1_loss(deltas[positive], wanted[positive], beta=SMOOTH_L1_BETA, reduction="sum")
        return objects / count, boxes / count


def build_rpn(config: ModelConfig, channels: int) -> ProposalNetwork:
    """`channels`: of each level of the pyramid."""
    anchors = Float32Anchors(
        sizes=tuple((size,) for size in config.anchor_sizes),
        aspect_ratios=(config.anchor_ratios,) * len(config.anchor_sizes),
    )
    return ProposalNetwork(
        anchors,
        Float32Head(channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=FOREGROUND_IOU,
        bg_iou_thresh=BACKGROUND_IOU,
        batch_size_per_image=config.rpn_rois,
        positive_fraction=0.5,
        pre_nms_top_n={"training": config.pre_nms_train, "testing": config.pre_nms_test},
        post_nms_top_n={"training": config.post_nms_train, "testing": config.post_nms_test},
        nms_thresh=NMS_IOU,
    )
