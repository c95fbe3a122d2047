"""The losses as modules: each knows how many logits it needs, how to score them and how to start.

loss = SeesawLoss(num_classes=1203)
classifier = loss.init_classifier_(nn.Linear(1024, loss.num_logits))
total = loss(classifier(features), labels)          # training
scores = loss.activation(classifier(features))      # inference: [N, C]
"""

from .base import LongTailLoss
from .bernoulli import (
    ACSLLoss,
    BernoulliLoss,
    DropLoss,
    EQLLoss,
    EQLv2Loss,
    FederatedLoss,
    GumbelLoss,
    GumbelSeesawLoss,
    SigmoidLoss,
)
from .softmax import BalancedSoftmaxLoss, EquilibriumLoss, SeesawLoss, SoftmaxLoss

__all__ = [
    "ACSLLoss",
    "BalancedSoftmaxLoss",
    "BernoulliLoss",
    "DropLoss",
    "EQLLoss",
    "EQLv2Loss",
    "EquilibriumLoss",
    "FederatedLoss",
    "GumbelLoss",
    "GumbelSeesawLoss",
    "LongTailLoss",
    "SeesawLoss",
    "SigmoidLoss",
    "SoftmaxLoss",
]
