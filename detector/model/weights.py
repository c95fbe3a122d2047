"""Loading weights that must fit exactly."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn


def load_weights(module: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Copy `weights` into `module`; raises ValueError naming the first differences in names or shapes."""
    own = module.state_dict()
    wrong = [
        f"{key} is {list(value.shape)} there and {list(own[key].shape)} here"
        for key, value in weights.items()
        if key in own and own[key].shape != value.shape
    ]
    wrong += [f"{key} is missing there" for key in own if key not in weights]
    wrong += [f"{key} is unknown here" for key in weights if key not in own]
    if wrong:
        raise ValueError(
            f"{source} does not fit this model, {len(wrong)} differences: {'; '.join(wrong[:3])}"
        )
    module.load_state_dict(weights)
