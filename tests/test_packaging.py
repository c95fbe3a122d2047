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


class TestDecision:
    @pytest.fixture(autouse=True)
    def _cuda_source(self, tmp_path: Path) -> None:
        add_source("csrc/cuda/loss.cu", tmp_path)

    def test_nothing_is_left_out_of_a_complete_machine(self, script: ModuleType) -> None:
        assert script.obstacles(**COMPLETE) == ("", "")

    @pytest.mark.parametrize(
        ("lacking", "word"),
        [({"torch": None}, "torch cannot be imported"), ({"compiler": None}, "no C++ compiler")],
    )
    def test_pure_python(self, script: ModuleType, lacking: dict, word: str) -> None:
        no_ext, no_cuda = script.obstacles(**{**COMPLETE, **lacking})
        assert word in no_ext
        assert no_cuda == no_ext

    @pytest.mark.parametrize(
        ("lacking", "word"),
        [({"torch": fake_torch(cuda=None)}, "not a CUDA build"), ({"cuda_home": ""}, "no nvcc")],
    )
    def test_cpu_kernels_only(self, script: ModuleType, lacking: dict, word: str) -> None:
        no_ext, no_cuda = script.obstacles(**{**COMPLETE, **lacking})
        assert no_ext == ""
        assert word in no_cuda

    def test_no_cuda_sources(self, script: ModuleType, tmp_path: Path) -> None:
        (tmp_path / "csrc/cuda/loss.cu").unlink()
        assert script.obstacles(**COMPLETE) == ("", "csrc/cuda has no sources")

    @pytest.mark.parametrize(("value", "left_out"), [("1", True), ("yes", True), ("0", False), ("", False)])
    def test_no_switches(
        self, script: ModuleType, monkeypatch: pytest.MonkeyPatch, value: str, left_out: bool
    ) -> None:
        monkeypatch.setenv("GOL_KERNELS_NO_CUDA", value)
        assert script.obstacles(**COMPLETE) == ("", "GOL_KERNELS_NO_CUDA is set" if left_out else "")
        monkeypatch.setenv("GOL_KERNELS_NO_EXT", value)
        assert script.obstacles(**COMPLETE) == (("GOL_KERNELS_NO_EXT is set",) * 2 if left_out else ("", ""))

    @pytest.mark.parametrize(
        ("switch", "lacking"),
        [
            ("GOL_KERNELS_FORCE_EXT", {"compiler": None}),
            ("GOL_KERNELS_FORCE_CUDA", {"compiler": None}),
            ("GOL_KERNELS_FORCE_CUDA", {"cuda_home": ""}),
        ],
    )
    def test_force_switches_name_the_obstacle(
        self, script: ModuleType, monkeypatch: pytest.MonkeyPatch, switch: str, lacking: dict
    ) -> None:
        monkeypatch.setenv(switch, "1")
        assert script.obstacles(**COMPLETE) == ("", "")
        with pytest.raises(SystemExit, match=f"{switch} is set, but there is no"):
            script.obstacles(**{**COMPLETE, **lacking})

    def test_force_ext_is_content_without_cuda(
        self, script: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("GOL_KERNELS_FORCE_EXT", "1")
        assert script.obstacles(**{**COMPLETE, "cuda_home": ""})[0] == ""


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
        extension = script.make_extension("", tmp_path)
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
        extension = script.make_extension("", tmp_path)
        assert "-fopenmp" in extension.extra_compile_args["cxx"]
        assert "-fopenmp" in extension.extra_link_args

    def test_debug(self, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DEBUG", "1")
        flags = script.make_extension("", tmp_path).extra_compile_args["cxx"]
        assert "-O3" not in flags
        assert flags.index("-g0") < flags.index("-g")

    @pytest.fixture
    def toolkit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """An empty toolkit, and wheels with a runtime library under its versioned name only."""
        from torch.utils import cpp_extension

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
        extension = script.make_extension("9.0+PTX", tmp_path / "nvidia")
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
        extension = script.make_extension("9.0", tmp_path / "nvidia")
        assert "cudart" not in extension.libraries
        assert runtime in extension.extra_link_args
        (toolkit / "lib64/libcudart.so").touch()
        extension = script.make_extension("9.0", tmp_path / "nvidia")
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


def build(tree: Path, hook: str, *, torch: bool = False, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs one hook of the build backend as pip does, into tree/dist."""
    path = {} if torch else {"PYTHONPATH": str(tree.parent / "no_torch")}
    outside = {name: value for name, value in os.environ.items() if not name.startswith("GOL_KERNELS_")}
    code = f"from setuptools import build_meta; build_meta.{hook}('dist')"
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
        for suffix in ("py", "yaml", "typed")
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
    done = build(tree, "build_wheel", torch=True, CXX="false")
    assert done.returncode == 0, done.stderr
    assert "extension: yes" in done.stdout
    assert "WARNING: installing without the extension" in done.stdout
    (path,) = set((tree / "dist").glob("*.whl")) - set((tree / "dist").glob("*-py3-none-any.whl"))
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(path).namelist())
    assert build(tree, "build_wheel", torch=True, CXX="false", GOL_KERNELS_FORCE_EXT="1").returncode != 0


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
