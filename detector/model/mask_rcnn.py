"""Mask R-CNN (He et al. 2017) from torchvision's parts, with the classification loss injected."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign

from detector.config import Config, ModelConfig
from detector.model.backbone import build_backbone
from detector.model.classes import ClassTable
from detector.model.losses import build_loss
from detector.model.predictors import BoxPredictor, MaskPredictor
from detector.model.roi_heads import DetectionSettings, RoIHeads, RoiSampler, Target

PIXEL_MEAN = (
    123.675,
    116.28,
    103.53,
)  # of ImageNet, RGB in 0..255, as torchvision's weights were trained with
PIXEL_STD = (58.395, 57.12, 57.375)
STRIDE = 32  # of the coarsest ResNet stage: sides of a batch are padded to multiples
BOX_POOL, MASK_POOL = 7, 14
SAMPLING_RATIO = 2  # RoIAlign samples per bin and axis, as torchvision


class _RPNHead(RPNHead):
    """torchvision's head with float32 results: in bfloat16 a box at pixel 800 is rounded to 4 pixels."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [level.float() for level in logits], [level.float() for level in deltas]


class MaskRCNN(nn.Module):
    """train mode: model(images, targets) -> dict of scalar losses. eval mode: model(images) -> list of
    detections.

    images: list of uint8 [3, H, W]; targets: what detector.data gives; detections: see RoIHeads.detect, boxes
    in the pixels of the image given.
    """

    def __init__(
        self,
        backbone: nn.Module,
        rpn: RegionProposalNetwork,
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
        self.to(memory_format=self.memory_format)

    def forward(
        self, images: list[Tensor], targets: list[Target] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        if self.training and targets is None:
            raise ValueError("MaskRCNN in training mode needs targets")
        batch = self._batch(images)
        features = self.backbone(batch.tensors)
        proposals, rpn_losses = self.rpn(batch, features, targets if self.training else None)
        # RoIAlign infers its scales from image sides; only the padded ones are exact multiples of the
        # strides.
        padded = [tuple(batch.tensors.shape[-2:])] * len(images)
        if not self.training:
            return self.roi_heads.detect(features, proposals, padded, batch.image_sizes)
        return {
            "loss_rpn_cls": rpn_losses["loss_objectness"],
            "loss_rpn_box": rpn_losses["loss_rpn_box_reg"],
            **self.roi_heads.training_losses(features, proposals, padded, targets),
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
    backbone = build_backbone(config.model, load_weights=load_weights)
    levels = [str(level) for level in range(5 - config.model.first_level)]
    rpn = _build_rpn(config.model, backbone.out_channels)
    roi_heads = _build_roi_heads(config, classes, backbone.out_channels, levels)
    return MaskRCNN(backbone, rpn, roi_heads, channels_last=config.train.channels_last)


def _build_rpn(model: ModelConfig, channels: int) -> RegionProposalNetwork:
    anchors = AnchorGenerator(
        sizes=tuple((size,) for size in model.anchor_sizes),
        aspect_ratios=(model.anchor_ratios,) * len(model.anchor_sizes),
    )
    return RegionProposalNetwork(
        anchors,
        _RPNHead(channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=model.rpn_rois,
        positive_fraction=0.5,
        pre_nms_top_n={"training": model.pre_nms_train, "testing": model.pre_nms_test},
        post_nms_top_n={"training": model.post_nms_train, "testing": model.post_nms_test},
        nms_thresh=0.7,
    )


def _build_roi_heads(config: Config, classes: ClassTable, channels: int, levels: list[str]) -> RoIHeads:
    model, num_classes = config.model, classes.num_classes
    loss = build_loss(config.loss, classes.stats)

    def pool(size: int) -> MultiScaleRoIAlign:
        return MultiScaleRoIAlign(levels, size, SAMPLING_RATIO, canonical_scale=model.canonical_size)

    box_head = TwoMLPHead(channels * BOX_POOL**2, model.box_head_width)
    for layer in (box_head.fc6, box_head.fc7):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return RoIHeads(
        num_classes=num_classes,
        loss=loss,
        loss_weight=config.loss.weight,
        sampler=RoiSampler(num_classes, model.rois_per_image, model.positive_fraction),
        settings=DetectionSettings(
            config.eval.score_threshold, config.eval.nms_threshold, config.eval.max_detections
        ),
        box_pool=pool(BOX_POOL),
        box_head=box_head,
        box_predictor=BoxPredictor(
            model.box_head_width,
            num_classes,
            loss,
            class_agnostic=model.class_agnostic_boxes,
            normed=model.normed_classifier,
        ),
        mask_pool=pool(MASK_POOL),
        mask_head=MaskRCNNHeads(channels, [model.mask_head_width] * model.mask_head_layers, dilation=1),
        mask_predictor=MaskPredictor(
            model.mask_head_width, model.mask_head_width, num_classes, normed=model.normed_mask
        ),
    )
