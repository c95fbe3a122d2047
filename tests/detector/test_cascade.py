"""Cascade Mask R-CNN and Hybrid Task Cascade: what passes from stage to stage, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from detector.config import ConfigError
from detector.model import build_model
from tests.detector.tiny_detector import NUM_CLASSES, tiny_classes, tiny_config, two_pictures

PADDED = [(96, 96)] * 2


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def build(architecture: str, *overrides: str):
    config = tiny_config(f"model.architecture={architecture}", "model.class_agnostic_boxes=true", *overrides)
    return build_model(config, tiny_classes())


def features_of(model) -> dict[str, torch.Tensor]:
    return model.backbone(torch.randn(2, 3, 96, 96))


class Fixed(nn.Module):
    """In the place of a box predictor: the same logits and deltas for every RoI."""

    def __init__(self, logits: list[float], deltas: list[float]) -> None:
        super().__init__()
        self.logits, self.deltas = torch.tensor(logits), torch.tensor(deltas)

    def forward(self, features):
        count = len(features)
        return self.logits.expand(count, -1), self.deltas.expand(count, 1, 4)


class Recorder:
    """In the place of a sampler: remembers what it is given, and hands it to the true one."""

    def __init__(self, sampler) -> None:
        self.sampler, self.seen, self.made = sampler, [], []

    def __call__(self, proposals, targets):
        self.seen.append(proposals)
        self.made.append(self.sampler(proposals, targets))
        return self.made[-1]


def losses_of(model, proposals) -> dict[str, torch.Tensor]:
    _, targets = two_pictures()
    return model.roi_heads.training_losses(features_of(model), proposals, PADDED, PADDED, targets)


def proposals_near_objects() -> list[torch.Tensor]:
    _, targets = two_pictures()
    return [
        torch.cat([target["boxes"] + shift for shift in (-3.0, 0.0, 2.0)]).clamp(0, 96) for target in targets
    ]


def test_mask_rcnn_is_the_first_stage_alone():
    """A cascade cut after its first stage computes what Mask R-CNN computes, to the last bit."""
    cascade, single = build("cascade_mask_rcnn", "loss.name=gol"), build("mask_rcnn", "loss.name=gol")
    cascade.roi_heads.stages = cascade.roi_heads.stages[:1]
    single.load_state_dict(cascade.state_dict())
    images, targets = two_pictures()
    results = []
    for model in (cascade, single):
        torch.manual_seed(5)
        losses = model.train()(images, targets)
        results.append((losses, model.eval()(images)))
    (cut, detections), (losses, expected) = results
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_box", "loss_cls", "loss_box", "loss_mask"}
    assert {key: value.item() for key, value in cut.items()} == {
        key: value.item() for key, value in losses.items()
    }
    for one, other in zip(detections, expected, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("boxes", "scores", "labels", "masks"))


@pytest.mark.parametrize("architecture", ["cascade_mask_rcnn", "htc"])
def test_every_parameter_of_every_stage_learns(architecture):
    model = build(architecture, "loss.name=seesaw")
    images, targets = two_pictures()
    losses = model(images, targets)
    kinds = ("loss_cls", "loss_box", "loss_mask")
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_box"} | {f"{kind}_{k}" for kind in kinds for k in "123"}
    sum(losses.values()).backward()
    assert [key for key, value in model.named_parameters() if value.grad is None] == []
    assert all(torch.isfinite(value.grad).all() for value in model.parameters())


def test_class_specific_boxes_are_refused():
    with pytest.raises(ConfigError, match=r"needs model\.class_agnostic_boxes=true"):
        tiny_config("model.architecture=htc")


def test_stages_have_the_papers_overlaps_deviations_and_weights():
    model = build("cascade_mask_rcnn")
    stages = list(model.roi_heads)
    assert [stage.sampler.iou for stage in stages] == [0.5, 0.6, 0.7]
    deviations = [[1 / weight for weight in stage.box_coder.weights] for stage in stages]
    assert deviations == [
        pytest.approx([0.1, 0.1, 0.2, 0.2]),
        pytest.approx([0.05, 0.05, 0.1, 0.1]),
        pytest.approx([1 / 30, 1 / 30, 1 / 15, 1 / 15]),
    ]

    class Three(nn.Module):
        def forward(self, logits, labels, avg_factor):
            return logits.sum() * 0 + 3.0

    for stage in stages:
        stage.loss = Three()
        stage.mask_predictor.forward = lambda features, labels: torch.zeros(len(labels), 28, 28)
    losses = losses_of(model, proposals_near_objects())
    assert [losses[f"loss_cls_{k}"].item() for k in (1, 2, 3)] == [3.0, 1.5, 0.75]
    masks = [losses[f"loss_mask_{k}"].item() for k in (1, 2, 3)]
    undecided = 0.693147  # ln 2
    assert masks == pytest.approx([w * undecided for w in (1, 0.5, 0.25)], rel=1e-5)


def test_a_stage_moves_boxes_by_its_own_deviations_and_stays_inside_the_image():
    _, second, _ = build("cascade_mask_rcnn").roi_heads
    boxes = [torch.tensor([[10.0, 20, 50, 40]]), torch.tensor([[0.0, 0, 20, 20]])]
    # 2 / 20 of the width to the right, 1 / 20 of the height up, twice as high
    deltas = torch.tensor([[2.0, -1.0, 0.0, 10 * 0.6931472]]).expand(2, 1, 4).requires_grad_()
    moved = second.refine(boxes, deltas, [(96, 96), (25, 19)])
    torch.testing.assert_close(moved[0], torch.tensor([[14.0, 9.0, 54.0, 49.0]]), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(moved[1], torch.tensor([[2.0, 0.0, 19.0, 25.0]]), rtol=1e-5, atol=1e-4)
    assert not moved[0].requires_grad


@pytest.mark.parametrize("architecture", ["cascade_mask_rcnn", "htc"])
def test_refined_proposals_go_on_and_objects_do_not(architecture):
    """Stage 1 moves everything by a tenth of its width; what it was given as objects is not passed on."""
    model = build(architecture, "model.rois_per_image=100", "model.positive_fraction=1.0")
    stages = list(model.roi_heads)
    for stage in stages:
        stage.sampler = Recorder(stage.sampler)
    stages[0].box_predictor = Fixed([0.0] * (NUM_CLASSES + 1), [1.0, 0, 0, 0])
    proposals = proposals_near_objects()
    losses_of(model, proposals)
    assert [len(stage.sampler.seen) for stage in stages] == (
        [2, 2, 2] if architecture == "htc" else [1, 1, 1]
    )
    assert stages[0].sampler.seen[0] is proposals
    after = stages[0].sampler.seen[1] if architecture == "htc" else stages[1].sampler.seen[0]
    for given, refined in zip(proposals, after, strict=True):
        shift = 0.1 * (given[:, 2] - given[:, 0])
        wanted = given + torch.stack([shift, 0 * shift, shift, 0 * shift], dim=1)
        torch.testing.assert_close(refined, wanted.clamp(0, 96), rtol=1e-5, atol=1e-4)


def test_interleaved_masks_are_learned_on_refined_boxes(monkeypatch):
    """HTC pools masks where the boxes went, Cascade Mask R-CNN where they came from."""
    for architecture in ("htc", "cascade_mask_rcnn"):
        model = build(architecture)
        first = next(iter(model.roi_heads))
        first.sampler = Recorder(first.sampler)
        pooled = []
        true_pool = model.roi_heads.mask_pool.forward
        monkeypatch.setattr(
            model.roi_heads.mask_pool,
            "forward",
            lambda features, boxes, sizes, pool=true_pool, seen=pooled: (
                seen.append(boxes),
                pool(features, boxes, sizes),
            )[1],
        )
        losses_of(model, proposals_near_objects())
        made = first.sampler.made[-1]
        assert len(first.sampler.made) == (2 if architecture == "htc" else 1)
        assert torch.equal(torch.cat(pooled[0]), torch.cat(made.boxes)[made.positive])


def test_mask_information_flows_through_the_heads_before():
    """Head 3 sees relu(conv(features of head 2 on the same RoIs)) added to its own; all heads are reached."""
    heads = build("htc").roi_heads
    first, second, third = (stage.mask_head for stage in heads)
    pooled = torch.randn(2, 64, 14, 14, requires_grad=True)
    made = first.layers(pooled)
    made = second.layers(pooled + F.relu(second.flow(made)))
    made = third.layers(pooled + F.relu(third.flow(made)))
    torch.testing.assert_close(heads._mask_features(2, pooled), made, rtol=0, atol=0)
    heads._mask_features(2, pooled).sum().backward()
    assert all(value.grad is not None for head in (first, second, third) for value in head.parameters())
    assert first.flow is None

    labels = torch.tensor([4, 1])
    planes = [
        stage.mask_predictor(heads._mask_features(number, pooled), labels).sigmoid()
        for number, stage in enumerate(heads)
    ]
    torch.testing.assert_close(heads._masks(pooled, labels), sum(planes) / 3, rtol=1e-5, atol=1e-6)

    plain = build("cascade_mask_rcnn").roi_heads
    torch.testing.assert_close(
        plain._mask_features(2, pooled), list(plain)[2].mask_head.layers(pooled), rtol=0, atol=0
    )


def test_logits_are_averaged_and_activated_once_and_masks_averaged():
    """Three stages with logits -1, 0 and 4 of class 2: exp(-exp(-1)), not the mean of three activations."""
    model = build("htc", "loss.name=gumbel", "eval.max_detections=4").eval()
    heads = model.roi_heads
    for stage, logit, plane in zip(heads, (-1.0, 0.0, 4.0), (-1.0, 0.0, 3.0), strict=True):
        logits = [-9.0] * (NUM_CLASSES + 1)
        logits[2] = logit
        stage.box_predictor = Fixed(logits, [0.0, 0, 0, 0])
        stage.mask_predictor.forward = lambda features, labels, value=plane: torch.full(
            (len(labels), 28, 28), value
        )
    proposals = [torch.tensor([[10.0, 10, 50, 50]]), torch.tensor([[30.0, 40, 90, 90]])]
    found = heads.detect(features_of(model), proposals, PADDED, PADDED)
    for detection, proposal in zip(found, proposals, strict=True):
        assert detection["labels"].tolist() == [2]
        assert detection["scores"].item() == pytest.approx(0.6922006, rel=1e-6)
        torch.testing.assert_close(detection["boxes"], proposal, rtol=1e-6, atol=1e-5)
        mean = (0.2689414 + 0.5 + 0.9525741) / 3  # of sigmoid(-1), sigmoid(0), sigmoid(3)
        assert detection["masks"].unique().item() == pytest.approx(mean, rel=1e-6)


def test_final_boxes_went_through_all_stages():
    """Each stage moves one delta to the right: 1/10 + 1/20 + 1/30 of the width in all."""
    model = build("cascade_mask_rcnn").eval()
    for stage in model.roi_heads:
        stage.box_predictor = Fixed([0.0, 3.0, *[0.0] * (NUM_CLASSES - 1)], [1.0, 0, 0, 0])
    proposals = [torch.tensor([[10.0, 10, 40, 50]]), torch.tensor([[20.0, 30, 50, 80]])]
    found = model.roi_heads.detect(features_of(model), proposals, PADDED, PADDED)
    for detection, proposal in zip(found, proposals, strict=True):
        moved = proposal[0] + torch.tensor([5.5, 0, 5.5, 0])
        best = detection["boxes"][0]
        torch.testing.assert_close(best, moved, rtol=1e-6, atol=1e-4)


def test_each_stage_has_a_loss_with_its_own_state():
    model = build("cascade_mask_rcnn", "loss.name=seesaw")
    stages = list(model.roi_heads)
    for stage in stages:
        stage.sampler = Recorder(stage.sampler)
    losses_of(model, proposals_near_objects())
    counts = [stage.loss.class_stats.label_counts for stage in stages]
    for stage, counted in zip(stages, counts, strict=True):
        expected = torch.bincount(stage.sampler.made[0].labels, minlength=NUM_CLASSES + 1)
        assert torch.equal(counted, expected)
    assert len({tuple(counted.tolist()) for counted in counts}) > 1
    kept = [key for key in model.state_dict() if key.endswith("label_counts")]
    assert kept == [f"roi_heads.stages.{k}.loss.class_stats.label_counts" for k in range(3)]
