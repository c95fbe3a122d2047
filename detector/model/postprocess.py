"""From class scores and box deltas of one image to its detections."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import clip_boxes_to_image, nms

FIRST_CANDIDATES = 8  # times max_detections: the best scores decoded first


def select_detections(
    scores: Tensor,
    deltas: Tensor,
    proposals: Tensor,
    coder: BoxCoder,
    image_size: tuple[int, int],
    *,
    score_threshold: float,
    nms_threshold: float,
    max_detections: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The `max_detections` best boxes of an image after class-aware NMS.

    scores [N, C] (foreground only), deltas [N, C or 1, 4], proposals [N, 4], image_size (height, width).
    Returns boxes [D, 4] inside the image, scores [D] descending and labels int64 [D].

    An untrained head passes all N x C scores (1.2 million on LVIS), so boxes are decoded only for the best
    scores. That changes nothing: NMS goes down the scores, so whether a candidate survives depends on better
    ones alone, and when the best k candidates leave `max_detections` survivors, these are the survivors of
    all. Otherwise k grows.
    """
    flat = scores.flatten()
    passing = int((flat > score_threshold).sum())
    num_candidates = min(passing, FIRST_CANDIDATES * max_detections)
    while True:
        top, index = flat.topk(num_candidates)
        row, label = index // scores.shape[1], index % scores.shape[1]
        chosen = deltas[row, label if deltas.shape[1] > 1 else torch.zeros_like(label)]
        boxes = clip_boxes_to_image(coder.decode_single(chosen, proposals[row]), image_size)
        solid = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(dim=1).nonzero().squeeze(1)
        boxes, top, label = boxes[solid], top[solid], label[solid]
        keep = class_nms(boxes, top, label, nms_threshold)[:max_detections]
        if len(keep) == max_detections or num_candidates == passing:
            return boxes[keep], top[keep], label[keep]
        num_candidates = min(passing, 4 * num_candidates)


def class_nms(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Indices that survive NMS within each class, best score first.

    The classes are moved apart by an offset in float64: in float32 the offset of class 1200 (1.6 million
    pixels) would round the boxes to 1/8 pixel.
    """
    if boxes.numel() == 0:
        return torch.zeros(0, dtype=torch.int64, device=boxes.device)
    offset = labels.double() * (boxes.max().double() + 1.0)
    return nms(boxes.double() + offset[:, None], scores.double(), threshold)
