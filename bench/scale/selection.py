"""Selecting detections and matching anchors at LVIS's size, beside the straightforward ways."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image

from bench.records import Row
from bench.scale.files import Size, draw_boxes
from bench.scale.findings import compare
from detector.model.matching import match_boxes
from detector.model.postprocess import DetectionSettings, select_detections

IMAGE = (800, 1066)


def straightforward(
    scores: Tensor,
    deltas: Tensor,
    proposals: Tensor,
    coder: BoxCoder,
    image_size: tuple[int, int],
    settings: DetectionSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Decode every class's boxes, drop low scores, NMS by class, keep the best: torchvision's way."""
    rows, classes = scores.shape
    boxes = coder.decode_single(deltas.flatten(1), proposals).view(rows, classes, 4)
    boxes = clip_boxes_to_image(boxes, image_size).view(-1, 4)
    values, labels = scores.flatten(), torch.arange(classes).expand(rows, classes).flatten()
    solid = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    keep = ((values > settings.score_threshold) & solid).nonzero().squeeze(1)
    boxes, values, labels = boxes[keep], values[keep], labels[keep]
    keep = batched_nms(boxes, values, labels, settings.nms_threshold)[: settings.max_detections]
    return boxes[keep], values[keep], labels[keep]


def select(folder: Path, size: Size) -> list[Row]:
    """Crowded proposals, and two heads: all of whose scores pass the threshold, and few."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    objects = draw_boxes(np.tile(IMAGE, (20, 1)), rng)
    near = objects[rng.integers(20, size=size.proposals)] + 10 * rng.standard_normal((size.proposals, 4))
    near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 8)
    torch.manual_seed(0)
    logits = torch.randn(size.proposals, size.classes)
    # No two scores are equal: of equal ones, either may come first.
    place = logits.flatten().argsort().argsort().view_as(logits).double() / logits.numel()
    heads = {"all": 2e-4 + 0.9 * place**8, "a tenth": 0.9 * place.clamp(min=0.9).sub(0.9).mul(10) ** 4}
    settings = DetectionSettings(1e-4, 0.5, size.detections)
    rows = []
    for share, scores in heads.items():
        arguments = (
            scores.float(),
            0.5 * torch.randn(size.proposals, size.classes, 4),
            torch.from_numpy(near).float(),
            BoxCoder((10.0, 10.0, 5.0, 5.0)),
            IMAGE,
            settings,
        )
        rows += compare(
            f"select {size.detections} of {size.proposals} x {size.classes} scores, {share} above 1e-4",
            partial(select_detections, *arguments),
            partial(straightforward, *arguments),
            rounds=size.rounds // 3,
            faster=True,
            passing=int((scores > 1e-4).sum()),
        )
    return rows


def match(folder: Path, size: Size) -> list[Row]:
    """The RPN's rule on all anchors of an image, beside torchvision's Matcher on the whole IoU matrix."""
    torch.set_num_threads(1)
    height, width = size.anchors
    generator = AnchorGenerator(tuple((side,) for side in (32, 64, 128, 256, 512)), ((0.5, 1.0, 2.0),) * 5)
    levels = [torch.zeros(1, 1, -(-height // step), -(-width // step)) for step in (4, 8, 16, 32, 64)]
    anchors = generator(ImageList(torch.zeros(1, 3, height, width), [(height, width)]), levels)[0]
    boxes = draw_boxes(np.tile(size.anchors, (size.objects, 1)), np.random.default_rng(0))
    truth = torch.from_numpy(boxes).float()
    return compare(
        f"match {len(truth)} objects with {len(anchors):,} anchors",
        lambda: match_boxes(truth, anchors, foreground=0.7, background=0.3, keep_best=True),
        lambda: Matcher(0.7, 0.3, True)(box_iou(truth, anchors)),
        rounds=size.rounds // 3,
        faster=False,
    )
