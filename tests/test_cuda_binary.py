"""What nvcc makes of the CUDA kernels: nothing spilled, memory moved 16 bytes at a time where it can be, no
more instructions and special functions for an element than planned. Needs nvcc and cuobjdump, no GPU.

A row of the table is a tuned kernel with its plan, an instruction count and a special function count for
each element of a common step (see tests/sass.py), which it may exceed by a fifth. The plan comes from what
one H200 can issue while it moves the bytes of an element (float32: 62 instructions and 7.8 special functions,
16 bits: 31 and 3.9) where the kernel is to run at the speed of memory, else from what its formula needs. A
softmax row lies in registers, and its step is the whole row with what it takes beside its columns; one that
does not fit goes through the general kernel, whose passes are counted one by one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import sass
from tests.sass import LOAD, LOAD_32, SPECIAL, STORE, STORE_32, Kernel

SOURCES = sorted((sass.ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURE = "sm_90"
MARGIN = 1.2
ELEMENTS = {"float": 4, "__nv_bfloat16": 8, "__half": 8}
"""In a 16-byte vector."""
PHILOX = r"IMAD\.WIDE\.U32 .*-0x2daee0ad"
"""A multiplication of the generator."""


@dataclass(frozen=True)
class Plan:
    """What an element may cost in the kernel of this name, for all instances that have the arguments."""

    kernel: str
    arguments: str
    type: str
    instructions: float
    special: float
    registers: int
    via: tuple[str, ...] = ()
    vectors: int = 1
    columns: float | None = None  # that a thread has of a row; None: whole vectors

    def is_of(self, kernel: Kernel) -> bool:
        name = (
            kernel.name.replace("gol::cuda::", "").replace("(anonymous namespace)::", "").replace(" >", ">")
        )
        return f"{self.kernel}<{self.type}, {self.arguments}>" in name


def _flat(
    arguments: str, registers: int, bfloat16: tuple[float, float], float32: tuple[float, float]
) -> list[Plan]:
    via = (PHILOX,) if arguments.endswith(", draws") else ()
    arguments = arguments.removesuffix(", draws")
    return [
        Plan("bernoulli_flat", arguments, "__nv_bfloat16", *bfloat16, registers, via),
        Plan("bernoulli_flat", arguments, "float", *float32, registers, via),
    ]


GUMBEL, SIGMOID, PROBIT = "FlatGumbel<float, false, true>", "FlatSigmoid<float>", "FlatProbit<float>"
NONE, SELECT, DRAW, WEIGHTS, SEESAW = (f"(Policy){i}" for i in range(5))
PLANS = [
    *_flat(f"{GUMBEL}, {NONE}, false", 48, (26, 2.4), (34, 2.5)),
    *_flat(f"{GUMBEL}, {SELECT}, false", 64, (31, 2.4), (40, 2.5)),
    *_flat(f"{GUMBEL}, {DRAW}, false", 64, (31, 2.4), (40, 2.5)),
    *_flat(f"{GUMBEL}, {DRAW}, false, draws", 64, (45, 2.4), (62, 2.5)),
    *_flat(f"{GUMBEL}, {WEIGHTS}, false", 64, (31, 3.3), (40, 3.3)),
    *_flat(f"{GUMBEL}, {WEIGHTS}, true", 80, (34, 3.3), (42, 3.3)),
    *_flat(f"{GUMBEL}, {SEESAW}, false", 80, (34, 3.4), (42, 3.5)),
    *_flat(f"{SIGMOID}, {NONE}, false", 48, (31, 2.2), (38, 2.3)),
    *_flat(f"{PROBIT}, {NONE}, false", 48, (45, 3.2), (52, 3.3)),
]


# Of softmax rows.
PLAIN, PRIOR, SEESAW_SQUARE, SEESAW_POWER = (f"(Mode){i}" for i in range(4))


@dataclass(frozen=True)
class Shape:
    """A kernel for rows in registers, and the width at which it is counted."""

    columns: int
    warps: int
    held: int  # columns in a thread
    before: int
    blocks: tuple[int, int]  # on a multiprocessor: of bfloat16, of float32

    def plans(self, mode: str, bfloat16: tuple[float, float], float32: tuple[float, float]) -> Iterator[Plan]:
        for name, plan, blocks in zip(
            ("__nv_bfloat16", "float"), (bfloat16, float32), self.blocks, strict=True
        ):
            arguments = f"{mode}, Shape<{self.warps}, {self.held}, {self.before}, {blocks}>"
            warps = 4 if self.warps == 1 else self.warps  # of a block
            registers = min(128, 65536 // (blocks * 32 * warps) // 8 * 8)
            share = self.columns / (32 * self.warps)
            vectors = self.held // ELEMENTS[name]
            yield Plan("softmax_registers", arguments, name, *plan, registers, (), vectors, share)


OBJECTS365, LVIS, DOUBLE, WIDE, WIDER = (
    Shape(365, 1, 16, 256, (8, 8)),
    Shape(1204, 1, 40, 1024, (6, 5)),
    Shape(2048, 2, 32, 1280, (12, 10)),
    Shape(5120, 4, 40, 3072, (4, 4)),
    Shape(21841, 16, 48, 16384, (1, 1)),
)
PLANS += [
    *OBJECTS365.plans(SEESAW_SQUARE, (34, 2), (34, 2)),
    *DOUBLE.plans(SEESAW_SQUARE, (22, 1.2), (22, 1.2)),
    *LVIS.plans(PLAIN, (12, 1.1), (11, 1.1)),
    *LVIS.plans(PRIOR, (14, 1.1), (13, 1.1)),
    *LVIS.plans(SEESAW_SQUARE, (22, 1.2), (17.4, 1.2)),
    *LVIS.plans(SEESAW_POWER, (22, 2.2), (17.4, 2.2)),
    *WIDE.plans(PLAIN, (12, 1.1), (12, 1.1)),
    *WIDE.plans(SEESAW_SQUARE, (22, 1.2), (22, 1.2)),
    *WIDER.plans(PLAIN, (13, 1.1), (13, 1.1)),
    *WIDER.plans(SEESAW_SQUARE, (24, 1.2), (24, 1.2)),
]


@dataclass(frozen=True)
class Pass:
    """A pass of the general softmax kernel over a float32 row, of which a thread takes ``TURN`` columns at a
    time: loads, stores and special functions of a turn, and what a column may cost."""

    name: str
    reweight: int
    loads: int
    stores: int
    special: int
    instructions: float


TURN = 4
# What a column takes: to load it; whether it is in the row and not the label's (2), and -inf if not (1); less
# the highest, times log2 e (2); an exponential. Then a sum: an addition; or the gradient: times the row's
# ratio, a store. The online sum: the higher of two; of a turn, that it does not subtract -inf (2), and what
# the sum so far is scaled by (3 and an exponential). A table: a load and 0 if not; the prior's addition;
# Seesaw's compensation (3), mitigation (2) and their product, which a sum adds at once. Of a turn: to count,
# compare and jump (3), and two for each pointer. All passes together stay below what float32 has for a column
# that is moved once (62 and 7.8): a row that is read again may come from the second-level cache.
PASSES = [
    Pass("online", 0, 4, 0, 5, 9 + 11 / TURN),
    Pass("gradient", 0, 4, 4, 4, 9 + 7 / TURN),
    Pass("online", 1, 8, 0, 5, 12 + 13 / TURN),
    Pass("gradient", 1, 8, 4, 4, 12 + 9 / TURN),
    Pass("online", 2, 4, 0, 5, 9 + 11 / TURN),
    Pass("weighted", 2, 8, 0, 4, 15 + 7 / TURN),
    Pass("gradient", 2, 8, 4, 4, 17 + 9 / TURN),
]


@pytest.fixture(scope="session")
def kernels(pytestconfig: pytest.Config) -> list[Kernel]:
    """All of csrc/cuda, compiled where it changed; warnings are errors."""
    for tool in ("nvcc", "cuobjdump"):
        if sass.find_tool(tool) is None:
            pytest.skip(f"there is no {tool} (looked in $CUDA_HOME, $PATH, /usr/local/cuda and wheels)")
    assert pytestconfig.cache is not None
    folder = Path(pytestconfig.cache.mkdir("cuda_binary"))
    headers = b"".join(path.read_bytes() for path in sorted((sass.ROOT / "csrc").rglob("*.*h")))

    def compiled(source: Path) -> Path:
        digest = hashlib.sha256(headers + source.read_bytes()).hexdigest()[:16]
        cubin = folder / f"{source.stem}-{ARCHITECTURE}-{digest}.cubin"
        if not cubin.exists():
            for old in folder.glob(f"{source.stem}-{ARCHITECTURE}-*"):
                old.unlink()
            sass.compile_cubin(source, ARCHITECTURE, cubin)
        return cubin

    with ThreadPoolExecutor(2) as pool:
        return [kernel for cubin in pool.map(compiled, SOURCES) for kernel in sass.read_kernels(cubin)]


def test_nothing_is_spilled(kernels: list[Kernel]) -> None:
    assert len(kernels) > 100
    # Not tuned: the general kernels, whose double erfc has a stack.
    tuned = [k for k in kernels if "_general<" not in k.name]
    spilled = {k.name: k.stack for k in tuned if k.stack > 0 or k.count(r"^(LDL|STL)")}
    assert not spilled


@pytest.mark.parametrize(
    "plan", PLANS, ids=lambda p: f"{p.kernel}<{p.type}, {p.arguments}>{'-via' * len(p.via)}"
)
def test_plan(kernels: list[Kernel], plan: Plan) -> None:
    (kernel,) = [k for k in kernels if plan.is_of(k)]
    step = kernel.step(*plan.via, stores=plan.vectors)
    loads, stores = (sum(bool(re.search(pattern, text)) for text in step) for pattern in (LOAD, STORE))
    assert loads == stores >= plan.vectors
    elements = plan.columns or loads * ELEMENTS[plan.type]
    special = sum(text.startswith("MUFU") for text in step)
    assert len(step) / elements <= MARGIN * plan.instructions
    assert special / elements <= MARGIN * plan.special
    assert kernel.registers <= plan.registers


@pytest.mark.parametrize("plan", PASSES, ids=lambda p: f"softmax_general-{p.reweight}-{p.name}")
def test_general_softmax(kernels: list[Kernel], plan: Pass) -> None:
    name = f"softmax_general<float, (gol::SoftmaxReweight){plan.reweight}>"
    (kernel,) = [k for k in kernels if name in k.name]
    # A turn is known by its loads, which all go before what is then done, and by that.
    done = (STORE_32,) * plan.stores or (SPECIAL,) * plan.special
    turn = kernel.turn(LOAD_32, *(LOAD_32,) * (plan.loads - 1), *done)
    loads, stores, special = (
        sum(bool(re.search(pattern, text)) for text in turn) for pattern in (LOAD_32, STORE_32, SPECIAL)
    )
    print(f"{plan.name} {plan.reweight}: {len(turn) / TURN} instructions, planned {plan.instructions}")
    assert (loads, stores, special) == (plan.loads, plan.stores, plan.special)
    assert len(turn) / TURN <= MARGIN * plan.instructions
    assert kernel.stack == 0
    assert kernel.registers <= 64
