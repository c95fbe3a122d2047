"""What is in a compiled CUDA kernel: its resources, and the instructions of a step of its main loop.

A kernel's loop holds branches that few threads take: a positive, a row's end. What a common step costs is the
cheapest way through the loop that still loads and stores: from a 128-bit load of global memory by a 128-bit
store back to the same load, along the kernel's control flow. On that way an instruction takes one issue slot,
and one of the special function unit, which is an eighth as wide, eight. `via` names instructions (regular
expressions, in order) that the way must pass too, to count a branch on purpose.
"""

from __future__ import annotations

import heapq
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOAD, STORE = r"^LDG\.E\.(\w+\.)*128", r"^STG\.E\.(\w+\.)*128"
LOAD_32, STORE_32 = r"^LDG\.E(\.CONSTANT)? ", r"^STG\.E "
SPECIAL = r"^MUFU"
SPECIAL_COST = 8

_LINE = re.compile(r"^\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*(?P<text>.*?);")
_GUARDED = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+@")
_TARGET = re.compile(r"0x[0-9a-f]+")


def find_tool(name: str) -> str | None:
    """A tool of the CUDA toolkit: on PATH, in a toolkit, or in a wheel that brings it along."""
    packages = Path(sysconfig.get_paths()["purelib"])
    homes = [os.environ[variable] for variable in ("CUDA_HOME", "CUDA_PATH") if variable in os.environ]
    places = [
        *(os.path.join(home, "bin") for home in homes),
        os.environ.get("PATH", ""),
        "/usr/local/cuda/bin",
        *map(str, packages.glob("nvidia/*/bin")),
        str(packages / "triton/backends/nvidia/bin"),
    ]
    return shutil.which(name, path=os.pathsep.join(places))


def _output(*command: str | Path) -> str:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stderr}"
    return result.stdout


def compile_cubin(source: Path, architecture: str, target: Path) -> None:
    """Warnings are errors, as in csrc/cuda."""
    nvcc = find_tool("nvcc")
    assert nvcc is not None
    warnings = ["-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror"]
    include = f"-I{ROOT / 'csrc'}"
    _output(
        nvcc, "-std=c++17", "-O3", *warnings, include, f"-arch={architecture}", "-cubin", source, "-o", target
    )


@dataclass
class Kernel:
    name: str  # demangled
    registers: int = 0
    stack: int = 0  # bytes: arrays that are indexed, and spills
    code: dict[int, str] = field(default_factory=dict)  # address -> instruction, its guard left out
    guarded: set[int] = field(default_factory=set)

    def count(self, pattern: str) -> int:
        """Instructions of the whole kernel."""
        return sum(bool(re.search(pattern, text)) for text in self.code.values())

    def step(self, *via: str, stores: int = 1) -> list[str]:
        """The instructions of a common step of the main loop, which stores so many vectors."""
        return self.turn(LOAD, *via, *(STORE,) * stores)

    def turn(self, load: str, *via: str) -> list[str]:
        """The instructions of the cheapest loop from such a load by others, in this order, back to it."""
        successors = self._successors()
        goals = [self._addresses(pattern) for pattern in via]
        ways = [
            way
            for start in self._addresses(load)
            if (way := self._cheapest(successors, start, [*goals, {start}]))
        ]
        assert ways, f"{self.name} has no loop from {load} by {via} back to it"
        cheapest = min(ways, key=self._cost)
        assert len(set(cheapest)) == len(cheapest), f"{self.name}: the step is more than one turn of the loop"
        return [self.code[address] for address in cheapest]

    def _addresses(self, pattern: str) -> set[int]:
        return {address for address, text in self.code.items() if re.search(pattern, text)}

    def _cost(self, way: list[int]) -> int:
        return sum(SPECIAL_COST if self.code[address].startswith("MUFU") else 1 for address in way)

    def _successors(self) -> dict[int, list[int]]:
        order = list(self.code)
        following = dict(pairwise(order))
        reunions: dict[str, set[int]] = {}  # where the threads of a barrier go on together
        for text in self.code.values():
            if text.startswith("BSSY"):
                barrier, target = re.search(r"(B\d+), (0x[0-9a-f]+)", text).groups()  # type: ignore[union-attr]
                reunions.setdefault(barrier, set()).add(int(target, 16))
        result = {}
        for address, text in self.code.items():
            onward = [following[address]] if address in following else []
            if text.startswith("BRA") and not text.startswith(("BRA.DIV", "BRA.CONV")):
                target = int(_TARGET.findall(text)[-1], 16)
                conditional = address in self.guarded or re.match(r"BRA(\.\w+)* !?U?P", text)
                onward = [target, *onward] if conditional else [target]
            elif text.startswith("EXIT"):
                onward = onward if address in self.guarded else []
            elif text.startswith("BSYNC"):
                targets = reunions.get(re.search(r"B\d+$", text.strip())[0], set())  # type: ignore[index]
                if not targets & set(onward):
                    onward = sorted(targets)
            result[address] = onward
        return result

    def _cheapest(
        self, successors: dict[int, list[int]], start: int, goals: Sequence[set[int]]
    ) -> list[int] | None:
        """The addresses after start, by one of each of the goals in turn up to one of the last."""
        queue, cost, before = [(0, start, 0)], {(start, 0): 0}, {}
        while queue:
            so_far, here, passed = heapq.heappop(queue)
            if passed == len(goals):
                way, place = [], (here, passed)
                while place in before:
                    way.append(place[0])
                    place = before[place]
                return way[::-1]
            if cost[here, passed] < so_far:
                continue
            for there in successors[here]:
                place, total = (there, passed + (there in goals[passed])), so_far + self._cost([there])
                if total < cost.get(place, total + 1):
                    cost[place], before[place] = total, (here, passed)
                    heapq.heappush(queue, (total, *place))
        return None


def read_kernels(cubin: Path) -> list[Kernel]:
    """Every kernel of a cubin."""
    cuobjdump, demangle = find_tool("cuobjdump"), shutil.which("c++filt") or find_tool("cu++filt")
    assert cuobjdump is not None
    assert demangle is not None
    kernels: dict[str, Kernel] = {}
    for line in _output(cuobjdump, "-res-usage", cubin).splitlines():
        if match := re.search(r"Function (\S+):", line):
            kernels[match[1]] = kernel = Kernel(_output(demangle, match[1]).strip())
        elif match := re.search(r"REG:(\d+) STACK:(\d+)", line):
            kernel.registers, kernel.stack = int(match[1]), int(match[2])
    for line in _output(cuobjdump, "-sass", cubin).splitlines():
        if match := re.search(r"Function : (\S+)", line):
            kernel = kernels[match[1]]
        elif match := _LINE.match(line):
            kernel.code[int(match["address"], 16)] = match["text"].strip()
            if _GUARDED.match(line):
                kernel.guarded.add(int(match["address"], 16))
    return list(kernels.values())
