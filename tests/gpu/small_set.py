"""A small set of calls that goes through every kernel, for memory checkers and for machines without pytest.

    python -m tests.gpu.small_set --backend native --all
    compute-sanitizer python -m tests.gpu.small_set --backend triton

With PYTORCH_NO_CUDA_MEMORY_CACHING=1 every tensor is an allocation of its own, so that memcheck sees every
byte beyond one. The truth is worked out on the CPU: few kernels run besides those under test.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

import gol_kernels as gk
from gol_kernels.ops import overload
from tests.cases import BY_NAME, CASES, Case, loss_and_grad, relative_l2, truth

FEW = (
    "gumbel",
    "gumbel-drop",
    "sigmoid-weights",
    "gumbel-seesaw",
    "probit-acsl",
    "softmax",
    "softmax-prior",
    "seesaw",
)
SHAPES = ((5, 37), (3, 1203), (2, 4099))
ROUNDOFF = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def _failures(case: Case, backend: str, device: str, n: int, c: int, dtype: torch.dtype) -> Iterator[str]:
    """Loss and gradient, the gradient of each row, and a label that does not exist."""
    torch.manual_seed(n * c)
    logits, labels = case.inputs(n, c, dtype)
    labels[1] = -100
    here, there = (logits, labels), (logits.to(device), labels.to(device))
    for reduction in ("sum", "none"):
        # DropLoss draws by the device's own generator.
        expected = truth(case, *(there if "drop" in case.name else here), reduction=reduction)
        found = loss_and_grad(
            lambda z, r=reduction: case.loss(z, there[1], backend=backend, reduction=r), there[0]
        )
        errors = [relative_l2(a.cpu(), b.cpu()) for a, b in zip(found, expected, strict=True)]
        if not (errors[0] <= 1e-5 and errors[1] <= ROUNDOFF[dtype]):
            yield f"reduction {reduction!r}: loss off by {errors[0]:.1e}, gradient by {errors[1]:.1e}"
    illegal = labels.clone()
    illegal[0] = 2**40
    losses, grad = loss_and_grad(
        lambda z: case.loss(z, illegal.to(device), validate=False, reduction="none", backend=backend),
        there[0],
    )
    rows = losses.cpu().isnan().tolist(), grad.cpu().isnan().all(1).tolist()
    if rows != ([True] + [False] * (n - 1),) * 2:
        yield f"an illegal label in row 0: rows of NaN are {rows}"


def _other_ops(backend: str, device: str) -> Iterator[str]:
    labels = torch.randint(-2, 45, (1000,))
    counts = gk.label_counts(labels.to(device), 40, validate=False, backend=backend).cpu()
    if counts.tolist() != torch.bincount(labels[(labels >= 0) & (labels <= 40)], minlength=41).tolist():
        yield "label_counts: wrong"
    grad = torch.randn(7, 33)
    for first in (1.0, 2.0):
        scaled = grad.clone().to(device)
        overload("scale_grad_", backend)(scaled, *(torch.tensor(f, device=device) for f in (first, 3.0)), 31)
        factors = torch.tensor([first] * 31 + [3.0] * 2)
        if not torch.equal(scaled.cpu(), grad * factors):
            yield f"scale_grad_ by {first:g} and 3: wrong"
    z = torch.linspace(-3, 8, 1001)

    def scores(x: Tensor) -> Tensor:
        return gk.gumbel_activation(x, temperature=1.5, backend=backend if x.device.type == device else None)

    found, expected = loss_and_grad(scores, z.to(device)), loss_and_grad(scores, z.double())
    if max(relative_l2(a.cpu(), b) for a, b in zip(found, expected, strict=True)) > 1e-6:
        yield "gumbel_activation: wrong"
    sums = torch.zeros(2, 38, dtype=torch.float64, device=device)
    case = BY_NAME["gumbel"]
    logits, labels = case.inputs(300, 37)
    case.loss(logits.to(device), labels.to(device), class_gradients=sums, backend=backend)
    expected_sums = torch.zeros(2, 38, dtype=torch.float64)
    case.loss(logits, labels, class_gradients=expected_sums, backend="reference")
    if relative_l2(sums.cpu(), expected_sums) > 1e-6:
        yield "class_gradients: wrong"


def main(argv: list[str] | None = None) -> int:
    """0, or 1 with a line for each failure."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu.small_set", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--backend", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--all", action="store_true", help="every loss, not one for each way through a kernel"
    )
    options = parser.parse_args(argv)
    cases = CASES if options.all else [BY_NAME[name] for name in FEW]
    failures, calls = list(_other_ops(options.backend, options.device)), 0
    for case in cases:
        for n, c in SHAPES:
            for dtype in ROUNDOFF:
                calls += 1
                where = f"{case.name} [{n}, {c + case.extra_logits}] {dtype}"
                found = _failures(case, options.backend, options.device, n, c, dtype)
                failures += [f"{where}: {failure}" for failure in found]
    if options.device == "cuda":
        torch.cuda.synchronize()
    print(*failures, f"{options.backend}: {len(failures)} failures in {calls} calls", sep="\n")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
