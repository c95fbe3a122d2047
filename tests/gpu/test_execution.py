"""How the kernels run: CUDA graphs, streams, no host sync, used memory, the same bits every time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gol_kernels as gk
from gol_kernels.ops import overload
from tests import test_ops
from tests.cases import BY_NAME, CASES, Case, loss_and_grad, relative_l2

CASE = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
# Their case makes a generator of its own in every call, which a graph cannot: see the modules' test.
WITHOUT_DRAWS = pytest.mark.parametrize(
    "case", [case for case in CASES if "drop" not in case.name], ids=lambda c: c.name
)
MODULE = pytest.mark.parametrize("index", range(len(test_ops._modules())))
N, C = 300, 130

Step = Callable[[], Any]


def captured(step: Step) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of ``step``, and the tensors that each replay fills anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # loads the modules and compiles
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return graph, outputs


def backward(loss: Tensor, leaf: Tensor) -> tuple[Tensor, Tensor]:
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.gpu
@WITHOUT_DRAWS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_graph_of_every_loss(native_backend: str, case: Case, dtype: torch.dtype) -> None:
    """Captured once, replayed on other logits and labels: the bits of an eager call."""
    logits, labels = case.inputs(N, C, dtype)
    leaf = logits.clone().requires_grad_(True)
    graph, outputs = captured(lambda: backward(case.loss(leaf, labels, backend=native_backend), leaf))
    for _ in range(3):
        fresh, fresh_labels = case.inputs(N, C, dtype)
        leaf.data.copy_(fresh)
        labels.copy_(fresh_labels)
        graph.replay()
        expected = loss_and_grad(lambda z, y=fresh_labels: case.loss(z, y, backend=native_backend), fresh)
        assert torch.equal(outputs[0], expected[0])
        assert torch.equal(outputs[1], expected[1])


@pytest.mark.gpu
def test_graph_draws_anew_in_every_replay(chosen: str) -> None:
    stats = gk.ClassStats(image_count=[1000, 1, 1, 1] * 50, num_images=5000)
    loss = gk.DropLoss(stats, link="sigmoid").to("cuda")
    labels = torch.full((64,), 200)
    labels[:8] = torch.arange(8)  # 6 of 8 are rare: a rare negative of the background stays with 3/4
    leaf = torch.zeros(64, 200, requires_grad=True)
    graph, outputs = captured(lambda: backward(loss(leaf, labels), leaf))
    kept = []
    for _ in range(4):
        graph.replay()
        kept.append(outputs[1][8:][:, loss.rare] != 0)
    shares = [mask.double().mean().item() for mask in kept]
    assert shares == pytest.approx([0.75] * 4, abs=0.025)  # 4 standard errors of 8400 draws: 0.019
    assert not any(torch.equal(a, b) for i, a in enumerate(kept) for b in kept[:i])


def _history(module: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [loss_and_grad(lambda z, y=labels: module(z, y), logits) for logits, labels in batches]


@pytest.mark.gpu
@MODULE
def test_graph_of_every_module(chosen: str, index: int) -> None:
    """Counts and statistics move with every replay as they do with every eager step."""
    eager, module = (test_ops._modules()[index].to("cuda") for _ in range(2))
    if isinstance(module, gk.DropLoss):
        pytest.skip("draws in every call")
    batches = [(torch.randn(N, module.num_logits), torch.randint(0, 41, (N,))) for _ in range(3)]
    static, labels = torch.zeros_like(batches[0][0]).requires_grad_(True), batches[0][1].clone()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    graph, outputs = captured(lambda: backward(module(static, labels), static))
    module.load_state_dict(before)  # the warm-up was training, too
    for (logits, fresh), (loss, grad) in zip(batches, _history(eager, batches), strict=True):
        static.data.copy_(logits)
        labels.copy_(fresh)
        graph.replay()
        torch.testing.assert_close(outputs[0], loss, rtol=1e-6, atol=0)
        assert relative_l2(outputs[1], grad) <= 1e-6
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-6, atol=1e-12, msg=name)


@pytest.mark.gpu
@CASE
def test_side_stream(native_backend: str, case: Case) -> None:
    """Everything runs on the current stream: what ran on another would see the logits before they come."""
    logits, labels = case.inputs(N, C)
    expected = loss_and_grad(lambda z: case.loss(z, labels, backend=native_backend), logits)
    leaf = torch.zeros_like(logits)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # cycles: some ten milliseconds
        leaf.copy_(logits)
        leaf.requires_grad_(True)
        loss, grad = backward(case.loss(leaf, labels, backend=native_backend), leaf)
    side.synchronize()
    assert torch.equal(loss, expected[0])
    assert torch.equal(grad, expected[1])


@contextmanager
def no_sync() -> Iterator[None]:
    """A host sync raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_no_sync_notices_a_sync() -> None:
    with pytest.raises(RuntimeError, match="synchroniz"), no_sync():
        torch.ones(1).item()


@pytest.mark.gpu
@MODULE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_no_host_sync(chosen: str, index: int, dtype: torch.dtype) -> None:
    """Forward, backward and scores of every module, with all its arguments."""
    module = test_ops._modules()[index].to("cuda")
    leaf = torch.randn(N, module.num_logits).to(dtype).requires_grad_(True)
    labels, weights, average = torch.randint(0, 41, (N,)), torch.rand(N), torch.tensor(77.0)

    def steps() -> None:
        for arguments in ((), (weights,), (weights, average), (None, 9.0)):
            (module(leaf, labels, *arguments) * 2).backward()
            module(leaf, labels, *arguments).backward(retain_graph=True)
        module.activation(leaf.detach())

    steps()  # loads the modules and compiles
    with no_sync():
        steps()


def poison() -> None:
    """Fills the blocks that the allocator will hand out next with NaN."""
    blocks = [torch.full((2**size,), 0xFF, dtype=torch.uint8) for size in range(9, 24) for _ in range(6)]
    del blocks


@CASE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_used_memory(native_backend: str, case: Case, dtype: torch.dtype) -> None:
    """Every element is written, of ignored rows and rows of weight 0 as well."""
    logits, labels = case.inputs(N, C, dtype)
    labels[5:20] = -100
    weights = torch.rand(N)
    weights[30:40] = 0
    results = []
    for _ in range(3):
        results.append(
            loss_and_grad(lambda z: case.loss(z, labels, row_weights=weights, backend=native_backend), logits)
        )
        poison()
    assert bool(results[0][1].isfinite().all())
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize(
    "name", ["gumbel", "gumbel-drop", "sigmoid-weights", "gumbel-seesaw", "probit-acsl", "softmax", "seesaw"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_hundred_runs(native_backend: str, name: str, dtype: torch.dtype) -> None:
    """Loss, gradient and statistics of many blocks, bit for bit."""
    case = BY_NAME[name]
    logits, labels = case.inputs(5003, 1204 - case.extra_logits, dtype)

    def run() -> tuple[Tensor, ...]:
        if case.name in ("softmax", "seesaw"):
            return loss_and_grad(lambda z: case.loss(z, labels, backend=native_backend), logits)
        sums = torch.zeros(2, 1204, dtype=torch.float64)
        options = {"class_gradients": sums, "backend": native_backend}
        return *loss_and_grad(lambda z: case.loss(z, labels, **options), logits), sums

    first = run()
    for _ in range(99):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_scale_grad(native_backend: str) -> None:
    grad = torch.randn(70, 1205)
    scaled = grad.clone()
    overload("scale_grad_", native_backend)(scaled, torch.tensor(1.0), torch.tensor(3.0), 1203)
    assert torch.equal(scaled[:, :1203], grad[:, :1203])
    assert torch.equal(scaled[:, 1203:], grad[:, 1203:] * 3)


@pytest.mark.gpu
def test_scaling_by_one_moves_nothing(native_backend: str) -> None:
    """A gibibyte: half a millisecond to scale on a fast GPU, a few microseconds to leave alone."""
    op, grad = overload("scale_grad_", native_backend), torch.ones(2**15, 2**13)

    def milliseconds(factor: float) -> float:
        """The shortest of ten: other processes may have the GPU in between."""
        scale, found = torch.tensor(factor), []
        for _ in range(11):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            op(grad, scale, scale, 2**13)
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end))
        return min(found[1:])

    assert milliseconds(1.0) < milliseconds(2.0) / 5
    assert grad[-1, -1].item() == 2.0**11


@pytest.mark.gpu
@MODULE
def test_grad_scaler(chosen: str, index: int) -> None:
    """A step under float16 autocast and GradScaler has the gradient of a float32 step."""
    plain, mixed = (test_ops._modules()[index].to("cuda") for _ in range(2))
    if isinstance(plain, gk.DropLoss):
        pytest.skip("draws in every call")
    features, labels = torch.randn(N, 64), torch.randint(0, 41, (N,))
    layer = nn.Linear(64, plain.num_logits)
    plain(layer(features), labels).backward()
    expected = layer.weight.grad.clone()
    layer.zero_grad()
    optimizer, scaler = torch.optim.SGD(layer.parameters(), lr=0.0), torch.amp.GradScaler("cuda")
    with torch.autocast("cuda", dtype=torch.float16):
        logits = layer(features)
        loss = mixed(logits, labels)
    assert logits.dtype == torch.float16
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert relative_l2(layer.weight.grad, expected) < 1e-2
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**16  # nothing overflowed
