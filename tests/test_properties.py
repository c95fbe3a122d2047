"""What must hold for any shape, dtype, layout and option: hypothesis draws them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import gol_kernels as gk
from tests import cases
from tests.cases import BY_NAME, CASES, Case, loss_and_grad, truth

BACKENDS = [name for name in gk.available_backends() if name != "triton"]
PROPERTY = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
# float32: an exponent of 20 bits is rounded to 24.
EPSILON = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


@dataclass(frozen=True)
class Drawn:
    """A loss with its inputs."""

    case: Case
    logits: Tensor
    labels: Tensor
    common: dict[str, Any]

    def run(self, backend: str, **changes: Any) -> tuple[Tensor, Tensor]:
        """Loss and gradient; ``changes`` replace logits, labels or options."""
        logits = changes.pop("logits", self.logits)
        labels = changes.pop("labels", self.labels)
        common = {**self.common, **changes}
        return loss_and_grad(lambda z: self.case.loss(z, labels, backend=backend, **common), logits)


def _layout(draw: st.DrawFn, logits: Tensor) -> Tensor:
    """The same numbers as a slice of columns, as every other row, transposed, or as they are."""
    n, k = logits.shape
    kind = draw(st.sampled_from(["dense", "columns", "rows", "transposed"]))
    if kind == "columns":
        wide = logits.new_full((n, k + 3), 7.0)
        wide[:, 1 : k + 1] = logits
        return wide[:, 1 : k + 1]
    if kind == "rows":
        tall = logits.new_full((2 * n, k), 7.0)
        tall[::2] = logits
        return tall[::2]
    return logits.t().contiguous().t() if kind == "transposed" else logits


@st.composite
def drawn(draw: st.DrawFn, cases: tuple[Case, ...] = tuple(CASES), dtype: torch.dtype | None = None) -> Drawn:
    case = draw(st.sampled_from(cases))
    n, c = draw(st.integers(1, 40)), draw(st.one_of(st.integers(1, 70), st.sampled_from([255, 256, 1203])))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dtype = dtype or draw(st.sampled_from(list(EPSILON)))
    logits, labels = case.inputs(n, c, dtype, spread=draw(st.sampled_from([0.1, 1.0, 3.0])))
    ignored = torch.rand(n) < draw(st.sampled_from([0.0, 0.3]))
    labels = labels.masked_fill(ignored, -100)
    if draw(st.booleans()):
        labels = labels.to(torch.int32)
    common: dict[str, Any] = {"reduction": draw(st.sampled_from(["mean", "sum", "none"]))}
    if common["reduction"] == "mean" and draw(st.booleans()):
        common["avg_factor"] = draw(st.sampled_from([0.7, 3, torch.tensor(2.5)]))
    if draw(st.booleans()):
        common["row_weights"] = torch.rand(n) * (torch.rand(n) < 0.8)
    return Drawn(case, _layout(draw, logits), labels, common)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(PROPERTY, max_examples=150)
@given(data=drawn())
def test_equals_the_float64_reference(backend: str, data: Drawn) -> None:
    expected_loss, expected = truth(data.case, data.logits, data.labels, **data.common)
    loss, grad = data.run(backend)
    assert grad.shape == data.logits.shape
    special = 0.0 if data.logits.dtype == torch.float64 else cases.special_error()
    tolerance = EPSILON[data.logits.dtype] + 2 * special
    # A half-precision gradient below its subnormals is 0.
    assert float((grad.double() - expected).norm()) <= tolerance * float(expected.norm()) + (
        1e-7 * grad.numel() ** 0.5 if data.logits.dtype == torch.float16 else 1e-30
    )
    # Of a probability near 1 a term's error is absolute.
    relative, absolute = (1e-12, 1e-14) if loss.dtype == torch.float64 else (5e-6, 2**-24 + special)
    error = float((loss.double() - expected_loss).norm())
    assert error <= relative * float(expected_loss.norm()) + absolute * data.logits.numel()


# DropLoss draws by row and column, and so is no function of the set of rows.
ROW_WISE = tuple(case for case in CASES if "drop" not in case.name)


@pytest.mark.parametrize("backend", BACKENDS)
@PROPERTY
@given(data=drawn(ROW_WISE, torch.float64), seed=st.integers(0, 1000))
def test_rows_may_be_permuted(backend: str, data: Drawn, seed: int) -> None:
    order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(seed))
    moved = {"logits": data.logits[order], "labels": data.labels[order]}
    if "row_weights" in data.common:
        moved["row_weights"] = data.common["row_weights"][order]
    loss, grad = data.run(backend)
    moved_loss, moved_grad = data.run(backend, **moved)
    expected = loss[order] if data.common["reduction"] == "none" else loss
    torch.testing.assert_close(moved_loss, expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(moved_grad, grad[order], rtol=1e-12, atol=1e-15)


# The tables of these follow the column's number; without tables every class is alike.
CLASS_WISE = tuple(BY_NAME[name] for name in ("gumbel", "gumbel-unclipped", "sigmoid", "probit", "softmax"))


@pytest.mark.parametrize("backend", BACKENDS)
@PROPERTY
@given(data=drawn(CLASS_WISE, torch.float64), seed=st.integers(0, 1000))
def test_classes_may_be_permuted(backend: str, data: Drawn, seed: int) -> None:
    order = torch.randperm(data.logits.shape[1], generator=torch.Generator().manual_seed(seed))
    place = order.argsort().to(data.labels.dtype)
    labels = torch.where(data.labels < 0, data.labels, place[data.labels.clamp(min=0).long()])
    loss, grad = data.run(backend)
    moved_loss, moved_grad = data.run(backend, logits=data.logits[:, order], labels=labels)
    torch.testing.assert_close(moved_loss, loss, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(moved_grad, grad[:, order], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
@PROPERTY
@given(data=drawn(ROW_WISE, torch.float64))
def test_a_row_of_weight_zero_is_no_row(backend: str, data: Drawn) -> None:
    n = len(data.labels)
    kept = torch.arange(n) % 3 != 1
    options = {"reduction": "sum", "avg_factor": None}
    weights = data.common.get("row_weights", torch.ones(n))
    _, with_zeros = data.run(backend, row_weights=weights * kept, **options)
    _, without = data.run(
        backend,
        logits=data.logits[kept],
        labels=data.labels[kept],
        row_weights=weights[kept],
        **options,
    )
    assert not with_zeros[~kept].any()
    torch.testing.assert_close(with_zeros[kept], without, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
@PROPERTY
@given(data=drawn(dtype=torch.float64), factor=st.floats(0.01, 100.0))
def test_avg_factor_scales(backend: str, data: Drawn, factor: float) -> None:
    options = {"reduction": "mean"}
    one, one_grad = data.run(backend, avg_factor=1.0, **options)
    scaled, scaled_grad = data.run(backend, avg_factor=factor, **options)
    torch.testing.assert_close(scaled * factor, one, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(scaled_grad * factor, one_grad, rtol=1e-12, atol=1e-15)


SOFTMAX = tuple(BY_NAME[name] for name in ("softmax", "softmax-prior", "seesaw-no-objectness"))


@pytest.mark.parametrize("backend", BACKENDS)
@PROPERTY
@given(data=drawn(SOFTMAX, torch.float64), shift=st.floats(-1e3, 1e3))
def test_softmax_losses_ignore_a_common_shift(backend: str, data: Drawn, shift: float) -> None:
    loss, grad = data.run(backend)
    moved_loss, moved_grad = data.run(backend, logits=data.logits + shift)
    torch.testing.assert_close(moved_loss, loss, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(moved_grad, grad, rtol=1e-9, atol=1e-10)
