"""The classification loss of a configuration, by name, and how its logits become scores."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

import gol_kernels as gk
from detector.config import ConfigError, LossConfig
from gol_kernels.losses import LongTailLoss
from gol_kernels.losses.bernoulli import BernoulliLoss

# GOL = DropLoss with the Gumbel link, GOL* = EQL with it (Alexandridis et al., ECCV 2022).
_LOSSES: dict[str, Callable[[LossConfig, gk.ClassStats, int], LongTailLoss]] = {
    "softmax": lambda config, stats, classes: gk.SoftmaxLoss(classes),
    "sigmoid": lambda config, stats, classes: gk.SigmoidLoss(classes),
    "gumbel": lambda config, stats, classes: gk.GumbelLoss(classes),
    "eql": lambda config, stats, classes: gk.EQLLoss(stats, threshold=config.threshold, link="sigmoid"),
    "droploss": lambda config, stats, classes: gk.DropLoss(stats, threshold=config.threshold, link="sigmoid"),
    "gol": lambda config, stats, classes: gk.DropLoss(stats, threshold=config.threshold, link="gumbel"),
    "gol_star": lambda config, stats, classes: gk.EQLLoss(stats, threshold=config.threshold, link="gumbel"),
    "seesaw": lambda config, stats, classes: gk.SeesawLoss(classes),
    "gumbel_seesaw": lambda config, stats, classes: gk.GumbelSeesawLoss(classes),
    "eqlv2": lambda config, stats, classes: gk.EQLv2Loss(classes),
    "federated": lambda config, stats, classes: gk.FederatedLoss(stats, link="sigmoid"),
    "gumbel_federated": lambda config, stats, classes: gk.FederatedLoss(stats, link="gumbel"),
    "acsl": lambda config, stats, classes: gk.ACSLLoss(stats, link="sigmoid"),
    "gumbel_acsl": lambda config, stats, classes: gk.ACSLLoss(stats, link="gumbel"),
    "balanced_softmax": lambda config, stats, classes: gk.BalancedSoftmaxLoss(stats),
    "equilibrium": lambda config, stats, classes: gk.EquilibriumLoss(classes),
}


def build_loss(config: LossConfig, stats: gk.ClassStats, *, gather_gradients: bool = False) -> LongTailLoss:
    """The loss module `config.name` for the classes counted in `stats`.

    gather_gradients: it adds up each class's gradients in its `gradient_stats`. Raises ConfigError where it
    has none.
    """
    loss = _LOSSES[config.name](config, stats, stats.num_classes)
    if gather_gradients:
        if not isinstance(loss, BernoulliLoss):
            raise ConfigError(
                f"train.gradient_interval gathers the gradients of binary terms, loss.name={config.name} has "
                f"none: set it to 0"
            )
        loss.gradient_stats = loss.gradient_stats or gk.ClassStats(loss.num_classes)  # EQLv2 has its own
    return loss


class NorCal(nn.Module):
    """Softmax scores divided by image counts to the power of gamma (Pan et al. 2021), in place of a loss's
    activation: logits [N, C+1] -> scores [N, C]."""

    image_count: Tensor

    def __init__(self, image_count: Tensor, gamma: float) -> None:
        super().__init__()
        # of the classes, not of the training: a run that knew nothing of it can be evaluated with it
        self.register_buffer("image_count", image_count.clone(), persistent=False)
        self.gamma = gamma

    def forward(self, logits: Tensor) -> Tensor:
        return gk.norcal(logits, self.image_count, self.gamma)


def build_scores(config: LossConfig, loss: LongTailLoss, stats: gk.ClassStats) -> Callable[[Tensor], Tensor]:
    """What turns logits [N, loss.num_logits] into class scores [N, C] when detecting."""
    return NorCal(stats.image_count, config.norcal) if config.norcal > 0 else loss.activation
