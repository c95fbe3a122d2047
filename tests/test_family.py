"""The rest of the family, module by module, against the papers' formulas written out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import gol_kernels as gk
from tests.cases import LINKS, loss_and_grad

F64 = torch.float64


def _stats(**changes: Any) -> gk.ClassStats:
    facts = {"image_count": [900, 40, 7], "instance_count": [2000, 50, 9], "num_images": 1000} | changes
    return gk.ClassStats(**facts)


def _backward(loss: gk.losses.LongTailLoss, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return loss_and_grad(lambda z: loss(z, labels), logits)


# --- links --------------------------------------------------------------------------------------
@pytest.mark.parametrize("z", [-4.9, -2.0, -0.3, 0.0, 1.1, 3.0, 4.9])
def test_probit_elements(backend: str, z: float) -> None:
    """-log Phi(+-z) and its slope -+phi/Phi, from the error function's complement."""
    logits, labels = torch.tensor([[z, z]], dtype=F64), torch.tensor([0])
    loss, grad = loss_and_grad(lambda x: gk.probit_loss(x, labels, backend=backend), logits)
    cdf = [math.erfc(-s * z / math.sqrt(2)) / 2 for s in (1, -1)]
    density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    assert loss.item() == pytest.approx(-math.log(cdf[0]) - math.log(cdf[1]), rel=1e-12)
    assert grad[0].tolist() == pytest.approx([-density / cdf[0], density / cdf[1]], rel=1e-10)


def test_probit_clip(backend: str) -> None:
    logits, labels = torch.tensor([[-7.0, 6.0]]), torch.tensor([0])
    edge = 15.064998393988726  # -log Phi(-5)
    for outside, slope in (("zero", 0.0), ("straight_through", 5.186503967125843)):
        loss, grad = loss_and_grad(
            lambda x, outside=outside: gk.probit_loss(x, labels, outside=outside, backend=backend), logits
        )
        assert loss.item() == pytest.approx(2 * edge, rel=1e-6)
        assert grad[0].tolist() == pytest.approx([-slope, slope], rel=1e-6)
    loss, grad = loss_and_grad(lambda x: gk.probit_loss(x, labels, clip=None, backend=backend), logits)
    tails = [math.erfc(x / math.sqrt(2)) / 2 for x in (7, 6)]
    density = [math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in (7, 6)]
    assert loss.item() == pytest.approx(-math.log(tails[0]) - math.log(tails[1]), rel=1e-6)
    assert grad[0].tolist() == pytest.approx([-density[0] / tails[0], density[1] / tails[1]], rel=1e-6)


# --- statistics -----------------------------------------------------------------------------------
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_class_gradients(backend: str, link: str, dtype: torch.dtype) -> None:
    """Sums of |d loss / d z| by class, with row weights, without the average; added to what was there."""
    torch.manual_seed(3)
    logits = (torch.randn(70, 21) * 2 - 1).to(dtype)
    labels = torch.randint(0, 21, (70,))
    labels[5] = -100
    weights = torch.rand(70, dtype=F64)
    leaf = logits.double().requires_grad_(True)
    rows = LINKS[link](leaf, labels, reduction="none", row_weights=weights, backend="reference")
    (grad,) = torch.autograd.grad(rows.sum(), leaf)
    positive = F.one_hot(labels.clamp(min=0), 21).bool()
    expected = torch.stack([(grad.abs() * positive).sum(0), (grad.abs() * ~positive).sum(0)])
    found = torch.ones(2, 21, dtype=F64)
    LINKS[link](logits, labels, row_weights=weights, avg_factor=7.0, class_gradients=found, backend=backend)
    torch.testing.assert_close(found - 1, expected, rtol=2e-6, atol=1e-7)


def test_class_gradients_leave_out_what_does_not_exist(backend: str) -> None:
    logits = torch.zeros(4, 3)
    logits[1:3] = math.nan
    labels = torch.tensor([0, 1, -100, 9])
    found = torch.zeros(2, 3, dtype=F64)
    options = {"validate": False, "class_gradients": found, "backend": backend}
    gk.sigmoid_loss(logits, labels, row_weights=torch.tensor([2.0, 0, 1, 1]), **options)
    assert found.tolist() == [[1.0, 0, 0], [0, 1.0, 1.0]]


def test_class_gradients_refuse_another_shape() -> None:
    with pytest.raises(ValueError, match=r"class_gradients must be float64 \[2, 3\]"):
        gk.sigmoid_loss(torch.zeros(4, 3), torch.zeros(4).long(), class_gradients=torch.zeros(2, 3))


def test_modules_gather_gradients_in_training_only() -> None:
    """The mean positive gradient of a class, as in the Gumbel paper's Fig. 7."""
    stats = gk.ClassStats(3)
    loss = gk.GumbelLoss(3, gradient_stats=stats)
    logits = torch.tensor([[0.0, -1, -1, -1], [1.0, 0, 0, 0], [0, 0, 0, 0.0]])
    loss(logits, torch.tensor([0, 0, 3]))
    expected = (1 + math.exp(-1)) / 2
    assert stats.mean_positive_gradient[0].item() == pytest.approx(expected, rel=1e-6)
    assert stats.positive_gradient[1:].tolist() == [0, 0]
    assert stats.negative_gradient[0].item() == pytest.approx(0.581976706869326, rel=1e-6)
    before = {name: value.clone() for name, value in stats.state_dict().items()}
    loss.eval()(logits, torch.tensor([0, 0, 3]))
    assert all(torch.equal(before[name], value) for name, value in stats.state_dict().items())


# --- EQLv2 ------------------------------------------------------------------------------------------
def test_eqlv2_two_steps() -> None:
    """Two identical steps, worked out from the paper's formulas in float64."""
    loss = gk.EQLv2Loss(2)
    z, y = torch.tensor([[1, -1, 0.5], [-2, 0, 2]], dtype=F64), torch.tensor([0, 2])
    first = loss(z, y)
    assert first.item() == pytest.approx(1.27380178093122, rel=1e-12)
    stats = loss.gradient_stats
    assert stats.positive_gradient.tolist() == pytest.approx([0.26894142137, 0], abs=1e-11)
    assert stats.negative_gradient.tolist() == pytest.approx([0.119202922022, 0.768941421370], abs=1e-11)
    assert stats.gradient_ratio.tolist() == pytest.approx([2.25616466931, 0], abs=1e-8)
    assert loss(z, y).item() == pytest.approx(0.7706314404957, rel=1e-12)


def test_eqlv2_class_never_seen() -> None:
    loss = gk.EQLv2Loss(2)
    loss(torch.zeros(4, 3), torch.tensor([0, 0, 2, 2]))
    table = loss._reweight(torch.zeros(1, 3), torch.zeros(1)).table
    assert table[:, 1].tolist() == pytest.approx([4.9997291, 6.772415e-5], rel=1e-6)
    assert table[:, 2].tolist() == [1, 1]


def test_eqlv2_scores() -> None:
    z = torch.tensor([[0.3, -2.0, 1.0]], dtype=F64)
    p = torch.sigmoid(z)
    torch.testing.assert_close(gk.EQLv2Loss(2).activation(z), p[:, :2] * (1 - p[:, 2:]))


# --- federated --------------------------------------------------------------------------------------
def test_federated_keeps_present_and_draws_others() -> None:
    stats = gk.ClassStats(image_count=[5] * 40 + [0] * 10, num_images=60)
    loss = gk.FederatedLoss(stats, num_sampled=12)
    labels = torch.tensor([3, 3, 45, 50, 7])  # four distinct, background among them
    drawn = torch.zeros(50)
    for _ in range(300):
        kept = loss._reweight(torch.zeros(5, 51), labels).kept
        assert kept[[3, 45, 7]].all()
        assert not kept[50]
        assert kept.sum() == 3 + 12 - 4
        drawn += kept[:50]
    assert not drawn[torch.arange(40, 50)[torch.arange(40, 50) != 45]].any()  # frequency 0
    others = drawn[[j for j in range(40) if j not in (3, 7)]]
    assert others.min() > 30  # 8 of 38 in 300 draws: 63 expected
    assert others.max() < 100


def test_federated_frequency_to_the_power() -> None:
    stats = gk.ClassStats(image_count=[400, 100, 100], num_images=500)
    loss = gk.FederatedLoss(stats, num_sampled=2, power=0.5)
    labels = torch.tensor([3])  # background takes a place: one class is drawn, 2 : 1 : 1
    first = sum(bool(loss._reweight(torch.zeros(1, 4), labels).kept[0]) for _ in range(2000))
    assert 0.45 < first / 2000 < 0.55


def test_federated_loss(backend: str) -> None:
    z = torch.randn(6, 5, dtype=F64)
    labels = torch.tensor([0, 2, 4, 4, 1, 0])
    kept = torch.tensor([True, True, True, False, False])
    target = F.one_hot(labels, 5).double()
    element = F.binary_cross_entropy_with_logits(z, target, reduction="none")
    loss = gk.sigmoid_loss(z, labels, reweight=gk.Federated(kept), backend=backend)
    torch.testing.assert_close(loss, (element * kept).sum() / 6)


def test_federated_more_present_than_places() -> None:
    loss = gk.FederatedLoss(_stats(), num_sampled=1)
    kept = loss._reweight(torch.zeros(2, 4), torch.tensor([0, 2])).kept
    assert kept.tolist() == [True, False, True, False]


# --- ACSL -------------------------------------------------------------------------------------------
def test_acsl_terms(backend: str) -> None:
    """Each row's kept columns, written out; sigma(z) >= 0.7 from z = 0.8473."""
    z = torch.tensor([[0.9, 0.8, 2.0, 1.0], [5.0, 5.0, 5.0, 5.0], [-1.0, -1, -1, -1]], dtype=F64)
    labels = torch.tensor([1, 3, 3])
    groups = torch.tensor([4, 2, 1, 8], dtype=torch.uint8)
    rows = torch.tensor([0, 4 | 8, 1 | 4 | 8], dtype=torch.uint8)
    kept = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 1, 1]], dtype=F64)
    kept[0, 1] = 1  # the label, though below the threshold
    element = F.binary_cross_entropy_with_logits(z, F.one_hot(labels, 4).double(), reduction="none")
    reweight = gk.ACSL(groups, rows)
    loss = gk.sigmoid_loss(z, labels, reweight=reweight, reduction="none", backend=backend)
    torch.testing.assert_close(loss, (element * kept).sum(1))
    z[0, 0] = 0.84  # just below
    kept[0, 0] = 0
    element = F.binary_cross_entropy_with_logits(z, F.one_hot(labels, 4).double(), reduction="none")
    loss = gk.sigmoid_loss(z, labels, reweight=reweight, reduction="none", backend=backend)
    torch.testing.assert_close(loss, (element * kept).sum(1))


def test_acsl_draws_shares_of_background_rows() -> None:
    stats = _stats(image_count=[900, 40, 7])
    loss = gk.ACSLLoss(stats, rare_share=0.1, common_share=0.25)
    assert loss.class_groups.tolist() == [4, 2, 1, 8]
    labels = torch.cat([torch.full((45,), 3), torch.tensor([0, 1, 2])])[torch.randperm(48)]
    seen = torch.zeros(48)
    for _ in range(200):
        groups = loss._reweight(torch.zeros(48, 4), labels).row_groups
        background = labels == 3
        assert not groups[~background].any()
        assert (groups[background] & 12 == 12).all()
        assert (groups & 1).sum() == 4  # floor(0.1 * 45)
        assert ((groups & 2) // 2).sum() == 11  # floor(0.25 * 45)
        seen += (groups & 1).float()
    assert (seen[labels == 3] > 0).all()


# --- Gumbel x Seesaw --------------------------------------------------------------------------------
def _probability(link: str, z: Tensor) -> Tensor:
    if link == "gumbel":
        return torch.exp(-torch.exp(-z.clamp(-4, 10)))
    return torch.sigmoid(z) if link == "sigmoid" else torch.special.ndtr(z.clamp(-5, 5))


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize(("p", "q", "eps"), [(0.8, 2.0, 1e-2), (0.0, 1.5, 0.2), (1.2, 0.0, 1e-2)])
def test_seesaw_on_binary_terms(backend: str, link: str, p: float, q: float, eps: float) -> None:
    """w = M C from the link's own probabilities, by hand; background rows have weight 1."""
    torch.manual_seed(2)
    z = torch.randn(9, 7, dtype=F64) * 1.5
    labels = torch.tensor([0, 3, 6, 7, 7, 1, 2, 4, 0])
    counts = torch.tensor([5000, 900, 0, 70, 10, 3, 1])
    s, n = _probability(link, z), counts.double().clamp(min=1)
    weight = torch.ones_like(z)
    for i, y in enumerate(labels.tolist()):
        for j in range(7):
            if y < 7 and j != y:
                weight[i, j] = min(1.0, (n[j] / n[y]).item() ** p)
                weight[i, j] *= max(1.0, (s[i, j] / max(s[i, y].item(), eps)).item()) ** q
    reference = LINKS[link](z, labels, reweight=gk.EQL(torch.zeros(7).bool()), reduction="none")
    leaf = z.clone().requires_grad_(True)
    for_rows = LINKS[link](
        leaf, labels, reweight=gk.Seesaw(counts, p, q, eps), reduction="none", backend=backend
    )
    (grad,) = torch.autograd.grad(for_rows.sum(), leaf)
    _, plain = loss_and_grad(
        lambda x: LINKS[link](x, labels, reweight=gk.EQL(torch.zeros(7).bool()), reduction="none"), z
    )
    torch.testing.assert_close(grad, plain * weight, rtol=1e-9, atol=1e-14)
    target = F.one_hot(labels, 8)[:, :7].double()
    element = -(target * s.log() + (1 - target) * torch.log1p(-s))
    torch.testing.assert_close(for_rows.detach(), (element * weight).sum(1), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(reference, element.sum(1), rtol=1e-7, atol=1e-9)


def test_gumbel_seesaw_counts_before_it_weights() -> None:
    loss = gk.GumbelSeesawLoss(3, q=1.0)
    z, labels = torch.randn(5, 3), torch.tensor([0, 0, 1, 3, -100])
    value = loss(z, labels)
    assert loss.class_stats.label_counts.tolist() == [2, 1, 0, 1]
    direct = gk.gumbel_loss(z, labels, reweight=gk.Seesaw(torch.tensor([2, 1, 0]), q=1.0))
    assert torch.equal(value, direct)
    loss.eval()(z, labels)
    assert loss.class_stats.label_counts.tolist() == [2, 1, 0, 1]


# --- softmax with a prior ---------------------------------------------------------------------------
def test_prior(backend: str) -> None:
    z, labels = torch.randn(5, 6, dtype=F64), torch.tensor([0, 5, 2, 2, 4])
    log_prior = torch.tensor([0.0, -2.0, 3.0, 1.0, -40.0, 0.5], dtype=F64)
    loss, grad = loss_and_grad(lambda x: gk.softmax_loss(x, labels, log_prior=log_prior, backend=backend), z)
    expected, expected_grad = loss_and_grad(lambda x: F.cross_entropy(x + log_prior, labels), z)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-16)


def test_equilibrium_value(backend: str) -> None:
    log_prior = torch.tensor([0.5, 0.1, 0.01], dtype=F64).log()
    loss, grad = loss_and_grad(
        lambda x: gk.softmax_loss(x, torch.tensor([0]), log_prior=log_prior, backend=backend),
        torch.tensor([[1.0, 2.0, 0.0]], dtype=F64),
    )
    assert loss.item() == pytest.approx(0.438908881262399, rel=1e-12)
    assert grad[0].tolist() == pytest.approx([-0.355260475195, 0.350516746873, 0.004743728322], abs=1e-11)


def test_balanced_softmax() -> None:
    stats = _stats()
    z, labels = torch.randn(6, 4, dtype=F64), torch.tensor([0, 1, 2, 3, 3, 0])
    n = torch.tensor([2000.0, 50, 9], dtype=F64)
    prior = torch.cat([n / n.mean(), torch.ones(1, dtype=F64)])
    for tau in (1.0, 0.5):
        loss = gk.BalancedSoftmaxLoss(stats, tau)
        torch.testing.assert_close(loss(z, labels), F.cross_entropy(z + tau * prior.log(), labels))
    classification = gk.BalancedSoftmaxLoss(stats, background=False)
    assert classification.num_logits == 3
    expected = F.cross_entropy(z[:, :3] + n.log(), labels % 3)  # a common factor of the prior cancels
    torch.testing.assert_close(classification(z[:, :3], labels % 3), expected)
    with pytest.raises(ValueError, match="needs class_stats with instance counts"):
        gk.BalancedSoftmaxLoss(gk.ClassStats(3))


def test_equilibrium_follows_scores() -> None:
    loss = gk.EquilibriumLoss(2, alpha=0.9)
    z, labels = torch.tensor([[2.0, 0, 0], [1.0, 0, 0], [0, 0, 3.0]], dtype=F64), torch.tensor([0, 0, 2])
    value = loss(z, labels)
    scores = torch.softmax(z, 1)[:2, 0]
    m0 = 0.81 * 0.01 + 0.19 * scores.mean()
    assert loss.class_stats.mean_score.tolist() == pytest.approx([m0.item(), 0.01], rel=1e-12)
    m = torch.tensor([m0, 0.01, 0.01], dtype=F64)  # followed before the loss, background fixed
    torch.testing.assert_close(value, F.cross_entropy(z + m.log(), labels))
    before = loss.class_stats.mean_score.clone()
    loss.eval()(z, labels)
    assert torch.equal(loss.class_stats.mean_score, before)


def test_mean_score_takes_instances() -> None:
    """Three rows of one instance and one of another: two entries, of mean 0.2 and 0.6."""
    stats = gk.ClassStats(2)
    scores, labels = torch.tensor([0.1, 0.2, 0.3, 0.6, 0.9]), torch.tensor([1, 1, 1, 1, 2])
    stats.follow_scores(scores, labels, alpha=0.5, instance_ids=torch.tensor([0, 0, 0, 3, 1]))
    assert stats.mean_score.tolist() == pytest.approx([0.01, 0.25 * 0.01 + 0.75 * 0.4], rel=1e-6)


def test_ignored_rows_have_no_score() -> None:
    loss = gk.EquilibriumLoss(2, ignore_index=1)
    loss(torch.randn(3, 3), torch.tensor([1, 1, 2]))
    assert loss.class_stats.mean_score.tolist() == [0.01, 0.01]


# --- NorCal -----------------------------------------------------------------------------------------
def test_norcal() -> None:
    z, n = torch.randn(4, 4, dtype=F64), torch.tensor([900, 40, 0])
    weight = torch.exp(z) / torch.cat([n.clamp(min=1).double(), torch.ones(1, dtype=F64)]) ** 0.6
    expected = (weight / weight.sum(1, keepdim=True))[:, :3]
    torch.testing.assert_close(gk.norcal(z, n, 0.6), expected)
    torch.testing.assert_close(gk.norcal(z, n, 0.0), torch.softmax(z, 1)[:, :3])
    huge = gk.norcal(torch.tensor([[200.0, 0, 0, 100.0]]), n, 0.6)
    assert bool(huge.isfinite().all())
    with pytest.raises(ValueError, match="norcal needs logits"):
        gk.norcal(z, torch.ones(4), 0.5)


# --- refusals -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: gk.GumbelLoss(3, clip=(3.0, 1.0)), ValueError, "clip must be"),
        (lambda: gk.SigmoidLoss(3, clip=(-4.0, 10.0)), TypeError, "sigmoid link has no option clip"),
        (lambda: gk.EQLv2Loss(3, link="gumbel", compat="gol"), ValueError, "no released Gumbel form"),
        (lambda: gk.EQLv2Loss(3, class_stats=gk.ClassStats(4)), ValueError, "has 4 classes, not 3"),
        (lambda: gk.GumbelSeesawLoss(3, link="softmax"), ValueError, "link must be one of"),
        (lambda: gk.FederatedLoss(_stats(), num_sampled=0), ValueError, "at least 1"),
        (lambda: gk.ACSLLoss(_stats(), rare_share=1.5), ValueError, "rare_share must lie"),
        (lambda: gk.EquilibriumLoss(3, alpha=1.0), ValueError, "alpha must lie"),
    ],
)
def test_modules_refuse(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("reweight", "message"),
    [
        (gk.ClassWeights(torch.ones(2, 4)), r"table must be float32 or float64 \[2, 5\]"),
        (gk.Federated(torch.ones(5)), r"kept must be bool \[5\]"),
        (gk.ACSL(torch.ones(5).byte(), torch.ones(3).byte()), r"row_groups must be uint8 \[4\]"),
        (gk.ACSL(torch.ones(5).byte(), torch.ones(4).byte(), 1.0), "score_threshold must lie"),
        (gk.Seesaw(torch.ones(4)), r"class_counts must be \[5\] or \[6\]"),
        (gk.Seesaw(torch.ones(5), eps=0.0), "eps must lie"),
        (gk.EQL(torch.ones(5)), r"rare must be bool \[5\]"),
    ],
)
def test_reweightings_refuse(reweight: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gk.gumbel_loss(torch.zeros(4, 5), torch.zeros(4).long(), reweight=reweight)


def test_compat_needs_a_released_form() -> None:
    with pytest.raises(ValueError, match="compat='gol' exists for"):
        gk.gumbel_loss(
            torch.zeros(4, 5), torch.zeros(4).long(), reweight=gk.Seesaw(torch.ones(5)), compat="gol"
        )
