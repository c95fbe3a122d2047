"""From class scores and box deltas of one image to its detections."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import clip_boxes_to_image, nms

FIRST_CANDIDATES = 8  # times max_detections: the best scores are nearly always enough
NEXT_CANDIDATES = 4096  # at a time where they are not; NMS on a GPU takes the square of it in bits


@dataclass(frozen=True)
class DetectionSettings:
    """When a scored box counts as a detection: its score is above the threshold, NMS leaves it, and no more
    than `max_detections` of the image are better."""

    score_threshold: float
    nms_threshold: float
    max_detections: int


def select_detections(
    scores: Tensor,
    deltas: Tensor,
    proposals: Tensor,
    coder: BoxCoder,
    image_size: tuple[int, int],
    settings: DetectionSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """The `max_detections` best boxes of an image after class-aware NMS.

    scores [N, C] (foreground only), deltas [N, C or 1, 4], proposals [N, 4], image_size (height, width).
    Returns boxes [D, 4] inside the image, scores [D] descending and labels int64 [D].

    An untrained head passes all N x C scores, 1.2 million on LVIS. Boxes are decoded in portions, best scores
    first, until enough of them have survived. That changes nothing: NMS goes down the scores, so whether a
    candidate survives depends on the survivors above it alone. These are put before the next portion, where
    they survive once more.
    """
    classes = scores.shape[1]
    boxes = proposals.new_zeros(0, 4)
    values, labels = scores.new_zeros(0), torch.zeros(0, dtype=torch.int64, device=scores.device)
    for value, index in _best_first(scores.flatten(), settings):
        row, label = index // classes, index % classes
        chosen = deltas[row, label if deltas.shape[1] > 1 else 0]
        decoded = clip_boxes_to_image(coder.decode_single(chosen, proposals[row]), image_size)
        solid = ((decoded[:, 2:] - decoded[:, :2]) > 0).all(dim=1).nonzero().squeeze(1)
        boxes = torch.cat([boxes, decoded[solid]])
        values, labels = torch.cat([values, value[solid]]), torch.cat([labels, label[solid]])
        keep = class_nms(boxes, values, labels, settings.nms_threshold)[: settings.max_detections]
        boxes, values, labels = boxes[keep], values[keep], labels[keep]
        if len(keep) == settings.max_detections:
            break
    return boxes, values, labels


def _best_first(scores: Tensor, settings: DetectionSettings) -> Iterator[tuple[Tensor, Tensor]]:
    """Scores [K] above the threshold and their indices, descending, in portions."""
    passing = int((scores > settings.score_threshold).sum())
    first, index = scores.topk(min(passing, FIRST_CANDIDATES * settings.max_detections))
    yield first, index
    if len(first) < passing:
        # Below any score that passes, and so behind what the sort has to bring.
        rest = scores.index_fill(0, index, -torch.inf)
        rest, index = rest.sort(descending=True, stable=True)
        left = slice(0, passing - len(first))
        yield from zip(rest[left].split(NEXT_CANDIDATES), index[left].split(NEXT_CANDIDATES), strict=True)


def class_nms(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Indices that survive NMS within each class, best score first; of equal ones the first.

    The classes are moved apart by an offset in float64: in float32 the offset of class 1200 (1.6 million
    pixels) would round the boxes to 1/8 pixel.
    """
    if boxes.numel() == 0:
        return torch.zeros(0, dtype=torch.int64, device=boxes.device)
    offset = labels.double() * (boxes.max().double() + 1.0)
    return nms(boxes.double() + offset[:, None], scores.double(), threshold)
