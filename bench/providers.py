"""Who is timed: each provider turns a batch into a step that returns the loss and d loss / d logits."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gol_kernels.backends import choose, native, status

from .cases import Batch, Case, Form

INSTRUCTION_SETS = ("avx512", "avx2", "generic")
LOSS_TOLERANCE = 2e-5
"""Relative. Inductor's float32 sum of five million terms is up to 5e-6 off, eager PyTorch's and ours 1e-7."""

ROUNDOFF = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Largest relative error of a gradient's rounding to the logits' dtype."""

YARDSTICKS = {"liger": "liger-kernel", "quack": "quack-kernels"}
"""Other projects' cross-entropy kernels by package: they move the same bytes as every loss here."""

YARDSTICK_SLACK = 8
"""How much further than ours a yardstick may be off: some round sums or losses to the logits' dtype."""

Step = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Provider:
    """name: "ours avx512", "released", "compiled", ...; "copy" moves the bytes and computes nothing.

    instruction_set: of the CPU kernels, "" on a GPU. yardstick: another project's kernel for the same loss.
    """

    name: str
    instruction_set: str
    step: Callable[[Batch], Step]
    yardstick: bool = False

    @property
    def computes(self) -> bool:
        """Whether the step's result is the loss, to be checked."""
        return self.name != "copy"

    @property
    def ours(self) -> bool:
        return self.name.startswith("ours")


class Refused(Exception):
    """A provider computes something else than the others."""


def providers(case: Case) -> list[Provider]:
    """All that run on the CPU: ``eager_providers`` and what torch.compile makes of both baselines."""
    return [*eager_providers(case), *compiled_providers(case, _widest())]


def eager_providers(case: Case) -> list[Provider]:
    """Ours with each instruction set, the released formula, the copy. The baselines take the widest set."""
    ours = [Provider(f"ours {name}", name, _native(case, name)) for name in runnable_instruction_sets()]
    return [
        *ours,
        Provider("released", _widest(), _autograd(case.released)),
        Provider("copy", _widest(), _copy),
    ]


def compiled_providers(case: Case, instruction_set: str = "") -> list[Provider]:
    """torch.compile of the released formula and of the closed forms, for one shape: no symbolic sizes."""
    torch.compiler.reset()  # it would refuse to compile the same code again for a ninth shape or form
    compiled_released = replace(case.released, function=torch.compile(case.released.function, dynamic=False))
    return [
        Provider("compiled released", instruction_set, _autograd(compiled_released)),
        *(Provider(name, instruction_set, _compiled(form)) for name, form in case.closed.items()),
    ]


def device_providers(case: Case, device: str, *, compiled: bool) -> tuple[list[Provider], list[str]]:
    """All that run on a device, with and without torch.compile, and the reasons why others do not."""
    found, absent = [], []
    for backend in ("native", "triton"):
        try:
            choose("bernoulli_loss", device, backend)
        except RuntimeError as reason:
            absent.append(str(reason))
            continue
        found.append(Provider(f"ours {backend}", "", _ours(case, backend)))
    if case.module is not None and found:
        found.append(Provider("ours module", "", _module(case)))
    found.append(Provider("released", "", _autograd(case.released)))
    if compiled:
        found += compiled_providers(case)
    for name, package in YARDSTICKS.items() if case.name == "softmax" else ():
        try:
            found.append(_yardstick(name))
        except (ImportError, OSError, RuntimeError) as reason:
            absent.append(f"the yardstick {package} cannot be imported: {reason}")
    return [*found, Provider("copy", "", _copy)], absent


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
    gradient = gradient.double() / fixed.upstream
    return {
        "loss": float((loss.double() - expected_loss).abs() / expected_loss.abs()),
        "gradient": float((gradient - expected).norm() / expected.norm()),
    }


def check(provider: Provider, case: Case, batch: Batch) -> dict[str, float]:
    """``errors``. Raises: Refused where one is above its tolerance, or no number."""
    found = errors(provider, case, batch)
    roundoff = ROUNDOFF[batch.logits.dtype]
    loss, gradient = LOSS_TOLERANCE, max(case.tolerance, roundoff)
    if provider.yardstick:
        loss, gradient = YARDSTICK_SLACK * max(loss, roundoff), YARDSTICK_SLACK * gradient
    if not (found["loss"] <= loss and found["gradient"] <= gradient):
        raise Refused(
            f"{case.name}, {provider.name}: not the same loss as the others. Against float64 the loss is "
            f"{found['loss']:.1e} off (allowed {loss:.0e}) and the gradient {found['gradient']:.1e} "
            f"(allowed {gradient:.0e})"
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


def _loss_and_gradient(loss: Tensor, leaf: Tensor, upstream: float = 1.0) -> tuple[Tensor, Tensor]:
    scaled = loss if upstream == 1 else loss * upstream
    return loss.detach(), torch.autograd.grad(scaled, leaf)[0]


def _step(batch: Batch, loss: Callable[[Tensor], Tensor], *, own_logits: bool = False) -> Step:
    """``loss`` and its gradient by autograd. own_logits: it overwrites what it is given."""
    logits = batch.logits.clone() if own_logits else batch.logits.detach()
    leaf = logits.requires_grad_(True)
    return lambda: _loss_and_gradient(loss(leaf), leaf, batch.upstream)


def _ours(case: Case, backend: str) -> Callable[[Batch], Step]:
    return lambda batch: _step(batch, lambda z: case.ours(z, batch, backend))


def _module(case: Case) -> Callable[[Batch], Step]:
    """The loss as training calls it: with its counts and statistics, which move on at every call."""

    def build(batch: Batch) -> Step:
        assert case.module is not None
        module = case.module(batch)
        return _step(batch, lambda z: module(z, batch.labels))

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
    """Half precision is cast first, as mmdet does for its losses: the released formulas need float32."""
    return lambda batch: _step(batch, lambda z: form.function(z.float(), *form.arguments(batch)))


def _compiled(form: Form) -> Callable[[Batch], Step]:
    def function(z: Tensor, upstream: float, *arguments: Tensor | None) -> tuple[Tensor, Tensor]:
        loss, gradient = form.function(z.float(), *arguments)
        return loss, (gradient if upstream == 1 else gradient * upstream).to(z.dtype)

    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    return lambda batch: lambda: compiled(batch.logits, batch.upstream, *form.arguments(batch))


def _copy(batch: Batch) -> Step:
    target = torch.empty_like(batch.logits)
    return lambda: (batch.logits, target.copy_(batch.logits))


def _yardstick(name: str) -> Provider:
    """Raises: whatever the import of the other project raises."""
    if name == "liger":
        function = importlib.import_module("liger_kernel.transformers.functional").liger_cross_entropy
    else:
        function = importlib.import_module("quack.cross_entropy").cross_entropy

    def build(batch: Batch) -> Step:
        return _step(batch, lambda z: function(z, batch.labels), own_logits=name == "liger")

    return Provider(name, "", build, yardstick=True)
