"""Weights: those that ImageNet gave a backbone, and loading that must fit exactly."""

from __future__ import annotations

import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights

from detector.config import ConfigError

ANSWER_TIMEOUT_S = 5.0  # the server has to answer a first question within
DOWNLOAD_TIMEOUT_S = 20.0  # the longest silence in a download that began
ALIASES = {"imagenet": "IMAGENET1K_V1"}
LOSS_STATE = ".loss."  # in the names of a detector's buffers
WRAPPERS = ("state_dict", "model")  # keys under which training programs file a state dict


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


def load_start(model: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """As `load_weights`, but the losses keep their own state: what another run's loss knew of its classes and
    had counted is not this run's, whose loss may be another one."""
    own = {key: value for key, value in model.state_dict().items() if LOSS_STATE in key}
    load_weights(model, {key: value for key, value in weights.items() if LOSS_STATE not in key} | own, source)


def pretrained_weights(backbone: str, weights: str) -> tuple[dict[str, Tensor], str]:
    """State dict that `weights` means for `backbone`, and a name for it in messages.

    weights: "imagenet", one of torchvision's names such as IMAGENET1K_V2, or a file with a state dict.
    Raises ConfigError when they cannot be had; within seconds where there is no network.
    """
    published = _published(backbone)
    name = ALIASES.get(weights, weights)
    if name in published:
        return _download(backbone, published[name]), f"torchvision's {name} of {backbone}"
    if Path(weights).is_file():
        return _read(Path(weights)), weights
    if weights in ALIASES:
        raise ConfigError(
            f"torchvision publishes no weights for {backbone}: set model.weights to a file with a state dict"
        )
    known = ", ".join((*ALIASES, *published)) if published else "those of a file"
    raise ConfigError(
        f"model.weights={weights!r} is no file, nor are these weights of {backbone}, which are {known}; "
        f"or train from scratch with model.weights=none"
    )


def _published(backbone: str) -> dict[str, Any]:
    try:
        return dict(get_model_weights(backbone).__members__)
    except ValueError:
        return {}


def _read(path: Path) -> dict[str, Tensor]:
    """A state dict, by itself or wrapped as training programs do."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise nearly everything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{path} cannot be read as weights: {reason}") from None
    for key in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError(f"{path} holds no state dict, expected names with tensors")
    return state


def _download(backbone: str, weights: Any) -> dict[str, Tensor]:
    cache = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    try:
        if not cache.is_file():
            _ask(weights.url)
        with _socket_timeout(DOWNLOAD_TIMEOUT_S):
            return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except Exception as error:  # of the network, the disk or a damaged file: nearly everything
        reason = str(error) or type(error).__name__
        raise ConfigError(
            f"cannot get the ImageNet weights of {backbone} ({reason}). Without a network, place the file "
            f"{weights.url} at {cache}, or set model.weights to a file, or train from scratch with "
            f"model.weights=none model.norm=gn model.trainable_stages=5"
        ) from None


def _ask(url: str) -> None:
    """Raise OSError unless `url` answers at once. In a thread, as looking up a name knows no time limit."""
    outcome: list[Exception] = [TimeoutError(f"no answer within {ANSWER_TIMEOUT_S:g} s")]

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S).close()
            outcome.clear()
        except urllib.error.HTTPError:
            outcome.clear()  # an answer all the same; the download will say what is the matter
        except (OSError, HTTPException) as error:
            outcome[:] = [error]

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_TIMEOUT_S)
    if outcome:
        raise outcome[0]


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """torch.hub opens its URL without a time limit, and a dropped connection would hang for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
