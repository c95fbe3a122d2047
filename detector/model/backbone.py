"""ResNet with a feature pyramid, from torchvision's parts."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torchvision.models import get_model, get_model_weights
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import ResNet
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from detector.config import ConfigError, ModelConfig
from detector.model.weights import load_weights

DOWNLOAD_TIMEOUT_S = 20.0
GROUPS = 32  # Wu & He 2018


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(GROUPS, channels)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "frozen_bn": FrozenBatchNorm2d,
    "gn": _group_norm,
}


def build_backbone(config: ModelConfig, *, load_weights: bool = True) -> BackboneWithFPN:
    """Backbone whose feature maps are named "0", "1", ... from the finest to the coarsest, then "pool".

    `load_weights=False` skips the pretrained weights, for a caller that loads a checkpoint right after.
    Raises ConfigError when the weights cannot be had or do not fit.
    """
    resnet = get_model(config.backbone, weights=None, norm_layer=NORMS[config.norm])
    if config.weights != "none":
        if config.norm == "gn":
            raise ConfigError(
                f"model.norm=gn has no pretrained weights, got model.weights={config.weights!r}; use none"
            )
        if load_weights:
            _load_weights(resnet, config)
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


def _out_channels(stage: nn.Sequential) -> int:
    return [module for module in stage[-1].modules() if isinstance(module, nn.Conv2d)][-1].out_channels


def _freeze(resnet: ResNet, trainable_stages: int) -> None:
    """Freeze the stem and the first stages; 5 trains everything, 0 nothing of the ResNet."""
    frozen = [("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)][: 5 - trainable_stages]
    for name in (name for group in frozen for name in group):
        getattr(resnet, name).requires_grad_(False)


def _load_weights(resnet: ResNet, config: ModelConfig) -> None:
    if config.weights == "imagenet":
        state = _download(config.backbone)
        source = f"torchvision's {config.backbone} weights"
    else:
        source = config.weights
        if not Path(source).is_file():
            raise ConfigError(f"model.weights={source!r} is neither 'imagenet', 'none' nor a file")
        state = torch.load(source, map_location="cpu", weights_only=True)
    resnet.fc = nn.Identity()  # the classifier of ImageNet stays behind
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    # a count of training steps that BatchNorm2d keeps and FrozenBatchNorm2d does not
    state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    load_weights(resnet, state, source)


def _download(backbone: str) -> dict[str, torch.Tensor]:
    weights = get_model_weights(backbone)["IMAGENET1K_V1"]
    cache = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    try:
        with _socket_timeout(DOWNLOAD_TIMEOUT_S):
            return weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"cannot get the ImageNet weights of {backbone} ({error}). Without a network, place the file "
            f"{weights.url} "
            f"at {cache}, or set model.weights to a file, or train from scratch with model.weights=none "
            f"model.norm=gn "
            f"model.trainable_stages=5"
        ) from None


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """torch.hub opens its URL without a time limit, and a dropped connection would hang for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
