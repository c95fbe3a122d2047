"""What autograd may ask of a loss: any upstream gradient, twice, several losses; not a second order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gol_kernels as gk
from tests.cases import BY_NAME, CASES, Case, loss_and_grad

CASE = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
SOME = pytest.mark.parametrize(
    "case", [BY_NAME[n] for n in ("gumbel", "gumbel-drop", "gumbel-seesaw", "seesaw")], ids=lambda c: c.name
)


@CASE
@pytest.mark.parametrize("upstream", [3.5, 0.0, -1.0])
def test_upstream_gradient(backend: str, case: Case, upstream: float) -> None:
    logits, labels = case.inputs(9, 40)
    _, grad = loss_and_grad(lambda z: case.loss(z, labels, backend=backend), logits)
    _, scaled = loss_and_grad(lambda z: case.loss(z, labels, backend=backend) * upstream, logits)
    torch.testing.assert_close(scaled, grad * upstream, rtol=2e-7, atol=0)


@CASE
def test_reduction_none_takes_a_gradient_for_each_row(backend: str, case: Case) -> None:
    logits, labels = case.inputs(9, 40, torch.float64)
    rows = torch.randn(9, dtype=torch.float64)
    losses, grad = loss_and_grad(
        lambda z: case.loss(z, labels, reduction="none", backend=backend) * rows, logits
    )
    _, each = loss_and_grad(lambda z: case.loss(z, labels, reduction="sum", backend=backend), logits)
    total, _ = loss_and_grad(lambda z: case.loss(z, labels, reduction="sum", backend=backend), logits)
    torch.testing.assert_close(grad, each * rows[:, None], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close((losses / rows).sum(), total, rtol=1e-12, atol=0)


def test_expanded_upstream_gradient(backend: str) -> None:
    """A stride-0 upstream gradient, as sum() sends back."""
    logits, labels = BY_NAME["gumbel"].inputs(5, 12, torch.float64)
    leaf = logits.clone().requires_grad_(True)
    gk.gumbel_loss(leaf, labels, reduction="none", backend=backend).sum().backward()
    _, expected = loss_and_grad(lambda z: gk.gumbel_loss(z, labels, reduction="sum", backend=backend), logits)
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-13, atol=0)


@SOME
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_left_alone(backend: str, case: Case, dtype: torch.dtype) -> None:
    logits, labels = case.inputs(7, 33, dtype)
    leaf = logits.clone().requires_grad_(True)
    (case.loss(leaf, labels, backend=backend) * 2).backward()
    assert torch.equal(leaf.detach(), logits)


@SOME
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_retained_graph(backend: str, case: Case, scale: float) -> None:
    """Three backward passes over one graph, accumulated into a leaf, and the gradient changed in between."""
    logits, labels = case.inputs(7, 33)
    _, expected = loss_and_grad(lambda z: case.loss(z, labels, backend=backend) * scale, logits)
    leaf = logits.clone().requires_grad_(True)
    loss = case.loss(leaf, labels, backend=backend) * scale
    for _ in range(2):
        loss.backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, 2 * expected, rtol=1e-6, atol=0)
    leaf.grad.zero_()
    loss.backward()
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_two_losses_on_the_same_logits(backend: str) -> None:
    logits, labels = BY_NAME["gumbel"].inputs(7, 33)
    leaf = logits.clone().requires_grad_(True)
    (
        gk.gumbel_loss(leaf, labels, backend=backend) + 2 * gk.softmax_loss(leaf, labels, backend=backend)
    ).backward()
    _, first = loss_and_grad(lambda z: gk.gumbel_loss(z, labels, backend=backend), logits)
    _, second = loss_and_grad(lambda z: gk.softmax_loss(z, labels, backend=backend), logits)
    torch.testing.assert_close(leaf.grad, first + 2 * second, rtol=1e-6, atol=1e-9)


def test_seesaw_parts_have_gradients_of_their_own(backend: str) -> None:
    case = BY_NAME["seesaw"]
    logits, labels = case.inputs(8, 20)
    counts = torch.arange(20)

    def grad_of(a: float, b: float) -> torch.Tensor:
        def weighted(z: torch.Tensor) -> torch.Tensor:
            classes, objectness = gk.seesaw_loss(z, labels, counts, backend=backend)
            return a * classes + b * objectness if b else a * classes

        return loss_and_grad(weighted, logits)[1]

    both, classes = grad_of(1, 1), grad_of(1, 0)
    assert not classes[:, 20:].any()
    torch.testing.assert_close(classes[:, :20], both[:, :20], rtol=1e-6, atol=0)
    mixed = grad_of(2, 3)
    torch.testing.assert_close(mixed[:, :20], 2 * both[:, :20], rtol=1e-6, atol=0)
    torch.testing.assert_close(mixed[:, 20:], 3 * both[:, 20:], rtol=1e-6, atol=0)


@CASE
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_is_refused(backend: str, case: Case, reduction: str) -> None:
    logits, labels = case.inputs(4, 9)
    leaf = logits.requires_grad_(True)
    loss = case.loss(leaf, labels, reduction=reduction, backend=backend).sum()
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.square().sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_of_part_of_the_graph_are_refused(backend: str, reduction: str) -> None:
    """Where autograd asks for some inputs alone, it does not go where they are not: the gradient must lead to
    them, through whatever made the logits."""
    features, weight = torch.randn(4, 3, requires_grad=True), torch.randn(3, 9, requires_grad=True)
    labels = torch.tensor([0, 3, 8, 1])
    loss = gk.gumbel_loss(features @ weight, labels, reduction=reduction, backend=backend).sum()
    (grad,) = torch.autograd.grad(loss, features, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(grad.square().sum(), weight)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.functional.hessian(
            lambda z: gk.softmax_loss(z, labels, reduction=reduction, backend=backend).sum(),
            torch.randn(4, 9),
        )


@CASE
def test_forward_mode_is_refused(backend: str, case: Case) -> None:
    logits, labels = case.inputs(4, 9)
    with pytest.raises(RuntimeError, match="forward-mode differentiation"):
        torch.func.jvp(lambda z: case.loss(z, labels, backend=backend), (logits,), (torch.ones_like(logits),))


def test_a_step_keeps_one_buffer(backend: str) -> None:
    """The gradient, and not the logits beside it."""
    kept: list[int] = []
    leaf = torch.randn(6, 9, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda _: None):
        gk.gumbel_loss(leaf, torch.zeros(6, dtype=torch.int64), backend=backend)
    assert kept == [54]


class _Calls(TorchDispatchMode):
    """What the dispatcher is asked for, in order, and the gradient that a loss op returns."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.grad = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.append(func.name().split("::")[1])
        if "_loss_" in self.names[-1]:
            self.grad = next(t.data_ptr() for t in result if t.dim() == 2)
        return result


@pytest.mark.parametrize(("name", "op"), [("gumbel", "bernoulli_loss"), ("softmax", "softmax_loss")])
def test_a_plain_step_is_a_loss_and_a_scaling_that_moves_nothing(backend: str, name: str, op: str) -> None:
    """Each further op is a good part of a small loss; the leaf's gradient is the buffer of the forward."""
    case = BY_NAME[name]
    logits, labels = case.inputs(7, 33)
    leaf = logits.requires_grad_(True)
    with _Calls() as calls:
        case.loss(leaf, labels, backend=backend).backward()
    assert calls.names == [
        f"{op}_{backend}",
        "slice_copy.Tensor",
        "ones_like",
        f"scale_grad__{backend}",
        "detach",
    ]
    assert leaf.grad is not None
    assert leaf.grad.data_ptr() == calls.grad


def test_no_gradient_no_buffer(backend: str) -> None:
    logits, labels = BY_NAME["gumbel"].inputs(4, 9)
    with torch.no_grad():
        loss = gk.gumbel_loss(logits.requires_grad_(True), labels, backend=backend)
    assert not loss.requires_grad
    assert not gk.gumbel_loss(logits.detach(), labels, backend=backend).requires_grad


def test_activation(backend: str) -> None:
    z = torch.linspace(-3, 8, 23, dtype=torch.float64, requires_grad=True)
    p = gk.gumbel_activation(z, temperature=1.5, backend=backend)
    torch.testing.assert_close(p, torch.exp(-torch.exp(-z / 1.5)), rtol=1e-13, atol=0)
    assert torch.autograd.gradcheck(lambda x: gk.gumbel_activation(x, temperature=1.5, backend=backend), (z,))
    _, grad = loss_and_grad(
        lambda x: gk.gumbel_activation(x, clip=(-1.0, 2.0), backend=backend), torch.tensor([-2.0, 0.0, 3.0])
    )
    torch.testing.assert_close(grad, torch.tensor([0.0, 0.36787944, 0.0]))
    extreme = gk.gumbel_activation(torch.tensor([-1e4, float("-inf"), 1e4, float("inf")]), backend=backend)
    assert extreme.tolist() == [0, 0, 1, 1]


def test_autocast(backend: str) -> None:
    """bf16 logits straight from a linear layer under autocast; the loss is float32."""
    layer = nn.Linear(8, 13)
    labels = torch.randint(0, 12, (6,))
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        logits = layer(torch.randn(6, 8))
        loss = gk.gumbel_loss(logits, labels, backend=backend)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    assert bool(layer.weight.grad.isfinite().all())
    assert bool(layer.weight.grad.any())
