"""The CUDA kernels without a GPU: csrc/cuda, compiled for the CPU against tests/cuda_emulation.

The tests that take a backend run here once more, on CPU tensors, through the kernels and their bindings as
they are; those of this file go through their own corners. What a GPU's threads do at the same time is left to
tests/gpu.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from gol_kernels import ops
from gol_kernels.backends import reference, status
from tests import test_properties
from tests.emulated_cuda import Guarded, emulated, in_place_of_native, survives
from tests.gpu.test_shared import SHARED

__all__ = ["emulated"]


@pytest.fixture
def native_backend(emulated: Any) -> Iterator[str]:
    """Puts the emulated kernels in the place of the native backend's CPU kernels."""
    if status()["native"] is not None:
        pytest.skip("there is no native backend to put the kernels into")
    with in_place_of_native(emulated):
        yield "native"


@pytest.fixture
def backend(native_backend: str) -> str:
    return native_backend


# The flat kernel and the one for rows apart round differently.
globals().update({name: test for name, test in SHARED.items() if name != "test_layouts"})


@settings(test_properties.PROPERTY, max_examples=60)
@given(data=test_properties.drawn())
def test_equals_the_float64_reference(native_backend: str, data: test_properties.Drawn) -> None:
    test_properties.test_equals_the_float64_reference.hypothesis.inner_test(native_backend, data)


# --- any arguments, against the reference ---------------------------------------------------------
REWEIGHTS = ("none", "eql", "drop", "weights", "federated", "acsl", "seesaw")
ROUNDOFF = {torch.float32: 2e-5, torch.bfloat16: 5e-3, torch.float16: 1.2e-3, torch.float64: 1e-9}


def _labels(rng: random.Random, n: int, c: int, ignore_index: int) -> Tensor:
    labels = torch.where(torch.rand(n) < 0.4, c, torch.randint(0, max(c, 1), (n,)))
    labels[torch.rand(n) < rng.choice([0.0, 0.15])] = ignore_index
    if rng.random() < 0.15:
        labels[rng.randrange(n)] = rng.choice([-1, c + 1, c + 5, -(2**40), 2**33])
    return labels


def _tables(rng: random.Random, reweight: str, n: int, k: int) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    if reweight in ("eql", "drop", "federated"):
        tables["class_table"] = torch.rand(k) < rng.choice([0.1, 0.5, 0.9])
    if reweight == "drop":
        tables["rng"] = torch.randint(2**63 - 1, (2,))
    if reweight == "weights":
        tables["class_table"] = torch.rand(2, k) * 2 * (torch.rand(2, k) < 0.8)
    if reweight == "acsl":
        tables["class_table"] = torch.randint(0, 16, (k,), dtype=torch.uint8)
        tables["row_table"] = torch.randint(0, 16, (n,), dtype=torch.uint8)
        tables["logit_threshold"] = rng.choice([-1.0, 0.5, 2.0])
    if reweight == "seesaw":
        counts = torch.rand(k + rng.choice([0, 1])) * 1000
        tables["class_table"] = counts.to(
            rng.choice([torch.int64, torch.int32, torch.float32, torch.float64])
        )
        tables["p"], tables["q"], tables["eps"] = rng.choice(
            [(0.8, 2.0, 1e-2), (0.0, 2.0, 0.1), (0.8, 0.0, 0.1), (-1.0, 1.0, 1.0)]
        )
    return tables


def _in_some_layout(rng: random.Random, z: Tensor) -> Tensor:
    """z in dense rows, in rows apart, or off the alignment of a vector."""
    n, k = z.shape
    layout = rng.choice(["dense", "dense", "dense", "apart", "unaligned"])
    if layout == "apart":
        wide = torch.full((n, k + 3), math.nan, dtype=z.dtype)
        wide[:, 1 : k + 1] = z
        return wide[:, 1 : k + 1]
    if layout == "unaligned":
        flat = torch.full((n * k + 1,), math.nan, dtype=z.dtype)
        flat[1:] = z.flatten()
        return flat[1:].view(n, k)
    return z


def _link(rng: random.Random, reweight: str) -> dict[str, Any]:
    link = rng.choice(["gumbel", "gumbel", "sigmoid", "probit"])
    slopes = ["zero_outside", "straight_through"]
    if link == "gumbel" and reweight in ("none", "eql", "drop"):
        slopes.append("released")
    clips = {
        "gumbel": [(-4.0, 10.0), (-4.0, 10.0), (-20.0, math.inf), (-1.0, 2.0)],
        "sigmoid": [(-math.inf, math.inf)],
        "probit": [(-5.0, 5.0), (-2.0, 3.0), (-20.0, 20.0)],
    }
    low, high = rng.choice(clips[link])
    temperature = rng.choice([1.0, 1.0, 2.0, 0.5]) if link == "gumbel" else 1.0
    return {
        "link": link,
        "temperature": temperature,
        "clip_min": low,
        "clip_max": high,
        "slope": rng.choice(slopes),
    }


def _any_arguments(rng: random.Random) -> ops.BernoulliArguments:
    n = rng.choice([1, 2, 3, 5, 8, 17, 33, 64, 100])
    k = rng.choice([1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 16, 31, 33, 64, 100, 203, 204, 205, 301])
    reweight = rng.choice(REWEIGHTS)
    c = k if reweight in ("eql", "drop", "seesaw") else rng.choice([k, k - 1])
    logits = torch.randn(n, k, dtype=torch.float64) * rng.choice([1, 3, 8]) - 1
    if rng.random() < 0.1:
        logits[rng.randrange(n), rng.randrange(k)] = rng.choice([math.inf, -math.inf, math.nan])
    reduction = rng.choice(["mean", "sum", "none"])
    ignore_index = rng.choice([-100, rng.randrange(c + 1)])
    common: dict[str, Any] = dict.fromkeys(("class_table", "row_table", "rng", "row_weights", "avg_factor"))
    common |= {"p": 0.0, "q": 0.0, "eps": 1.0, "logit_threshold": 0.0, "reweight": reweight}
    common |= {"num_classes": c, "ignore_index": ignore_index, "reduction": reduction, "validate": False}
    common |= _tables(rng, reweight, n, k) | _link(rng, reweight)
    if rng.random() < 0.4:
        weights = torch.rand(n) * 2 * (torch.rand(n) < 0.8)
        common["row_weights"] = weights.to(rng.choice([torch.float32, torch.float64]))
    if reduction == "mean" and rng.random() < 0.4:
        types = [torch.float32, torch.float64, torch.int64, torch.int32]
        common["avg_factor"] = torch.tensor(rng.choice([0.0, 7.0, 3.5])).to(rng.choice(types))
    return ops.BernoulliArguments(
        logits=_in_some_layout(rng, logits.to(rng.choice(list(ROUNDOFF)))),
        labels=_labels(rng, n, c, ignore_index),
        scale=rng.choice([1.0, 1.0, 0.25]),
        **common,
    )


def _assert_close(actual: Tensor, expected: Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("seed", range(8))
def test_any_arguments(emulated: Any, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Loss, gradient, statistics and recomputed gradient of calls at random, in memory full of NaN."""
    torch.use_deterministic_algorithms(True)  # which fills what at::empty returns
    try:
        for trial in range(25):
            rng = random.Random(25 * seed + trial)
            torch.manual_seed(25 * seed + trial)
            monkeypatch.setenv("EMULATED_MULTIPROCESSORS", str(rng.choice([1, 1, 3])))
            _check_call(emulated, rng, _any_arguments(rng))
    finally:
        torch.use_deterministic_algorithms(False)


def _check_call(emulated: Any, rng: random.Random, a: ops.BernoulliArguments) -> None:
    dtype, n = a.logits.dtype, a.logits.shape[0]
    exact = a._replace(logits=a.logits.double())
    roundoff = ROUNDOFF[dtype]
    # Below the smallest number of float16, and below what float32 can tell of 1 - exp(-e).
    tiny = {torch.float16: 6e-8, torch.float64: 1e-200}.get(dtype, 1e-18)
    compute_grad, compute_statistics = rng.random() < 0.8, rng.random() < 0.4
    loss, grad, statistics = emulated.bernoulli_loss_native(*a, compute_grad, compute_statistics)
    expected = reference._bernoulli_loss(*exact, compute_grad, compute_statistics)
    single = dtype != torch.float64
    _assert_close(loss, expected[0], 2e-5 if single else 1e-9, 1e-6 if single else 1e-12)
    _assert_close(grad, expected[1].to(dtype), roundoff, tiny)
    _assert_close(statistics, expected[2], 3e-5, 1e-18)
    if a.reduction == "none" and rng.random() < 0.7:
        upstream = torch.rand(n).to(loss.dtype)
    else:
        upstream = torch.tensor(rng.choice([1.0, 65536.0, 0.5]), dtype=loss.dtype)
    grad = emulated.bernoulli_grad_native(upstream, *a)
    _assert_close(grad, reference._bernoulli_grad(upstream, *exact).to(dtype), roundoff, tiny * 65536)


def test_the_next_lanes_draws_after_many_steps(emulated: Any) -> None:
    """A thread takes 45 steps here, past the 32 for which a warp draws ahead."""
    n, k = 33000, 11
    a = ops.BernoulliArguments(
        *(torch.zeros(n, k), torch.full((n,), k), None, None, torch.rand(k) < 0.7, None),
        *(torch.tensor([2**62 + 5, 2**61 + 3]), "sigmoid", 1.0, -math.inf, math.inf, "zero_outside", "drop"),
        *(0.0, 0.0, 1.0, 0.0, k, -100, "sum", 1.0, False),
    )
    a.labels[:300] = torch.arange(300) % k
    _, grad, _ = emulated.bernoulli_loss_native(*a, True, False)
    _, expected, _ = reference._bernoulli_loss(*a, True, False)
    assert 0.1 < float((expected == 0).float().mean()) < 0.9
    assert torch.equal(grad != 0, expected != 0)


# --- memory ---------------------------------------------------------------------------------------
def test_guard_pages_guard() -> None:
    tensor = Guarded()(torch.zeros(5))
    assert survives(lambda: tensor.sum())
    assert tensor.as_strided((8,), (1,))[5:].isnan().all()
    assert not survives(lambda: tensor.as_strided((9,), (1,)).sum())


@pytest.mark.parametrize("reweight", REWEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reads_nothing_past_the_end(emulated: Any, dtype: torch.dtype, reweight: str) -> None:
    guarded, rng, calls = Guarded(), random.Random(0), []
    for n, k in product((1, 2, 3, 8), (8, 9, 12, 33, 3)):
        tables: dict[str, Any] = dict.fromkeys(("class_table", "row_table", "rng"))
        tables |= {"p": 0.8, "q": 2.0, "eps": 0.01, "logit_threshold": 0.0} | _tables(rng, reweight, n, k)
        logits, labels = torch.randn(n, k).to(dtype), torch.arange(n) % (k + 1)
        calls.append(
            ops.BernoulliArguments(
                *(guarded(logits), guarded(labels), guarded(torch.rand(n)), None),
                **{name: guarded(v) if isinstance(v, Tensor) else v for name, v in tables.items()},
                **{"link": "gumbel", "temperature": 1.0, "clip_min": -4.0, "clip_max": 10.0},
                **{"slope": "zero_outside", "reweight": reweight, "num_classes": k, "ignore_index": -100},
                **{"reduction": "sum", "scale": 1.0, "validate": False},
            )
        )
    assert survives(lambda: [emulated.bernoulli_loss_native(*a, True, True) for a in calls])
    for a in calls:  # the NaN after the end is not in the sum
        assert bool(emulated.bernoulli_loss_native(*a, True, False)[0].isfinite())


# --- what is not a loss ---------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", list(ROUNDOFF), ids=str)
def test_scale_grad(emulated: Any, dtype: torch.dtype) -> None:
    number = torch.float64 if dtype == torch.float64 else torch.float32
    first, second = torch.tensor(3.0, dtype=number), torch.tensor(0.5, dtype=number)
    for n, k in product((1, 3, 64, 301), (1, 2, 5, 8, 33, 205)):
        for split in {0, k // 2, k}:
            grad = torch.randn(n, k).to(dtype)
            expected = torch.cat([grad[:, :split] * 3, grad[:, split:] * 0.5], dim=1)
            emulated.scale_grad__native(grad, first, second, split)
            assert torch.equal(grad, expected)


def test_scale_grad_touches_nothing_for_ones(emulated: Any) -> None:
    one = torch.tensor(1.0)
    grad = Guarded()(torch.randn(64, 33), protection=0)
    assert survives(lambda: emulated.scale_grad__native(grad, one, one, 33))
    assert not survives(lambda: emulated.scale_grad__native(grad, one, one + 1, 32))


@pytest.mark.parametrize("c", [1, 5, 1203, 20000])
def test_label_counts_of_any_number_of_classes(emulated: Any, c: int) -> None:
    labels = torch.randint(-3, c + 4, (30000,))
    counts = emulated.label_counts_native(labels, c, 1, False)
    legal = labels[(labels >= 0) & (labels <= c) & (labels != 1)]
    assert torch.equal(counts, legal.bincount(minlength=c + 1))


@pytest.mark.parametrize("dtype", list(ROUNDOFF), ids=str)
def test_activation_of_any_size(emulated: Any, dtype: torch.dtype) -> None:
    clip = (2.0, -3.0, 5.0)
    for size, offset in product((1, 7, 8, 9, 1000, 4099), (0, 1)):
        logits = (torch.randn(size + offset, dtype=torch.float64) * 4).to(dtype)[offset:]
        upstream = torch.randn(size, dtype=torch.float64).to(dtype)
        expected = reference._gumbel_activation(logits.double(), *clip)
        _assert_close(emulated.gumbel_activation_native(logits, *clip), expected, ROUNDOFF[dtype], 1e-7)
        expected = reference._gumbel_activation_grad(upstream.double(), logits.double(), *clip)
        grad = emulated.gumbel_activation_grad_native(upstream, logits, *clip)
        _assert_close(grad, expected, ROUNDOFF[dtype], 1e-7)
