"""The classification loss of a configuration, by name."""

from __future__ import annotations

from collections.abc import Callable

import gol_kernels as gk
from detector.config import LossConfig
from gol_kernels.losses import LongTailLoss

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
}


def build_loss(config: LossConfig, stats: gk.ClassStats) -> LongTailLoss:
    """The loss module `config.name` for the classes counted in `stats`."""
    return _LOSSES[config.name](config, stats, len(stats.image_count))
