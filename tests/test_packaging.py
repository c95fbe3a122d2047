"""setup.py's decisions, and what ends up in the wheel and the source distribution."""

from __future__ import annotations

import email
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[1]
SWITCHES = [f"GOL_KERNELS_{word}_{part}" for word in ("NO", "FORCE") for part in ("EXT", "CUDA")]
TOOLS = ["CUDA_HOME", "CUDA_PATH", "CXX", "CXXFLAGS", "NVCC_FLAGS", "DEBUG", "TORCH_CUDA_ARCH_LIST"]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs a checkout, not an install")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SWITCHES + TOOLS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, its sources looked for in an empty folder."""
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def fake_torch(cuda: str | None = "13.0", gpus: tuple[tuple[int, int], ...] = ()) -> SimpleNamespace:
    return SimpleNamespace(
        __version__="2.11.0",
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(device_count=lambda: len(gpus), get_device_capability=lambda index: gpus[index]),
    )


def add_source(name: str, root: Path) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).touch()


COMPLETE = {"torch": fake_torch(), "compiler": "/usr/bin/c++", "cuda_home": "/cuda"}


def obstacle(script: ModuleType, part: str, **lacking: object) -> str:
    """Why a machine that lacks only this does not build EXT or CUDA; "" where it does."""
    try:
        script.check(part, **{**COMPLETE, **lacking})
    except RuntimeError as error:
        return str(error)
    return ""


class TestDecision:
    @pytest.fixture(autouse=True)
    def _cuda_source(self, tmp_path: Path) -> None:
        add_source("csrc/cuda/loss.cu", tmp_path)

    def test_nothing_is_left_out_of_a_complete_machine(self, script: ModuleType) -> None:
        assert obstacle(script, "EXT") == obstacle(script, "CUDA") == ""

    @pytest.mark.parametrize(
        ("lacking", "word"),
        [({"torch": None}, "torch cannot be imported"), ({"compiler": None}, "no C++ compiler")],
    )
    def test_pure_python(self, script: ModuleType, lacking: dict, word: str) -> None:
        assert word in obstacle(script, "EXT", **lacking)
        assert obstacle(script, "CUDA", **lacking) == obstacle(script, "EXT", **lacking)

    @pytest.mark.parametrize(
        ("lacking", "word"),
        [({"torch": fake_torch(cuda=None)}, "not a CUDA build"), ({"cuda_home": ""}, "no nvcc")],
    )
    def test_cpu_kernels_only(self, script: ModuleType, lacking: dict, word: str) -> None:
        assert obstacle(script, "EXT", **lacking) == ""
        assert word in obstacle(script, "CUDA", **lacking)

    def test_no_cuda_sources(self, script: ModuleType, tmp_path: Path) -> None:
        (tmp_path / "csrc/cuda/loss.cu").unlink()
        assert obstacle(script, "EXT") == ""
        assert obstacle(script, "CUDA") == "csrc/cuda has no sources"

    @pytest.mark.parametrize(("value", "left_out"), [("1", True), ("yes", True), ("0", False), ("", False)])
    def test_no_switches(
        self, script: ModuleType, monkeypatch: pytest.MonkeyPatch, value: str, left_out: bool
    ) -> None:
        monkeypatch.setenv("GOL_KERNELS_NO_CUDA", value)
        assert obstacle(script, "EXT") == ""
        assert obstacle(script, "CUDA") == ("GOL_KERNELS_NO_CUDA is set" if left_out else "")
        monkeypatch.setenv("GOL_KERNELS_NO_EXT", value)
        for part in ("EXT", "CUDA"):
            assert obstacle(script, part) == ("GOL_KERNELS_NO_EXT is set" if left_out else "")


class TestAttempts:
    """What `build` tries in turn, with `setup` only noted down."""

    @pytest.fixture
    def runs(self, script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
        """What each `setup` was to build: for which CUDA architectures, "" for none, or "pure" Python."""
        found: list[str] = []
        add_source("csrc/cuda/loss.cu", tmp_path)
        monkeypatch.setattr(sys, "argv", ["setup.py", "bdist_wheel"])
        monkeypatch.setitem(os.environ, "CUDA_HOME", "")  # restores both after `build` has set them
        monkeypatch.setitem(os.environ, "TORCH_CUDA_ARCH_LIST", "9.0")
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(script, "find_cuda_home", lambda wheels: "/cuda")
        monkeypatch.setattr(script, "compile_options", lambda archs, wheels: {"archs": archs})
        monkeypatch.setattr(script, "setup", lambda archs="pure": found.append(archs))
        return found

    def test_a_complete_machine_builds_with_cuda_kernels_once(
        self, script: ModuleType, runs: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        script.build()
        assert runs == ["9.0"]
        assert os.environ["CUDA_HOME"] == "/cuda"
        assert capsys.readouterr().out.startswith(
            f"gol_kernels: CUDA kernels: yes, torch {torch.__version__}"
        )

    @pytest.mark.parametrize("error", [RuntimeError("bad nvcc"), SystemExit("bad nvcc")])
    def test_a_build_that_fails_is_followed_by_the_next(
        self,
        script: ModuleType,
        runs: list[str],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        error: BaseException,
    ) -> None:
        noted = script.setup

        def fail(archs: str = "pure") -> None:
            noted(archs)
            if archs != "pure":
                raise error

        monkeypatch.setattr(script, "setup", fail)
        script.build()
        assert runs == ["9.0", "", "pure"]
        lines = capsys.readouterr().out.splitlines()
        assert [line for line in lines if "yes" not in line] == [
            "gol_kernels: CUDA kernels: no, bad nvcc",
            "gol_kernels: extension: no, bad nvcc",
        ]

    @pytest.mark.parametrize(
        ("switch", "lacking", "tried"),
        [
            ("GOL_KERNELS_FORCE_EXT", "which", []),
            ("GOL_KERNELS_FORCE_CUDA", "which", []),
            ("GOL_KERNELS_FORCE_CUDA", "find_cuda_home", []),
            ("GOL_KERNELS_FORCE_EXT", "find_cuda_home", [""]),  # content without CUDA
        ],
    )
    def test_force_switches_name_the_obstacle(
        self,
        script: ModuleType,
        runs: list[str],
        monkeypatch: pytest.MonkeyPatch,
        switch: str,
        lacking: str,
        tried: list[str],
    ) -> None:
        monkeypatch.setenv(switch, "1")
        script.build()
        assert runs.pop() == "9.0"
        monkeypatch.setattr(script.shutil if lacking == "which" else script, lacking, lambda name: "")
        if tried:
            script.build()
        else:
            with pytest.raises(SystemExit, match=f"{switch} is set, but there is no"):
                script.build()
        assert runs == tried


class TestArchitectures:
    @pytest.mark.parametrize(
        ("torch", "expected"),
        [
            (fake_torch(), "8.0;8.6;8.9;9.0;10.0;12.0+PTX"),
            (fake_torch(cuda="12.4"), "8.0;8.6;8.9;9.0+PTX"),
            (fake_torch(gpus=((9, 0), (8, 6), (9, 0))), "8.6;9.0+PTX"),
            (fake_torch(gpus=((12, 0), (9, 0))), "9.0;12.0+PTX"),
        ],
    )
    def test_default(self, script: ModuleType, torch: SimpleNamespace, expected: str) -> None:
        assert script.cuda_archs(torch) == expected

    def test_the_environment_wins(self, script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
        assert script.cuda_archs(fake_torch(gpus=((9, 0),))) == "8.0"


def make_nvcc(path: Path, home: str) -> None:
    """An nvcc that answers --dryrun as the real one does: on stderr, with its folder as TOP."""
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\necho '#$ _HERE_={home}/bin' >&2\necho '#$ TOP={home}/bin/..' >&2\n")
    path.chmod(0o755)


class TestToolkit:
    def test_a_script_on_path_leads_to_its_toolkit(
        self, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "kit/bin").mkdir(parents=True)
        make_nvcc(tmp_path / "local/bin/nvcc", home=f"{tmp_path}/kit")
        monkeypatch.setenv("PATH", f"{tmp_path}/local/bin:{os.environ['PATH']}")
        assert script.find_cuda_home(tmp_path / "nvidia") == str(tmp_path / "kit")

    def test_cuda_home_comes_before_path(
        self, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("first", "second"):
            make_nvcc(tmp_path / name / "bin/nvcc", home=f"{tmp_path}/{name}")
        monkeypatch.setenv("CUDA_HOME", f"{tmp_path}/first")
        monkeypatch.setenv("PATH", f"{tmp_path}/second/bin:{os.environ['PATH']}")
        assert script.find_cuda_home(tmp_path / "nvidia") == str(tmp_path / "first")

    def test_nvcc_from_a_wheel(
        self, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        home = tmp_path / "nvidia/cu13"
        make_nvcc(home / "bin/nvcc", home=str(home))
        which, folder = shutil.which, str(home / "bin")  # the only place that is left to look in
        monkeypatch.setattr(
            script.shutil, "which", lambda tool, path: which(tool, path=folder) if folder in path else None
        )
        assert script.find_cuda_home(tmp_path / "nvidia") == str(home)
        assert script.find_cuda_home(tmp_path / "elsewhere") == ""


class TestExtension:
    @pytest.fixture(autouse=True)
    def _sources(self, script: ModuleType, tmp_path: Path) -> None:
        for name in ("csrc/ops.cpp", "csrc/cpu/b.cpp", "csrc/cpu/a.cpp", "csrc/cpu/a.h", "csrc/cuda/k.cu"):
            add_source(name, tmp_path)

    def test_cpu(self, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXXFLAGS", "-DNAME='two words' -O1")
        options = script.compile_options("", tmp_path)
        assert issubclass(options["cmdclass"]["build_ext"], cpp_extension.BuildExtension)
        (extension,) = options["ext_modules"]
        assert extension.name == "gol_kernels._C"
        assert extension.sources == ["csrc/cpu/a.cpp", "csrc/cpu/b.cpp", "csrc/ops.cpp"]
        assert extension.define_macros == []
        flags = extension.extra_compile_args["cxx"]
        assert flags[-2:] == ["-DNAME=two words", "-O1"]
        assert {"-O3", "-fvisibility=hidden", "-Wall", "-Wextra"} <= set(flags)
        assert not any("fast-math" in flag or flag.startswith("-march") for flag in flags)
        assert not any("cuda" in library for library in extension.libraries)

    @pytest.mark.skipif(sys.platform != "linux", reason="OpenMP is used on Linux only")
    def test_openmp_is_compiled_and_linked(self, script: ModuleType, tmp_path: Path) -> None:
        (extension,) = script.compile_options("", tmp_path)["ext_modules"]
        assert "-fopenmp" in extension.extra_compile_args["cxx"]
        assert "-fopenmp" in extension.extra_link_args

    def test_debug(self, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DEBUG", "1")
        (extension,) = script.compile_options("", tmp_path)["ext_modules"]
        flags = extension.extra_compile_args["cxx"]
        assert "-O3" not in flags
        assert flags.index("-g0") < flags.index("-g")

    @pytest.fixture
    def toolkit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """An empty toolkit, and wheels with a runtime library under its versioned name only."""
        home = tmp_path / "kit"
        for name in ("kit/lib64", "kit/include", "nvidia/cu13/include", "nvidia/cu13/lib"):
            (tmp_path / name).mkdir(parents=True)
        (tmp_path / "nvidia/cu13/lib/libcudart.so.13").touch()
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(home))
        return home

    def test_cuda(
        self, script: ModuleType, tmp_path: Path, toolkit: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NVCC_FLAGS", "-lineinfo")
        (extension,) = script.compile_options("9.0+PTX", tmp_path / "nvidia")["ext_modules"]
        assert extension.sources[-2:] == ["csrc/cuda/k.cu", "csrc/ops.cpp"]
        assert dict(extension.define_macros) == {"GOL_WITH_CUDA": None, "GOL_CUDA_ARCHS": '"9.0+PTX"'}
        flags = extension.extra_compile_args["nvcc"]
        assert flags[-1] == "-lineinfo"
        wheel_headers = str(tmp_path / "nvidia/cu13/include")
        assert flags.index(str(toolkit / "include")) < flags.index(wheel_headers)

    def test_the_runtime_comes_from_the_wheels_where_the_toolkit_lacks_it(
        self, script: ModuleType, tmp_path: Path, toolkit: Path
    ) -> None:
        runtime = str(tmp_path / "nvidia/cu13/lib/libcudart.so.13")
        (extension,) = script.compile_options("9.0", tmp_path / "nvidia")["ext_modules"]
        assert "cudart" not in extension.libraries
        assert runtime in extension.extra_link_args
        (toolkit / "lib64/libcudart.so").touch()
        (extension,) = script.compile_options("9.0", tmp_path / "nvidia")["ext_modules"]
        assert "cudart" in extension.libraries
        assert runtime not in extension.extra_link_args


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout without anything built, and beside it a torch that must not be imported."""
    root = tmp_path_factory.mktemp("packaging")
    built = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for folder in ("csrc", "gol_kernels", "detector", "tests"):
        shutil.copytree(ROOT / folder, root / "tree" / folder, ignore=built)
    for file in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt"):
        shutil.copy(ROOT / file, root / "tree" / file)
    (root / "no_torch").mkdir()
    (root / "no_torch" / "torch.py").write_text("raise ImportError('no torch here')\n")
    return root / "tree"


def build(
    tree: Path, hook: str, *, torch: bool = False, dist: str = "dist", **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs one hook of the build backend as pip does, into a folder of the tree."""
    path = {} if torch else {"PYTHONPATH": str(tree.parent / "no_torch")}
    outside = {name: value for name, value in os.environ.items() if not name.startswith("GOL_KERNELS_")}
    code = f"from setuptools import build_meta; build_meta.{hook}({dist!r})"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env={**outside, **path, **env},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    done = build(tree, "build_wheel", GOL_KERNELS_NO_EXT="1")
    assert done.returncode == 0, done.stderr
    (path,) = (tree / "dist").glob("*-py3-none-any.whl")
    return path


def test_a_wheel_without_the_extension_holds_the_python_files(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    packages = [name for name in names if ".dist-info/" not in name]
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in ("gol_kernels", "detector")
        for suffix in ("py", "yaml", "md", "typed")
        for path in (ROOT / package).rglob(f"*.{suffix}")
    }
    assert set(packages) == expected
    assert "gol_kernels/py.typed" in packages


def test_metadata_is_the_same_everywhere(wheel: Path) -> None:
    """It is asked for where torch cannot be imported, and holds no trace of this machine."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    requirements = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert requirements == ["torch>=2.6"]
    assert metadata["Requires-Python"] == ">=3.10"
    assert f'\n__version__ = "{metadata["Version"]}"\n' in (ROOT / "gol_kernels/__init__.py").read_text()


def test_the_sdist_can_be_compiled(tree: Path) -> None:
    done = build(tree, "build_sdist")
    assert done.returncode == 0, done.stderr
    (path,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    sources = {file.relative_to(ROOT).as_posix() for file in (ROOT / "csrc").rglob("*") if file.is_file()}
    assert sources
    assert sources | {"setup.py", "constraints.txt", "LICENSE", "tests/test_packaging.py"} <= names
    assert not any(name.endswith(".so") for name in names)


def test_without_torch_the_wheel_is_pure_and_says_why(tree: Path) -> None:
    done = build(tree, "build_wheel")
    assert done.returncode == 0, done.stderr
    assert "extension: no, torch cannot be imported at build time" in done.stdout


def test_a_failing_compiler_leaves_pure_python_unless_forced(tree: Path) -> None:
    done = build(tree, "build_wheel", torch=True, dist="fallen_back", CXX="false")
    assert done.returncode == 0, done.stderr
    assert "extension: yes" in done.stdout
    assert "extension: no, " in done.stdout
    (path,) = (tree / "fallen_back").glob("*.whl")
    assert path.name.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(path).namelist())
    done = build(tree, "build_wheel", torch=True, CXX="false", GOL_KERNELS_FORCE_EXT="1")
    assert done.returncode != 0
    assert "GOL_KERNELS_FORCE_EXT is set, but " in done.stderr


def test_an_outdated_extension_does_not_outlive_a_build_without_one(tree: Path) -> None:
    outdated = tree / "gol_kernels" / "_C.cpython-311-x86_64-linux-gnu.so"
    outdated.touch()
    subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree.parent / "no_torch")},
        capture_output=True,
        check=True,
    )
    assert not outdated.exists()
