"""gradcheck in float64 of every loss with every option, and the errors of each precision."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import gol_kernels as gk
from tests import cases
from tests.cases import BY_NAME, CASES, Case, loss_and_grad, relative_l2, truth

CASE = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def _common(n: int, weighted: bool, reduction: str, avg: str) -> dict[str, object]:
    options: dict[str, object] = {"reduction": reduction}
    if weighted:
        options["row_weights"] = torch.linspace(0, 2, n, dtype=torch.float64)
    if avg == "number":
        options["avg_factor"] = 3.5
    elif avg == "tensor":
        options["avg_factor"] = torch.tensor(3.5)
    return options


# Seesaw's weights are constants of the loss and would move with the logits: see test_seesaw_gradcheck.
@pytest.mark.parametrize("case", [c for c in CASES if "seesaw" not in c.name], ids=lambda c: c.name)
@pytest.mark.parametrize("name", ["reference", "native"])
def test_gradcheck(case: Case, name: str) -> None:
    if name not in gk.available_backends():
        pytest.skip(f"the {name} backend is not available")
    logits, labels = case.inputs(6, 9, torch.float64, spread=1.0)
    labels[2] = -100
    options = [("mean", "none"), ("mean", "number"), ("mean", "tensor"), ("sum", "none"), ("none", "none")]
    for weighted, (reduction, avg) in product((False, True), options):
        common = _common(6, weighted, reduction, avg)
        leaf = logits.clone().requires_grad_(True)
        assert torch.autograd.gradcheck(
            lambda z, common=common: case.loss(z, labels, backend=name, **common), (leaf,)
        )


@pytest.mark.parametrize(("p", "q"), [(0.8, 2.0), (0.0, 2.0), (0.8, 0.0), (1.5, 0.5)])
def test_seesaw_gradcheck(backend: str, p: float, q: float) -> None:
    """Against autograd through cross-entropy of the logits plus their constant log-weights."""
    case = BY_NAME["seesaw"]
    logits, labels = case.inputs(7, 9, torch.float64, spread=1.0)
    counts = torch.tensor([900, 400, 0, 100, 50, 20, 8, 3, 1])
    weights = torch.linspace(0, 2, 7, dtype=torch.float64)

    def by_hand(z: torch.Tensor) -> torch.Tensor:
        positive = labels < 9
        classes, y = z[positive, :9], labels[positive]
        s = torch.softmax(classes.detach(), 1)
        n = counts.double().clamp(min=1)
        mitigation = torch.where(n[None] < n[y][:, None], (n[None] / n[y][:, None]) ** max(p, 0.0), 1.0)
        own = s.gather(1, y[:, None])
        floor = own.clamp(min=1e-2)
        compensation = torch.where(s > floor, (s / floor) ** max(q, 0.0), 1.0)
        factors = (mitigation * compensation).scatter(1, y[:, None], 1.0)
        per_row = torch.nn.functional.cross_entropy(classes + factors.log(), y, reduction="none")
        objectness = torch.nn.functional.cross_entropy(z[:, 9:], (~positive).long(), reduction="none")
        return ((per_row * weights[positive]).sum() + (objectness * weights).sum()) / 7

    def ours(z: torch.Tensor) -> torch.Tensor:
        return sum(gk.seesaw_loss(z, labels, counts, p=p, q=q, row_weights=weights, backend=backend))

    expected_loss, expected = loss_and_grad(by_hand, logits)
    loss, grad = loss_and_grad(ours, logits)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-15)


@CASE
@pytest.mark.parametrize("shape", [(33, 1203), (16, 1204), (17, 1205), (5, 1), (9, 2), (4, 80), (1, 40)])
def test_float32_error(native_backend: str, case: Case, shape: tuple[int, int]) -> None:
    """Relative L2 error of the gradient at most 2e-7 (Seesaw on binary terms: 6e-7), and of the loss 1e-6,
    against float64."""
    logits, labels = case.inputs(*shape)
    expected_loss, expected = truth(case, logits, labels)
    loss, grad = loss_and_grad(lambda z: case.loss(z, labels, backend=native_backend), logits)
    assert relative_l2(grad, expected) <= case.float32_error
    assert relative_l2(loss, expected_loss) <= cases.loss_error()


@pytest.mark.parametrize(("q", "eps"), [(0.5, 1e-30), (1.0, 1e-2), (3.0, 1e-4)])
def test_seesaw_float32_error_of_other_exponents(native_backend: str, q: float, eps: float) -> None:
    """The paper's q = 2 is squared; any other takes an exponential."""
    case = BY_NAME["seesaw"]
    logits, labels = case.inputs(33, 1203)
    expected_loss, expected = truth(case, logits, labels, q=q, eps=eps)
    loss, grad = loss_and_grad(lambda z: case.loss(z, labels, q=q, eps=eps, backend=native_backend), logits)
    assert relative_l2(grad, expected) <= case.float32_error
    assert relative_l2(loss, expected_loss) <= cases.loss_error()


@pytest.mark.parametrize("case", [c for c in CASES if c.released], ids=lambda c: c.name)
@pytest.mark.parametrize("spread", [1.0, 2.0])
def test_never_worse_than_released(native_backend: str, case: Case, spread: float) -> None:
    """float32 gradient error against float64, ours and the released eager formula's on the same logits."""
    logits, labels = case.inputs(64, 1203, spread=spread)
    logits = logits.clamp(-3.2, 9.9)  # where the released Gumbel is not dead, so that both mean the same
    _, expected = truth(case, logits, labels)
    _, grad = loss_and_grad(lambda z: case.loss(z, labels, backend=native_backend), logits)
    _, eager = loss_and_grad(lambda z: case.released(z, labels), logits)
    # Both are near rounding where the released formula is well made; there a quarter is luck.
    bound = max(relative_l2(eager, expected), 2**-24) + 2 * cases.special_error()
    assert relative_l2(grad, expected) <= bound


@CASE
@pytest.mark.parametrize(("dtype", "epsilon"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_error(backend: str, case: Case, dtype: torch.dtype, epsilon: float) -> None:
    """Half-precision logits: the loss is float32's, the gradient is off by its own rounding alone."""
    logits, labels = case.inputs(24, 1203, dtype)
    expected_loss, expected = truth(case, logits, labels)
    loss, grad = loss_and_grad(lambda z: case.loss(z, labels, backend=backend), logits)
    assert loss.dtype == torch.float32
    assert grad.dtype == dtype
    assert relative_l2(loss, expected_loss) <= cases.loss_error()
    # fp16's smallest subnormal is 6e-8: a gradient below it cannot be held.
    assert float((grad.double() - expected).abs().max()) <= float(expected.abs().max()) * epsilon
    assert relative_l2(grad, expected) <= epsilon


def test_confident_true_class(backend: str) -> None:
    """1 - p of the label keeps its digits: the label's gradient is minus the sum of the others'."""
    logits = torch.randn(8, 1204)
    labels = torch.arange(8) * 31
    logits[torch.arange(8), labels] = 40.0
    _, expected = loss_and_grad(lambda z: gk.softmax_loss(z, labels, backend="reference"), logits.double())
    _, grad = loss_and_grad(lambda z: gk.softmax_loss(z, labels, backend=backend), logits)
    own = grad[torch.arange(8), labels].double()
    torch.testing.assert_close(own, expected[torch.arange(8), labels], rtol=1e-5, atol=0)


def test_float16_gradient_is_scaled_before_it_is_rounded(backend: str) -> None:
    """A gradient of 1e-9 is 0 in float16; times GradScaler's 65536 it is not."""
    logits = torch.full((4, 1204), -6.0, dtype=torch.float16, requires_grad=True)
    labels = torch.zeros(4, dtype=torch.int64)
    loss = gk.sigmoid_loss(logits, labels, avg_factor=4e6, backend=backend)
    (loss * 65536).backward()
    expected = 65536 / 4e6 * torch.sigmoid(torch.tensor(-6.0)).item()
    assert logits.grad[0, 1].item() == pytest.approx(expected, rel=2e-3)
