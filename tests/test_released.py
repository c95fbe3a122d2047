"""The released formulas of the family, where they are right, are what our losses compute.

(The Gumbel ones, which are not right everywhere, have ``test_compat``.)
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import gol_kernels as gk
from gol_kernels import released
from tests.cases import class_groups, counts, loss_and_grad, rare_mask, relative_l2, row_groups

N, C = 60, 90
DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 5e-7)])


def _inputs(dtype: torch.dtype, background: bool = True) -> tuple[Tensor, Tensor]:
    """Logits [N, C+1] around -1, labels with a third of background or none."""
    labels = torch.randint(0, C, (N,))
    if background:
        labels[: N // 3] = C
    return (torch.randn(N, C + 1, dtype=torch.float64) * 2 - 1).to(dtype), labels


def _assert_same(
    ours: Callable[[Tensor], Tensor],
    theirs: Callable[[Tensor], Tensor],
    logits: Tensor,
    tolerance: float,
) -> None:
    loss, grad = loss_and_grad(ours, logits)
    expected_loss, expected = loss_and_grad(theirs, logits)
    torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=0)
    assert relative_l2(grad, expected) < tolerance


@DTYPES
def test_eqlv2(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    """Loss, gradient and the sums of the gradients, with ratios on both sides of mu."""
    logits, labels = _inputs(dtype)
    ratio = torch.linspace(0, 2, C, dtype=torch.float64).to(dtype)
    negative = torch.cat([torch.sigmoid(12 * (ratio - 0.8)), ratio.new_ones(1)])
    reweight = gk.ClassWeights(torch.stack([1 + 4 * (1 - negative), negative]))
    sums = torch.zeros(2, C + 1, dtype=torch.float64)
    _assert_same(
        lambda z: gk.sigmoid_loss(z, labels, reweight=reweight, class_gradients=sums, backend=backend),
        lambda z: released.eqlv2(z, labels, ratio)[0],
        logits,
        tolerance,
    )
    expected = torch.stack(released.eqlv2(logits, labels, ratio)[1:]).double()
    torch.testing.assert_close(sums[:, :-1], expected, rtol=1e-12 if dtype == torch.float64 else 2e-6, atol=0)


@DTYPES
def test_federated(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    """Rows whose own class was not drawn are among them."""
    logits, labels = _inputs(dtype)
    kept = ~rare_mask(C)
    assert bool((~kept[labels[labels < C]]).any())
    reweight = gk.Federated(torch.cat([kept, kept.new_zeros(1)]))
    _assert_same(
        lambda z: gk.sigmoid_loss(z, labels, reweight=reweight, backend=backend),
        lambda z: released.federated(z, labels, kept),
        logits,
        tolerance,
    )


@DTYPES
def test_acsl(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    logits, labels = _inputs(dtype)
    groups, rows = class_groups(C + 1), row_groups(labels, C)
    rows[1::5] &= 12
    _assert_same(
        lambda z: gk.sigmoid_loss(z, labels, reweight=gk.ACSL(groups, rows, 0.7), backend=backend),
        lambda z: released.acsl(z, labels, groups, rows),
        logits,
        tolerance,
    )


@DTYPES
def test_balanced_softmax(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    logits, labels = _inputs(dtype)
    n = counts(C + 1).clamp(min=1).double()
    _assert_same(
        lambda z: gk.softmax_loss(z, labels, log_prior=n.log(), backend=backend),
        lambda z: released.balanced_softmax(z, labels, n.to(dtype)),
        logits,
        tolerance,
    )


@DTYPES
def test_equilibrium(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    logits, labels = _inputs(dtype)
    m = torch.linspace(0.01, 0.9, C + 1, dtype=torch.float64)
    _assert_same(
        lambda z: gk.softmax_loss(z, labels, log_prior=m.log(), backend=backend),
        lambda z: released.equilibrium(z, labels, m.to(dtype)),
        logits,
        tolerance,
    )


def test_equilibrium_of_a_label_far_below(backend: str) -> None:
    """Where the released form divides 0 by a sum, the loss is the logits' gap and the gradient -1 and 1."""
    logits, labels = torch.tensor([[-60.0, 60.0]]), torch.tensor([0])
    half = torch.full((2,), 0.5)
    loss, grad = loss_and_grad(lambda z: released.equilibrium(z, labels, half), logits)
    assert loss == torch.inf
    assert bool(grad.isnan().any())
    loss, grad = loss_and_grad(
        lambda z: gk.softmax_loss(z, labels, log_prior=half.log(), backend=backend), logits
    )
    assert loss == 120
    assert grad.tolist() == [[-1.0, 1.0]]
