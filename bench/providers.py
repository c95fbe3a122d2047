"""Who is timed: each provider turns a batch into a step that returns the loss and d loss / d logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gol_kernels.backends import native, status

from .cases import Batch, Case, Form

INSTRUCTION_SETS = ("avx512", "avx2", "generic")
LOSS_TOLERANCE = 2e-5
"""Relative. Inductor's float32 sum of five million terms is up to 5e-6 off, eager PyTorch's and ours 1e-7."""

Step = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Provider:
    """name: "ours avx512", "released", "compiled", ...; "copy" moves the bytes and computes nothing."""

    name: str
    instruction_set: str
    step: Callable[[Batch], Step]

    @property
    def computes(self) -> bool:
        """Whether the step's result is the loss, to be checked."""
        return self.name != "copy"


class Refused(Exception):
    """A provider computes something else than the others."""


def providers(case: Case) -> list[Provider]:
    """All that run here: ``eager_providers`` and what torch.compile makes of both baselines."""
    widest = _widest()
    compiled_released = replace(case.released, function=torch.compile(case.released.function, dynamic=False))
    return [
        *eager_providers(case),
        Provider("compiled released", widest, _autograd(compiled_released)),
        *(Provider(name, widest, _compiled(form)) for name, form in case.closed.items()),
    ]


def eager_providers(case: Case) -> list[Provider]:
    """Ours with each instruction set, the released formula, the copy. The baselines take the widest set."""
    ours = [Provider(f"ours {name}", name, _native(case, name)) for name in runnable_instruction_sets()]
    return [
        *ours,
        Provider("released", _widest(), _autograd(case.released)),
        Provider("copy", _widest(), _copy),
    ]


def _widest() -> str:
    return torch.backends.cpu.get_cpu_capability().lower()


def plain_closed_form(case: Case) -> Provider:
    """The reference, eager and in the logits' own dtype: what PyTorch's float32 operations can give."""
    return Provider("torch closed form", "", _ours(case, "reference"))


def errors(provider: Provider, case: Case, batch: Batch) -> dict[str, float]:
    """Relative errors {"loss", "gradient"} (rel-L2) against the float64 reference, with the draws fixed."""
    fixed = case.fixed(batch)
    leaf = fixed.logits.double().requires_grad_(True)
    expected_loss, expected = _loss_and_gradient(case.ours(leaf, fixed, "reference"), leaf)
    loss, gradient = provider.step(fixed)()
    return {
        "loss": float((loss.double() - expected_loss).abs() / expected_loss.abs()),
        "gradient": float((gradient.double() - expected).norm() / expected.norm()),
    }


def check(provider: Provider, case: Case, batch: Batch) -> dict[str, float]:
    """``errors``. Raises: Refused where one is above LOSS_TOLERANCE or the case's tolerance, or no number."""
    found = errors(provider, case, batch)
    if not (found["loss"] <= LOSS_TOLERANCE and found["gradient"] <= case.tolerance):
        raise Refused(
            f"{case.name}, {provider.name}: not the same loss as the others. Against float64 the loss is "
            f"{found['loss']:.1e} off (allowed {LOSS_TOLERANCE:.0e}) and the gradient "
            f"{found['gradient']:.1e} (allowed {case.tolerance:.0e})"
        )
    return found


def runnable_instruction_sets() -> list[str]:
    """Of our kernels, widest first; none without the extension."""
    if status()["native"] is not None:
        return []
    found = []
    with _instruction_set_restored():
        for name in INSTRUCTION_SETS:
            try:
                native.extension().set_cpu_capability(name)
            except ValueError:
                continue
            found.append(name)
    return found


@contextmanager
def _instruction_set_restored() -> Iterator[None]:
    extension = native.extension()
    before = extension.cpu_capability()
    try:
        yield
    finally:
        extension.set_cpu_capability(before)


def _loss_and_gradient(loss: Tensor, leaf: Tensor) -> tuple[Tensor, Tensor]:
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def _ours(case: Case, backend: str) -> Callable[[Batch], Step]:
    def build(batch: Batch) -> Step:
        leaf = batch.logits.clone().requires_grad_(True)
        return lambda: _loss_and_gradient(case.ours(leaf, batch, backend), leaf)

    return build


def _native(case: Case, instruction_set: str) -> Callable[[Batch], Step]:
    def build(batch: Batch) -> Step:
        extension, run = native.extension(), _ours(case, "native")(batch)

        def step() -> tuple[Tensor, Tensor]:
            with _instruction_set_restored():
                extension.set_cpu_capability(instruction_set)
                return run()

        return step

    return build


def _autograd(form: Form) -> Callable[[Batch], Step]:
    def build(batch: Batch) -> Step:
        leaf = batch.logits.clone().requires_grad_(True)
        return lambda: _loss_and_gradient(form.function(leaf, *form.arguments(batch)), leaf)

    return build


def _compiled(form: Form) -> Callable[[Batch], Step]:
    compiled = torch.compile(form.function, fullgraph=True, dynamic=False)
    return lambda batch: lambda: compiled(batch.logits, *form.arguments(batch))


def _copy(batch: Batch) -> Step:
    target = torch.empty_like(batch.logits)
    return lambda: (batch.logits, target.copy_(batch.logits))
