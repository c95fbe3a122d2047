"""What is drawn from an image for training, and the averages over processes, here of one."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection.rpn import RegionProposalNetwork

from detector.model.rois import RoiSampler
from detector.model.rpn import build_rpn
from detector.model.sampling import draw_balanced, mean_over_ranks, with_generators
from tests.detector.tiny_detector import tiny_config


def masks(positive: int, negative: int, neither: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [N] each: the first are positive, the last negative."""
    kind = torch.tensor([1] * positive + [0] * neither + [-1] * negative)
    return kind == 1, kind == -1


@pytest.mark.parametrize(
    ("positive", "negative", "count", "share", "expected"),
    [
        (40, 100, 32, 0.25, (8, 24)),
        (3, 100, 32, 0.25, (3, 29)),  # negatives fill up
        (40, 10, 32, 0.25, (8, 10)),  # positives do not
        (0, 5, 32, 0.25, (0, 5)),
        (5, 0, 4, 0.5, (2, 0)),
        (0, 0, 4, 0.5, (0, 0)),
    ],
)
def test_the_share_of_positives(positive, negative, count, share, expected):
    is_positive, is_negative = masks(positive, negative)
    drawn = draw_balanced(is_positive, is_negative, count, share)
    assert (int(is_positive[drawn].sum()), int(is_negative[drawn].sum())) == expected
    assert len(drawn) == sum(expected)
    assert drawn.tolist() == sorted(set(drawn.tolist()))


def test_everything_is_drawn_equally_often():
    is_positive, is_negative = masks(8, 12, neither=2)
    draws = [draw_balanced(is_positive, is_negative, 10, 0.4) for _ in range(3000)]
    times = torch.bincount(torch.cat(draws), minlength=22).double()
    for mask, probability in ((is_positive, 4 / 8), (is_negative, 6 / 12)):
        deviation = (3000 * probability * (1 - probability)) ** 0.5
        assert float((times[mask] - 3000 * probability).abs().max()) < 4.5 * deviation
    assert float(times[~is_positive & ~is_negative].sum()) == 0


def target(seed: int, left: float) -> dict:
    boxes = torch.tensor([[left, 10.0, left + 20, 40.0]])
    return {"boxes": boxes, "labels": torch.tensor([2]), "seed": seed}


def test_a_draw_belongs_to_its_sample_alone():
    """Neither the neighbour in the batch nor the default generator matters; another seed does."""
    generator = torch.Generator().manual_seed(0)
    proposals = [torch.rand(300, 4, generator=generator) * 50 for _ in range(2)]
    proposals = [torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:] + 1], dim=1) for boxes in proposals]
    first, second = target(5, 10.0), target(6, 30.0)
    sampler = RoiSampler(6, rois_per_image=20, positive_fraction=0.25)
    device = torch.device("cpu")
    both = sampler(proposals, with_generators([first, second], device))
    torch.rand(3)
    turned = sampler(proposals[::-1], with_generators([second, first], device))
    assert torch.equal(both.boxes[0], turned.boxes[1])
    assert torch.equal(both.boxes[1], turned.boxes[0])
    other = sampler(proposals[:1], with_generators([{**first, "seed": 7}], device))
    assert not torch.equal(both.boxes[0], other.boxes[0])

    state = torch.get_rng_state()
    sampler(proposals[:1], with_generators([first], device))
    assert torch.equal(torch.get_rng_state(), state)
    without_seed = {key: value for key, value in first.items() if key != "seed"}
    sampler(proposals[:1], with_generators([without_seed], device))
    assert not torch.equal(torch.get_rng_state(), state)


def test_one_process_divides_by_its_own_count():
    assert float(mean_over_ranks(7, torch.device("cpu"))) == 7.0
    assert float(mean_over_ranks(0, torch.device("cpu"))) == 1.0  # 0 / 1 instead of 0 / 0


def test_proposal_losses_are_those_of_torchvision():
    """With as many anchors drawn as there are, its own sampler takes the same ones."""
    rpn = build_rpn(tiny_config("model.rpn_rois=100000").model, 8)
    generator = torch.Generator().manual_seed(1)
    labels = [torch.randint(-1, 2, (count,), generator=generator).float() for count in (50, 70)]
    logits = torch.randn(120, 1, generator=generator, requires_grad=True)
    deltas = torch.randn(120, 4, generator=generator, requires_grad=True)
    wanted = [torch.randn(count, 4, generator=generator) for count in (50, 70)]
    ours = rpn.compute_loss(logits, deltas, labels, wanted)
    theirs = RegionProposalNetwork.compute_loss(rpn, logits, deltas, labels, wanted)
    for loss, reference in zip(ours, theirs, strict=True):
        assert loss.item() == pytest.approx(reference.item(), rel=1e-6)
        gradients = (
            torch.autograd.grad(each, (logits, deltas), allow_unused=True, retain_graph=True)
            for each in (loss, reference)
        )
        for gradient, expected in zip(*gradients, strict=True):
            if expected is not None:
                torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-9)


def test_anchors_that_are_not_drawn_have_no_label():
    rpn = build_rpn(tiny_config("model.rpn_rois=10").model, 8)
    anchors = [torch.tensor([[float(x), 10.0, x + 20.0, 40.0] for x in range(0, 200, 2)])]
    found = with_generators([target(3, 50.0)], torch.device("cpu"))
    (label,), (matched,) = rpn.assign_targets_to_anchors(anchors, found)
    assert int((label >= 0).sum()) == 10
    assert 0 < int((label == 1).sum()) <= 5
    objects = (label == 1).nonzero().squeeze(1)
    assert (abs(anchors[0][objects, 0] - 50) <= 4).all()  # IoU 0.7 and more
    assert torch.equal(matched[objects], found[0]["boxes"].expand(len(objects), 4))
