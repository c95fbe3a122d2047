"""The choice of detections, against decoding everything."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import clip_boxes_to_image, nms

from detector.model import postprocess
from detector.model.postprocess import DetectionSettings, class_nms, select_detections
from detector.model.roi_heads import CASCADE

SIZE = (90, 80)


class CountingCoder(BoxCoder):
    """Remembers how many boxes it decoded at a time."""

    def __init__(self) -> None:
        super().__init__(CASCADE[0].box_weights)
        self.decoded: list[int] = []

    def decode_single(self, rel_codes: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        self.decoded.append(len(boxes))
        return super().decode_single(rel_codes, boxes)


def straightforward(scores, deltas, proposals, coder, size, settings):
    """Decode everything, NMS class by class, keep the best."""
    every = coder.decode_single(deltas.flatten(1), proposals).view(len(proposals), -1, 4)
    boxes, values, labels = [], [], []
    for label in range(scores.shape[1]):
        mine = clip_boxes_to_image(every[:, min(label, every.shape[1] - 1)], size)
        solid = (mine[:, 2] > mine[:, 0]) & (mine[:, 3] > mine[:, 1])
        keep = ((scores[:, label] > settings.score_threshold) & solid).nonzero().squeeze(1)
        keep = keep[nms(mine[keep], scores[keep, label], settings.nms_threshold)]
        boxes.append(mine[keep])
        values.append(scores[keep, label])
        labels.append(torch.full((len(keep),), label))
    order = torch.cat(values).argsort(descending=True)[: settings.max_detections]
    return torch.cat(boxes)[order], torch.cat(values)[order], torch.cat(labels)[order]


def random_boxes(rows: int, spread: float) -> torch.Tensor:
    corner = torch.rand(rows, 2) * spread
    return torch.cat([corner, corner + 20 + spread * torch.rand(rows, 2)], dim=1)


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize(
    ("rows", "classes", "threshold", "limit", "spread", "portions"),
    [
        (200, 40, 1e-4, 50, 60.0, 1),  # far more candidates than are decoded at first
        (300, 12, 1e-4, 100, 2.0, 8),  # boxes so alike that NMS leaves few: in the end all are decoded
        (300, 12, 0.5, 150, 6.0, 2),  # all that pass are decoded, and no more
        (500, 40, 1e-4, 50, 3.0, 2),  # the first 400 of 20,000 leave too few, some more leave enough
        (60, 5, 0.97, 300, 60.0, 1),  # few pass the threshold
        (40, 3, 1.0, 10, 60.0, 1),  # none does
    ],
)
def test_selection_equals_the_straightforward_way(
    monkeypatch, agnostic, rows, classes, threshold, limit, spread, portions
):
    monkeypatch.setattr(postprocess, "NEXT_CANDIDATES", 400)
    torch.manual_seed(rows)
    scores = torch.rand(rows, classes)
    deltas = 0.5 * torch.randn(rows, 1 if agnostic else classes, 4)
    coder, settings = CountingCoder(), DetectionSettings(threshold, 0.5, limit)
    arguments = (scores, deltas, random_boxes(rows, spread), coder, SIZE, settings)
    found = select_detections(*arguments)
    assert len(coder.decoded) >= portions
    assert max(coder.decoded) <= max(400, 8 * limit)
    expected = straightforward(*arguments)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert (len(found[0]) == 0) == (threshold == 1.0)


def test_equal_scores_are_taken_once_each(monkeypatch):
    """A fresh Gumbel head scores all classes of a RoI alike. With five RoIs apart from each other nothing
    suppresses anything, and every RoI and class must come out exactly once."""
    monkeypatch.setattr(postprocess, "FIRST_CANDIDATES", 1)
    monkeypatch.setattr(postprocess, "NEXT_CANDIDATES", 7)
    corner = 10.0 * torch.arange(5)[:, None]
    proposals = torch.cat([corner, corner, corner + 8, corner + 8], dim=1)
    settings = DetectionSettings(1e-4, 0.5, 19)
    scores = torch.full((5, 4), 6e-4)
    boxes, _, labels = select_detections(
        scores, torch.zeros(5, 1, 4), proposals, CountingCoder(), (60, 60), settings
    )
    pairs = {(float(box[0]), int(label)) for box, label in zip(boxes, labels, strict=True)}
    assert len(boxes) == len(pairs) == 19

    # each RoI twice, and one class of the fourth a little lower: 40 candidates, of which 25 come first
    scores[3, 1] = 5e-4
    settings = DetectionSettings(1e-4, 0.5, 25)
    boxes, values, labels = select_detections(
        torch.cat([scores, scores]),
        torch.zeros(10, 1, 4),
        torch.cat([proposals, proposals]),
        CountingCoder(),
        (60, 60),
        settings,
    )
    pairs = {(float(box[0]), int(label)) for box, label in zip(boxes, labels, strict=True)}
    assert len(boxes) == len(pairs) == 20
    assert (boxes[-1].tolist(), int(labels[-1])) == ([30.0, 30, 38, 38], 1)
    assert values[-1] < values[-2]


def test_untrained_head_of_lvis_size_is_bounded():
    """All 1000 x 1203 scores pass: the best 300 come out without decoding 1.2 million boxes."""
    scores = 6e-4 + 1e-5 * torch.rand(1000, 1203)
    deltas = torch.zeros(1000, 1, 4).expand(1000, 1203, 4)
    corner, coder = torch.rand(1000, 2) * 700, CountingCoder()
    proposals = torch.cat([corner, corner + 60], dim=1)
    found = select_detections(scores, deltas, proposals, coder, (800, 800), DetectionSettings(1e-4, 0.5, 300))
    assert len(found[1]) == 300
    assert coder.decoded == [2400]
    assert float(found[1][-1]) >= float(scores.flatten().topk(2400).values[-1])


def test_boxes_that_are_all_the_same_stay_bounded():
    """Every RoI on one object and every score above the threshold: one box a class, found in portions."""
    scores, coder = (1.0 + torch.randperm(200 * 1203)).view(200, 1203) / 2**18, CountingCoder()
    proposals = torch.tensor([[10.0, 10, 60, 60]]).expand(200, 4)
    settings = DetectionSettings(1e-4, 0.5, 300)
    _, values, labels = select_detections(scores, torch.zeros(200, 1, 4), proposals, coder, SIZE, settings)
    best = scores.amax(dim=0).sort(descending=True)
    assert torch.equal(values, best.values[:300])
    assert torch.equal(labels, best.indices[:300])
    assert max(coder.decoded) <= postprocess.NEXT_CANDIDATES


def test_class_nms_keeps_precision_at_high_labels():
    """Two boxes of class 1202 with an IoU just under the threshold survive; float32 would hide it."""
    boxes = torch.tensor([[0.0, 0.0, 1000.0, 1000.0], [0.0, 0.0, 1000.0, 499.98]])
    labels = torch.tensor([1202, 1202])
    assert class_nms(boxes, torch.tensor([0.9, 0.8]), labels, 0.5).tolist() == [0, 1]
    assert class_nms(boxes, torch.tensor([0.9, 0.8]), labels, 0.4999).tolist() == [0]
    assert class_nms(boxes, torch.tensor([0.8, 0.9]), torch.tensor([0, 1]), 0.1).tolist() == [1, 0]
