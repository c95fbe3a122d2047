"""What a step on a GPU would do, without one: on fake CUDA tensors, which hold no numbers.

An operation whose result depends on numbers (``item``, ``nonzero``) raises there, and so does one on tensors
of two devices. The kernels themselves do not run.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

import gol_kernels as gk
from tests.test_ops import _modules


@pytest.mark.parametrize("index", range(len(_modules())))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_forward_of_every_module_reads_nothing(index: int, dtype: torch.dtype) -> None:
    """In training, with every argument; its state stays on its device."""
    module = _modules()[index]
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = module.to("cuda")
        logits = torch.randn(9, module.num_logits, device="cuda", dtype=dtype, requires_grad=True)
        labels = torch.randint(0, 41, (9,), device="cuda")
        weights, average = torch.rand(9, device="cuda"), torch.rand((), device="cuda")
        for arguments in ((), (weights,), (weights, average), (None, 3.0)):
            loss = module(logits, labels, *arguments)
            assert loss.device.type == "cuda"
            assert loss.requires_grad
        assert module.activation(logits).shape == (9, 40)
        assert {buffer.device.type for buffer in module.buffers()} <= {"cuda"}


def test_what_reads_a_number_raises() -> None:
    with FakeTensorMode():
        labels = torch.randint(0, 5, (9,), device="cuda")
        with pytest.raises(DataDependentOutputException):
            gk.label_counts(labels, 5)[0].item()
        with pytest.raises(DynamicOutputShapeException):
            labels[labels > 2]
        with pytest.raises(RuntimeError, match="found two different devices cuda:0, cpu"):
            labels + torch.arange(9)
