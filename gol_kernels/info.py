"""``python -m gol_kernels.info``: versions, what was built, and which backend each op takes here and why."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import gol_kernels
from gol_kernels import backends

HOW_TO_BUILD = "with torch and a C++ compiler there, in a checkout: pip install --no-build-isolation -v ."


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The NVIDIA driver's version, also where torch is not a CUDA build; None where there is no driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return answer[0] if answer else None


def _gpus() -> list[str]:
    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus]


def _cpu_model() -> str:
    """Name, family and model as Linux knows them, else what Python knows."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    facts = {key.strip(): value.strip() for key, _, value in lines}
    if "model name" not in facts:
        return platform.machine()
    return f"{facts['model name']} (family {facts.get('cpu family')}, model {facts.get('model')})"


def _git(*arguments: str) -> str | None:
    """git's answer about the checkout that this package lies in; None where it does not."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # installed: git would answer for whatever is around it
        return None
    try:
        answer = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def _choice(op: str, device: str) -> dict[str, str]:
    backend, reason = backends.choose(op, device)
    return {"backend": backend, "reason": reason}


def _versions() -> dict[str, str | None]:
    return {
        "gol_kernels": gol_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "driver": _driver(),
    }


def _machine() -> dict[str, Any]:
    return {"cpu": _cpu_model(), "cores": os.cpu_count(), "gpus": _gpus()}


def environment(*packages: str) -> dict[str, Any]:
    """Where and with what a record is made, as JSON-ready values.

    Keys: ``date`` (UTC), ``commit`` and ``dirty`` (of the checkout that runs; None for an installed package),
    ``versions`` (also of the compiler and of ``packages``; None for what is missing), ``machine``.
    """
    commit, changes = _git("rev-parse", "--short=12", "HEAD"), _git("status", "--porcelain")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0).isoformat(),
        "commit": commit,
        "dirty": None if changes is None else bool(changes),
        "versions": {
            **_versions(),
            "compiler": gol_kernels.build_info()["compiler"],
            **{package: _version(package) for package in packages},
        },
        "machine": {**_machine(), "platform": f"{platform.system()} {platform.machine()}"},
    }


def report() -> dict[str, Any]:
    """Everything that the command prints, as JSON-ready values.

    Keys: ``versions`` (None for what is missing), ``machine``, ``build`` (``gol_kernels.build_info()``),
    ``backends`` (name -> None or the reason why it is not usable) and
    ``ops`` (op -> device -> ``{"backend", "reason"}``, for "cpu" and, where torch sees a GPU, "cuda").
    """
    machine = _machine()
    devices = ("cpu", "cuda") if machine["gpus"] else ("cpu",)
    return {
        "versions": _versions(),
        "machine": {**machine, "platform": platform.platform(), "threads": torch.get_num_threads()},
        "build": gol_kernels.build_info(),
        "backends": backends.status(),
        "ops": {op: {device: _choice(op, device) for device in devices} for op in backends.OPS},
    }


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _build_lines(build: dict[str, Any]) -> list[tuple[str, str]]:
    if not build["extension"]:
        return [("extension", f"none: {build['reason']}"), ("", HOW_TO_BUILD)]
    return [
        ("extension", f"{build['file']}, {build['compiler']}"),
        ("CPU kernels", f"{build['cpu_capability']}, {'with' if build['openmp'] else 'without'} OpenMP"),
        ("CUDA kernels", f"for {build['cuda_archs']}" if build["cuda"] else "none"),
    ]


def format_report(facts: dict[str, Any]) -> str:
    """``report()`` as the text that the command prints."""
    versions, machine = facts["versions"], facts["machine"]
    cuda = f"CUDA {versions['cuda']}" if versions["cuda"] else "without CUDA"
    gpus = machine["gpus"] or ["none that torch sees"]
    general = [
        ("gol_kernels", versions["gol_kernels"]),
        ("python", f"{versions['python']}, {machine['platform']}"),
        ("torch", f"{versions['torch']}, {cuda}, {machine['threads']} threads on {machine['cores']} cores"),
        ("triton", versions["triton"] or "not installed"),
        ("driver", versions["driver"] or "none found"),
        ("CPU", machine["cpu"]),
        *(("GPU", gpu) for gpu in gpus),
    ]
    usable = [(name, reason or "usable") for name, reason in facts["backends"].items()]
    chosen = [
        (op, device, choice["backend"], choice["reason"])
        for op, devices in facts["ops"].items()
        for device, choice in devices.items()
    ]
    return "\n".join(
        [
            "Versions",
            *_table(general),
            "Build",
            *_table(_build_lines(facts["build"])),
            "Backends",
            *_table(usable),
            "Ops",
            *_table([("op", "device", "backend", "why"), *chosen]),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gol_kernels.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    as_json = parser.parse_args(argv).json
    facts = report()
    print(json.dumps(facts, indent=2) if as_json else format_report(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
