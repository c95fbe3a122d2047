"""The detector's parts against hand-made answers, with every loss injected."""

from __future__ import annotations

import socket
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import clip_boxes_to_image, nms

import gol_kernels as gk
from detector.config import ConfigError, ModelConfig
from detector.model import backbone as backbone_module
from detector.model import build_model
from detector.model.backbone import build_backbone
from detector.model.postprocess import class_nms, select_detections
from detector.model.predictors import BoxPredictor, MaskPredictor
from detector.model.roi_heads import BOX_WEIGHTS, RoiSampler
from tests.detector.tiny_detector import NUM_CLASSES, picture, tiny_classes, tiny_config, two_pictures

LOSSES = {
    "softmax": (NUM_CLASSES + 1, gk.SoftmaxLoss),
    "sigmoid": (NUM_CLASSES + 1, gk.SigmoidLoss),
    "gumbel": (NUM_CLASSES + 1, gk.GumbelLoss),
    "eql": (NUM_CLASSES, gk.EQLLoss),
    "droploss": (NUM_CLASSES, gk.DropLoss),
    "gol": (NUM_CLASSES, gk.DropLoss),
    "gol_star": (NUM_CLASSES, gk.EQLLoss),
    "seesaw": (NUM_CLASSES + 2, gk.SeesawLoss),
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
    heads = model.roi_heads
    width, kind = LOSSES[name]
    assert type(heads.loss) is kind
    assert heads.box_predictor.classifier.out_features == heads.loss.num_logits == width
    expected = nn.Linear(64, width)
    torch.manual_seed(7)
    heads.loss.init_classifier_(expected)
    classifier = heads.box_predictor.classifier
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
    """GOL and DropLoss differ by their link alone: at logit 0, exp(-1) against 1/2."""
    scores = {
        name: float(
            build_model(tiny_config(f"loss.name={name}"), tiny_classes()).roi_heads.loss.activation(
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
        build_model(tiny_config("loss.name=eql", f"loss.threshold={t}"), tiny_classes()).roi_heads.loss(
            logits, labels
        )
        for t in (
            0.002,
            0.03,
        )  # image shares are 0.001 0.005 0.02 | 0.06 0.15 0.4: one or three classes are spared
    )
    assert float(narrow - wide) == pytest.approx(2 * float(F.softplus(torch.tensor(1.0))), rel=1e-5)


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
    heads = model.roi_heads
    heads.loss = RecordingLoss()
    heads.box_predictor = BoxPredictor(64, NUM_CLASSES, heads.loss, class_agnostic=False, normed=False)
    images, targets = two_pictures()
    assert float(model(images, targets)["loss_cls"].detach()) == 3.0
    logits, labels, row_weights, avg_factor = heads.loss.call
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
    assert rois.matched.tolist()[0::2] == [0, 1, 0]
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
    heads = model.roi_heads
    roi, truth = (
        torch.tensor([[10.0, 10, 30, 50]]),
        torch.tensor([[14.0, 10, 34, 50]]),
    )  # moved by 4 = 0.2 widths
    target = {"boxes": truth, "labels": torch.tensor([4])}
    rois = RoiSampler(NUM_CLASSES, 8, 1.0)([roi], [target])
    rois = replace(rois, boxes=[roi], labels=rois.labels[:1], matched=rois.matched[:1], truth=rois.truth[:1])
    deltas = torch.full((1, 1 if agnostic else NUM_CLASSES, 4), 0.5, requires_grad=True)
    loss = heads._box_loss(deltas, rois, torch.tensor([0]))
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
    heads = model.roi_heads
    seen = torch.full((1, 28, 28), -20.0)
    seen[:, :, :14] = 20.0

    class Planes(nn.Module):
        def forward(self, features, labels):
            return seen * (1.0 if labels.tolist() == [3] else -1.0)

    heads.mask_predictor = Planes()
    _, target = picture([(1, [0, 0, 5, 5]), (3, [10, 20, 30, 60])])
    roi = torch.tensor([[10.0, 20, 50, 60]])
    rois = RoiSampler(NUM_CLASSES, 8, 1.0)([roi], [target])
    index = rois.boxes[0].eq(roi).all(dim=1).nonzero().squeeze(1)
    rois = replace(
        rois, boxes=[roi], labels=rois.labels[index], matched=rois.matched[index], truth=rois.truth[index]
    )
    features = model.backbone(torch.zeros(1, 3, 96, 96))
    assert float(heads._mask_loss(features, rois, torch.tensor([0]), [(96, 96)], [target])) < 1e-6


def straightforward(scores, deltas, proposals, coder, size, score_threshold, nms_threshold, max_detections):
    """Decode everything, NMS class by class, keep the best."""
    every = coder.decode_single(deltas.flatten(1), proposals).view(len(proposals), -1, 4)
    boxes, values, labels = [], [], []
    for label in range(scores.shape[1]):
        mine = clip_boxes_to_image(every[:, min(label, every.shape[1] - 1)], size)
        kept = (scores[:, label] > score_threshold) & (mine[:, 2] > mine[:, 0]) & (mine[:, 3] > mine[:, 1])
        keep = kept.nonzero().squeeze(1)
        keep = keep[nms(mine[keep], scores[keep, label], nms_threshold)]
        boxes.append(mine[keep])
        values.append(scores[keep, label])
        labels.append(torch.full((len(keep),), label))
    order = torch.cat(values).argsort(descending=True)[:max_detections]
    return torch.cat(boxes)[order], torch.cat(values)[order], torch.cat(labels)[order]


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize(
    ("rows", "classes", "threshold", "limit", "spread"),
    [
        (200, 40, 1e-4, 50, 60.0),  # far more candidates than are decoded at first
        (300, 12, 1e-4, 100, 2.0),  # boxes so alike that NMS leaves few: in the end all are decoded
        (500, 40, 1e-4, 50, 3.0),  # the first 400 of 20,000 leave too few, the next 1600 enough
        (60, 5, 0.97, 300, 60.0),  # few pass the threshold
        (40, 3, 1.0, 10, 60.0),  # none does
    ],
)
def test_selection_equals_the_straightforward_way(agnostic, rows, classes, threshold, limit, spread):
    generator = torch.Generator().manual_seed(rows)
    corner = torch.rand(rows, 2, generator=generator) * spread
    proposals = torch.cat([corner, corner + 20 + spread * torch.rand(rows, 2, generator=generator)], dim=1)
    scores = torch.rand(rows, classes, generator=generator)
    deltas = 0.5 * torch.randn(rows, 1 if agnostic else classes, 4, generator=generator)
    arguments = (scores, deltas, proposals, BoxCoder(BOX_WEIGHTS), (90, 80))
    limits = {"score_threshold": threshold, "nms_threshold": 0.5, "max_detections": limit}
    boxes, values, labels = select_detections(*arguments, **limits)
    expected = straightforward(*arguments, **limits)
    assert torch.equal(values, expected[1])
    assert torch.equal(labels, expected[2])
    assert torch.equal(boxes, expected[0])


def test_untrained_head_of_lvis_size_is_bounded():
    """All 1000 x 1203 scores pass: the best 300 come out without decoding 1.2 million boxes."""
    scores = 6e-4 + 1e-5 * torch.rand(1000, 1203)
    deltas = torch.zeros(1000, 1, 4).expand(1000, 1203, 4)
    corner = torch.rand(1000, 2) * 700
    decoded = []

    class CountingCoder(BoxCoder):
        def decode_single(self, codes, boxes):
            decoded.append(len(boxes))
            return super().decode_single(codes, boxes)

    found = select_detections(
        scores,
        deltas,
        torch.cat([corner, corner + 60], dim=1),
        CountingCoder(BOX_WEIGHTS),
        (800, 800),
        score_threshold=1e-4,
        nms_threshold=0.5,
        max_detections=300,
    )
    assert len(found[1]) == 300
    assert sum(decoded) <= 2400
    assert float(found[1][-1]) >= float(scores.flatten().topk(2400).values[-1])


def test_class_nms_keeps_precision_at_high_labels():
    """Two boxes of class 1202 with an IoU just under the threshold survive; float32 would hide it."""
    boxes = torch.tensor([[0.0, 0.0, 1000.0, 1000.0], [0.0, 0.0, 1000.0, 499.98]])
    labels = torch.tensor([1202, 1202])
    assert class_nms(boxes, torch.tensor([0.9, 0.8]), labels, 0.5).tolist() == [0, 1]
    assert class_nms(boxes, torch.tensor([0.9, 0.8]), labels, 0.4999).tolist() == [0]
    assert class_nms(boxes, torch.tensor([0.8, 0.9]), torch.tensor([0, 1]), 0.1).tolist() == [1, 0]


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
    assert {value.dtype for value in (*logits, *deltas)} == {torch.float32}
    assert all(torch.isfinite(value) for value in losses.values())


def test_training_without_targets_is_refused():
    model = build_model(tiny_config(), tiny_classes())
    with pytest.raises(ValueError, match="needs targets"):
        model([torch.zeros(3, 64, 64, dtype=torch.uint8)])


def model_config(**changes) -> ModelConfig:
    return replace(ModelConfig(backbone="resnet18"), **changes)


def test_frozen_stages_are_the_first_ones():
    backbone = build_backbone(model_config(weights="none", norm="gn", trainable_stages=2))
    frozen = {key.split(".")[1] for key, value in backbone.named_parameters() if not value.requires_grad}
    assert frozen == {"conv1", "bn1", "layer1", "layer2"}


def test_weights_from_a_file_are_loaded_and_checked(tmp_path):
    source = resnet18()
    torch.save(source.state_dict(), tmp_path / "resnet18.pt")
    backbone = build_backbone(model_config(weights=str(tmp_path / "resnet18.pt")))
    assert torch.equal(backbone.body.layer4[1].conv2.weight, source.layer4[1].conv2.weight)
    assert torch.equal(backbone.body.bn1.running_var, source.bn1.running_var)
    with pytest.raises(ValueError, match=r"resnet18.pt does not fit"):
        build_backbone(replace(model_config(weights=str(tmp_path / "resnet18.pt")), backbone="resnet50"))
    with pytest.raises(ConfigError, match="neither 'imagenet', 'none' nor a file"):
        build_backbone(model_config(weights="absent.pt"))


def test_a_silent_server_ends_in_a_message_not_a_hang(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(backbone_module, "DOWNLOAD_TIMEOUT_S", 0.3)
    for key in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(key, raising=False)
    server = socket.create_server(("127.0.0.1", 0))  # accepts, never answers
    weights = backbone_module.get_model_weights("resnet18")["IMAGENET1K_V1"]
    url = f"http://127.0.0.1:{server.getsockname()[1]}/resnet18-f37072fd.pth"
    monkeypatch.setattr(
        backbone_module, "get_model_weights", lambda name: {"IMAGENET1K_V1": _with_url(weights.value, url)}
    )
    raised = []

    def build():
        try:
            build_backbone(model_config())
        except ConfigError as error:
            raised.append(str(error))

    thread = threading.Thread(target=build, daemon=True)
    thread.start()
    thread.join(timeout=20)
    server.close()
    assert not thread.is_alive()
    assert "cannot get the ImageNet weights of resnet18" in raised[0]
    assert "model.weights=none" in raised[0]


def _with_url(weights, url):
    class Local:
        def __init__(self):
            self.url = url

        def get_state_dict(self, **arguments):
            return torch.hub.load_state_dict_from_url(url, **arguments)

    return Local()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "none", "norm": "frozen_bn"}, "cannot learn"),
        ({"weights": "imagenet", "norm": "gn"}, "no pretrained weights"),
    ],
)
def test_norms_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        build_backbone(model_config(**changes))
