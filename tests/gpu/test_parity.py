"""Every loss in every precision, shape and layout, against the float64 reference on the same device."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import gol_kernels as gk
from gol_kernels.ops import overload
from tests import test_gradients
from tests.cases import BY_NAME, CASES, Case, loss_and_grad, loss_error, rare_mask, relative_l2, truth

CASE = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
KERNEL_KINDS = (
    "gumbel",
    "gumbel-drop",
    "sigmoid-weights",
    "gumbel-seesaw",
    "softmax",
    "softmax-prior",
    "seesaw",
)
"""One case for each way through a kernel."""
KIND = pytest.mark.parametrize("case", [BY_NAME[name] for name in KERNEL_KINDS], ids=lambda c: c.name)
FLOAT_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
ROUNDOFF = {torch.float64: 1e-12, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def assert_gradient(case: Case, grad: Tensor, expected: Tensor) -> None:
    """Relative L2 error at most the case's tolerance in float32, else the dtype's roundoff."""
    assert relative_l2(grad, expected) <= ROUNDOFF.get(grad.dtype, case.float32_error)


def assert_equals_truth(case: Case, backend: str, logits: Tensor, labels: Tensor, **common: object) -> None:
    expected_loss, expected = truth(case, logits, labels, **common)
    leaf = logits.detach().requires_grad_(True)  # loss_and_grad's clone would straighten a strided tensor
    loss = case.loss(leaf, labels, backend=backend, **common)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert grad.dtype == logits.dtype
    assert relative_l2(loss.detach(), expected_loss) <= (
        1e-12 if logits.dtype == torch.float64 else loss_error()
    )
    assert_gradient(case, grad, expected)


# Different widths too: divisible by four, odd, and by neither.
TABLE = {
    torch.float32: (700, 1204),
    torch.bfloat16: (513, 1203),
    torch.float16: (300, 1205),
    torch.float64: (129, 130),
}


@CASE
@pytest.mark.parametrize("dtype", TABLE, ids=str)
def test_table(native_backend: str, case: Case, dtype: torch.dtype) -> None:
    """Many blocks of rows, some ignored, all weighted."""
    n, c = TABLE[dtype]
    logits, labels = case.inputs(n, c, dtype)
    labels[::17] = -100
    assert_equals_truth(case, native_backend, logits, labels, row_weights=torch.rand(n))


@CASE
def test_gradcheck(native_backend: str, case: Case) -> None:
    if "seesaw" in case.name:
        pytest.skip("its weights are constants of the loss: see test_seesaw_gradcheck")
    test_gradients.test_gradcheck(case, native_backend)


@KIND
@FLOAT_DTYPES
@pytest.mark.parametrize("width", [2049, 8192, 21841, 32768])
def test_wide_rows(native_backend: str, case: Case, dtype: torch.dtype, width: int) -> None:
    logits, labels = case.inputs(37, width - case.extra_logits, dtype)
    assert_equals_truth(case, native_backend, logits, labels)


@pytest.mark.parametrize(
    "case", [BY_NAME[name] for name in KERNEL_KINDS if "drop" not in name], ids=lambda c: c.name
)
@FLOAT_DTYPES
@pytest.mark.parametrize("n", [1, 512, 65536])
def test_number_of_rows(native_backend: str, case: Case, dtype: torch.dtype, n: int) -> None:
    """The truth is worked out in slices: in float64 and whole it would take twenty gigabytes."""
    logits, labels = case.inputs(n, 1204 - case.extra_logits, dtype)
    loss, grad = loss_and_grad(lambda z: case.loss(z, labels, backend=native_backend), logits)
    total = torch.zeros((), dtype=torch.float64)
    for rows in (slice(start, start + 8192) for start in range(0, n, 8192)):
        part, expected = truth(case, logits[rows], labels[rows], avg_factor=float(n))
        assert_gradient(case, grad[rows], expected)
        total += part
    assert relative_l2(loss, total) <= loss_error()


@KIND
@FLOAT_DTYPES
@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("stride", [1204, 1205, 1216])
def test_alignment(native_backend: str, case: Case, dtype: torch.dtype, offset: int, stride: int) -> None:
    """Rows of any alignment; what lies between them is NaN, and must not reach a result."""
    values, labels = case.inputs(65, 1204 - case.extra_logits, dtype)
    storage = torch.full((offset + 65 * stride,), math.nan, dtype=dtype)
    logits = storage.as_strided((65, 1204), (stride, 1), offset)
    logits.copy_(values)
    assert_equals_truth(case, native_backend, logits, labels)


@CASE
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_illegal_labels(native_backend: str, case: Case, dtype: torch.dtype) -> None:
    """NaN for these rows and for the mean, and the others as if they were alone."""
    logits, labels = case.inputs(200, 130)
    info = torch.iinfo(dtype)
    bad = [-1, 131 if case.background else 130, info.max, info.min, -101, 2 * 10**9]
    at = torch.arange(len(bad)) * 31 + 7
    labels = labels.to(dtype)
    labels[at] = torch.tensor(bad, dtype=dtype)
    others = torch.ones(200, dtype=torch.bool)
    others[at] = False
    options = {"validate": False, "backend": native_backend}
    losses, grad = loss_and_grad(lambda z: case.loss(z, labels, reduction="none", **options), logits)
    assert bool(losses[at].isnan().all())
    assert bool(grad[at].isnan().all())
    legal = labels.masked_fill(~others, -100)
    expected_losses, expected = truth(case, logits, legal, reduction="none")
    assert relative_l2(losses[others], expected_losses[others]) <= loss_error()
    assert relative_l2(grad[others], expected[others]) <= case.float32_error
    mean, mean_grad = loss_and_grad(lambda z: case.loss(z, labels, **options), logits)
    assert bool(mean.isnan())
    assert bool(mean_grad[at].isnan().all())
    assert bool(mean_grad[others].isfinite().all())
    with pytest.raises(ValueError, match="got -1 in row 7"):
        case.loss(logits, labels, validate=True, backend=native_backend)


def test_label_counts(native_backend: str) -> None:
    labels = torch.randint(-3, 1210, (70_001,))
    labels[::5] = -100
    for kind in (torch.int64, torch.int32):
        found = gk.label_counts(labels.to(kind), 1203, validate=False, backend=native_backend)
        assert torch.equal(found, torch.bincount(labels[(labels >= 0) & (labels <= 1203)], minlength=1204))
    with pytest.raises(ValueError, match=r"label_counts.*in row"):
        gk.label_counts(labels, 1203, validate=True, backend=native_backend)


@pytest.mark.parametrize("name", ["gumbel", "gumbel-drop", "sigmoid-weights", "gumbel-seesaw", "probit-acsl"])
@FLOAT_DTYPES
def test_class_gradients(native_backend: str, name: str, dtype: torch.dtype) -> None:
    """Over many blocks of rows; added to what is there."""
    case = BY_NAME[name]
    logits, labels = case.inputs(5003, 1204 - case.extra_logits, dtype)
    weights = torch.rand(5003)
    found, expected = (torch.ones(2, 1204, dtype=torch.float64) for _ in range(2))
    case.loss(logits, labels, row_weights=weights, class_gradients=found, backend=native_backend)
    case.loss(logits.double(), labels, row_weights=weights, class_gradients=expected, backend="reference")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_draws_are_those_of_the_cpu(native_backend: str) -> None:
    """With one (seed, offset), DropLoss keeps the same elements on every device and in backward."""
    n, c = 67, 1203
    labels, rare = torch.full((n,), c), rare_mask(c)
    labels[:20] = torch.arange(20)
    options = ("sigmoid", 1.0, -math.inf, math.inf, "straight_through", "drop", 0.0, 0.0, 1.0, 0.0)
    rows = (c, -100, "sum", 1.0, False)

    def kept(device: torch.device | str, backend: str) -> tuple[Tensor, Tensor]:
        rng = torch.tensor([2**62 + 12345, 2**61 + 77], device=device)
        logits = torch.zeros(n, c, device=device)
        arguments = (logits, labels.to(device), None, None, rare.to(device), None, rng, *options, *rows)
        _, grad, _ = overload("bernoulli_loss", backend)(*arguments, True, False)
        again = overload("bernoulli_grad", backend)(torch.ones((), device=device), *arguments)
        return grad.cpu() != 0, again.cpu() != 0

    ours, expected = kept(torch.get_default_device(), native_backend), kept("cpu", "reference")
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[0])
    dropped = ~expected[0][20:][:, rare.cpu()]
    assert 0.2 < dropped.double().mean() < 0.8


BEYOND = (
    ("gumbel", 1204),
    ("gumbel-seesaw", 1204),
    ("softmax", 1204),
    ("seesaw", 1204),
    ("gumbel", 32768),
    ("softmax", 32768),
)


@pytest.mark.gpu
def test_more_elements_than_32_bits_count(native_backend: str) -> None:
    """Over 2^31 elements; one after the other, for the memory's sake."""
    need, free = 24 * 2**30, torch.cuda.mem_get_info()[0]
    if free < need:
        pytest.skip(f"needs {need / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")
    for name, width in BEYOND:
        _check_quarters(BY_NAME[name], native_backend, 2**31 // width + 300, width)


def _check_quarters(case: Case, backend: str, n: int, width: int) -> None:
    """Every quarter as if it were alone, and the last rows as the reference has them."""
    logits = torch.empty(n, width, dtype=torch.bfloat16).normal_(-1.0, 2.0)
    labels = torch.randint(0, width - case.extra_logits, (n,))

    def run(rows: slice) -> tuple[Tensor, Tensor]:
        leaf = logits[rows].detach().requires_grad_(True)
        loss = case.loss(leaf, labels[rows], reduction="sum", backend=backend)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    loss, grad = run(slice(None))
    total = torch.zeros((), dtype=torch.float64)
    quarter = n // 4 + 1
    for rows in (slice(start, start + quarter) for start in range(0, n, quarter)):
        part, expected = run(rows)
        # One unit in bfloat16's last place: at another alignment the arithmetic is grouped otherwise.
        torch.testing.assert_close(grad[rows], expected, rtol=2**-7, atol=1e-12)
        total += part
    assert relative_l2(loss, total) <= loss_error()
    _, expected = truth(case, logits[-200:], labels[-200:], reduction="sum")
    assert_gradient(case, grad[-200:], expected)
