"""Empty batches, ignored rows, extreme numbers, odd layouts."""

from __future__ import annotations

import math

import pytest
import torch

import gol_kernels as gk
from tests import cases
from tests.cases import BY_NAME, CASES, LINKS, Case, counts, loss_and_grad, relative_l2

CASE = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
INF, NAN = math.inf, math.nan


def _assert_zero_and_attached(
    case: Case, logits: torch.Tensor, labels: torch.Tensor, **common: object
) -> None:
    leaf = logits.clone().requires_grad_(True)
    loss = case.loss(leaf, labels, **common)
    assert loss.requires_grad
    assert loss == 0
    loss.backward()
    assert leaf.grad.shape == logits.shape
    assert not leaf.grad.any()


@CASE
@pytest.mark.parametrize("avg_factor", ["none", "number", "tensor"])
def test_no_rows(backend: str, case: Case, avg_factor: str) -> None:
    logits, labels = case.inputs(0, 20)
    zero = {"none": None, "number": 0, "tensor": torch.tensor(0.0)}[avg_factor]
    _assert_zero_and_attached(case, logits, labels, avg_factor=zero, backend=backend)


@CASE
def test_everything_ignored(backend: str, case: Case) -> None:
    logits, labels = case.inputs(6, 20)
    _assert_zero_and_attached(case, logits, torch.full_like(labels, -100), backend=backend)
    _assert_zero_and_attached(case, logits, labels, row_weights=torch.zeros(6), backend=backend)


@pytest.mark.parametrize("case", [c for c in CASES if c.background], ids=lambda c: c.name)
def test_no_foreground(backend: str, case: Case) -> None:
    logits, _ = case.inputs(6, 20)
    labels = torch.full((6,), 20)
    loss, grad = loss_and_grad(lambda z: case.loss(z, labels, backend=backend), logits)
    assert bool(loss.isfinite())
    assert loss > 0
    assert bool(grad.isfinite().all())
    assert bool(grad.any())


def test_seesaw_without_foreground_has_no_class_term(backend: str) -> None:
    logits, _ = BY_NAME["seesaw"].inputs(6, 20)
    classes, grad = loss_and_grad(
        lambda z: gk.seesaw_loss(z, torch.full((6,), 20), torch.ones(20), backend=backend)[0], logits
    )
    assert classes == 0
    assert not grad.any()


@CASE
def test_zero_weight_is_removal(backend: str, case: Case) -> None:
    """A row of weight 0 or ignored changes nothing, not even with NaN in its logits.

    DropLoss draws by row, and its share counts every row that is not ignored: there the last rows go,
    and they are ignored.
    """
    logits, labels = case.inputs(8, 20)
    gone = torch.tensor([6, 7]) if "drop" in case.name else torch.tensor([1, 6])
    keep = torch.ones(8, dtype=torch.bool)
    keep[gone] = False
    poisoned = logits.clone()
    poisoned[gone] = NAN
    loss, grad = loss_and_grad(lambda z: case.loss(z, labels[keep], backend=backend), logits[keep])
    ignored = labels.masked_fill(~keep, -100)
    same, same_grad = loss_and_grad(lambda z: case.loss(z, ignored, backend=backend), poisoned)
    torch.testing.assert_close(same, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(same_grad[keep], grad, rtol=1e-6, atol=1e-12)
    assert not same_grad[gone].any()
    if gone.tolist() == [1, 6]:
        same, same_grad = loss_and_grad(
            lambda z: case.loss(z, labels, row_weights=keep.float(), avg_factor=6, backend=backend), poisoned
        )
        torch.testing.assert_close(same, loss, rtol=1e-6, atol=0)
        assert not same_grad[gone].any()


@CASE
@pytest.mark.parametrize("layout", ["sliced", "strided", "transposed", "int32"])
def test_layouts(backend: str, case: Case, layout: str) -> None:
    logits, labels = case.inputs(7, 37)
    expected_loss, expected = loss_and_grad(lambda z: case.loss(z, labels, backend=backend), logits)
    if layout == "int32":
        labels = labels.to(torch.int32)
        view, back = logits, lambda g: g
    elif layout == "sliced":
        wide = torch.randn(7, logits.shape[1] + 5)
        wide[:, 2:-3] = logits
        view, back = wide, lambda g: g[:, 2:-3]
    elif layout == "strided":
        tall = torch.randn(14, logits.shape[1])
        tall[::2] = logits
        view, back = tall, lambda g: g[::2]
    else:
        view, back = logits.t().contiguous(), lambda g: g.t()
    loss, grad = loss_and_grad(lambda z: case.loss(back(z), labels, backend=backend), view)
    if cases.special_error() == 0:
        assert torch.equal(loss, expected_loss)
        assert torch.equal(back(grad), expected)
    else:  # on a GPU rows that lie apart are another kernel's
        torch.testing.assert_close(loss, expected_loss, rtol=2 * cases.loss_error(), atol=0)
        assert relative_l2(back(grad), expected) < 2 * case.float32_error


def test_label_slice_is_read_by_its_stride(backend: str) -> None:
    logits, labels = BY_NAME["gumbel"].inputs(6, 9)
    interleaved = torch.stack([labels, torch.zeros_like(labels)], 1)[:, 0]
    a = gk.gumbel_loss(logits, labels, backend=backend)
    assert torch.equal(a, gk.gumbel_loss(logits, interleaved, backend=backend))


# --- extreme logits: the same class of answer as the mathematics --------------------------------
def _row(backend: str, function, values: list[float], label: int, **options: object):
    logits = torch.tensor([values])
    return loss_and_grad(lambda z: function(z, torch.tensor([label]), backend=backend, **options), logits)


@pytest.mark.parametrize("function", [gk.gumbel_loss, gk.sigmoid_loss, gk.softmax_loss])
def test_nan_propagates(backend: str, function) -> None:
    loss, grad = _row(backend, function, [0.5, NAN, 0.1], 0)
    assert bool(loss.isnan())
    assert bool(grad[0, 1].isnan())
    loss, grad = _row(backend, function, [NAN, 0.2, 0.1], 0)
    assert bool(loss.isnan())
    assert bool(grad[0, 0].isnan())


def test_gumbel_extremes(backend: str) -> None:
    loss, grad = _row(backend, gk.gumbel_loss, [0.0, INF, -INF, 1e4, -1e4], 0)
    expected = 1 + 2 * 10.0000227 + 2 * 0.0  # clamped to 10 and -4
    torch.testing.assert_close(loss, torch.tensor(expected), rtol=1e-6, atol=1e-6)
    assert grad[0, 1:].tolist() == [0, 0, 0, 0]
    # Unclipped: a negative's loss grows linearly, its slope is 1; a positive's e is capped at exp(80).
    loss, grad = _row(backend, gk.gumbel_loss, [0.0, 1e4, -1e4], 0, clip=None)
    torch.testing.assert_close(loss, torch.tensor(10001.0), rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, torch.tensor([[-1.0, 1.0, 0.0]]))
    loss, grad = _row(backend, gk.gumbel_loss, [-INF, 0.0], 0, clip=None)
    assert grad[0, 0].item() == pytest.approx(-math.exp(80), rel=1e-5)
    loss, grad = _row(backend, gk.gumbel_loss, [0.0, INF], 0, clip=None)
    assert loss == INF
    assert grad[0, 1].item() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("high", [10.0, 10.9, 10.95, 11.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gumbel_at_the_upper_clip(backend: str, high: float, dtype: torch.dtype) -> None:
    """The product of exp(-high) over many columns leaves float32 early."""
    logits, labels = torch.full((8, 65), 30.0, dtype=dtype), torch.full((8,), 64)
    loss, _ = loss_and_grad(lambda z: gk.gumbel_loss(z, labels, clip=(-4.0, high), backend=backend), logits)
    negative, positive = -math.log(-math.expm1(-math.exp(-high))), math.exp(-high)
    torch.testing.assert_close(loss, torch.tensor(64 * negative + positive), rtol=2e-6, atol=0)


def test_sigmoid_extremes(backend: str) -> None:
    loss, grad = _row(backend, gk.sigmoid_loss, [-1e4, 1e4, -200.0, 200.0], 0)
    torch.testing.assert_close(loss, torch.tensor(20200.0), rtol=1e-6, atol=0)
    assert grad[0].tolist() == [-1, 1, 0, 1]


def test_softmax_extremes(backend: str) -> None:
    for offset in (0.0, 1e6, -1e6):
        loss, grad = _row(backend, gk.softmax_loss, [offset, offset + 1, offset + 3], 0)
        torch.testing.assert_close(loss, torch.tensor(3.16984601), rtol=1e-6, atol=0)
        torch.testing.assert_close(grad[0, 0], torch.tensor(-0.95798990), rtol=1e-6, atol=0)
    loss, _ = _row(backend, gk.softmax_loss, [0.0, -INF, 0.0], 0)
    torch.testing.assert_close(loss, torch.tensor(math.log(2)))
    loss, _ = _row(backend, gk.softmax_loss, [-INF, 0.0, 0.0], 0)
    assert loss == INF
    loss, grad = _row(backend, gk.softmax_loss, [1e4, 0.0, -1e4], 0)
    assert loss == 0
    assert not grad.any()


@pytest.mark.parametrize("spread", [30.0, 200.0])
def test_seesaw_with_spread_logits_and_counts(backend: str, spread: float) -> None:
    """Mitigation by 2^-300 and scores down to e^-1000: finite, and the float64 value."""
    torch.manual_seed(1)
    logits, labels = BY_NAME["seesaw"].inputs(40, 50, spread=spread)
    counts = (10 ** torch.linspace(0, 9, 50)).long()
    for p in (0.8, 10.0):
        expected, expected_grad = loss_and_grad(
            lambda z, p=p: sum(gk.seesaw_loss(z, labels, counts, p=p, backend="reference")), logits.double()
        )
        loss, grad = loss_and_grad(
            lambda z, p=p: sum(gk.seesaw_loss(z, labels, counts, p=p, backend=backend)), logits
        )
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
        assert relative_l2(grad, expected_grad) < 2e-4  # fp32 rounds logits of 1000 to 6e-5


def test_seesaw_falls_back_when_mitigation_takes_everything(backend: str) -> None:
    """The label's score is tiny and every other class is mitigated by 2^-300: the label wins."""
    logits = torch.zeros(1, 6)
    logits[0, 0] = -120.0
    counts = torch.tensor([10**9, 1, 1, 1])
    expected, expected_grad = loss_and_grad(
        lambda z: gk.seesaw_loss(z, torch.tensor([0]), counts, p=10.0, backend="reference")[0],
        logits.double(),
    )
    loss, grad = loss_and_grad(
        lambda z: gk.seesaw_loss(z, torch.tensor([0]), counts, p=10.0, backend=backend)[0], logits
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-4, atol=1e-30)


def test_rows_wider_than_a_page(native_backend: str) -> None:
    case = BY_NAME["seesaw"]
    logits, labels = case.inputs(2, 21841)
    expected, expected_grad = loss_and_grad(
        lambda z: case.loss(z, labels, backend="reference"), logits.double()
    )
    loss, grad = loss_and_grad(lambda z: case.loss(z, labels, backend=native_backend), logits)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    assert relative_l2(grad, expected_grad) < 2e-7


def test_result_does_not_depend_on_threads(native_backend: str) -> None:
    """Bit for bit, with one thread and with several."""
    before = torch.get_num_threads()
    try:
        for name in ("gumbel", "gumbel-drop", "gumbel-seesaw", "seesaw"):
            logits, labels = BY_NAME[name].inputs(301, 1203)
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(loss_and_grad(lambda z: BY_NAME[name].loss(z, labels), logits))  # noqa: B023
            for loss, grad in results[1:]:
                assert torch.equal(loss, results[0][0])
                assert torch.equal(grad, results[0][1])
    finally:
        torch.set_num_threads(before)


def test_max_loss(backend: str) -> None:
    logits, labels = torch.full((4, 50), -3.0), torch.arange(4)
    loss, grad = loss_and_grad(lambda z: gk.gumbel_loss(z, labels, max_loss=5.0, backend=backend), logits)
    assert loss == 5
    assert not grad.any()
    below, _ = loss_and_grad(lambda z: gk.gumbel_loss(z, labels, max_loss=50.0, backend=backend), logits)
    torch.testing.assert_close(below, torch.tensor(20.0855369), rtol=1e-6, atol=0)


# --- what float32 does not hold ------------------------------------------------------------------
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("options", [{"p": 30.0}, {"q": 12.0}], ids=["mitigation", "compensation"])
def test_seesaw_factors_that_float32_does_not_hold(
    native_backend: str, link: str, options: dict[str, float]
) -> None:
    """(1e-5)^30 and (1e2)^12."""
    logits, labels = torch.randn(20, 12) * 2, torch.arange(20) % 12
    reweight = gk.Seesaw(counts(12), **options)
    results = [
        loss_and_grad(lambda x, b=backend: LINKS[link](x, labels, reweight=reweight, backend=b), z)
        for backend, z in ((native_backend, logits), ("reference", logits.double()))
    ]
    (loss, grad), (expected_loss, expected) = results
    # An exponent of 2 near 80 is rounded by up to 4e-6, the logarithms in it are off by an ulp or two.
    bound = 8e-6 + 12 * cases.special_error()
    torch.testing.assert_close(loss.double(), expected_loss, rtol=bound, atol=0)
    assert relative_l2(grad, expected) < bound


def test_priors_that_float32_does_not_hold(native_backend: str) -> None:
    """e^-200 makes up for a logit of 205; a class of prior 0 does not take part."""
    logits = torch.tensor([[0.0, 205.0, 1.0, 300.0], [1.0, 199.0, 0.0, 2.0]])
    log_prior = torch.tensor([0.0, -200.0, -1.0, -math.inf])
    loss, grad = loss_and_grad(
        lambda z: gk.softmax_loss(
            z, torch.tensor([0, 1]), log_prior=log_prior, reduction="none", backend=native_backend
        ),
        logits,
    )
    sums = 1 + math.exp(5) + 1, math.exp(1) + math.exp(-1) + math.exp(-1)
    assert loss.tolist() == pytest.approx([math.log(sums[0]), math.log(sums[1]) + 1], rel=1e-6)
    expected = [[1 / sums[0] - 1, math.exp(5) / sums[0], 1 / sums[0], 0]]
    expected += [[math.exp(1) / sums[1], math.exp(-1) / sums[1] - 1, math.exp(-1) / sums[1], 0]]
    torch.testing.assert_close(grad, torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("link", ["gumbel", "sigmoid"])
def test_weight_0_beside_an_infinite_loss(native_backend: str, link: str) -> None:
    """Column by column: gone, there, there with NaN, the label."""
    logits, labels = torch.tensor([[math.inf, 0.0, math.nan, 1.0]]), torch.tensor([3])
    table = torch.tensor([[1.0, 1, 1, 0], [0, 2, 0, 1]])
    options = {"clip": None} if link == "gumbel" else {}
    loss, grad = loss_and_grad(
        lambda z: LINKS[link](z, labels, reweight=gk.ClassWeights(table), backend=native_backend, **options),
        logits,
    )
    slope, value = {"gumbel": (0.581976706869, 0.458675145387), "sigmoid": (0.5, math.log(2))}[link]
    assert loss.item() == pytest.approx(2 * value, rel=1e-6)
    assert grad[0].tolist() == pytest.approx([0, 2 * slope, 0, 0], rel=1e-6)
