"""Which object each box belongs to, without the matrix of all overlaps."""

from __future__ import annotations

import torch
from torch import Tensor

BACKGROUND = -1
BETWEEN = -2  # neither foreground nor background

# Overlaps computed at a time: on a CPU a block and its temporaries stay in the cache, a GPU has few launches.
BLOCK_CPU = 2**17
BLOCK_GPU = 2**22


def match_boxes(
    truth: Tensor, boxes: Tensor, *, foreground: float, background: float, keep_best: bool = False
) -> Tensor:
    """Index of the object that each box overlaps most, BACKGROUND or BETWEEN: int64 [N].

    truth [G, 4] and boxes [N, 4] are float (x0, y0, x1, y1). A box is foreground at an IoU of at least
    `foreground`, background below `background`. With `keep_best` the boxes that overlap an object most, ties
    included, belong to *their* best object, however small the overlap (Faster R-CNN, section 3.1.2, case i).
    Without objects all boxes are background.

    The values are those of torchvision's Matcher on box_iou(truth, boxes), which for 500 objects and 200,000
    anchors would be 400 MB, and four times that with its temporaries. Here the boxes pass block by block: the
    best object of a box is known within its block, the best boxes of an object after all of them. The second
    look, at which boxes these are, takes only the blocks and the objects that met there.
    """
    if len(truth) == 0:
        return torch.full((len(boxes),), BACKGROUND, dtype=torch.int64, device=boxes.device)
    limit = BLOCK_CPU if boxes.device.type == "cpu" else BLOCK_GPU
    size = max(limit // len(truth), 1)
    value = torch.empty(len(boxes), dtype=boxes.dtype, device=boxes.device)
    best = torch.empty(len(boxes), dtype=torch.int64, device=boxes.device)
    blocks = boxes.split(size)
    highest = torch.empty(len(blocks), len(truth), dtype=boxes.dtype, device=boxes.device)
    for block, top, row, columns in zip(blocks, value.split(size), highest, best.split(size), strict=True):
        iou = _iou(truth, block)
        torch.max(iou, dim=0, out=(top, columns))
        torch.amax(iou, dim=1, out=row)
    matches = torch.where(value < foreground, BETWEEN, best)
    matches = torch.where(value < background, BACKGROUND, matches)
    if keep_best:
        matches = torch.where(_among_best(truth, blocks, highest), best, matches)
    return matches


def _among_best(truth: Tensor, blocks: tuple[Tensor, ...], highest: Tensor) -> Tensor:
    """bool [N]: boxes that overlap some object as much as any box does; highest [number of blocks, G]."""
    best = highest.amax(dim=0)
    if len(blocks) == 1:  # where all objects met; no GPU is waited for
        return (_iou(truth, blocks[0]) == best[:, None]).any(dim=0)
    found = [torch.zeros(len(block), dtype=torch.bool, device=block.device) for block in blocks]
    reached = (highest == best).cpu()  # the one time that a GPU is waited for
    for number, objects in enumerate(reached):
        if objects.any():
            chosen = objects.nonzero().squeeze(1).to(truth.device)
            iou = _iou(truth[chosen], blocks[number])
            found[number] = (iou == best[chosen, None]).any(dim=0)
    return torch.cat(found)


def _iou(truth: Tensor, boxes: Tensor) -> Tensor:
    """IoU [G, B], in the order of operations of torchvision's box_iou, so that equal stays equal."""
    inter = _shared(truth, boxes, 0).mul_(_shared(truth, boxes, 1))
    union = (_area(truth)[:, None] + _area(boxes)).sub_(inter)
    return inter.div_(union)


def _shared(truth: Tensor, boxes: Tensor, axis: int) -> Tensor:
    """Length [G, B] that the boxes share along an axis."""
    end = torch.minimum(truth[:, None, axis + 2], boxes[:, axis + 2])
    return end.sub_(torch.maximum(truth[:, None, axis], boxes[:, axis])).clamp_(min=0)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
