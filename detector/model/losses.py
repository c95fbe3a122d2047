"""The classification loss of a configuration, by name, and how its logits become scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import gol_kernels as gk
from detector.config import ConfigError, LossConfig
from gol_kernels.losses import LongTailLoss
from gol_kernels.losses.bernoulli import BernoulliLoss

# GOL = DropLoss with the Gumbel link, GOL* = EQL with it (Alexandridis et al., ECCV 2022).
_GUMBEL_LOSSES: dict[str, Callable[..., LongTailLoss]] = {
    "gumbel": lambda config, stats, **link: gk.GumbelLoss(stats.num_classes, **link),
    "gol": lambda config, stats, **link: gk.DropLoss(stats, config.threshold, link="gumbel", **link),
    "gol_star": lambda config, stats, **link: gk.EQLLoss(stats, config.threshold, link="gumbel", **link),
    "gumbel_seesaw": lambda config, stats, **options: gk.GumbelSeesawLoss(stats.num_classes, **options),
    "gumbel_federated": lambda config, stats, **link: gk.FederatedLoss(stats, link="gumbel", **link),
    "gumbel_acsl": lambda config, stats, **link: gk.ACSLLoss(stats, link="gumbel", **link),
}
_LOSSES: dict[str, Callable[..., LongTailLoss]] = {
    **_GUMBEL_LOSSES,
    "softmax": lambda config, stats: gk.SoftmaxLoss(stats.num_classes),
    "sigmoid": lambda config, stats: gk.SigmoidLoss(stats.num_classes),
    "eql": lambda config, stats: gk.EQLLoss(stats, config.threshold, link="sigmoid"),
    "droploss": lambda config, stats: gk.DropLoss(stats, config.threshold, link="sigmoid"),
    "seesaw": lambda config, stats, **options: gk.SeesawLoss(stats.num_classes, **options),
    "eqlv2": lambda config, stats: gk.EQLv2Loss(stats.num_classes),
    "federated": lambda config, stats: gk.FederatedLoss(stats, link="sigmoid"),
    "acsl": lambda config, stats: gk.ACSLLoss(stats, link="sigmoid"),
    "balanced_softmax": lambda config, stats: gk.BalancedSoftmaxLoss(stats),
    "equilibrium": lambda config, stats: gk.EquilibriumLoss(stats.num_classes),
}


_OPTIONS = {
    "temperature": tuple(_GUMBEL_LOSSES),
    "outside": tuple(_GUMBEL_LOSSES),
    "compat": tuple(_GUMBEL_LOSSES),
    "q": ("seesaw", "gumbel_seesaw"),
}
"""Of some losses alone, with their names."""


def _options(config: LossConfig) -> dict[str, Any]:
    """As far as they are not the defaults. Raises ConfigError where the loss does not have one."""
    default, options = LossConfig(), {}
    for name, losses in _OPTIONS.items():
        if getattr(config, name) == getattr(default, name):
            continue
        if config.name not in losses:
            raise ConfigError(
                f"loss.{name} goes with {', '.join(losses)}, loss.name={config.name} has no such option"
            )
        options[name] = getattr(config, name)
    return options


def build_loss(config: LossConfig, stats: gk.ClassStats, *, gather_gradients: bool = False) -> LongTailLoss:
    """The loss module `config.name` for the classes counted in `stats`.

    gather_gradients: it adds up each class's gradients in its `gradient_stats`. Raises ConfigError where it
    has none, and for options that do not go with the loss.
    """
    options = _options(config)
    try:
        loss = _LOSSES[config.name](config, stats, **options)
    except ValueError as error:
        raise ConfigError(f"loss.name={config.name}: {error}") from error
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
