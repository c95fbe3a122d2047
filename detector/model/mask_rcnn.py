"""Mask R-CNN (He et al. 2017), Cascade Mask R-CNN (Cai & Vasconcelos 2019) and Hybrid Task Cascade without
its semantic branch (Chen et al. 2019) from torchvision's parts, with the classification loss injected."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign

from detector.config import Config, ModelConfig
from detector.model.backbone import build_backbone
from detector.model.classes import ClassTable
from detector.model.losses import build_loss, build_scores
from detector.model.postprocess import DetectionSettings
from detector.model.predictors import BoxPredictor, MaskHead, MaskPredictor
from detector.model.roi_heads import CASCADE, RoIHeads, Stage
from detector.model.rois import RoiSampler, Target
from detector.model.rpn import ProposalNetwork, build_rpn
from detector.model.sampling import with_generators

PIXEL_MEAN = (
    123.675,
    116.28,
    103.53,
)  # of ImageNet, RGB in 0..255, as torchvision's weights were trained with
PIXEL_STD = (58.395, 57.12, 57.375)
STRIDE = 32  # of the coarsest ResNet stage: sides of a batch are padded to multiples
BOX_POOL, MASK_POOL = 7, 14
SAMPLING_RATIO = 2  # RoIAlign samples per bin and axis, as torchvision


class MaskRCNN(nn.Module):
    """train mode: model(images, targets) -> dict of scalar losses. eval mode: model(images) -> list of
    detections.

    images: list of uint8 [3, H, W]; targets: what detector.data gives; detections: see RoIHeads.detect, boxes
    in the pixels of the image given.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        rpn: ProposalNetwork,
        roi_heads: RoIHeads,
        *,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.rpn = rpn
        self.roi_heads = roi_heads
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(3, 1, 1), persistent=False)
        self.to(memory_format=self.memory_format)  # type: ignore[call-overload]

    def forward(
        self, images: list[Tensor], targets: list[Target] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        if self.training:
            if targets is None:
                raise ValueError("MaskRCNN in training mode needs targets")
            targets = with_generators(targets, self.pixel_mean.device)
        batch = self._batch(images)
        features = self.backbone(batch.tensors)
        proposals, rpn_losses = self.rpn(batch, features, targets if self.training else None)
        # RoIAlign infers its scales from image sides; only the padded ones are exact multiples of the
        # strides.
        padded = [tuple(batch.tensors.shape[-2:])] * len(images)
        if not self.training or targets is None:
            return self.roi_heads.detect(features, proposals, padded, batch.image_sizes)
        return {
            "loss_rpn_cls": rpn_losses["loss_objectness"],
            "loss_rpn_box": rpn_losses["loss_rpn_box_reg"],
            **self.roi_heads.training_losses(features, proposals, padded, batch.image_sizes, targets),
        }

    def _batch(self, images: list[Tensor]) -> ImageList:
        """Normalise and pad at the right and the bottom, to one size that the strides divide."""
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        height, width = (-(-max(side) // STRIDE) * STRIDE for side in zip(*sizes, strict=True))
        device = self.pixel_mean.device
        batch = torch.zeros(len(images), 3, height, width, device=device)
        for slot, image, (h, w) in zip(batch, images, sizes, strict=True):
            slot[:, :h, :w] = (image.to(device, non_blocking=True) - self.pixel_mean) / self.pixel_std
        return ImageList(batch.contiguous(memory_format=self.memory_format), sizes)


def build_model(config: Config, classes: ClassTable, *, load_weights: bool = True) -> MaskRCNN:
    """The model a configuration describes, for the classes of a data set.

    `load_weights=False` skips the pretrained backbone, for a caller that loads a checkpoint right after.
    """
    backbone = build_backbone(config.model, load_pretrained=load_weights)
    levels = [str(level) for level in range(5 - config.model.first_level)]
    rpn = build_rpn(config.model, backbone.out_channels)
    roi_heads = _build_roi_heads(config, classes, backbone.out_channels, levels)
    model = MaskRCNN(backbone, rpn, roi_heads, channels_last=config.train.channels_last)
    if config.model.trainable == "classifier":
        model.requires_grad_(False)
        for stage in roi_heads:
            stage.box_predictor.classifier.requires_grad_(True)
    return model


def _build_roi_heads(config: Config, classes: ClassTable, channels: int, levels: list[str]) -> RoIHeads:
    model = config.model

    def pool(size: int) -> MultiScaleRoIAlign:
        return MultiScaleRoIAlign(levels, size, SAMPLING_RATIO, canonical_scale=model.canonical_size)

    number = 1 if model.architecture == "mask_rcnn" else len(CASCADE)
    stages = [_build_stage(config, classes, channels, k) for k in range(number)]
    return RoIHeads(
        stages,
        box_pool=pool(BOX_POOL),
        mask_pool=pool(MASK_POOL),
        settings=DetectionSettings(
            config.eval.score_threshold, config.eval.nms_threshold, config.eval.max_detections
        ),
        scores=build_scores(config.loss, stages[0].loss, classes.stats),
        interleaved=model.architecture == "htc",
    )


def _build_stage(config: Config, classes: ClassTable, channels: int, number: int) -> Stage:
    model, num_classes, settings = config.model, classes.num_classes, CASCADE[number]
    gather = config.train.gradient_interval > 0
    loss = build_loss(config.loss, classes.stats, gather_gradients=gather)
    width = model.mask_head_width
    return Stage(
        settings,
        sampler=RoiSampler(num_classes, model.rois_per_image, model.positive_fraction, settings.iou),
        loss=loss,
        loss_weight=config.loss.weight,
        box_head=_build_box_head(model, channels),
        box_predictor=BoxPredictor(
            model.box_head_width,
            num_classes,
            loss,
            class_agnostic=model.class_agnostic_boxes,
            normed=model.normed_classifier,
        ),
        mask_head=MaskHead(
            channels, width, model.mask_head_layers, flow=model.architecture == "htc" and number > 0
        ),
        mask_predictor=MaskPredictor(width, width, num_classes, normed=model.normed_mask),
    )


def _build_box_head(model: ModelConfig, channels: int) -> TwoMLPHead:
    head = TwoMLPHead(channels * BOX_POOL**2, model.box_head_width)
    for layer in (head.fc6, head.fc7):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return head
