"""ResNet or ResNeXt with a feature pyramid, from torchvision's parts."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torchvision.models import get_model
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from detector.config import ConfigError, ModelConfig
from detector.model.weights import load_weights, pretrained_weights

GROUPS = 32  # Wu & He 2018


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(GROUPS, channels)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "frozen_bn": FrozenBatchNorm2d,
    "gn": _group_norm,
}


def build_backbone(config: ModelConfig, *, load_pretrained: bool = True) -> BackboneWithFPN:
    """Backbone whose feature maps are named "0", "1", ... from the finest to the coarsest, then "pool".

    `load_pretrained=False` skips the pretrained weights, for a caller that loads a checkpoint right after.
    Raises ConfigError when the weights cannot be had or do not fit.
    """
    resnet = _build_resnet(config.backbone, NORMS[config.norm])
    if config.weights != "none":
        if config.norm == "gn":
            raise ConfigError(
                f"model.norm=gn has no pretrained weights, got model.weights={config.weights!r}; use none"
            )
        if load_pretrained:
            _load_pretrained(resnet, config)
    elif config.norm == "frozen_bn":
        raise ConfigError("model.weights=none cannot learn with model.norm=frozen_bn; use gn")
    stages = [f"layer{i}" for i in range(config.first_level, 5)]
    _freeze(resnet, config.trainable_stages)
    return BackboneWithFPN(
        resnet,
        return_layers={stage: str(level) for level, stage in enumerate(stages)},
        in_channels_list=[_out_channels(getattr(resnet, stage)) for stage in stages],
        out_channels=config.fpn_channels,
        extra_blocks=LastLevelMaxPool(),
        norm_layer=_group_norm if config.norm == "gn" else None,
    )


def _build_resnet(name: str, norm: Callable[[int], nn.Module]) -> ResNet:
    if name == "resnext101_32x4d":  # Xie et al. 2017, table 3; torchvision has wider ones only
        return ResNet(Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4, norm_layer=norm)
    return get_model(name, weights=None, norm_layer=norm)


def _out_channels(stage: nn.Sequential) -> int:
    return [module for module in stage[-1].modules() if isinstance(module, nn.Conv2d)][-1].out_channels


def _freeze(resnet: ResNet, trainable_stages: int) -> None:
    """Freeze the stem and the first stages; 5 trains everything, 0 nothing of the ResNet."""
    frozen = [("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)][: 5 - trainable_stages]
    for name in (name for group in frozen for name in group):
        getattr(resnet, name).requires_grad_(False)


def _load_pretrained(resnet: ResNet, config: ModelConfig) -> None:
    state, source = pretrained_weights(config.backbone, config.weights)
    resnet.fc = nn.Identity()  # the classifier of ImageNet stays behind
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    # a count of training steps that BatchNorm2d keeps and FrozenBatchNorm2d does not
    state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    load_weights(resnet, state, source)
