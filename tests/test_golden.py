"""Values worked out independently of this code, in float64 or with 60-digit arithmetic, to 1e-12."""

from __future__ import annotations

import math

import pytest
import torch

import gol_kernels as gk

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


# z, loss of a positive, loss of a negative, slope of a negative; the slope of a positive is minus its loss.
GUMBEL = [
    (-3.0, 20.085536923187668, 1.8921786966e-9, 3.8005425112e-8),
    (-2.0, 7.38905609893065, 6.181700170515e-4, 4.569105031037e-3),
    (0.0, 1.0, 0.458675145387082, 0.581976706869326),
    (2.0, 0.135335283236613, 2.066904606444170, 0.933858195905194),
    (8.0, 3.354626279025e-4, 8.000167726624985, 0.999832278063980),
]


def _f64(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _loss_and_grad(function, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.clone().requires_grad_(True)
    loss = function(leaf)
    loss.sum().backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize(("z", "positive", "negative", "slope"), GUMBEL)
def test_gumbel_elements(backend: str, z: float, positive: float, negative: float, slope: float) -> None:
    # One column each: label 0 makes it a positive; of two columns, label 1 makes column 0 a negative.
    loss, grad = _loss_and_grad(
        lambda x: gk.gumbel_loss(x, torch.tensor([0]), reduction="none", backend=backend), _f64([[z]])
    )
    torch.testing.assert_close(loss, _f64([positive]), **CLOSE)
    torch.testing.assert_close(grad, _f64([[-positive]]), **CLOSE)
    rare = torch.tensor([False])
    loss, grad = _loss_and_grad(
        lambda x: gk.gumbel_loss(
            x, torch.tensor([1]), reweight=gk.EQL(rare), reduction="none", backend=backend
        ),
        _f64([[z]]),
    )
    torch.testing.assert_close(loss, _f64([negative]), **CLOSE)
    torch.testing.assert_close(grad, _f64([[slope]]), **CLOSE)


def test_gumbel_temperature(backend: str) -> None:
    rare = torch.tensor([False])
    options = {"temperature": 2.0, "reweight": gk.EQL(rare), "reduction": "none", "backend": backend}
    loss, grad = _loss_and_grad(
        lambda x: gk.gumbel_loss(x, torch.tensor([0, 1]), **options), _f64([[1.0], [1.0]])
    )
    torch.testing.assert_close(loss, _f64([0.606530659712633, 0.787983738704449]), **CLOSE)
    torch.testing.assert_close(grad, _f64([[-0.303265329856317], [0.363602477982691]]), **CLOSE)


def test_eql(backend: str) -> None:
    frequency = _f64([0.01, 0.0005])
    logits, labels = _f64([[0, 1], [-1, 0.5], [0.2, -0.3]]), torch.tensor([0, 1, 2])
    rare = gk.EQL(frequency < 0.0011)
    loss, grad = _loss_and_grad(lambda x: gk.gumbel_loss(x, labels, reweight=rare, backend=backend), logits)
    torch.testing.assert_close(loss, _f64(0.852171601655864), **CLOSE)
    assert grad[0, 1] == 0
    loss = gk.sigmoid_loss(logits, labels, reweight=rare, backend=backend)
    torch.testing.assert_close(loss, _f64(0.944326655369464), **CLOSE)


def test_seesaw(backend: str) -> None:
    logits = _f64([[2, 1, 0.5, 0.3, -0.2], [0, 1, 3, 1, 0], [0.1, 0.2, 0.3, -1, 2], [-3, 4, 1, 0.5, 0.5]])
    labels = torch.tensor([0, 1, 3, 0])
    stats = gk.ClassStats(3)
    stats.label_counts += torch.tensor([99, 10, 0, 500])
    counts = stats.count(labels)
    assert counts.tolist() == [101, 11, 0, 501]
    leaf = logits.clone().requires_grad_(True)
    classes, objectness = gk.seesaw_loss(leaf, labels, counts, avg_factor=4, backend=backend)
    # These were printed with 9 to 14 digits: compare to all of them.
    torch.testing.assert_close(classes.detach(), _f64(4.626987992), rtol=0, atol=5e-10)
    torch.testing.assert_close(objectness.detach(), _f64(0.382268300958), rtol=0, atol=5e-13)
    (classes + objectness).backward()
    expected = _f64(
        [
            [-0.0159145158517, 0.014612921481, 0.0013015943707],
            [0.0015173284289, -0.2458754737, 0.24435814528],
            [0, 0, 0],
            [-0.24999985169, 0.24999532097, 4.5307217898e-6],
        ]
    )
    torch.testing.assert_close(leaf.grad[:, :3], expected, rtol=0, atol=1e-11)
    towards_object = _f64([-0.0943851672, -0.0672353553, 0.0118564683, -0.125])
    torch.testing.assert_close(leaf.grad[:, 3], towards_object, rtol=0, atol=5e-11)
    torch.testing.assert_close(leaf.grad[:, 4], -leaf.grad[:, 3], **CLOSE)


def test_seesaw_against_its_equations(backend: str) -> None:
    """One row by hand: M and C written out as the paper's factors, not as logarithms."""
    z, n, y = [1.0, 2.0, -1.0], [50.0, 10.0, 100.0], 0
    total = sum(map(math.exp, z))
    s = [math.exp(v) / total for v in z]
    weight = [1.0] * 3
    for j in (1, 2):
        mitigation = (n[j] / n[y]) ** 0.8 if n[j] < n[y] else 1.0
        compensation = (s[j] / s[y]) ** 2.0 if s[j] > s[y] else 1.0
        weight[j] = mitigation * compensation
    denominator = sum(w * math.exp(v) for w, v in zip(weight, z, strict=True))
    expected = -math.log(math.exp(z[y]) / denominator)
    classes, _ = gk.seesaw_loss(_f64([[*z, 0.0, 0.0]]), torch.tensor([y]), torch.tensor(n), backend=backend)
    torch.testing.assert_close(classes, _f64(expected), **CLOSE)


def test_prior_bias() -> None:
    assert gk.gumbel_prior_bias(1203) == pytest.approx(-1.959, abs=5e-4)
    assert gk.gumbel_prior_bias(1230) == pytest.approx(-1.962, abs=5e-4)
    assert gk.gumbel_prior_bias(80) == pytest.approx(-1.480, abs=5e-4)
