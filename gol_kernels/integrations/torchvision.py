"""Any loss of this library in torchvision's Faster, Mask and Keypoint R-CNN.

model = torchvision.models.detection.maskrcnn_resnet50_fpn(num_classes=1204)
use_loss(model, gk.DropLoss(stats))     # GOL; now train and predict as before
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

from ..losses import LongTailLoss
from . import background_last

MIN_BOX_SIZE = 1e-2
"""Pixels; torchvision drops smaller detections."""


def use_loss(model: nn.Module, loss: LongTailLoss) -> nn.Module:
    """Puts ``loss`` in the place of the box head's cross-entropy and softmax, for training and inference.

    The classifier is replaced by a new one of ``loss.num_logits`` columns, started as the loss wants it; box,
    mask and keypoint branches stay. Labels stay torchvision's own (background 0). The loss's state is part of
    the model's ``state_dict``.

    Args:
        model: FasterRCNN, MaskRCNN or KeypointRCNN with num_classes C+1 and torchvision's
            ``FastRCNNPredictor``.

    Returns: the model, changed in place.
    Raises: TypeError for another model or box predictor; ValueError where the numbers of classes differ.
    """
    heads = getattr(model, "roi_heads", None)
    if not isinstance(heads, RoIHeads):
        raise TypeError(f"use_loss needs a torchvision R-CNN with roi_heads, got {type(model).__name__}")
    predictor = heads.box_predictor
    if not isinstance(predictor, FastRCNNPredictor):
        raise TypeError(f"use_loss needs torchvision's FastRCNNPredictor, got {type(predictor).__name__}")
    foreground = predictor.bbox_pred.out_features // 4 - 1
    if foreground != loss.num_classes:
        raise ValueError(
            f"the model has {foreground} foreground classes (num_classes={foreground + 1}), the loss "
            f"{loss.num_classes}"
        )
    heads.box_predictor = LongTailPredictor(predictor, loss)
    heads.__class__ = LongTailRoIHeads  # it keeps its modules and settings
    heads.loss = loss
    return model


class LongTailPredictor(nn.Module):
    """Logits [N, loss.num_logits] and torchvision's own box regression [N, 4 (C+1)].

    In training RoIHeads applies its cross-entropy to what this returns: it gets zeros, and the logits stay
    here for ``LongTailRoIHeads``.
    """

    def __init__(self, predictor: FastRCNNPredictor, loss: LongTailLoss) -> None:
        super().__init__()
        weight = predictor.cls_score.weight
        classifier = nn.Linear(predictor.cls_score.in_features, loss.num_logits)
        self.cls_score = loss.init_classifier_(classifier).to(weight.device, weight.dtype)
        self.bbox_pred = predictor.bbox_pred
        self.num_classes = loss.num_classes
        self.logits: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flatten(start_dim=1)
        logits = self.cls_score(x)
        if not self.training:
            return logits, self.bbox_pred(x)
        self.logits = logits
        return logits.new_zeros((len(logits), self.num_classes + 1)), self.bbox_pred(x)


class LongTailRoIHeads(RoIHeads):
    """torchvision's RoIHeads with a loss of this library; made by ``use_loss``."""

    loss: LongTailLoss
    _labels: Tensor

    def select_training_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As torchvision's; the labels are kept for the loss."""
        samples = super().select_training_samples(*args, **kwargs)
        self._labels = torch.cat(samples[2])
        return samples

    def forward(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """As torchvision's, ``loss_classifier`` being the loss's."""
        detections, losses = super().forward(*args, **kwargs)
        if self.training:
            logits, self.box_predictor.logits = self.box_predictor.logits, None
            losses["loss_classifier"] = self.loss(
                logits, background_last(self._labels, self.loss.num_classes)
            )
        return detections, losses

    def postprocess_detections(
        self,
        class_logits: Tensor,
        box_regression: Tensor,
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Boxes, scores and labels 1..C of each image, scored by the loss's activation."""
        counts = [len(boxes) for boxes in proposals]
        scores = self.loss.activation(class_logits)
        decoded = self.box_coder.decode(box_regression, proposals)[:, 1:]  # less background's
        found = [
            self._one_image(*image)
            for image in zip(scores.split(counts), decoded.split(counts), image_shapes, strict=True)
        ]
        boxes, kept_scores, labels = (list(column) for column in zip(*found, strict=True))
        return boxes, kept_scores, labels

    def _one_image(
        self, scores: Tensor, boxes: Tensor, image_shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        row, column = (scores > self.score_thresh).nonzero(as_tuple=True)
        chosen, score = clip_boxes_to_image(boxes[row, column], image_shape), scores[row, column]
        large = remove_small_boxes(chosen, MIN_BOX_SIZE)
        chosen, score, label = chosen[large], score[large], column[large] + 1
        kept = batched_nms(chosen, score, label, self.nms_thresh)[: self.detections_per_img]
        return chosen[kept], score[kept], label[kept]
