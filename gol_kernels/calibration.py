"""Calibration of a trained classifier's scores."""

from __future__ import annotations

import torch
from torch import Tensor


def norcal(logits: Tensor, image_count: Tensor, gamma: float) -> Tensor:
    """NorCal (NeurIPS 2021): foreground scores [N, C] of softmax(z - gamma ln n), background not shifted.

    Dividing exp(z_j) by n_j^gamma and renormalising over classes and background, formed so that nothing
    overflows.

    Args:
        logits: [N, C+1] of a softmax classifier, background last.
        image_count: [C], images that hold each class; 0 counts as 1.
        gamma: strength; 0 leaves the scores as they are. The paper tunes it on held-out data.

    Raises: ValueError where the shapes do not fit.
    """
    c = logits.shape[-1] - 1
    if logits.dim() != 2 or tuple(image_count.shape) != (c,):
        raise ValueError(
            f"norcal needs logits [N, C+1] and image_count [C], got {list(logits.shape)} and "
            f"{list(image_count.shape)}"
        )
    shift = gamma * image_count.to(torch.float64).clamp(min=1).log()
    shift = torch.cat([shift, shift.new_zeros(1)]).to(
        logits.device, torch.promote_types(logits.dtype, torch.float32)
    )
    return torch.softmax(logits - shift, dim=1)[:, :c].to(logits.dtype)
