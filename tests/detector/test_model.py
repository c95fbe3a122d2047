"""The detector's parts against hand-made answers, with every loss injected."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gol_kernels as gk
from detector.config import ConfigError
from detector.model import build_model
from detector.model.predictors import BoxPredictor, MaskPredictor
from detector.model.rois import RoiSampler
from detector.model.weights import load_start, load_weights
from tests.detector.tiny_detector import (
    IMAGE_COUNT,
    NUM_CLASSES,
    picture,
    tiny_classes,
    tiny_config,
    two_pictures,
)

LOSSES = {
    "softmax": (NUM_CLASSES + 1, gk.SoftmaxLoss),
    "sigmoid": (NUM_CLASSES + 1, gk.SigmoidLoss),
    "gumbel": (NUM_CLASSES + 1, gk.GumbelLoss),
    "eql": (NUM_CLASSES, gk.EQLLoss),
    "droploss": (NUM_CLASSES, gk.DropLoss),
    "gol": (NUM_CLASSES, gk.DropLoss),
    "gol_star": (NUM_CLASSES, gk.EQLLoss),
    "seesaw": (NUM_CLASSES + 2, gk.SeesawLoss),
    "gumbel_seesaw": (NUM_CLASSES, gk.GumbelSeesawLoss),
    "eqlv2": (NUM_CLASSES + 1, gk.EQLv2Loss),
    "federated": (NUM_CLASSES + 1, gk.FederatedLoss),
    "gumbel_federated": (NUM_CLASSES + 1, gk.FederatedLoss),
    "acsl": (NUM_CLASSES + 1, gk.ACSLLoss),
    "gumbel_acsl": (NUM_CLASSES + 1, gk.ACSLLoss),
    "balanced_softmax": (NUM_CLASSES + 1, gk.BalancedSoftmaxLoss),
    "equilibrium": (NUM_CLASSES + 1, gk.EquilibriumLoss),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class RecordingLoss(nn.Module):
    """A loss nobody knows: three extra logits, scores from the first column on, remembers its call."""

    num_logits = NUM_CLASSES + 3

    def init_classifier_(self, linear: nn.Module) -> None:
        nn.init.zeros_(linear.weight)
        nn.init.constant_(linear.bias, 0.25)

    def activation(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[:, 1 : NUM_CLASSES + 1].sigmoid()

    def forward(self, logits, labels, row_weights=None, avg_factor=None):
        self.call = (logits, labels, row_weights, avg_factor)
        return logits.sum() * 0 + 3.0


@pytest.mark.parametrize("name", LOSSES)
def test_named_loss_sizes_starts_and_scores_the_head(name):
    model = build_model(tiny_config(f"loss.name={name}"), tiny_classes())
    stage = model.roi_heads.stages[0]
    width, kind = LOSSES[name]
    assert type(stage.loss) is kind
    assert stage.box_predictor.classifier.out_features == stage.loss.num_logits == width
    expected = nn.Linear(64, width)
    torch.manual_seed(7)
    stage.loss.init_classifier_(expected)
    classifier = stage.box_predictor.classifier
    assert torch.equal(classifier.bias, expected.bias)
    assert classifier.weight.std().item() == pytest.approx(expected.weight.std().item(), abs=2e-3)

    images, targets = two_pictures()
    losses = model(images, targets)
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_box", "loss_cls", "loss_box", "loss_mask"}
    sum(losses.values()).backward()
    without = [key for key, value in model.named_parameters() if value.grad is None]
    assert without == []
    assert all(torch.isfinite(value.grad).all() for value in model.parameters())


def test_link_and_threshold_reach_the_loss():
    """GOL and DropLoss, as the other pairs, differ by their link alone: at logit 0, exp(-1) against 1/2."""
    scores = {
        name: float(
            build_model(tiny_config(f"loss.name={name}"), tiny_classes()).roi_heads.scores(
                torch.zeros(1, NUM_CLASSES)
            )[0, 0]
        )
        for name in ("gol", "droploss", "gol_star", "eql")
    }
    assert scores == pytest.approx(
        {"gol": 0.36788, "droploss": 0.5, "gol_star": 0.36788, "eql": 0.5}, abs=1e-5
    )
    logits, labels = torch.full((1, NUM_CLASSES), 1.0), torch.tensor([5])
    narrow, wide = (
        build_model(tiny_config("loss.name=eql", f"loss.threshold={t}"), tiny_classes())
        .roi_heads.stages[0]
        .loss(logits, labels)
        for t in (
            0.002,
            0.03,
        )  # image shares are 0.001 0.005 0.02 | 0.06 0.15 0.4: one or three classes are spared
    )
    assert float(narrow - wide) == pytest.approx(2 * float(F.softplus(torch.tensor(1.0))), rel=1e-5)


def test_options_of_the_gumbel_link_reach_the_loss():
    """At z = -3.5 the released code has lost most of a positive's gradient, -exp(3.5) in truth."""
    logits, labels = torch.full((1, NUM_CLASSES), -3.5), torch.tensor([5])
    gradients = {}
    for option in ("compat=none", "compat=gol", "temperature=2"):
        loss = (
            build_model(tiny_config("loss.name=gol", f"loss.{option}"), tiny_classes())
            .roi_heads.stages[0]
            .loss
        )
        z = logits.clone().requires_grad_()
        loss(z, labels).backward()
        gradients[option] = z.grad[0, 5].item()
    assert gradients["compat=none"] == pytest.approx(-math.exp(3.5), rel=1e-5)
    assert gradients["temperature=2"] == pytest.approx(-math.exp(1.75) / 2, rel=1e-5)
    assert -1 < gradients["compat=gol"] < 0


def test_exponent_of_the_compensation_reaches_the_loss():
    """Each loss has its own unless one is given, be it another's own."""
    found = [
        build_model(tiny_config(f"loss.name={name}", *q), tiny_classes()).roi_heads.stages[0].loss.q
        for name in ("seesaw", "gumbel_seesaw")
        for q in ((), ("loss.q=0",), ("loss.q=2",))
    ]
    assert found == [2, 0, 2, 0, 0, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("loss.name=softmax", "loss.outside=straight_through"), "loss.outside goes with gumbel, gol"),
        (("loss.name=gumbel", "loss.q=1"), "loss.q goes with seesaw, gumbel_seesaw, loss.name=gumbel has"),
        (("loss.name=gumbel_seesaw", "loss.compat=gol"), "no released Gumbel form"),
        (("loss.name=gumbel", "loss.temperature=0"), "temperature must be positive"),
    ],
)
def test_options_that_do_not_go_with_the_loss_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build_model(tiny_config(*options), tiny_classes())


def test_loss_weight_scales_the_classification_loss_only():
    images, targets = two_pictures()
    plain, doubled = (
        _losses_from_same_start(tiny_config(f"loss.weight={weight}"), images, targets)
        for weight in (1.0, 2.0)
    )
    assert doubled["loss_cls"] == pytest.approx(2 * plain["loss_cls"], rel=1e-5)
    assert doubled["loss_box"] == pytest.approx(plain["loss_box"], rel=1e-5)


def _losses_from_same_start(config, images, targets):
    torch.manual_seed(3)
    model = build_model(config, tiny_classes())
    torch.manual_seed(4)
    return {key: value.item() for key, value in model(images, targets).items()}


def test_unknown_loss_gets_every_roi_background_last_and_scores_detections():
    model = build_model(tiny_config(), tiny_classes())
    stage = model.roi_heads.stages[0]
    stage.loss = RecordingLoss()
    stage.box_predictor = BoxPredictor(64, NUM_CLASSES, stage.loss, class_agnostic=False, normed=False)
    model.roi_heads.scores = stage.loss.activation
    images, targets = two_pictures()
    assert float(model(images, targets)["loss_cls"].detach()) == 3.0
    logits, labels, row_weights, avg_factor = stage.loss.call
    assert logits.shape == (len(labels), NUM_CLASSES + 3)
    assert avg_factor == len(labels) == 64  # 32 RoIs on each of two images
    assert row_weights is None
    counts = torch.bincount(labels, minlength=NUM_CLASSES + 1)
    # the objects are proposals themselves, so each of the eight is there at least once, and most RoIs are
    # background
    assert (counts[:NUM_CLASSES] >= torch.tensor([1, 1, 1, 1, 2, 2])).all()
    assert counts[:NUM_CLASSES].sum() <= 16  # a quarter of 64
    assert counts[NUM_CLASSES] == 64 - counts[:NUM_CLASSES].sum()

    model.eval()
    assert set(model(images)[0]["scores"].tolist()) == {torch.tensor(0.25).sigmoid().item()}


def only(rois, index):
    """Those RoIs of a single image."""
    return replace(
        rois,
        boxes=[rois.boxes[0][index]],
        **{key: getattr(rois, key)[index] for key in ("labels", "matched", "truth", "proposed")},
    )


def test_sampler_labels_by_overlap_and_limits_foreground():
    truth = {"boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]]), "labels": torch.tensor([4, 2])}
    proposals = torch.tensor(
        [
            [0.0, 0, 10, 5],  # overlap exactly 0.5 with object 0: foreground
            [0, 0, 10, 4.9],  # 0.49: background
            [20, 20, 40, 38],  # 0.9 with object 1
            [60, 60, 80, 80],  # nothing
        ]
    )
    rois = RoiSampler(NUM_CLASSES, rois_per_image=64, positive_fraction=0.25)([proposals], [truth])
    assert rois.labels.tolist() == [4, NUM_CLASSES, 2, NUM_CLASSES, 4, 2]  # the two objects come last
    assert rois.matched.tolist() == [0, -1, 1, -1, 0, 1]
    assert rois.proposed.tolist() == [True, True, True, True, False, False]
    assert (rois.positive.tolist(), rois.positive_counts) == ([0, 2, 4, 5], [4])
    assert torch.equal(rois.truth[2], truth["boxes"][1])
    few = RoiSampler(NUM_CLASSES, rois_per_image=4, positive_fraction=0.25)([proposals], [truth])
    assert (few.labels < NUM_CLASSES).sum() == 1
    assert len(few) == 3  # one foreground and both background RoIs: no more are there to fill the four


def test_sampler_with_no_objects_calls_all_background():
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    rois = RoiSampler(NUM_CLASSES, 64, 0.25)([torch.tensor([[0.0, 0, 5, 5], [1, 1, 9, 9]])], [empty])
    assert rois.labels.tolist() == [NUM_CLASSES, NUM_CLASSES]


@pytest.mark.parametrize("name", ["gol", "seesaw", "softmax"])
def test_images_without_objects_train(name):
    """A batch of nothing but background: finite, no box or mask loss, and a gradient on every parameter."""
    model = build_model(tiny_config(f"loss.name={name}"), tiny_classes())
    images, targets = zip(picture([], seed=1), picture([], seed=2), strict=True)
    losses = model(list(images), list(targets))
    assert float(losses["loss_box"]) == float(losses["loss_mask"]) == float(losses["loss_rpn_box"]) == 0.0
    assert 0 < float(losses["loss_cls"]) < 50
    sum(losses.values()).backward()
    assert all(value.grad is not None and torch.isfinite(value.grad).all() for value in model.parameters())


@pytest.mark.parametrize("agnostic", [False, True])
def test_box_loss_reads_the_deltas_of_the_own_class(agnostic):
    """One foreground RoI with known targets: smooth L1 by hand, gradient only on the class's deltas."""
    model = build_model(tiny_config(f"model.class_agnostic_boxes={str(agnostic).lower()}"), tiny_classes())
    stage = model.roi_heads.stages[0]
    roi, truth = (
        torch.tensor([[10.0, 10, 30, 50]]),
        torch.tensor([[14.0, 10, 34, 50]]),
    )  # moved by 4 = 0.2 widths
    target = {"boxes": truth, "labels": torch.tensor([4])}
    rois = RoiSampler(NUM_CLASSES, 8, 1.0)([roi], [target])
    rois = only(rois, torch.tensor([0]))
    deltas = torch.full((1, 1 if agnostic else NUM_CLASSES, 4), 0.5, requires_grad=True)
    loss = stage.box_loss(deltas, rois)
    # targets (10 * 0.2, 0, 0, 0); |0.5 - 2| - beta/2 and three times |0.5| - beta/2 with beta = 1/9
    assert float(loss) == pytest.approx(1.5 + 3 * 0.5 - 4 / 18, rel=1e-6)
    loss.backward()
    expected = torch.zeros_like(deltas)
    expected[0, 0 if agnostic else 4] = torch.tensor([-1.0, 1, 1, 1])
    assert torch.equal(deltas.grad, expected)


@pytest.mark.parametrize("agnostic", [False, True])
def test_predictor_width_follows_class_agnostic(agnostic):
    predictor = BoxPredictor(8, NUM_CLASSES, RecordingLoss(), class_agnostic=agnostic, normed=False)
    features = torch.randn(3, 8)
    logits, deltas = predictor(features)
    raw = F.linear(features, predictor.deltas.weight, predictor.deltas.bias)
    assert torch.equal(deltas[1, -1], raw[1, -4:])
    assert deltas.shape == (3, 1 if agnostic else NUM_CLASSES, 4)
    assert logits.shape == (3, NUM_CLASSES + 3)


@pytest.mark.parametrize("normed", [False, True])
def test_mask_planes_equal_the_full_predictor(normed):
    predictor = MaskPredictor(5, 7, NUM_CLASSES, normed=normed)
    nn.init.normal_(predictor.logits.bias)
    features, labels = torch.randn(9, 5, 3, 3), torch.tensor([0, 5, 2, 2, 1, 0, 4, 3, 5])
    upstream = torch.randn(9, 6, 6)
    planes = predictor(features, labels)
    gradients = torch.autograd.grad(planes, list(predictor.parameters()), upstream)
    full = predictor.logits(F.relu(predictor.upsample(features)))[torch.arange(9), labels]
    wanted = torch.autograd.grad(full, list(predictor.parameters()), upstream)
    torch.testing.assert_close(planes, full, rtol=1e-5, atol=1e-5)
    for gradient, reference in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-4)


def test_mask_target_is_the_object_seen_through_the_roi():
    """An RoI of twice the object's width sees it in its left half: planes that say so cost nothing."""
    model = build_model(tiny_config(), tiny_classes())
    seen = torch.full((1, 28, 28), -20.0)
    seen[:, :, :14] = 20.0

    class Planes(nn.Module):
        def forward(self, features, labels):
            return seen * (1.0 if labels.tolist() == [3] else -1.0)

    model.roi_heads.stages[0].mask_predictor = Planes()
    _, target = picture([(1, [0, 0, 5, 5]), (3, [10, 20, 30, 60])])
    roi = torch.tensor([[10.0, 20, 50, 60]])
    rois = RoiSampler(NUM_CLASSES, 8, 1.0)([roi], [target])
    rois = only(rois, rois.boxes[0].eq(roi).all(dim=1).nonzero().squeeze(1))
    features = model.backbone(torch.zeros(1, 3, 96, 96))
    assert float(model.roi_heads._mask_loss(0, features, rois, [(96, 96)], [target])) < 1e-6


def test_batch_is_normalised_and_padded():
    model = build_model(tiny_config(), tiny_classes())
    images = [torch.full((3, 40, 70), 255, dtype=torch.uint8), torch.zeros((3, 64, 33), dtype=torch.uint8)]
    batch = model._batch(images)
    assert batch.tensors.shape == (2, 3, 64, 96)
    assert batch.image_sizes == [(40, 70), (64, 33)]
    red_white, green_black = (255 - 123.675) / 58.395, -116.28 / 57.12
    assert float(batch.tensors[0, 0, 39, 69]) == pytest.approx(red_white, rel=1e-6)
    assert float(batch.tensors[1, 1, 63, 32]) == pytest.approx(green_black, rel=1e-6)
    assert float(batch.tensors[0, :, 40:].abs().sum() + batch.tensors[1, :, :, 33:].abs().sum()) == 0.0


def test_detections_do_not_depend_on_what_was_seen_before():
    """RoIAlign keeps the scales of its first batch, which must be right even for an odd little image."""
    images, _ = two_pictures()
    model = build_model(tiny_config(), tiny_classes()).eval()
    fresh = model(images)
    torch.manual_seed(0)
    again = build_model(tiny_config(), tiny_classes()).eval()
    again([images[0][:, :41, :37]])
    for one, other in zip(fresh, again(images), strict=True):
        assert torch.equal(one["boxes"], other["boxes"])
        assert torch.equal(one["scores"], other["scores"])


def test_proposals_keep_float32_under_autocast():
    model = build_model(tiny_config(), tiny_classes())
    images, targets = two_pictures()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, targets)
        logits, deltas = model.rpn.head([torch.randn(1, 64, 8, 8)])
        batch = model._batch([torch.zeros(3, 320, 800, dtype=torch.uint8)])
        anchors = model.rpn.anchor_generator(batch, list(model.backbone(batch.tensors).values()))[0]
    assert {value.dtype for value in (*logits, *deltas, anchors)} == {torch.float32}
    # the smallest anchors come every four pixels in three shapes, the first twice as wide as high: 11.3 x 5.7
    assert anchors[3 * 199].tolist() == [796 - 6, -3, 796 + 6, 3]
    assert all(torch.isfinite(value) for value in losses.values())


def test_training_without_targets_is_refused():
    model = build_model(tiny_config(), tiny_classes())
    with pytest.raises(ValueError, match="needs targets"):
        model([torch.zeros(3, 64, 64, dtype=torch.uint8)])


def test_classifier_alone_learns_in_the_second_phase():
    model = build_model(tiny_config("model.trainable=classifier"), tiny_classes())
    learning = {key for key, value in model.named_parameters() if value.requires_grad}
    assert learning == {f"roi_heads.stages.0.box_predictor.classifier.{key}" for key in ("weight", "bias")}
    images, targets = two_pictures()
    sum(model(images, targets).values()).backward()
    assert {key for key, value in model.named_parameters() if value.grad is not None} == learning


def test_a_run_starts_from_anothers_weights_with_a_loss_of_its_own():
    """What Seesaw has counted in the first run is not known to the second; a resumed run knows all of it."""
    first = build_model(tiny_config("loss.name=seesaw"), tiny_classes())
    first(*two_pictures())
    counts = first.roi_heads.stages[0].loss.class_stats.label_counts
    assert counts.sum() == 64
    second = build_model(tiny_config("loss.name=seesaw"), tiny_classes())
    load_start(second, first.state_dict(), "first.pt")
    assert second.roi_heads.stages[0].loss.class_stats.label_counts.sum() == 0
    assert torch.equal(second.rpn.head.cls_logits.weight, first.rpn.head.cls_logits.weight)
    load_weights(second, first.state_dict(), "first.pt")
    assert torch.equal(second.roi_heads.stages[0].loss.class_stats.label_counts, counts)

    other = build_model(tiny_config("loss.name=gumbel"), tiny_classes())  # no state, one logit less
    with pytest.raises(ValueError, match=r"first.pt does not fit.*classifier.weight is \[8, 64\] there"):
        load_start(other, first.state_dict(), "first.pt")
    third = build_model(tiny_config("loss.name=softmax"), tiny_classes())
    load_start(third, other.state_dict(), "other.pt")
    assert torch.equal(third.rpn.head.conv[0][0].weight, other.rpn.head.conv[0][0].weight)


def test_norcal_calibrates_the_scores_of_a_run_that_did_not_know_it():
    """softmax(z - gamma ln N) with nothing taken from background, on a checkpoint of the plain loss."""
    plain = build_model(tiny_config("loss.name=softmax"), tiny_classes())
    calibrated = build_model(tiny_config("loss.name=softmax", "loss.norcal=0.7"), tiny_classes())
    load_weights(calibrated, plain.state_dict(), "plain.pt")
    logits = torch.randn(4, NUM_CLASSES + 1)
    shift = torch.cat([0.7 * torch.tensor(IMAGE_COUNT).log(), torch.zeros(1)])
    wanted = (logits - shift).softmax(dim=1)[:, :NUM_CLASSES]
    torch.testing.assert_close(calibrated.roi_heads.scores(logits), wanted, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        plain.roi_heads.scores(logits), logits.softmax(dim=1)[:, :NUM_CLASSES], rtol=1e-6, atol=1e-7
    )
    with pytest.raises(ConfigError, match=r"loss\.norcal calibrates softmax scores"):
        tiny_config("loss.name=gol", "loss.norcal=0.7")
