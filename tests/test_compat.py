"""compat="gol" reproduces the released code, dead zone, clamp and cap; the default has none of them."""

from __future__ import annotations

import pytest
import torch

import gol_kernels as gk
from gol_kernels import released
from tests.cases import generator, loss_and_grad, rare_mask, relative_l2


def _positive_slope(z: float, backend: str, **options: object) -> float:
    _, grad = loss_and_grad(
        lambda x: gk.gumbel_loss(
            x, torch.tensor([0]), reduction="sum", max_loss=None, backend=backend, **options
        ),
        torch.tensor([[z]], dtype=torch.float64),
    )
    return grad.item()


def test_dead_zone(backend: str) -> None:
    """A positive at z = -3.5 should be pushed up by e^3.5 = 33.1; the released code pushes by 0.137."""
    assert _positive_slope(-3.5, backend) == pytest.approx(-33.115, abs=1e-3)
    capless = {"compat": "gol", "reweight": gk.EQL(torch.tensor([False]))}
    assert _positive_slope(-3.5, backend, **capless) == pytest.approx(-0.137, abs=5e-4)
    # -2.906 instead of -29.96, as float64 autograd through the released formula gives.
    assert _positive_slope(-3.4, backend, **capless) == pytest.approx(-2.906, abs=5e-4)
    assert _positive_slope(-3.0, backend, **capless) == pytest.approx(-20.0855, abs=1e-4)


def test_outside_the_clip(backend: str) -> None:
    z = torch.tensor([[-6.0, 12.0]], dtype=torch.float64)
    label = torch.tensor([0])
    for options, expected in (
        ({}, [0.0, 0.0]),
        ({"outside": "straight_through"}, [-54.598150, 0.99997730]),
        ({"clip": None}, [-403.428793, 0.99999693]),
        ({"compat": "gol", "max_loss": 1e9}, [0.0, 0.0]),
    ):
        _, grad = loss_and_grad(lambda x, o=options: gk.gumbel_loss(x, label, backend=backend, **o), z)
        torch.testing.assert_close(grad, torch.tensor([expected], dtype=torch.float64), rtol=1e-7, atol=0)


@pytest.mark.parametrize("spread", [0.5, 1.5])
def test_reproduces_released_gumbel(backend: str, spread: float) -> None:
    """Loss and gradient over z in all of [-4, 10], the dead zone's slopes included, in float32."""
    logits = (torch.randn(32, 301) * spread - 2.6).clamp(-3.9, 9.5)
    labels = torch.randint(0, 301, (32,))
    weights = torch.rand(32)

    def eager(z: torch.Tensor) -> torch.Tensor:
        return released.gumbel_ce(z, labels, weights, avg_factor=40.0)

    def ours(z: torch.Tensor) -> torch.Tensor:
        return gk.gumbel_loss(z, labels, row_weights=weights, avg_factor=40.0, compat="gol", backend=backend)

    (expected_loss, expected), (loss, grad) = loss_and_grad(eager, logits), loss_and_grad(ours, logits)
    assert expected_loss < 20
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert relative_l2(grad, expected) < 2e-4  # the released p(1-p)/1e-12 has few digits in float32


def test_cap_at_20(backend: str) -> None:
    logits, labels = torch.full((4, 50), -4.0), torch.arange(4)
    loss, grad = loss_and_grad(lambda z: gk.gumbel_loss(z, labels, compat="gol", backend=backend), logits)
    eager_loss, eager = loss_and_grad(lambda z: released.gumbel_ce(z, labels), logits)
    assert loss == eager_loss == 20
    assert not grad.any()
    assert not eager.any()
    loss, grad = loss_and_grad(lambda z: gk.gumbel_loss(z, labels, backend=backend), logits)
    assert loss > 50
    assert grad[0, 0] == pytest.approx(-54.598 / 4, rel=1e-4)


@pytest.mark.parametrize("gumbel", [True, False])
def test_reproduces_released_eql(backend: str, gumbel: bool) -> None:
    logits = torch.randn(40, 90) * 1.5
    labels = torch.randint(0, 91, (40,))
    rare = rare_mask(90)
    function = gk.gumbel_loss if gumbel else gk.sigmoid_loss
    options = {"compat": "gol"} if gumbel else {}
    loss, grad = loss_and_grad(
        lambda z: function(z, labels, reweight=gk.EQL(rare), backend=backend, **options), logits
    )
    expected_loss, expected = loss_and_grad(lambda z: released.eql(z, labels, rare, gumbel=gumbel), logits)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert relative_l2(grad, expected) < 1e-4


@pytest.mark.parametrize("gumbel", [True, False])
@pytest.mark.parametrize("background_rows", [0, 15, 40])
def test_reproduces_released_drop_loss(backend: str, gumbel: bool, background_rows: int) -> None:
    """Our own draws handed to the released formula; 40 of 40 background rows: nothing is dropped."""
    logits = torch.randn(40, 90) * 1.5
    labels = torch.randint(0, 90, (40,))
    labels[:background_rows] = 90
    rare = rare_mask(90)
    seed, offset = torch.randint(2**63 - 1, (2,), generator=generator(seed=3))
    uniform = gk.reference.philox_uint16(seed, offset, 40, 90).float() / 2**16
    function = gk.gumbel_loss if gumbel else gk.sigmoid_loss
    options = {"compat": "gol"} if gumbel else {}
    loss, grad = loss_and_grad(
        lambda z: function(z, labels, reweight=gk.Drop(rare, generator(seed=3)), backend=backend, **options),
        logits,
    )
    expected_loss, expected = loss_and_grad(
        lambda z: released.drop_loss(z, labels, rare, gumbel=gumbel, uniform=uniform), logits
    )
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert relative_l2(grad, expected) < 1e-4


def test_refused_combinations() -> None:
    logits, labels = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="outside must stay 'zero'"):
        gk.gumbel_loss(logits, labels, compat="gol", outside="straight_through")
    with pytest.raises(ValueError, match="max_loss caps the reduced loss"):
        gk.gumbel_loss(logits, labels, max_loss=20.0, reduction="none")
