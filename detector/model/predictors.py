"""The mask head and the last layers of both heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads

import gol_kernels as gk
from gol_kernels.losses import LongTailLoss

TEMPERATURE = 20.0  # of the cosine predictors, as in Seesaw Loss and GOL


class BoxPredictor(nn.Module):
    """Class logits as wide as the loss asks for, and box deltas per class or one set for all.

    forward: features [N, in_channels] -> (logits [N, loss.num_logits], deltas float32 [N, B, 4]) with B = C
    or 1.
    """

    def __init__(
        self, in_channels: int, num_classes: int, loss: LongTailLoss, *, class_agnostic: bool, normed: bool
    ) -> None:
        super().__init__()
        if normed:
            self.classifier: nn.Module = gk.NormedLinear(
                in_channels, loss.num_logits, temperature=TEMPERATURE
            )
        else:
            self.classifier = nn.Linear(in_channels, loss.num_logits)
        loss.init_classifier_(self.classifier)
        self.deltas = nn.Linear(in_channels, 4 if class_agnostic else 4 * num_classes)
        nn.init.normal_(self.deltas.weight, std=0.001)  # Fast R-CNN, section 3.1
        nn.init.zeros_(self.deltas.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        deltas = self.deltas(features)
        return self.classifier(features), deltas.float().view(len(features), -1, 4)


class MaskHead(nn.Module):
    """The 3x3 convolutions of Mask R-CNN; with `flow` they also see what the mask head before them made.

    forward: (pooled [P, channels, S, S], before [P, width, S, S] or None) -> features [P, width, S, S].
    `flow` is the mask information flow of Hybrid Task Cascade (Chen et al. 2019, section 3.1): the features
    of the head before pass a 1x1 convolution, with a ReLU like all others, and are added to the pooled ones.
    Without `flow`, `before` is not looked at.
    """

    def __init__(self, channels: int, width: int, layers: int, *, flow: bool) -> None:
        super().__init__()
        self.layers = MaskRCNNHeads(channels, [width] * layers, dilation=1)
        self.flow = nn.Conv2d(width, channels, kernel_size=1) if flow else None
        if self.flow is not None:
            nn.init.kaiming_normal_(self.flow.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(self.flow.get_parameter("bias"))

    def forward(self, pooled: Tensor, before: Tensor | None) -> Tensor:
        if self.flow is not None and before is not None:
            pooled = pooled + F.relu(self.flow(before))
        return self.layers(pooled)


class MaskPredictor(nn.Module):
    """Deconvolution and a 1x1 predictor with one channel per class, of which only the asked one is computed.

    forward: (features [P, in_channels, S, S], labels int64 [P]) -> mask logits float32 [P, 2S, 2S].
    The full predictor would make P x C planes, of which the loss and the results read P: with C = 1203 and
    128 masks of 28 x 28 that is 483 MB per image for 0.4 MB.
    """

    def __init__(self, in_channels: int, width: int, num_classes: int, *, normed: bool) -> None:
        super().__init__()
        self.upsample = nn.ConvTranspose2d(in_channels, width, kernel_size=2, stride=2)
        if normed:
            self.logits: nn.Conv2d = gk.NormedConv2d(
                width, num_classes, kernel_size=1, temperature=TEMPERATURE
            )
        else:
            self.logits = nn.Conv2d(width, num_classes, kernel_size=1)
            nn.init.kaiming_normal_(self.logits.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(self.logits.get_parameter("bias"))
        nn.init.kaiming_normal_(self.upsample.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.upsample.get_parameter("bias"))

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        features = F.relu(self.upsample(features))
        weight = self.logits.weight.flatten(1).index_select(0, labels)  # [P, width]
        bias = self.logits.get_parameter("bias").index_select(0, labels)[:, None, None]
        planes = (
            torch.bmm(weight[:, None], features.flatten(2)).view(len(features), *features.shape[2:]).float()
        )
        if isinstance(self.logits, gk.NormedConv2d):
            # T x/(|x| + eps) . w/(|w| + eps) per pixel, norms in float32. A pixel whose features are all zero
            # after the ReLU is constant, as in NormedConv2d: its derivative would be 1/eps.
            norm, eps = features.float().norm(dim=1), self.logits.eps
            length = (norm + eps) * (weight.float().norm(dim=1) + eps)[:, None, None]
            planes = torch.where(norm > 0, self.logits.temperature * planes / length, 0.0)
        return planes + bias
