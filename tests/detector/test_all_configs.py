"""Every preset, the rows of the papers' tables among them: built as it says, one step, one inference.

Images are tiny and the layers behind the backbone narrow. What a preset decides stays: architecture,
backbone, loss, predictors, sampling, thresholds.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch

from detector.config import PRESETS, Config, ModelConfig, load_config, presets
from detector.model import build_model, mask_rcnn
from detector.model.backbone import build_backbone
from tests.detector.tiny_detector import NUM_CLASSES, tiny_classes, two_pictures

SMALL = (
    "model.weights=none",
    "model.norm=gn",
    "model.fpn_channels=32",
    "model.canonical_size=64",
    "model.rpn_rois=32",
    "model.pre_nms_train=50",
    "model.post_nms_train=30",
    "model.pre_nms_test=30",
    "model.post_nms_test=10",
    "model.rois_per_image=16",
    "model.box_head_width=32",
    "model.mask_head_width=16",
    "eval.max_detections=10",
    "loss.threshold=0.03",
)
OF_THE_BACKBONE = (
    "backbone",
    "weights",
    "norm",
    "trainable_stages",
    "first_level",
    "fpn_channels",
    "anchor_sizes",
)
TABLE = (PRESETS / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module", autouse=True)
def _one_backbone_of_each_kind() -> Iterator[None]:
    """Making a ResNeXt-101 takes longer than the step, and all presets with one start from equal weights."""
    original = mask_rcnn.build_backbone

    @lru_cache(maxsize=1)
    def build(model: ModelConfig) -> torch.nn.Module:
        return build_backbone(model)

    def backbone_alone(model: ModelConfig, *, load_pretrained: bool) -> torch.nn.Module:
        return copy.deepcopy(build(ModelConfig(**{key: getattr(model, key) for key in OF_THE_BACKBONE})))

    mask_rcnn.build_backbone = backbone_alone
    yield
    mask_rcnn.build_backbone = original


def by_backbone() -> list[str]:
    return sorted(presets(rows=True), key=lambda name: load_config(name).model.backbone)


@pytest.mark.parametrize("preset", by_backbone())
def test_preset_takes_a_step_and_detects(preset):
    stated = load_config(preset)
    config = load_config(preset, SMALL)
    torch.manual_seed(0)
    model = build_model(config, tiny_classes())
    check_architecture(model, stated)
    images, targets = two_pictures()
    total = torch.stack(list(model(images, targets).values())).sum()
    assert torch.isfinite(total)
    total.backward()
    learning = [value for value in model.parameters() if value.requires_grad]
    assert learning
    assert all(value.grad is not None and torch.isfinite(value.grad).all() for value in learning)
    with torch.no_grad():
        found = model.eval()(images)
    for detection in found:
        assert 0 < len(detection["scores"]) <= config.eval.max_detections
        assert detection["scores"].min() > config.eval.score_threshold
        assert (detection["scores"].diff() <= 0).all()
        assert detection["labels"].max() < NUM_CLASSES
        assert ((detection["masks"] >= 0) & (detection["masks"] <= 1)).all()


def check_architecture(model: torch.nn.Module, stated: Config) -> None:
    """The parts that the preset names are the ones that were built."""
    stages = list(model.roi_heads)
    cascade = stated.model.architecture != "mask_rcnn"
    assert len(stages) == (3 if cascade else 1)
    assert model.roi_heads.interleaved == (stated.model.architecture == "htc")
    assert len({id(stage.loss) for stage in stages}) == len(stages)
    blocks = {"resnet18": 2, "resnet50": 6}.get(stated.model.backbone, 23)
    assert len(model.backbone.body.layer3) == blocks
    groups = {"resnext101_32x4d": 32, "resnext101_32x8d": 32, "resnext101_64x4d": 64}
    assert model.backbone.body.layer1[0].conv2.groups == groups.get(stated.model.backbone, 1)
    for stage in stages:
        normed = type(stage.box_predictor.classifier).__name__ == "NormedLinear"
        assert normed == stated.model.normed_classifier
        assert (type(stage.mask_predictor.logits).__name__ == "NormedConv2d") == stated.model.normed_mask
        assert len(stage.box_predictor.deltas.bias) == (4 if cascade else 4 * NUM_CLASSES)


def test_the_table_names_every_row_and_nothing_else():
    rows = {name for name in presets(rows=True) if "/" in name}
    named = set(re.findall(r"^\| `([\w/]+)` \|", TABLE, re.MULTILINE))
    assert rows <= named <= set(presets(rows=True))


@pytest.mark.parametrize("preset", [name for name in presets(rows=True) if "/" in name])
def test_the_name_says_what_the_row_is(preset):
    """Names are made of loss, backbone, schedule and sampling; a file that says otherwise is a slip."""
    config = load_config(preset)
    words = preset.split("/")[1].split("_")
    model = config.model
    backbones = {"r50": "resnet50", "r101": "resnet101", "x101": "resnext101_64x4d"}
    assert [backbones[word] for word in words if word in backbones] == [model.backbone]
    architecture = {"cascade": "cascade_mask_rcnn", "htc": "htc"}
    assert [architecture[word] for word in words if word in architecture] == [model.architecture] * (
        model.architecture != "mask_rcnn"
    )
    assert ("1x" in words, "2x" in words) == (config.train.epochs == 12, config.train.epochs == 24)
    assert ("random" in words) == (config.data.repeat_threshold == 0)
    assert ("v05" in words) == ("v0.5" in config.data.train) == ("v0.5" in config.data.val)
    assert config.loss.threshold == (1.77e-3 if "v05" in words else 1.1e-3)
    if preset.startswith("seesaw/"):
        assert (config.loss.name, model.normed_classifier) == ("seesaw", True)
        assert ("normed" in words) == model.normed_mask
    enhanced = words[0] == "gol"
    assert config.eval.nms_threshold == (0.3 if enhanced else 0.5)
