"""The Triton kernels without a GPU: what the interpreter computes, and what the compiler makes of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import gol_kernels as gk
from gol_kernels import backends
from gol_kernels.backends import triton as backend
from gol_kernels.ops import overload
from tests.cases import BY_NAME

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(backend.unavailable() is not None, reason=str(backend.unavailable()))


# --- Triton is not needed, and not imported before a kernel runs ------------------------------------
def _python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120
    )


def test_import_does_not_import_triton() -> None:
    done = _python("import sys, gol_kernels as gk; gk.available_backends(); print('triton' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


def test_without_triton() -> None:
    done = _python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, gol_kernels as gk\n"
        "from gol_kernels.backends import status\n"
        "print(status()['triton'], float(gk.gumbel_loss(torch.zeros(1, 1), torch.tensor([0]))))"
    )
    assert done.stdout.strip() == "Triton is not installed (pip install triton) 1.0", done.stderr


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("__version__ = '2.9.1'", "Triton 2.9 is too old: 3.6 or newer is needed"),
        ('__version__ = "3.6.0"', None),
        ("__version__ = '10.0.0'", None),
    ],
)
def test_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, reason: str | None) -> None:
    package = tmp_path / "__init__.py"
    package.write_text(source)
    monkeypatch.setattr(
        backend.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(package))
    )
    assert backend.unavailable() == reason


# --- the interpreter ----------------------------------------------------------------------------------
_FILES = ("triton_interpreted", "edge_cases", "family", "autograd", "golden", "compat", "bad_input", "ops")
# The interpreter takes milliseconds for a row: of the tests that go through all cases, some will do.
_CHOSEN = (
    "triton and not threads and not double_backward and not upstream_gradient and not reduction_none"
    " and (not layouts or drop or prior) and not (opcheck and dtype1)"
)


@pytest.mark.slow
def test_interpreted() -> None:
    """The suite with the interpreted kernels as its backend, in a process of its own: a process that has a
    GPU must not set TRITON_INTERPRET."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.triton_interpreter",
        "-p",
        "no:cacheprovider",
    ]
    files = [f"tests/{name if name.startswith('triton') else 'test_' + name}.py" for name in _FILES]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-W", "ignore::RuntimeWarning", "-k", _CHOSEN, *files],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 500  # type: ignore[index]


# --- what the host asks the compiler for -----------------------------------------------------------
@dataclass(frozen=True)
class Request:
    """One specialisation of a kernel."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    num_warps: int


class _NoGPU:
    """The driver of a GPU that runs nothing."""

    def get_current_device(self) -> str:
        return "none"  # the key of the kernels' caches; a GPU's is a number

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Request]]:
    """What the ops, run on CPU tensors, ask the compiler for; nothing is compiled and no kernel runs."""
    import triton
    from triton.runtime.jit import JITFunction

    found: list[Request] = []
    kernels: set[Any] = set()
    idle = SimpleNamespace(
        launch_metadata=lambda *_: None, run=lambda *_: None, function=None, packed_metadata=None
    )

    def compile_nothing(
        self: Any,
        key: str,
        signature: Any,
        device: Any,
        constants: Any,
        options: Any,
        attributes: Any,
        warmup: Any,
    ) -> Any:
        found.append(Request(self, signature, constants, attributes, options.num_warps))
        kernels.add(self)
        self.device_caches[device][0][key] = idle
        return idle

    monkeypatch.setitem(backends._DEVICES, "triton", ("cpu",))
    monkeypatch.setattr(JITFunction, "_do_compile", compile_nothing)
    monkeypatch.setattr(triton.runtime.driver, "_active", _NoGPU())
    yield found
    for kernel in kernels:
        kernel.device_caches.pop("none", None)


@pytest.mark.parametrize("name", ["gumbel", "gumbel-drop", "gumbel-seesaw", "seesaw"])
def test_one_compilation_for_every_number_of_rows(requests: list[Request], name: str) -> None:
    """1 and multiples of 16 among them, which Triton tells apart if it may; nor does the average matter."""
    case, first = BY_NAME[name], 0
    for n in range(1, 51):
        logits, labels = case.inputs(n, 40)
        common = {"validate": False, "backend": "triton"}
        for average in (None, float(n), torch.tensor(float(n))):
            case.loss(logits, labels, avg_factor=average, **common)
        if name != "seesaw":
            sums = torch.zeros(2, logits.shape[1], dtype=torch.float64)
            case.loss(logits, labels, class_gradients=sums, **common)
        overload("scale_grad_", "triton")(logits, torch.tensor(1.0), torch.tensor(float(n)), 7)
        overload("gumbel_activation", "triton")(logits, 1.0, -4.0, 10.0)
        overload("label_counts", "triton")(labels, 40, -100, False)
        first = first or len(requests)
    assert 0 < first == len(requests)


# --- what the compiler makes of it ---------------------------------------------------------------------
@dataclass(frozen=True)
class Resources:
    """Of one kernel, from its machine code."""

    registers: int
    stack: int  # bytes, local memory and spills
    instructions: int
    mufu: int  # instructions of the special function unit
    loads: Counter[int]  # of global memory, by bits
    stores: Counter[int]


def _compiled(request: Request, architecture: int, folder: Path) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(request.kernel, request.signature, request.constants, request.attributes)
    target = GPUTarget("cuda", architecture, 32)
    kernel = triton.compile(source, target=target, options={"num_warps": request.num_warps})
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])

    def dump(what: str) -> str:
        command = [triton.knobs.nvidia.cuobjdump.path, what, str(cubin)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = dump("-res-usage")
    code = [m[1] for m in re.finditer(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]*)", dump("-sass"))]
    names = [name for name in code if name != "NOP"]

    def widths(operation: str) -> Counter[int]:
        found = (
            re.search(r"\.(?:U|S)?(8|16|64|128)\b", name) for name in names if name.startswith(operation)
        )
        return Counter(int(width[1]) if width else 32 for width in found)

    return Resources(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        stack=int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),  # type: ignore[index]
        instructions=len(names),
        mufu=sum(name.startswith("MUFU") for name in names),
        loads=widths("LDG"),
        stores=widths("STG"),
    )


@dataclass(frozen=True)
class Tuned:
    """A kernel that is watched: classes, dtype, and for each column at most 1.2 times these figures."""

    name: str
    classes: int
    dtype: torch.dtype
    width: int  # bits of a load of the logits and of a store of the gradient
    instructions: float
    mufu: float


F32, BF16 = torch.float32, torch.bfloat16
# Of the first six a prototype of the same kernel had these figures; those of the others are their own. Rows
# of 1205 columns cannot be read in vectors. DropLoss's generator, counted too, runs in background rows alone.
TUNED = [
    Tuned("gumbel", 1203, F32, 128, 25.0, 3.4),
    Tuned("gumbel", 1203, BF16, 64, 25.5, 3.4),
    Tuned("softmax", 1203, F32, 128, 21.0, 1.1),
    Tuned("softmax", 1203, BF16, 64, 21.0, 1.1),
    Tuned("seesaw-no-objectness", 1204, F32, 128, 26.5, 2.2),
    Tuned("seesaw-no-objectness", 1204, BF16, 64, 26.5, 2.2),
    Tuned("seesaw", 1203, F32, 32, 30.5, 2.4),
    Tuned("seesaw", 1203, BF16, 16, 34.5, 2.4),
    Tuned("gumbel-eql", 1204, F32, 128, 33.0, 3.5),
    Tuned("gumbel-drop", 1204, F32, 128, 54.5, 3.5),
    Tuned("gumbel-seesaw", 1204, F32, 128, 41.0, 5.4),
    Tuned("sigmoid-weights", 1203, F32, 128, 25.6, 3.3),
    Tuned("probit", 1203, F32, 128, 42.0, 3.5),
]


@pytest.mark.parametrize("tuned", TUNED, ids=lambda t: f"{t.name}-{t.classes}-{str(t.dtype)[6:]}")
def test_resources(requests: list[Request], tuned: Tuned, tmp_path: Path) -> None:
    """No spills, full vectors, and no more instructions than budgeted, on three generations of GPUs."""
    logits, labels = BY_NAME[tuned.name].inputs(2, tuned.classes, tuned.dtype)
    BY_NAME[tuned.name].loss(logits.requires_grad_(True), labels, validate=False, backend="triton")
    request = requests[-1]
    columns, threads = logits.shape[1], 32 * request.num_warps
    vectors = columns * logits.element_size() * 8 // (threads * tuned.width)
    for architecture in (80, 90, 100):
        found = _compiled(request, architecture, tmp_path)
        instructions, mufu = (count * threads / columns for count in (found.instructions, found.mufu))
        print(
            f"sm_{architecture} {tuned.name} {columns} {tuned.dtype}: {found.registers} registers, "
            f"{instructions:.1f} instructions and {mufu:.2f} special functions a column, "
            f"loads {dict(found.loads)}, stores {dict(found.stores)}"
        )
        assert found.stack == 0
        assert found.registers <= 128
        assert found.loads[tuned.width] >= vectors
        assert found.stores[tuned.width] >= vectors
        assert instructions <= 1.2 * tuned.instructions
        assert mufu <= 1.2 * tuned.mufu


@pytest.mark.parametrize(
    ("name", "held"),
    [("gumbel", 2048), ("gumbel-drop", 2048), ("softmax-prior", 32768), ("seesaw-no-objectness", 32768)],
)
def test_code_does_not_grow_with_the_row(
    requests: list[Request], name: str, held: int, tmp_path: Path
) -> None:
    """Rows wider than registers hold are gone through by loops: nothing spilled, and at most a quarter more
    code than the widest that is held."""
    case, limit = BY_NAME[name], 0.0
    for columns in (held, 100_000, 1_000_000):
        logits, labels = case.inputs(2, columns - case.extra_logits)
        case.loss(logits.requires_grad_(True), labels, validate=False, backend="triton")
        found = _compiled(requests[-1], 90, tmp_path)
        print(f"{name} {columns}: {found.instructions} instructions, {found.stack} bytes spilled")
        limit = limit or 1.25 * found.instructions
        assert found.stack == 0
        assert found.instructions <= limit


def test_everything_compiles(requests: list[Request], tmp_path: Path) -> None:
    """What is not watched above: the interpreter accepts more than the compiler does."""
    common: dict[str, Any] = {"validate": False, "backend": "triton"}
    for name, dtype in (
        ("gumbel-unclipped", torch.float16),
        ("gumbel-drop", torch.float64),
        ("probit-seesaw", torch.float64),
        ("sigmoid-acsl", torch.bfloat16),
        ("probit-federated", torch.float32),
        ("softmax-prior", torch.float64),
        ("seesaw", torch.float64),
        ("seesaw", torch.float16),
    ):
        logits, labels = BY_NAME[name].inputs(4, 30, dtype)
        weights = torch.ones(4, dtype=torch.float64)
        leaf = logits.requires_grad_(True)
        BY_NAME[name].loss(
            leaf, labels.int(), row_weights=weights, reduction="none", **common
        ).sum().backward()
        if "-" in name and "softmax" not in name:
            sums = torch.zeros(2, logits.shape[1], dtype=torch.float64)
            BY_NAME[name].loss(leaf, labels, class_gradients=sums, avg_factor=torch.tensor(3), **common)
    gk.gumbel_loss(leaf, labels, compat="gol", **common)
    for dtype in (torch.float32, torch.float64):
        z = torch.zeros(5, dtype=dtype, requires_grad=True)
        gk.gumbel_activation(z, clip=(-4, 10), backend="triton").sum().backward()
        grad, number = torch.zeros(4, 9, dtype=dtype), torch.tensor(1.0, dtype=dtype)
        for split in (7, 9):
            overload("scale_grad_", "triton")(grad, number, number, split)
    gk.label_counts(labels.int(), 40, **common)
    assert len(requests) > 25
    for request in requests:
        assert _compiled(request, 90, tmp_path).instructions > 0
