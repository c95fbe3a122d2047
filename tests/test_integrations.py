"""The losses in torchvision's detectors."""

from __future__ import annotations

import pytest
import torch

import gol_kernels as gk
from gol_kernels.integrations import background_first, background_last

pytest.importorskip("torchvision")
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from gol_kernels.integrations.torchvision import use_loss

CLASSES = 5


def test_label_conventions() -> None:
    first = torch.tensor([0, 1, 5, -100, 3])
    last = background_last(first, 5)
    assert last.tolist() == [5, 0, 4, -100, 2]
    assert torch.equal(background_first(last, 5), first)


def _model() -> MaskRCNN:
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 8, 1), torch.nn.ReLU())
    backbone.out_channels = 8
    pool = {"featmap_names": ["0"], "sampling_ratio": 2}
    return MaskRCNN(
        backbone,
        min_size=64,
        max_size=64,
        rpn_anchor_generator=AnchorGenerator(((16, 32),), ((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(output_size=3, **pool),
        mask_roi_pool=MultiScaleRoIAlign(output_size=4, **pool),
        box_head=TwoMLPHead(8 * 9, 16),
        box_predictor=FastRCNNPredictor(16, CLASSES + 1),
        mask_head=MaskRCNNHeads(8, (8,), 1),
        mask_predictor=MaskRCNNPredictor(8, 8, CLASSES + 1),
        box_score_thresh=1e-4,
        box_detections_per_img=50,
    )


def _batch() -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    torch.manual_seed(1)
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    masks[0, 4:30, 4:30] = 1
    masks[1, 30:60, 20:60] = 1
    boxes = torch.tensor([[4.0, 4, 30, 30], [20, 30, 60, 60]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 5]), "masks": masks}
    return [torch.rand(3, 64, 64), torch.rand(3, 64, 64)], [target, target]


def _stats() -> gk.ClassStats:
    return gk.ClassStats(image_count=[90, 40, 7, 3, 1], instance_count=[99, 50, 9, 3, 1], num_images=100)


def _move_background_last(weight: torch.Tensor) -> torch.Tensor:
    return torch.cat([weight[1:], weight[:1]])


def test_softmax_is_torchvisions_own() -> None:
    """With the classifier's rows moved, losses and detections are those of the model as it was."""
    plain, ours = _model(), use_loss(_model(), gk.SoftmaxLoss(CLASSES))
    state = plain.state_dict()
    for name in ("weight", "bias"):
        key = f"roi_heads.box_predictor.cls_score.{name}"
        state[key] = _move_background_last(state[key])
    ours.load_state_dict(state)
    images, targets = _batch()
    results = []
    for model in (plain, ours):
        torch.manual_seed(2)  # the samplers draw
        losses = model(images, targets)
        sum(losses.values()).backward()
        grad = model.roi_heads.box_predictor.cls_score.weight.grad
        results.append((losses, grad, model.eval()(images)))
    for name, value in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[1][1], _move_background_last(results[0][1]), rtol=1e-4, atol=1e-7)
    for found, expected in zip(results[1][2], results[0][2], strict=True):
        assert len(expected["scores"]) > 5
        torch.testing.assert_close(found["scores"], expected["scores"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["boxes"], expected["boxes"], rtol=1e-4, atol=1e-3)
        assert torch.equal(found["labels"], expected["labels"])
        assert found["masks"].shape == expected["masks"].shape


@pytest.mark.parametrize(
    "make",
    [
        lambda: gk.SeesawLoss(CLASSES),
        lambda: gk.DropLoss(_stats(), threshold=0.05),
        lambda: gk.EQLv2Loss(CLASSES, link="gumbel"),
        lambda: gk.BalancedSoftmaxLoss(_stats()),
    ],
)
def test_any_loss_trains_and_predicts(make) -> None:
    loss = make()
    model = use_loss(_model(), loss)
    assert any(key.startswith("roi_heads.loss.") for key in model.state_dict())
    images, targets = _batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    history = []
    for _ in range(12):
        optimizer.zero_grad()
        losses = model(images, targets)
        sum(losses.values()).backward()
        optimizer.step()
        history.append(losses["loss_classifier"].item())
    assert history[-1] < history[0]
    found = model.eval()(images)
    assert all(set(item["labels"].tolist()) <= set(range(1, CLASSES + 1)) for item in found)
    assert sum(len(item["scores"]) for item in found) > 0


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"5 foreground classes \(num_classes=6\), the loss 4"):
        use_loss(_model(), gk.SoftmaxLoss(4))
    with pytest.raises(TypeError, match="needs a torchvision R-CNN"):
        use_loss(torch.nn.Linear(2, 2), gk.SoftmaxLoss(CLASSES))
    model = use_loss(_model(), gk.SoftmaxLoss(CLASSES))
    with pytest.raises(TypeError, match="FastRCNNPredictor, got LongTailPredictor"):
        use_loss(model, gk.SoftmaxLoss(CLASSES))


def test_retinanet_is_refused() -> None:
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 8, 1))
    backbone.out_channels = 8
    anchors = AnchorGenerator(((16,),), ((1.0,),))
    with pytest.raises(TypeError, match="got RetinaNet"):
        use_loss(RetinaNet(backbone, 3, anchor_generator=anchors), gk.SigmoidLoss(2))
