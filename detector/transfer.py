"""Tensors on their way from a GPU to the host."""

from __future__ import annotations

import torch
from torch import Tensor


class OnTheWay:
    """A tensor that the host will want later.

    On a GPU the copy is queued behind what has been launched so far. Read when more work has been queued
    after it, the tensor arrives before the GPU runs out of work: the host waits, the GPU does not.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.copied = tensor.detach(), None
        if tensor.is_cuda:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.tensor = host.copy_(self.tensor, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()

    def read(self) -> Tensor:
        """It, on the host."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.tensor
