"""The Triton kernels against the float64 reference, run by the interpreter: see tests/test_triton.py."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

import gol_kernels as gk
from gol_kernels.backends.triton import elementwise, softmax
from gol_kernels.backends.triton.rows import prepare
from gol_kernels.ops import RowArguments, overload
from tests.cases import BY_NAME, CASES, Case, counts, loss_and_grad, relative_l2, truth

BACKEND = "triton"
# One chunk and many, full and ragged; one column; no rows. Every shape meets every dtype.
SHAPES = [(17, 5), (3, 255), (3, 256), (2, 257), (1, 1203), (1, 1204), (3, 1), (17, 2), (0, 80)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PAIRS = list(product(SHAPES, DTYPES))
# Gradient and loss, relative L2; the interpreter has no fused multiply-add.
TOLERANCE = {
    torch.float32: (4e-7, 1e-6),
    torch.bfloat16: (2**-8, 1e-6),
    torch.float16: (2**-11, 1e-6),
    torch.float64: (2e-14, 1e-14),
}


@pytest.mark.parametrize(
    ("case", "shape", "dtype"),
    [(c, *PAIRS[(5 * i + k) % len(PAIRS)]) for i, c in enumerate(CASES) for k in range(5)],
    ids=lambda value: value.name if isinstance(value, Case) else str(value).removeprefix("torch."),
)
def test_family(case: Case, shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits, labels = case.inputs(*shape, dtype)
    expected_loss, expected = truth(case, logits, labels)
    loss, grad = loss_and_grad(lambda z: case.loss(z, labels, backend=BACKEND), logits)
    grad_tolerance, loss_tolerance = TOLERANCE[dtype]
    assert grad.dtype == dtype
    assert relative_l2(loss, expected_loss) <= loss_tolerance
    assert relative_l2(grad, expected) <= max(grad_tolerance, case.tolerance if dtype == torch.float32 else 0)


@pytest.mark.parametrize("name", ["gumbel", "sigmoid-weights", "seesaw"])
def test_rows_of_many_blocks_or_warps(name: str) -> None:
    """2 100 columns: more than one program of a Bernoulli row, more than one warp of a softmax."""
    case = BY_NAME[name]
    logits, labels = case.inputs(2, 2100)
    labels[0] = 2099
    expected_loss, expected = truth(case, logits, labels, reduction="none")
    loss, grad = loss_and_grad(lambda z: case.loss(z, labels, reduction="none", backend=BACKEND), logits)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-6, atol=0)
    assert relative_l2(grad, expected) <= 4e-7


SOFTMAX = [case for case in CASES if case.name.startswith(("softmax", "seesaw"))]
HELD = {torch.float64: 256} | dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), 512)
"""Columns that ``few_registers`` hold."""


@pytest.fixture
def few_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide rows are read again from a width on that the interpreter is quick with."""
    monkeypatch.setattr(softmax, "_WARPS", 1)
    monkeypatch.setattr(softmax, "_HELD_CHUNKS", 2)


@pytest.mark.usefixtures("few_registers")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", SOFTMAX, ids=lambda case: case.name)
def test_softmax_rows_on_both_sides_of_what_registers_hold(case: Case, dtype: torch.dtype) -> None:
    """The last that is held, the first that is not, whose tail is one column, and three turns and a part;
    labels in the first column, the last, and between."""
    for columns, held in ((HELD[dtype], True), (HELD[dtype] + 1, False), (3 * HELD[dtype] + 77, False)):
        plan = softmax._plan(columns, torch.float64 if dtype == torch.float64 else torch.float32)
        assert (plan.chunk * plan.chunks >= columns) == held
        pair = 2 if case.name == "seesaw" else 0
        logits, labels = case.inputs(5, columns + pair - case.extra_logits, dtype)
        labels[0], labels[1], labels[2] = 0, columns - 1, columns // 2
        expected_loss, expected = truth(case, logits, labels, reduction="none")
        loss, grad = loss_and_grad(
            lambda z, y=labels: case.loss(z, y, reduction="none", backend=BACKEND), logits
        )
        grad_tolerance, loss_tolerance = TOLERANCE[dtype]
        assert relative_l2(loss, expected_loss) <= loss_tolerance
        assert relative_l2(grad, expected) <= max(
            grad_tolerance, case.tolerance if dtype == torch.float32 else 0
        )


@pytest.mark.parametrize("name", ["softmax", "seesaw-no-objectness"])
def test_extreme_softmax_rows_are_the_same_read_or_held(name: str, request: pytest.FixtureRequest) -> None:
    """Columns of a turn that are all -inf, maxima that come late, and what is not finite, in each turn."""
    case, columns, middle = BY_NAME[name], 1300, 650
    inf = math.inf
    labels = torch.tensor([1299, 3, 700, 5, 0, 9, 600])
    logits, _ = case.inputs(len(labels), columns - case.extra_logits)
    logits[0, :-1] = -inf
    logits[1, :middle] = -inf
    logits[2] = torch.linspace(-3e4, 3e4, columns)
    logits[3, middle] = math.nan
    logits[4, 1280] = inf
    logits[5, 9] = -inf
    logits[6] = -inf
    results = []
    for _ in range(2):
        results.append(
            loss_and_grad(lambda z: case.loss(z, labels, reduction="none", backend=BACKEND), logits)
        )
        request.getfixturevalue("few_registers")
    (loss, grad), (read_loss, read_grad) = results
    assert loss.isnan().tolist() == [False, False, False, True, True, False, True]
    assert loss[5] == inf
    torch.testing.assert_close(read_loss, loss, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(read_grad, grad, rtol=2e-6, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("name", ["gumbel", "gumbel-drop", "probit-acsl", "softmax", "seesaw"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_illegal_labels_are_nan(name: str, dtype: torch.dtype) -> None:
    """Their row alone, loss and gradient; the smallest and largest integers read nothing out of bounds."""
    case = BY_NAME[name]
    logits, labels = case.inputs(6, 20)
    labels = labels.to(dtype)
    limits = torch.iinfo(dtype)
    labels[1], labels[4], labels[5] = limits.min, limits.max, -100
    common = {"reduction": "none", "validate": False, "backend": BACKEND}
    loss, grad = loss_and_grad(lambda z: case.loss(z, labels, **common), logits)
    assert loss.isnan().tolist() == [False, True, False, False, True, False]
    assert grad.isnan().all(1).tolist() == [False, True, False, False, True, False]
    assert not grad[5].any()
    with pytest.raises(ValueError, match=rf"got {limits.min} in row 1"):
        case.loss(logits, labels, backend=BACKEND)


@pytest.mark.parametrize("kind", ["eql", "federated", "weights"])
def test_a_term_of_weight_0_does_not_exist(kind: str) -> None:
    """Whatever its logit: as a negative, and, where a reweighting reaches it, as the label's."""
    kept = torch.tensor([True, False, True, False])
    table = torch.stack([kept, kept]).double() * 0.5
    reweight = {"eql": gk.EQL(~kept), "federated": gk.Federated(kept), "weights": gk.ClassWeights(table)}[
        kind
    ]
    logits = torch.tensor([[0.3, math.nan, 0.7, -math.inf], [0.1, math.nan, 0.2, math.inf]])
    labels = torch.tensor([0, 2 if kind == "eql" else 1])
    loss, grad = loss_and_grad(
        lambda z: gk.sigmoid_loss(z, labels, reweight=reweight, backend=BACKEND), logits
    )
    assert bool(loss.isfinite())
    assert not grad[:, ~kept].any()
    assert bool(grad[:, kept].all())


@pytest.mark.parametrize("split", [7, 5, 0])
def test_scale_grad(split: int) -> None:
    grad = torch.randn(400, 7)  # three blocks, the last in part
    for first, second in ((1.0, 1.0), (2.5, 1.0), (1.0, -0.5), (math.nan, 3.0)):
        expected = grad.clone()
        overload("scale_grad_", "reference")(expected, torch.tensor(first), torch.tensor(second), split)
        scaled = grad.clone()
        overload("scale_grad_", BACKEND)(scaled, torch.tensor(first), torch.tensor(second), split)
        torch.testing.assert_close(scaled, expected, rtol=0, atol=0, equal_nan=True)


def test_scale_by_one_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("the gradient was touched")

    monkeypatch.setattr(elementwise, "scale_block", refuse)
    one = torch.tensor(1.0)
    overload("scale_grad_", BACKEND)(torch.randn(3, 4), one, one, 2)
    with pytest.raises(Exception, match="the gradient was touched"):
        overload("scale_grad_", BACKEND)(torch.randn(3, 4), one, one + 1, 2)


def test_label_counts() -> None:
    labels = torch.randint(0, 41, (2100,))
    labels[::7] = -100
    labels[3] = 99
    counts = gk.label_counts(labels[::2], 40, validate=False, backend=BACKEND)
    legal = labels[::2][(labels[::2] >= 0) & (labels[::2] <= 40)]
    assert counts.tolist() == torch.bincount(legal, minlength=41).tolist()


def test_every_row_is_counted_once() -> None:
    """More rows than one program of the prologue takes, and more than all of them take at once."""
    for n in (3000, 33 * 1024 + 5):
        labels = torch.randint(0, 4, (n, 2))[:, 0]  # strided
        labels[::3] = -100
        labels[1] = 99  # illegal labels count
        rows = RowArguments(torch.empty(n, 0), labels, None, None, 0, -100, "mean", 1.0, False)
        counts = prepare("test", rows).counts
        assert counts is not None
        assert int(counts.sum()) == int((labels != -100).sum())


def test_draws_are_the_reference_s() -> None:
    """DropLoss, all 16 bits of every column: a limit in the middle of the range, three chunks and a part."""
    labels = torch.tensor([0, 1, 3, *[700] * 4])  # one rare row of three: the limit is 2^16 / 3
    rare = torch.zeros(700, dtype=torch.bool)
    rare[0] = rare[2:] = True
    logits = torch.zeros(7, 700)
    for seed in (3, 2**62 + 5):
        kept = []
        for backend in (BACKEND, "reference"):
            reweight = gk.Drop(rare, torch.Generator().manual_seed(seed))
            _, grad = loss_and_grad(
                lambda z, r=reweight, b=backend: gk.sigmoid_loss(z, labels, reweight=r, backend=b), logits
            )
            kept.append(grad != 0)
        assert torch.equal(*kept)
        assert 0.5 < kept[0][3:].double().mean().item() < 0.85


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_softmax_parts_have_upstream_gradients_of_their_own(reduction: str) -> None:
    """Where backward makes the gradient; the objectness's upstream gradient is strided."""
    logits, labels = BY_NAME["seesaw"].inputs(5, 20)
    labels[3] = -100
    upstream = torch.randn(2, 5).unbind(0) if reduction == "none" else torch.randn(2).unbind(0)
    upstream = (upstream[0], upstream[1].flip(0)) if reduction == "none" else upstream
    arguments = (logits, labels, None, None, counts(20), "seesaw", 0.8, 2.0, 0.01, True)
    options = (20, -100, reduction, 1.0, True)
    expected = overload("softmax_grad", "reference")(*upstream, *arguments, *options)
    grad = overload("softmax_grad", BACKEND)(*upstream, *arguments, *options)
    torch.testing.assert_close(grad, expected, rtol=2e-6, atol=1e-7)
    expanded = overload("softmax_grad", BACKEND)(
        torch.ones(()).expand(5), torch.ones(5), *arguments, 20, -100, "none", 1.0, True
    )
    assert (
        relative_l2(
            expanded,
            overload("softmax_grad", "reference")(
                torch.ones(5), torch.ones(5), *arguments, 20, -100, "none", 1.0, True
            ),
        )
        < 4e-7
    )


def test_repeats_bit_for_bit() -> None:
    case = BY_NAME["gumbel-seesaw"]
    logits, labels = case.inputs(9, 300)
    found = torch.zeros(2, 300, dtype=torch.float64)
    once = [case.loss(logits, labels, class_gradients=found, backend=BACKEND), found.clone()]
    again = torch.zeros_like(found)
    assert torch.equal(case.loss(logits, labels, class_gradients=again, backend=BACKEND), once[0])
    assert torch.equal(again, once[1])


def test_refuses_what_does_not_fit() -> None:
    op = overload("bernoulli_loss", BACKEND)
    logits, labels = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    link, rest = (
        ("sigmoid", 1.0, -1.0, 1.0, "zero_outside"),
        (0.0, 0.0, 1.0, 0.0, 3, -100, "mean", 1.0, False, True, False),
    )
    with pytest.raises(ValueError, match=r"labels must be \[4\]"):
        op(logits, labels[:2], None, None, None, None, None, *link, "none", *rest)
    with pytest.raises(ValueError, match=r"eql needs class_table \[3\], got \[2\]"):
        op(logits, labels, None, None, torch.ones(2, dtype=torch.bool), None, None, *link, "eql", *rest)
    with pytest.raises(ValueError, match=r"upstream gradient must be 0-d or \[4\], got \[3\]"):
        overload("bernoulli_grad", BACKEND)(
            torch.ones(3), logits, labels, None, None, None, None, None, *link, "none", *rest[:-2]
        )
    with pytest.raises(ValueError, match="unknown reweight 'focal'"):
        op(logits, labels, None, None, None, None, None, *link, "focal", *rest)
