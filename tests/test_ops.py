"""Registration: opcheck of every op, torch.compile of every module, and the choice of a backend."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gol_kernels as gk
from gol_kernels import backends
from gol_kernels.ops import OPS, SCHEMAS, overload
from tests.cases import class_groups, class_weights, counts, rare_mask, row_groups

ROOT = Path(__file__).parents[1]
C = 11


def _takes_cpu(backend: str) -> bool:
    try:
        return backends.choose("bernoulli_loss", "cpu", backend)[0] == backend
    except RuntimeError:
        return False


BACKENDS = [name for name in gk.available_backends() if _takes_cpu(name)]


def _samples(op: str, dtype: torch.dtype) -> list[tuple[object, ...]]:
    """Argument lists for opcheck, among them every reweighting and both forms of reduction.

    The *_grad ops refuse to be differentiated, so their logits require no gradient.
    """
    torch.manual_seed(0)
    labels = torch.tensor([0, 3, -100, C, 10, C])
    weights, rng = torch.linspace(0, 1, 6), torch.tensor([3, 4])

    def logits(k: int) -> torch.Tensor:
        return torch.randn(6, k, dtype=dtype, requires_grad=not op.endswith("_grad"))

    options = [(C, -100, "mean", 1.0, True), (C, -100, "none", 1.0, True)]
    gumbel, sigmoid = ("gumbel", 1.0, -4.0, 10.0, "zero_outside"), ("sigmoid", 1.0, -9.0, 9.0, "zero_outside")
    probit = ("probit", 1.0, -5.0, 5.0, "straight_through")
    rows, no_factors, seesaw = (weights, torch.tensor(4.0)), (0.0, 0.0, 1.0, 0.0), (0.8, 2.0, 0.01, 0.0)
    rare, table, groups = rare_mask(C), class_weights(C + 1), class_groups(C + 1)
    bernoulli = [
        (logits(C + 1), labels, *rows, None, None, None, *gumbel, "none", *no_factors, *options[0]),
        (logits(C), labels, None, None, rare, None, None, *sigmoid, "eql", *no_factors, *options[1]),
        (logits(C), labels, None, None, rare, None, rng, *gumbel, "drop", *no_factors, *options[0]),
        (logits(C + 1), labels, *rows, table, None, None, *probit, "weights", *no_factors, *options[0]),
        (logits(C), labels, None, None, counts(C), None, None, *gumbel, "seesaw", *seesaw, *options[1]),
        (
            logits(C + 1),
            labels,
            *rows,
            groups,
            row_groups(labels, C),
            None,
            *sigmoid,
            "acsl",
            0.0,
            0.0,
            1.0,
            0.8,
            *options[0],
        ),
    ]
    softmax = [
        (logits(C + 1), labels, weights, None, None, "none", 0.0, 0.0, 1.0, False, *options[0]),
        (logits(C + 1), labels, None, None, torch.randn(C + 1), "prior", 0.0, 0.0, 1.0, False, *options[1]),
        (logits(C + 2), labels, None, None, counts(C), "seesaw", 0.8, 2.0, 0.01, True, *options[0]),
        (logits(C + 2), labels, None, None, counts(C), "seesaw", 0.8, 2.0, 0.01, True, *options[1]),
    ]
    number, vector = torch.tensor(1.5), torch.randn(6)

    def upstream(sample: tuple[object, ...]) -> torch.Tensor:
        return vector if sample[-3] == "none" else number

    clip = (1.5, -4.0, 10.0)
    return {
        "bernoulli_loss": [(*s, s[-3] == "mean", i % 2 == 0) for i, s in enumerate(bernoulli)],
        "bernoulli_grad": [(upstream(s), *s) for s in bernoulli],
        "softmax_loss": [(*s, s[-3] == "mean") for s in softmax],
        "softmax_grad": [(upstream(s), upstream(s) * 2, *s) for s in softmax],
        "gumbel_activation": [(logits(C), *clip)],
        "gumbel_activation_grad": [(torch.randn(6, C, dtype=dtype), logits(C), *clip)],
        "scale_grad_": [
            (torch.randn(6, C, dtype=dtype), number, number, C),
            (torch.randn(6, C, dtype=dtype), torch.tensor(1.0), number, C - 2),
        ],
        "label_counts": [(labels, C, -100, True)],
    }[op]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(op: str, backend: str, dtype: torch.dtype) -> None:
    for sample in _samples(op, dtype):
        torch.library.opcheck(overload(op, backend), sample)


def test_every_op_has_a_sample() -> None:
    assert set(OPS) == set(SCHEMAS)
    assert all(_samples(op, torch.float32) for op in OPS)


def _modules() -> list[gk.losses.LongTailLoss]:
    frequency = [1000 // (i + 1) for i in range(40)]
    stats = gk.ClassStats(image_count=frequency, instance_count=frequency, num_images=2000)
    options = {"threshold": 0.02}
    return [
        gk.GumbelLoss(40),
        gk.GumbelLoss(40, compat="gol"),
        gk.GumbelLoss(40, clip=None),
        gk.SigmoidLoss(40),
        gk.SoftmaxLoss(40),
        gk.EQLLoss(stats, **options),
        gk.DropLoss(stats, **options),
        gk.DropLoss(stats, link="sigmoid", **options),
        gk.SeesawLoss(40),
        gk.GumbelSeesawLoss(40, q=2.0),
        gk.EQLv2Loss(40, link="probit"),
        gk.FederatedLoss(stats, num_sampled=41),  # all: Inductor draws other numbers than eager
        gk.ACSLLoss(stats, rare_share=1.0, common_share=0.0),
        gk.BalancedSoftmaxLoss(stats, background=True),
        gk.EquilibriumLoss(40),
    ]


@pytest.mark.parametrize("index", range(len(_modules())))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compile_equals_eager(index: int, dtype: torch.dtype) -> None:
    """fullgraph, ignored rows present, an upstream gradient that is not 1, the loss used in a graph."""
    torch.compiler.reset()
    eager, compiled = _modules()[index], _modules()[index]
    logits = torch.randn(9, eager.num_logits).to(dtype)
    labels = torch.randint(0, 41, (9,))
    labels[4] = -100

    def step(module, z, y):
        return module(z * 1.5, y) * 3

    results = []
    for module, function in ((eager, step), (compiled, torch.compile(step, fullgraph=True))):
        torch.manual_seed(7)
        outcomes = []
        for _ in range(2):  # the second step sees the first one's state
            leaf = logits.clone().requires_grad_(True)
            loss = function(module, leaf, labels)
            loss.backward()
            outcomes.append((loss.detach(), leaf.grad))
        results.append((outcomes, module.state_dict()))
    for (loss, grad), (compiled_loss, compiled_grad) in zip(results[0][0], results[1][0], strict=True):
        if isinstance(eager, gk.DropLoss):
            # Inductor has a generator of its own: only what does not depend on the draws is comparable.
            foreground = (labels >= 0) & (labels < 40)
            torch.testing.assert_close(compiled_grad[foreground], grad[foreground], rtol=1e-5, atol=1e-7)
            continue
        torch.testing.assert_close(compiled_loss, loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(
            compiled_grad, grad, rtol=2e-3 if dtype == torch.float16 else 1e-6, atol=1e-7
        )
    for name, value in results[0][1].items():
        torch.testing.assert_close(
            results[1][1][name], value, rtol=1e-3 if dtype == torch.float16 else 1e-6, atol=0, msg=name
        )


def test_compile_does_not_recompile_for_each_number_of_rows() -> None:
    torch.compiler.reset()
    loss = gk.GumbelLoss(12)
    with torch._dynamo.config.patch(error_on_recompile=False):
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        function = torch.compile(lambda z, y: loss(z, y), backend=counter, fullgraph=True)
        for n in range(3, 53):
            function(torch.randn(n, 13), torch.randint(0, 13, (n,)))
    assert counter.frame_count <= 2  # the first N, then one graph for all


# --- the choice of a backend ---------------------------------------------------------------------
def test_choice_and_reasons() -> None:
    status = backends.status()
    assert status["reference"] is None
    assert gk.available_backends() == [name for name, reason in status.items() if reason is None]
    for op in OPS:
        name, reason = backends.choose(op, "cpu")
        assert name == gk.available_backends()[0]
        assert reason
    assert backends.choose("bernoulli_loss", "meta")[0] == "reference"
    with pytest.raises(ValueError, match="unknown op"):
        backends.choose("nms", "cpu")
    with pytest.raises(RuntimeError, match="cannot run bernoulli_loss on 'meta'"):
        backends.choose("bernoulli_loss", "meta", "native")


def test_without_the_extension() -> None:
    """The package imports, says why, computes by the reference, and refuses an explicit native."""
    program = """
import sys
sys.modules["gol_kernels._C"] = None  # what an absent extension looks like
import torch, gol_kernels as gk
assert "native" not in gk.available_backends(), gk.available_backends()
info = gk.build_info()
assert info["extension"] is False and "not built" in info["reason"], info
z, y = torch.zeros(3, 5, requires_grad=True), torch.tensor([0, 1, 4])
gk.GumbelLoss(4)(z, y).backward()
assert z.grad[0, 0].item() == -1 / 3 or abs(z.grad[0, 0].item() + 1 / 3) < 1e-7
try:
    gk.gumbel_loss(z, y, backend="native")
except RuntimeError as error:
    assert "was not built" in str(error), error
    print("ok")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "ok", done.stderr


def test_choosing_the_instruction_set() -> None:
    if "native" not in BACKENDS:
        pytest.skip("the native backend is not available")
    extension = backends.native.extension()
    with pytest.raises(ValueError, match="cannot run the CPU kernels for 'sse9'"):
        extension.set_cpu_capability("sse9")
    assert extension.cpu_capability() in ("generic", "avx2", "avx512")


@pytest.mark.parametrize("name", ["avx2", "avx512"])
def test_no_inline_function_escapes_its_instruction_set(name: str) -> None:
    """What the linker may merge must not be compiled for more than every processor has."""
    objects = list(ROOT.glob(f"build/temp.*/csrc/cpu/kernels_{name}.o"))
    if not objects or shutil.which("nm") is None:
        pytest.skip("no object files or no nm here")
    listed = subprocess.run(["nm", "--defined-only", objects[0]], capture_output=True, text=True, check=True)
    mergeable = [line.split(" ", 2)[2] for line in listed.stdout.splitlines() if line.split(" ")[1] in "WVuw"]
    assert mergeable
    own = f"3gol{len(name)}{name}"  # gol::<name>::, as the compiler writes it
    assert [symbol for symbol in mergeable if own not in symbol] == []
