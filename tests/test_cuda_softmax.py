"""The CUDA softmax kernels, emulated on the CPU, against the float64 reference: every kernel shape, every
place that a label can have, every alignment, and numbers at the ends of float32."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from gol_kernels.backends import reference
from gol_kernels.ops import SoftmaxArguments
from tests.cases import counts, relative_l2
from tests.emulated_cuda import Guarded, emulated, survives

__all__ = ["emulated"]

# What rounding the results to their type costs, and the sums.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float64: 1e-12}
DTYPE = pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
# (reweight, q): a square, and another power, are different kernels.
REWEIGHT = pytest.mark.parametrize(
    "reweight", [("none", 0.0), ("prior", 0.0), ("seesaw", 2.0), ("seesaw", 1.3)], ids=str
)


def _arguments(
    logits: Tensor, labels: Tensor, reweight: tuple[str, float], **options: Any
) -> SoftmaxArguments:
    """Objectness where labels may be background, which C columns and 2 more make of the number of columns."""
    objectness = options.pop("objectness", True)
    c = logits.shape[1] - 2 * objectness
    table = {"none": None, "prior": torch.linspace(-3, 2, c), "seesaw": counts(c)}[reweight[0]]
    common = {
        "row_weights": None,
        "avg_factor": None,
        "class_table": table,
        "reweight": reweight[0],
        "p": 0.8,
        "q": reweight[1],
        "eps": 0.01,
        "num_classes": c if objectness else c - 1,
        "ignore_index": -100,
        "reduction": "none",
        "scale": 1.0,
        "validate": False,
    }
    return SoftmaxArguments(logits=logits, labels=labels, objectness=objectness, **{**common, **options})


def _check(emulated: Any, a: SoftmaxArguments, tolerance: float = 1.0) -> None:
    """Loss and gradient, made together and apart, each as far from the truth as its type must be."""
    truth = reference._softmax_loss(*a._replace(logits=a.logits.double()), True)
    result = emulated.softmax_loss_native(*a, True)
    losses_alone = emulated.softmax_loss_native(*a, False)
    n = a.labels.shape if a.reduction == "none" else ()
    upstream = torch.linspace(-1, 2, a.labels.numel()).expand(a.labels.shape)
    upstreams = [(torch.tensor(2.5), torch.tensor(-0.5))] + [(upstream, upstream.flip(0))] * bool(n)
    fp64 = a.logits.dtype == torch.float64
    for actual, alone, expected in zip(result[:2], losses_alone, truth, strict=False):
        assert actual.shape == n
        rtol = ROUNDING[torch.float64 if fp64 else torch.float32] * tolerance
        torch.testing.assert_close(actual.double(), expected, rtol=3 * rtol, atol=rtol, equal_nan=True)
        torch.testing.assert_close(alone, actual, rtol=3 * rtol, atol=rtol, equal_nan=True)
    assert losses_alone[2].numel() == 0
    grads = [(result[2], truth[2])]
    for classes, objectness in upstreams:
        expected = reference._softmax_grad(classes, objectness, *a._replace(logits=a.logits.double()))
        grads.append((emulated.softmax_grad_native(classes, objectness, *a), expected))
    for grad, expected in grads:
        assert grad.dtype == a.logits.dtype
        assert torch.equal(grad.isnan(), expected.isnan())
        there = ~expected.isnan()
        assert relative_l2(grad[there], expected[there]) < ROUNDING[grad.dtype] * tolerance


def _rows(n: int, c: int, dtype: torch.dtype, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    logits = (torch.randn(n, c + 2, dtype=torch.float64) * spread - 1).to(dtype)
    labels = torch.randint(0, c, (n,))
    labels[0], labels[-1] = c - 1, 0
    return logits, labels


@REWEIGHT
@DTYPE
@pytest.mark.parametrize(
    "widths",
    [
        (1, 2, 3, 4, 7, 8, 9, 15, 31, 33, 80, 255, 256, 257, 263, 264, 270, 511, 512, 516, 519, 520),
        (1000, 1023, 1024, 1025, 1031, 1032),
        (1203, 1204, 1205, 1206, 1207, 1280, 1284, 1287),
        (1288, 2049, 2055, 2056, 3079, 3080, 5000, 5127, 5128),
        (10247, 10248, 16391, 16392, 24583, 24584, 32768, 32775, 32776),
    ],
    ids=lambda widths: f"{widths[0]}-{widths[-1]}",
)
def test_widths(
    emulated: Any, reweight: tuple[str, float], dtype: torch.dtype, widths: tuple[int, ...]
) -> None:
    if dtype not in (torch.float32, torch.bfloat16):
        widths = widths[:2]
    for c in widths:
        logits, labels = _rows(9 if c < 1300 else 2, c, dtype)
        if c < 1300:
            labels[2:6] = torch.tensor([c, c, -100, c + 1])
        _check(emulated, _arguments(logits, labels, reweight))
        if c < 1300:
            labels = labels.clamp(0, c - 1)
            _check(emulated, _arguments(logits[:, :c].contiguous(), labels, reweight, objectness=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_labels_everywhere(emulated: Any, dtype: torch.dtype) -> None:
    edges = [b + d for b in (128, 256, 512, 1024) for d in (-9, -1, 0, 1, 8)]
    for c in (1, 5, 9, 40, 1203, 1206):
        labels = torch.tensor(sorted({i for i in (*range(20), *edges, *range(c - 20, c)) if 0 <= i < c}))
        for order in (labels, labels.flip(0)):
            logits = torch.randn(labels.numel(), c + 2).to(dtype)
            _check(emulated, _arguments(logits, order, ("seesaw", 2.0)))


@REWEIGHT
@DTYPE
def test_any_layout(emulated: Any, reweight: tuple[str, float], dtype: torch.dtype) -> None:
    """Rows apart by whole vectors or not, from an aligned place or not."""
    for c, extra, start in product((5, 37, 1205), (0, 3, 8), (0, 1, 2, 8)):
        logits, labels = _rows(4, c + extra, dtype)
        logits = torch.cat([torch.zeros(start, dtype=dtype), logits.flatten()])[start:].view(4, -1)
        labels = labels.clamp(max=c)
        _check(emulated, _arguments(logits[:, extra:], labels, reweight))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("avg_factor", [None, 0.0, 7.0])
def test_many_rows_of_a_warp(emulated: Any, reduction: str, avg_factor: float | None) -> None:
    """More than wait for each other, and as many."""
    for n in (1, 31, 255, 256, 257, 700):
        logits, labels = _rows(n, 20, torch.float32)
        labels[::3] = 20
        if n > 3:
            labels[3] = -100
        options = {
            "row_weights": torch.rand(n),
            "avg_factor": None if avg_factor is None else torch.tensor(avg_factor),
            "reduction": reduction,
        }
        _check(emulated, _arguments(logits, labels, ("seesaw", 2.0), **options))


@pytest.mark.parametrize("reweight", ["none", "prior", "seesaw"])
def test_reads_nothing_past_the_end(emulated: Any, reweight: str) -> None:
    for dtype, c, n in product((torch.float32, torch.bfloat16), (1, 6, 31, 263), (1, 2, 5)):
        logits, labels = _rows(n, c, dtype)
        guarded = Guarded()
        a = _arguments(guarded(logits), guarded(labels), (reweight, 2.0), row_weights=guarded(torch.rand(n)))
        if a.class_table is not None:
            a = a._replace(class_table=guarded(a.class_table))
        assert survives(lambda a=a: emulated.softmax_loss_native(*a, True))  # type: ignore[misc]


# --- numbers at the ends of float32 ---------------------------------------------------------------
@pytest.mark.parametrize("strided", [False, True], ids=["registers", "general"])
@REWEIGHT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_extremes(emulated: Any, dtype: torch.dtype, reweight: tuple[str, float], strided: bool) -> None:
    """Every other row has label 2 and extreme logits, which its neighbours must not notice."""
    inf, nan = math.inf, math.nan
    extremes: list[tuple[Any, float]] = [
        *((2, number) for number in (nan, inf, -inf, 300, 90, -95, -300, 1e30, -1e30)),
        *((0, number) for number in (nan, inf, -inf, 90, 1e30, -1e30)),
        *((slice(0, None), number) for number in (nan, -inf, 4)),
    ]
    for c in (6, 1203):
        logits, labels = _rows(2 * len(extremes) + 1, c, dtype)
        labels[1::2] = 2
        for row, (column, number) in enumerate(extremes):
            logits[2 * row + 1, :c][column] = number
        if strided:
            logits = torch.cat([logits, torch.zeros_like(logits[:, :3])], dim=1)[:, : c + 2]
        _check(emulated, _arguments(logits, labels, reweight), tolerance=20)


@REWEIGHT
def test_zero_weight_rows_may_hold_anything(emulated: Any, reweight: tuple[str, float]) -> None:
    logits, labels = _rows(5, 37, torch.float32)
    logits[1], logits[3] = math.nan, math.inf
    labels[3] = 37
    weights = torch.tensor([1.0, 0, 1, 0, 2])
    for reduction in ("sum", "none"):
        _check(emulated, _arguments(logits, labels, reweight, row_weights=weights, reduction=reduction))


@pytest.mark.parametrize("offset", [2.0**12, -(2.0**12), 2.0**22, -(2.0**22)])
def test_offset_common_to_all_logits(emulated: Any, offset: float) -> None:
    logits, labels = _rows(5, 1203, torch.float32)
    logits = (logits * 8).round() / 2
    expected = emulated.softmax_loss_native(*_arguments(logits, labels, ("seesaw", 2.0)), True)
    moved = emulated.softmax_loss_native(*_arguments(logits + offset, labels, ("seesaw", 2.0)), True)
    torch.testing.assert_close(moved[0], expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moved[2], expected[2], rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("p", "q", "eps"),
    [(10.0, 2.0, 0.01), (0.8, 20.0, 1e-6), (0.0, 0.0, 0.01), (-1.0, -1.0, 0.01), (1.5, 2.0, 1e-9)],
)
def test_options_beyond_float32(emulated: Any, p: float, q: float, eps: float) -> None:
    logits, labels = torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 4])
    logits[0, 0] = -120
    a = _arguments(logits, labels, ("seesaw", q), p=p, eps=eps)
    _check(emulated, a._replace(class_table=torch.tensor([2**39, 1, 1000, 1])), tolerance=5)
