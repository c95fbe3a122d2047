"""bench/gpu_check.sh and the small set of calls that it runs. A stand-in for Python plays the stages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gol_kernels.backends import reference
from tests.gpu import small_set

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu_check.sh"
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a shell script for Linux")

# Answers as the machine and the stages would; $FAIL is the stage that fails, $HANG the one that hangs.
PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case "$*" in
    *"import torch;"*) echo 9.0; exit ;;
    *"import ninja"* | *"import pytest"* | *"import xdist"*) [[ " $MISSING " != *" ${2#import } "* ]]; exit ;;
    *"pip install"*) mkdir -p "${@: -2:1}" ;;
    --version) echo Python 3.12.3; exit ;;
esac
for stage in setup.py pytest small_set "bench gpu" "bench plot" "bench training" "bench learning" choose; do
    [[ "$*" == *"$stage"* ]] || continue
    [[ $HANG == "$stage" ]] && sleep 60
    [[ $FAIL == "$stage" ]] && { echo "FAILED tests/gpu/x.py::test_y"; exit 3; }
done
[[ "$*" == *"-m pytest"* ]] && echo "7 passed, 1 skipped in 0.1s"
[[ "$*" == *small_set* ]] && echo "native: 0 failures in 72 calls"
[[ "$*" == *"bench gpu"* ]] && { echo "PASS gumbel 0.95 of copy"; echo "OMP ${OMP_NUM_THREADS-unset}"; }
[[ "$*" == *"bench learning"* ]] && echo "| Gumbel | 20.0 |"
[[ "$*" == *"bench training"* ]] && echo "gol, ours: 31.0 images/s, step 500.0 ms; OMP $OMP_WAIT_POLICY"
exit 0
"""
SANITIZER = """#!/usr/bin/env bash
echo "sanitizer $*, caching off: $PYTORCH_NO_CUDA_MEMORY_CACHING" >>"$CALLS"
echo "========= ERROR SUMMARY: 0 errors"
while [[ $1 == -* ]]; do shift; [[ $1 == -* ]] || shift; done
exec "$@"
"""


class Check:
    """The script in a world of stand-ins; ``run`` gives its exit status."""

    def __init__(self, folder: Path) -> None:
        self.out, self.calls_file = folder / "out", folder / "calls"
        bin_ = folder / "bin"
        bin_.mkdir()
        nothing = "#!/bin/sh\nexit 0\n"
        for name, text in (
            ("python", PYTHON),
            ("compute-sanitizer", SANITIZER),
            ("nvidia-smi", "#!/bin/sh\necho NVIDIA Z80\n"),
            ("nvcc", nothing),
            ("ninja", nothing),
        ):
            (bin_ / name).write_text(text)
            (bin_ / name).chmod(0o755)
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("GOL_", "OMP_"))}
        self.environment = plain | {
            "PATH": f"{bin_}:{os.environ['PATH']}",
            "PYTHON": str(bin_ / "python"),
            "CALLS": str(self.calls_file),
            "FAIL": "",
            "HANG": "",
            "MISSING": "",
        }

    def run(self, *arguments: str, script: Path = SCRIPT, **variables: str) -> int:
        self.calls_file.write_text("")
        command = ["bash", str(script), *arguments, str(self.out)]
        environment = self.environment | variables
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert "unbound variable" not in done.stderr, done.stderr
        return done.returncode

    @property
    def summary(self) -> str:
        return (self.out / "summary.txt").read_text()

    def verdict(self, stage: str) -> str:
        (line,) = (line for line in self.summary.splitlines() if line.startswith(f"{stage} "))
        return line.split(" s  ")[1]

    @property
    def calls(self) -> str:
        return self.calls_file.read_text()


@pytest.fixture
def check(tmp_path: Path) -> Check:
    return Check(tmp_path)


ALL = ("--stages", "build,tests,sanitizers,bench,training,learning")


def test_all_stages(check: Check) -> None:
    assert check.run(*ALL) == 0
    for stage in (
        "build",
        "both backends on CUDA",
        "tests/gpu, CUDA",
        "tests/gpu, Triton",
        "memcheck, native",
        "memcheck, triton",
        "racecheck, native",
        "racecheck, triton",
        "bench",
        "plot",
        "training",
        "learning",
    ):
        assert check.verdict(stage) == "PASS"
    for line in ("NVIDIA Z80", "compute capability 9.0, Python 3.12.3", "7 passed, 1 skipped in 0.1s"):
        assert line in check.summary
    assert check.summary.count("ERROR SUMMARY: 0 errors") == 4
    assert "PASS gumbel 0.95 of copy" in check.summary
    assert "gol, ours: 31.0 images/s, step 500.0 ms; OMP PASSIVE" in check.summary
    assert f"bench training --budget-s 150 --records {check.out}/training.jsonl" in check.calls
    assert "| Gumbel | 20.0 |" in check.summary
    assert f"--records {check.out}/learning.jsonl --budget-s 480" in check.calls
    assert "setup.py build_ext --inplace" in check.calls
    assert "-k not triton" in check.calls
    assert check.calls.count("sanitizer --tool") == 4
    assert check.calls.count("caching off: 1") == 4
    assert "OMP unset" in (check.out / "bench.log").read_text()  # what the tests set is theirs alone
    assert len(list(check.out.iterdir())) <= 8


@pytest.mark.parametrize(
    ("fail", "verdict"),
    [
        ("setup.py", "build"),
        ("pytest", "tests/gpu, CUDA"),
        ("small_set", "memcheck, triton"),
        ("bench gpu", "bench"),
        ("bench training", "training"),
        ("bench learning", "learning"),
    ],
)
def test_a_stage_that_fails_does_not_stop_the_others(check: Check, fail: str, verdict: str) -> None:
    assert check.run(*ALL, FAIL=fail) == (1 if fail == "small_set" else 3)
    lines = check.summary.splitlines()
    assert check.verdict(verdict) == "FAIL, status 3"
    assert sum(line.endswith("PASS") for line in lines) >= 6
    assert lines[-1].split("; ")[1] == f"worst status {1 if fail == 'small_set' else 3}"
    if fail == "pytest":
        assert "FAILED tests/gpu/x.py::test_y" in lines


def test_a_stage_that_hangs_is_ended(check: Check) -> None:
    assert check.run("--stages", "build,bench", HANG="setup.py", BUILD_S="1") == 124
    assert check.verdict("build") == "TIMEOUT after 1 s"
    assert check.verdict("bench") == "PASS"
    assert "-m pytest" not in check.calls


def test_without_pytest_a_plain_script_runs(check: Check) -> None:
    assert check.run("--stages", "tests", MISSING="pytest") == 0
    assert "no pytest: a small set of calls instead of tests/gpu" in check.summary
    assert "-m tests.gpu.small_set --backend native --all" in check.calls
    assert "-m tests.gpu.small_set --backend triton --all" in check.calls
    assert "-m pytest" not in check.calls


def test_without_xdist_one_process_runs_all(check: Check) -> None:
    check.run("--stages", "tests")
    assert "--dist worksteal" in check.calls
    check.run("--stages", "tests", MISSING="xdist")
    assert "--dist" not in check.calls


def test_wheels_are_installed_aside(check: Check, tmp_path: Path) -> None:
    """To a folder that is gone in the end, and only where there are any."""
    check.run("--stages", "tests")
    assert "pip install" not in check.calls
    for folder in ("bench", "wheels"):
        (tmp_path / "tree" / folder).mkdir(parents=True)
    script = Path(shutil.copy(SCRIPT, tmp_path / "tree" / "bench"))
    (tmp_path / "tree" / "wheels" / "pytest-1-py3-none-any.whl").touch()
    assert check.run("--stages", "tests", script=script) == 0
    (install,) = (line for line in check.calls.splitlines() if "pip install" in line)
    words = install.split()
    assert words[-1] == "wheels/pytest-1-py3-none-any.whl"
    assert {"--no-index", "--no-deps"} < set(words)
    assert not Path(words[words.index("--target") + 1]).exists()


def test_dry_run(check: Check) -> None:
    """No GPU is asked for anything."""
    assert check.run("--dry-run", *ALL) == 0
    assert "import torch;" not in check.calls
    assert "sanitizer --tool" not in check.calls
    assert "tests/gpu, collected" in check.summary
    assert "bench gpu --records" in check.calls
    assert check.calls.count("--dry-run") == 2  # of both benches
    assert "bench training --dry-run" in check.calls
    assert "data.min_sizes=[64] data.test_size=64" in check.calls
    assert "compute capability 9.0" in check.summary


def test_parts_add_to_one_folder(check: Check) -> None:
    assert check.run("--stages", "tests", FAIL="pytest") == 3
    assert check.run("--stages", "bench") == 0
    assert check.verdict("tests/gpu, CUDA") == "FAIL, status 3"
    assert check.verdict("bench") == "PASS"
    assert {"tests.log", "bench.log"} < {path.name for path in check.out.iterdir()}


@pytest.mark.parametrize("wrong", [["--fast"], ["--stages", "build,test"]])
def test_wrong_option(check: Check, wrong: list[str]) -> None:
    assert check.run(*wrong) == 2
    assert check.calls == ""


# --- the small set --------------------------------------------------------------------------------
def test_small_set_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert small_set.main(["--backend", "reference", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.strip() == "reference: 0 failures in 72 calls"


def test_small_set_notices(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A gradient that is 1 % off in half precision, and a label that gave no NaN."""
    finish = reference._finish_grad

    def wrong(grad: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        factor = 1.01 if dtype == torch.float16 else 1.0
        return finish(grad * factor, scale.nan_to_num(0.0), dtype)

    monkeypatch.setattr(reference, "_finish_grad", wrong)
    monkeypatch.setattr(small_set, "SHAPES", ((5, 37),))
    assert small_set.main(["--backend", "reference", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "gumbel [5, 38] torch.float16: reduction 'sum': loss off by" in out
    assert "gradient by 1.0e-02" in out
    assert "seesaw [5, 39] torch.float32: an illegal label in row 0" in out
    assert "gumbel [5, 38] torch.float32: reduction" not in out
