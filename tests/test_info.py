"""The report of `python -m gol_kernels.info` says what this machine and this build are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gol_kernels
from gol_kernels import backends, info

MISSING = {"extension": False, "reason": "it was left out on purpose", "cuda": False, "cuda_archs": ""}
BUILT = {
    "extension": True,
    "reason": None,
    "cuda": True,
    "cuda_archs": "9.0+PTX",
    "compiler": "gcc 12.2.0",
    "openmp": True,
    "cpu_capability": "avx2",
    "file": "_C.so",
}


def section(text: str, title: str) -> list[str]:
    """The indented lines below a title."""
    lines = text.split("\n")
    below = lines[lines.index(title) + 1 :]
    end = next((i for i, line in enumerate(below) if not line.startswith("  ")), len(below))
    return below[:end]


def test_the_command_prints_the_report_of_this_machine() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gol_kernels.info", "--json"], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    facts = json.loads(done.stdout)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["cuda"] == torch.version.cuda
    assert facts["versions"]["gol_kernels"] == gol_kernels.__version__
    assert facts["machine"]["cores"] == os.cpu_count()
    assert facts["build"] == gol_kernels.build_info()
    assert facts["backends"] == backends.status()
    assert tuple(facts["ops"]) == backends.OPS
    for op, devices in facts["ops"].items():
        assert set(devices) == ({"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"})
        for device, choice in devices.items():
            assert (choice["backend"], choice["reason"]) == backends.choose(op, device)
            assert backends.status()[choice["backend"]] is None


def test_text_names_the_reasons(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gol_kernels, "build_info", lambda: MISSING)
    monkeypatch.setattr(backends, "status", lambda: {"native": MISSING["reason"], "reference": None})
    monkeypatch.setattr(backends, "OPS", ("bernoulli_loss", "label_counts"))
    monkeypatch.setattr(backends, "choose", lambda op, device: ("reference", f"no {op} on {device}"))
    monkeypatch.setattr(info, "_gpus", lambda: ["NVIDIA H200, sm_90, 140 GiB"])
    monkeypatch.setattr(info, "_version", lambda package: None)
    monkeypatch.setattr(info, "_driver", lambda: "580.1")
    assert info.main([]) == 0
    text = capsys.readouterr().out
    versions = dict(line.split(None, 1) for line in section(text, "Versions"))
    assert versions["triton"] == "not installed"
    assert versions["driver"] == "580.1"
    assert versions["GPU"] == "NVIDIA H200, sm_90, 140 GiB"
    assert "it was left out on purpose" in section(text, "Build")[0]
    assert "pip install --no-build-isolation" in section(text, "Build")[1]
    assert [line.split(None, 1) for line in section(text, "Backends")] == [
        ["native", "it was left out on purpose"],
        ["reference", "usable"],
    ]
    assert [line.split(None, 3) for line in section(text, "Ops")] == [
        ["op", "device", "backend", "why"],
        ["bernoulli_loss", "cpu", "reference", "no bernoulli_loss on cpu"],
        ["bernoulli_loss", "cuda", "reference", "no bernoulli_loss on cuda"],
        ["label_counts", "cpu", "reference", "no label_counts on cpu"],
        ["label_counts", "cuda", "reference", "no label_counts on cuda"],
    ]


def test_text_names_what_was_built(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gol_kernels, "build_info", lambda: BUILT)
    info.main([])
    assert section(capsys.readouterr().out, "Build") == [
        "  extension     _C.so, gcc 12.2.0",
        "  CPU kernels   avx2, with OpenMP",
        "  CUDA kernels  for 9.0+PTX",
    ]


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=x", "-c", "user.email=x"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True
    ).stdout


def test_the_environment_names_the_commit_of_its_own_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "checkout/gol_kernels"
    package.mkdir(parents=True)
    monkeypatch.setattr(info, "__file__", str(package / "info.py"))
    git(tmp_path, "init", "-q")  # a repository around it, as around an environment's site-packages
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "not this one")
    facts = info.environment("torchvision", "no_such_package")
    assert (facts["commit"], facts["dirty"]) == (None, None)

    git(package.parent, "init", "-q")
    git(package.parent, "commit", "-q", "--allow-empty", "-m", "this one")
    (package / "info.py").touch()
    facts = info.environment("torchvision", "no_such_package")
    assert facts["commit"] == git(package.parent, "rev-parse", "HEAD")[:12]
    assert facts["dirty"] is True
    git(package.parent, "add", "-A")
    git(package.parent, "commit", "-q", "-m", "clean")
    assert info.environment()["dirty"] is False
    assert facts["versions"]["torchvision"] == metadata.version("torchvision")
    assert facts["versions"]["no_such_package"] is None
    assert facts["versions"]["compiler"] == gol_kernels.build_info()["compiler"]
    assert set(facts["machine"]) == {"cpu", "cores", "gpus", "platform"}
    json.dumps(facts)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (lambda: SimpleNamespace(stdout="580.95.05\n580.95.05\n"), "580.95.05"),
        (lambda: SimpleNamespace(stdout=""), None),
        (lambda: (_ for _ in ()).throw(subprocess.CalledProcessError(9, "nvidia-smi")), None),
    ],
    ids=["two-gpus", "silent", "broken"],
)
def test_the_driver_is_asked_of_nvidia_smi(monkeypatch: pytest.MonkeyPatch, answer, expected) -> None:
    monkeypatch.setattr(info.shutil, "which", lambda tool: f"/bin/{tool}")
    monkeypatch.setattr(info.subprocess, "run", lambda *args, **kwargs: answer())
    assert info._driver() == expected


def test_no_nvidia_smi_means_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info.shutil, "which", lambda tool: None)
    assert info._driver() is None


# --- an extension that does not fit -----------------------------------------------------------------
# The ops get other schemas than the extension at hand has kernels for, as after a change without a build.
OTHER_SCHEMAS = """
define = torch.library.Library.define
torch.library.Library.define = lambda library, schema, **options: define(
    library, schema.replace("softmax_loss_native(", "softmax_loss_native(Tensor unknown, "), **options
)
"""


@pytest.mark.skipif(backends.status()["native"] is not None, reason="there is no extension")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (OTHER_SCHEMAS, "softmax_loss_native"),
        ("torch.__version__ = '1.13.0'", "it was built with torch"),
    ],
    ids=["other-schemas", "other-torch"],
)
def test_an_extension_that_does_not_fit_is_left_out(change: str, reason: str) -> None:
    """The package works without it, nothing of it stays registered, and the report says why."""
    program = "\n".join(
        [
            "import torch",
            change,
            "import gol_kernels as gk, gol_kernels.info",
            "loss = gk.softmax_loss(torch.zeros(1, 2), torch.tensor([0]), validate=False)",
            "kernels = torch._C._dispatch_dump('gol_kernels::bernoulli_loss_native')",
            "assert 'ops.cpp' not in kernels, kernels",
            "print(float(loss))",
            "gol_kernels.info.main([])",
        ]
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loss, _, text = done.stdout.partition("\n")
    assert float(loss) == pytest.approx(0.6931472)
    lines = [line for line in section(text, "Backends") if line.startswith("  native ")]
    assert "gol_kernels._C does not load: " in lines[0]
    assert reason in lines[0]
    assert len(section(text, "Build")) == 2  # the reason is a line, without a stack of calls
