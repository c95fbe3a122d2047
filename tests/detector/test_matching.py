"""Matching in blocks, against torchvision's Matcher on the whole matrix of overlaps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from detector.model import matching
from detector.model.matching import BACKGROUND, BETWEEN, match_boxes

RULES = [(0.7, 0.3, True), (0.7, 0.3, False), (0.5, 0.5, False), (0.5, 0.5, True)]


def anchors(height: int, width: int) -> torch.Tensor:
    """Those of five pyramid levels; neighbours of equal shape give exact ties."""
    generator = AnchorGenerator(
        tuple((size,) for size in (32, 64, 128, 256, 512)), aspect_ratios=((0.5, 1.0, 2.0),) * 5
    )
    levels = [torch.zeros(1, 1, -(-height // s), -(-width // s)) for s in (4, 8, 16, 32, 64)]
    return generator(ImageList(torch.zeros(1, 3, height, width), [(height, width)]), levels)[0]


def objects(count: int, height: int, width: int) -> torch.Tensor:
    """From one pixel to the whole image, half of them on whole pixels and each tenth there twice."""
    corner = torch.rand(count, 2) * torch.tensor([width - 2.0, height - 2.0])
    size = 1 + torch.rand(count, 2) ** 4 * torch.tensor([width, height])
    boxes = torch.cat([corner, torch.minimum(corner + size, torch.tensor([width, height]).float())], dim=1)
    boxes[::2] = boxes[::2].round()
    boxes[1::10] = boxes[:-1:10]
    return boxes


def torchvisions(truth, boxes, foreground, background, keep_best):
    return Matcher(foreground, background, keep_best)(box_iou(truth, boxes))


@pytest.mark.parametrize("block", [1, 1000, 2**17])
@pytest.mark.parametrize("count", [1, 2, 37])
@pytest.mark.parametrize(("foreground", "background", "keep_best"), RULES)
def test_matches_are_torchvisions(monkeypatch, block, count, foreground, background, keep_best):
    monkeypatch.setattr(matching, "BLOCK_CPU", block)
    boxes, truth = anchors(96, 64), objects(count, 96, 64)
    if block == 1:
        boxes = boxes[::7]
    expected = torchvisions(truth, boxes, foreground, background, keep_best)
    found = match_boxes(truth, boxes, foreground=foreground, background=background, keep_best=keep_best)
    assert torch.equal(found, expected)
    assert (expected >= 0).sum() >= count * keep_best


def test_best_box_is_kept_with_its_own_object():
    """Anchor 1 is the best that object 0 has, but overlaps object 1 more; anchor 3 is the best of nobody."""
    truth = torch.tensor([[0.0, 0, 10, 10], [2.0, 0, 12, 8]])
    boxes = torch.tensor([[50.0, 50, 60, 60], [2, 0, 12, 10], [0, 0, 4, 4], [3, 3, 9, 9]])
    kept = match_boxes(truth, boxes, foreground=0.9, background=0.3, keep_best=True)
    assert kept.tolist() == [BACKGROUND, 1, BACKGROUND, BETWEEN]
    plain = match_boxes(truth, boxes, foreground=0.9, background=0.3)
    assert plain.tolist() == [BACKGROUND, BETWEEN, BACKGROUND, BETWEEN]


def test_only_the_best_boxes_are_kept_and_all_of_them():
    truth = torch.tensor([[0.0, 0, 10, 10]])
    boxes = torch.tensor([[0.0, 0, 5, 9.99], [0, 0, 5, 10], [5, 0, 10, 10]])  # the last two at 1/2 exactly
    found = match_boxes(truth, boxes, foreground=0.7, background=0.3, keep_best=True)
    assert found.tolist() == [BETWEEN, 0, 0]


def test_object_that_overlaps_nothing_is_treated_as_by_torchvision():
    truth = torch.tensor([[0.0, 0, 4, 4], [90, 90, 95, 95]])
    boxes = torch.tensor([[0.0, 0, 4, 5], [20, 20, 30, 30]])
    expected = torchvisions(truth, boxes, 0.7, 0.3, True)
    assert torch.equal(match_boxes(truth, boxes, foreground=0.7, background=0.3, keep_best=True), expected)


def test_without_objects_all_is_background():
    found = match_boxes(torch.zeros(0, 4), torch.rand(5, 4), foreground=0.5, background=0.5, keep_best=True)
    assert found.tolist() == [BACKGROUND] * 5


PEAK = """
from pathlib import Path
from detector.model.matching import match_boxes
from tests.detector.test_matching import anchors, objects, torchvisions
boxes, truth = anchors(800, 1088), objects(100, 800, 1088)
def blocks(boxes):
    return match_boxes(truth, boxes, foreground=0.7, background=0.3, keep_best=True)
def matrix(boxes):
    return torchvisions(truth, boxes, 0.7, 0.3, True)
blocks(boxes[:100]), matrix(boxes[:100])
def peak():  # of this program alone; getrusage would give at least that of the process it was started from
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
for way in (blocks, matrix):
    before = peak()
    way(boxes)
    print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_memory_does_not_grow_with_the_matrix():
    """100 objects and 217,000 anchors: a matrix of 87 MB, of which torchvision holds several at once."""
    output = subprocess.check_output([sys.executable, "-c", PEAK], text=True, cwd=Path(__file__).parents[2])
    blocks, matrix = (int(kilobytes) for kilobytes in output.split())
    assert blocks < 40_000 < 400_000 < matrix
