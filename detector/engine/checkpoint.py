"""Checkpoints: written atomically, read without running code, complete enough to go on unchanged."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

FORMAT = 2


class CheckpointError(ValueError):
    """A checkpoint that is absent, damaged, or of another model."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` so that `path` holds the old checkpoint or the new one, whatever happens meanwhile.

    Raises OSError, naming the file, where the disk is full or refuses; what was written is removed.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name itself must survive a power cut
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        # torch's writer says that positions do not fit, because of what the disk said before
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(f"cannot write {path}: {reason}. An older file of that name is whole") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; only tensors and plain values are accepted (`weights_only`)."""
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise nearly everything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is not a readable checkpoint: {reason}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this trainer (format {FORMAT})")
    return state
