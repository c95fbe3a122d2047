"""What is the native CPU kernels' own: their ranges, their refusals, their sums over rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import gol_kernels as gk
from gol_kernels.backends import native
from gol_kernels.ops import overload
from gol_kernels.reweight import inverse_sigmoid
from tests.cases import loss_and_grad, rare_mask

F64 = torch.float64
LINK_OPTIONS = ("gumbel", 1.0, -4.0, 10.0, "zero_outside")


def _bernoulli(
    logits: Tensor,
    labels: Tensor,
    reweight: str,
    *,
    link: tuple[Any, ...] = LINK_OPTIONS,
    tables: tuple[Tensor | None, ...] = (None, None, None),
) -> tuple[Tensor, Tensor, Tensor]:
    """The op itself, past the checks of ``functional``."""
    op = overload("bernoulli_loss", "native")
    factors, rows = (0.8, 2.0, 0.01, 0.5), (logits.shape[1], -100, "mean", 1.0, True)
    return op(logits, labels, None, None, *tables, *link, reweight, *factors, *rows, True, False)


# --- statistics ---------------------------------------------------------------------------------
def _class_gradients(logits: Tensor, labels: Tensor, backend: str) -> Tensor:
    sums = torch.zeros(2, logits.shape[1], dtype=F64)
    weights = torch.linspace(0.1, 2, len(labels))
    gk.gumbel_loss(logits, labels, row_weights=weights, class_gradients=sums, backend=backend)
    return sums


@pytest.mark.parametrize("rows", [100, 5000])
def test_class_gradients_do_not_depend_on_threads(native_backend: str, rows: int) -> None:
    """Bit for bit, in one block of rows and in many; and they are the sums of all rows."""
    logits, labels = torch.randn(rows, 37), torch.randint(0, 37, (rows,))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(_class_gradients(logits, labels, native_backend))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(sums, found[0]) for sums in found[1:])
    expected = _class_gradients(logits.double(), labels, "reference")
    torch.testing.assert_close(found[0], expected, rtol=5e-7, atol=0)


# --- ranges -------------------------------------------------------------------------------------
@pytest.mark.parametrize("outside", ["zero", "straight_through"])
@pytest.mark.parametrize(
    ("clip", "temperature"),
    [
        ((-4.0, 10.0), 1.0),
        ((-4.4609375, 10.890625), 1.0),  # the widest clip in which no power leaves the normal numbers
        ((-4.484375, 10.0), 1.0),
        ((-4.0, 10.9140625), 1.0),
        ((-8.0, 20.0), 2.0),
        ((-2.0, 5.0), 0.5),
        ((-80.0, 10.0), 1.0),
    ],
)
def test_gumbel_at_every_logit(
    native_backend: str, clip: tuple[float, float], temperature: float, outside: str
) -> None:
    """Element by element, up to the clip's edges and beyond, where the kernels change their formulas."""
    logits = torch.cat([torch.linspace(-9, 22, 2025), torch.tensor([*clip, 0.0])]).clamp(-9, 22).view(3, 676)
    labels = torch.full((3,), 675)
    options = {"clip": clip, "temperature": temperature, "outside": outside, "reduction": "none"}
    loss, grad = loss_and_grad(lambda z: gk.gumbel_loss(z, labels, backend=native_backend, **options), logits)
    expected_loss, expected = loss_and_grad(
        lambda z: gk.gumbel_loss(z, labels, backend="reference", **options), logits.double()
    )
    torch.testing.assert_close(loss.double(), expected_loss, rtol=6e-7, atol=0)
    # e reaches 89 before p vanishes, and what it is rounded by becomes relative to p.
    torch.testing.assert_close(grad.double(), expected, rtol=4e-5, atol=1e-35)
    inner = logits > -2 * temperature
    torch.testing.assert_close(grad.double()[inner], expected[inner], rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_acsl_keeps_the_threshold_itself(native_backend: str, dtype: torch.dtype) -> None:
    """z >= threshold, in the logits' own arithmetic: a float32 logit is compared with the float32 nearest."""
    threshold = torch.tensor(inverse_sigmoid(0.7), dtype=F64).to(dtype)
    below, above = (torch.nextafter(threshold, torch.tensor(s * math.inf, dtype=dtype)) for s in (-1, 1))
    logits = torch.stack([below, threshold, above, torch.zeros((), dtype=dtype)])[None]
    groups = gk.ACSL(torch.zeros(4, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8), 0.7)
    _, grad = loss_and_grad(
        lambda z: gk.sigmoid_loss(z, torch.tensor([2]), reweight=groups, backend=native_backend), logits
    )
    assert (grad != 0).tolist() == [[False, True, True, False]]


def test_drop_loss_share_leaves_out_ignored_rows(backend: str) -> None:
    """The one rare label is ignored: the share is 0 and background rows keep no rare class."""
    labels = torch.tensor([0, 2, 4, 4])
    rare = torch.tensor([True, False, False, True])
    _, grad = loss_and_grad(
        lambda z: gk.gumbel_loss(z, labels, reweight=gk.Drop(rare), ignore_index=0, backend=backend),
        torch.zeros(4, 4),
    )
    assert (grad[2:] != 0).tolist() == [[False, True, True, False]] * 2


# --- refusals -----------------------------------------------------------------------------------
@pytest.mark.parametrize("link", ["gumbel", "probit"])
@pytest.mark.parametrize("reweight", ["weights", "federated", "acsl", "seesaw"])
def test_released_slope_is_refused(link: str, reweight: str) -> None:
    with pytest.raises(
        ValueError, match="slope 'released' exists for link 'gumbel' and reweight 'none', 'eql'"
    ):
        _bernoulli(
            torch.zeros(2, 3), torch.zeros(2).long(), reweight, link=(link, 1.0, -4.0, 10.0, "released")
        )


@pytest.mark.parametrize(
    ("reweight", "tables", "message"),
    [
        ("eql", (None, None, None), r"needs class_table, a tensor of Bool \[3\]"),
        ("eql", (torch.zeros(3), None, None), r"needs class_table, a tensor of Bool \[3\]"),
        ("drop", (rare_mask(3), None, None), "needs rng"),
        ("weights", (torch.ones(3), None, None), r"needs class_table, a tensor of \[2, 3\]"),
        (
            "acsl",
            (torch.ones(3).byte(), torch.ones(3).byte(), None),
            r"needs row_table, a tensor of Byte \[2\]",
        ),
        ("seesaw", (torch.ones(2), None, None), r"the counts of \[3\] or more"),
        ("focal", (None, None, None), "unknown reweight 'focal'"),
    ],
)
def test_tables_that_do_not_fit_are_refused(
    reweight: str, tables: tuple[Tensor | None, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _bernoulli(torch.zeros(2, 3), torch.zeros(2).long(), reweight, tables=tables)


@pytest.mark.parametrize(
    ("link", "message"),
    [
        (("cauchit", 1.0, 0.0, 1.0, "released"), "unknown link"),
        ((*LINK_OPTIONS[:4], "steep"), "unknown slope"),
    ],
)
def test_unknown_links_are_refused(link: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _bernoulli(torch.zeros(2, 3), torch.zeros(2).long(), "none", link=link)


# --- scale_grad_ --------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_scale_grad_in_place(dtype: torch.dtype) -> None:
    grad = torch.ones(3, 5, dtype=dtype)
    overload("scale_grad_", "native")(grad, torch.tensor(2.0), torch.tensor(1.0), 3)
    assert grad.tolist() == [[2, 2, 2, 1, 1]] * 3
    overload("scale_grad_", "native")(grad, torch.tensor(1.0), torch.tensor(-0.5), 3)
    assert grad.tolist() == [[2, 2, 2, -0.5, -0.5]] * 3


def test_scale_grad_by_1_writes_nothing() -> None:
    """A multiplication would set the quiet bit of these signalling NaN."""
    bits = torch.full((4, 6), 0x7F800001, dtype=torch.int32)
    overload("scale_grad_", "native")(bits.view(torch.float32), torch.tensor(1.0), torch.tensor(1.0), 2)
    assert bool((bits == 0x7F800001).all())
    overload("scale_grad_", "native")(bits.view(torch.float32), torch.tensor(1.0), torch.tensor(2.0), 2)
    assert (bits[0] == 0x7F800001).tolist() == [True, True, False, False, False, False]


if native.unavailable() is not None:
    pytestmark = pytest.mark.skip(reason="the native backend is not available")


# --- softmax rows -------------------------------------------------------------------------------
def _softmax(
    logits: Tensor, labels: Tensor, reweight: str, backend: str = "native"
) -> tuple[Tensor, Tensor, Tensor]:
    """The op itself: losses and gradient, of "seesaw" with its objectness where K is above 2."""
    k = logits.shape[1]
    objectness = reweight == "seesaw" and k > 2
    table = {"none": None, "prior": torch.linspace(-4, 2, k), "seesaw": torch.arange(k) ** 2}[reweight]
    num_classes = k - 2 if objectness else k - 1
    op = overload("softmax_loss", backend)
    factors, rows = (0.8, 2.0, 0.01, objectness), (num_classes, -100, "mean", 1.0, True)
    return op(logits, labels.clamp(max=num_classes), None, None, table, reweight, *factors, *rows, True)


@pytest.fixture
def last_cache() -> Iterator[Callable[[int], int]]:
    """Sets what the kernels take for the last cache's size."""
    set_last_cache = native.extension().set_last_cache
    before = set_last_cache(0)
    yield set_last_cache
    set_last_cache(before)


@pytest.mark.parametrize("reweight", ["none", "prior", "seesaw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, F64])
def test_gradients_written_past_the_caches(
    native_backend: str, last_cache: Callable[[int], int], dtype: torch.dtype, reweight: str
) -> None:
    """Bit for bit as those that go through them, wherever in a vector a row begins, with and without rows
    between that have no gradient."""
    for k in (*range(1, 36), 60, 100, 1203, 1204, 1205):
        logits, labels = (2 * torch.randn(19, k)).to(dtype), torch.randint(0, k, (19,))
        labels[[4, 5, 11]] = -100
        labels[[7, 15]] = k - 1
        last_cache(0)
        past = _softmax(logits, labels, reweight)
        last_cache(2**40)
        through = _softmax(logits, labels, reweight)
        assert all(map(torch.equal, past, through)), k


@pytest.mark.parametrize("above", [5.0, 12.0, 40.0, 90.0, 1e4, 1e30])
@pytest.mark.parametrize("reweight", ["none", "prior", "seesaw"])
def test_softmax_whose_maximum_comes_late(native_backend: str, reweight: str, above: float) -> None:
    """The exponents' reference is a guess from the first columns and the label's; beside logits of any size
    and masked ones."""
    logits, labels = torch.randn(6, 203), torch.tensor([0, 100, 150, 150, 200, 7])
    logits[:, 150] += above
    logits[2:, 120] = -math.inf
    logits[3:, 30] = torch.finfo(torch.float32).min
    expected = _softmax(logits.double(), labels, reweight, "reference")
    loss, objectness, grad = _softmax(logits, labels, reweight)
    torch.testing.assert_close(loss.double(), expected[0], rtol=2e-7, atol=0)
    torch.testing.assert_close(objectness.double(), expected[1], rtol=2e-7, atol=0)
    assert (grad.double() - expected[2]).norm() <= 2e-7 * expected[2].norm()
    assert not grad[2:, 120].any()
    assert not grad[3:, 30].any()


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_softmax_of_what_is_no_number(native_backend: str, value: float) -> None:
    """Late in the row, where the first columns do not show it."""
    logits = torch.randn(2, 203)
    logits[0, 170] = value
    _, _, grad = _softmax(logits, torch.tensor([3, 3]), "none")
    assert grad[0].isnan().all()
    assert not grad[1].isnan().any()
