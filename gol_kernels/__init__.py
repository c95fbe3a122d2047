"""Fused losses for long-tailed detection and classification: any link with any reweighting, in one pass.

    import gol_kernels as gk
    loss = gk.GumbelLoss(num_classes=1203)
    total = loss(logits, labels)        # logits [N, loss.num_logits], labels [N], background is C

``python -m gol_kernels.info`` tells what was built and which backend each op takes here.
"""

__version__ = "0.1.0"

from .backends import status as _status
from .backends.native import build_info
from .calibration import norcal
from .class_stats import ClassStats
from .functional import (
    gumbel_activation,
    gumbel_loss,
    label_counts,
    probit_loss,
    seesaw_loss,
    sigmoid_loss,
    softmax_loss,
)
from .losses import (
    ACSLLoss,
    BalancedSoftmaxLoss,
    DropLoss,
    EQLLoss,
    EQLv2Loss,
    EquilibriumLoss,
    FederatedLoss,
    GumbelLoss,
    GumbelSeesawLoss,
    SeesawLoss,
    SigmoidLoss,
    SoftmaxLoss,
)
from .nn import NormedConv2d, NormedLinear, gumbel_prior_bias
from .reweight import ACSL, EQL, ClassWeights, Drop, Federated, Seesaw


def available_backends() -> list[str]:
    """The backends usable here, in order of preference."""
    return [name for name, reason in _status().items() if reason is None]


__all__ = [
    "ACSL",
    "EQL",
    "ACSLLoss",
    "BalancedSoftmaxLoss",
    "ClassStats",
    "ClassWeights",
    "Drop",
    "DropLoss",
    "EQLLoss",
    "EQLv2Loss",
    "EquilibriumLoss",
    "Federated",
    "FederatedLoss",
    "GumbelLoss",
    "GumbelSeesawLoss",
    "NormedConv2d",
    "NormedLinear",
    "Seesaw",
    "SeesawLoss",
    "SigmoidLoss",
    "SoftmaxLoss",
    "available_backends",
    "build_info",
    "gumbel_activation",
    "gumbel_loss",
    "gumbel_prior_bias",
    "label_counts",
    "norcal",
    "probit_loss",
    "seesaw_loss",
    "sigmoid_loss",
    "softmax_loss",
]
