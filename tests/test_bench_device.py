"""The GPU bench, gone through on the CPU: equal work, what a row holds, what is made of the rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench import device, device_report, meters, records
from bench.__main__ import main
from bench.cases import CASES
from bench.device import DTYPES, Effort, Profile, Setting, measure, measure_setting
from bench.meters import HostMeter
from bench.providers import Provider, Refused, check, device_providers
from bench.timing import Sample

EFFORT = Effort(2, 0.05)
SOFTMAX = Setting(CASES["softmax"], 6, 19, "float32", False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", device.DEVICE_CASES)
def test_every_provider_computes_the_same(name: str, dtype: str) -> None:
    """In half precision too, with the loss scaled for float16; and the modules with their state."""
    case = CASES[name]
    batch = case.batch(64, 37, dtype=DTYPES[dtype])
    assert (batch.upstream > 1) == (dtype == "float16")
    providers, _ = device_providers(case, "cpu", compiled=False)
    for provider in providers:
        if provider.computes:
            assert check(provider, case, batch)["gradient"] > 0
            _, gradient = provider.step(batch)()
            assert gradient.dtype == DTYPES[dtype]


@pytest.mark.parametrize("name", ["seesaw", "gumbel_seesaw", "eqlv2"])
def test_a_module_moves_on(name: str) -> None:
    """What is timed as "ours module" counts at every call: its second loss is another one."""
    case = CASES[name]
    batch = case.batch(64, 37)
    module = next(p for p in device_providers(case, "cpu", compiled=False)[0] if p.name == "ours module")
    step = module.step(batch)
    assert step()[0] != step()[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", device.DEVICE_CASES)
def test_what_is_compiled_computes_the_same(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the compiler, which is slow to start. float16's gradient is scaled before it is rounded."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    case = CASES[name]
    batch = case.batch(64, 37, dtype=DTYPES[dtype])
    compiled = [p for p in device_providers(case, "cpu", compiled=True)[0] if p.name.startswith("compiled")]
    assert len(compiled) == 1 + len(case.closed)
    for provider in compiled:
        check(provider, case, batch)


def test_half_precision_is_held_to_its_roundoff() -> None:
    case = CASES["softmax"]
    batch = case.batch(64, 37, dtype=torch.bfloat16)
    released = next(p for p in device_providers(case, "cpu", compiled=False)[0] if p.name == "released")

    def twice_rounded(b: Any) -> Any:
        step = released.step(b)
        return lambda: (step()[0], (step()[1].float() * 1.01).to(torch.bfloat16))

    with pytest.raises(Refused, match=r"gradient .* \(allowed 4e-03\)"):
        check(Provider("other", "", twice_rounded), case, batch)
    check(Provider("other", "", twice_rounded, yardstick=True), case, batch)  # theirs may be further off


# --- yardsticks ---------------------------------------------------------------------------------
def _stub(monkeypatch: pytest.MonkeyPatch, name: str, function: str, value: Callable[..., Tensor]) -> None:
    parts = name.split(".")
    for i in range(len(parts)):
        module = ModuleType(".".join(parts[: i + 1]))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    setattr(sys.modules[name], function, value)


def _overwriting(z: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy that leaves nothing of its logits behind."""

    def overwrite(grad: Tensor) -> None:
        z.data.fill_(torch.nan)

    loss = F.cross_entropy(z, labels)
    loss.register_hook(overwrite)
    return loss


def test_yardsticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are checked like the others; the one that writes over its logits gets some of its own."""
    _stub(monkeypatch, "liger_kernel.transformers.functional", "liger_cross_entropy", _overwriting)
    _stub(monkeypatch, "quack.cross_entropy", "cross_entropy", F.cross_entropy)
    outcome = measure_setting(SOFTMAX, None, HostMeter(), EFFORT)
    assert {"liger", "quack", "released", "copy"} <= {row["provider"] for row in outcome.rows}
    assert not outcome.refused
    _stub(monkeypatch, "quack.cross_entropy", "cross_entropy", lambda z, y: F.cross_entropy(z * 1.01, y))
    outcome = measure_setting(SOFTMAX, None, HostMeter(), EFFORT)
    assert outcome.refused["quack"].startswith("softmax, quack: not the same loss")


def test_absent_yardsticks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "quack", None)
    absent = device_providers(CASES["softmax"], "cpu", compiled=False)[1]
    assert [line.split(" cannot")[0] for line in absent[-2:]] == [
        "the yardstick liger-kernel",
        "the yardstick quack-kernels",
    ]
    assert len(device_providers(CASES["gumbel"], "cpu", compiled=False)[1]) == len(absent) - 2


# --- measuring ----------------------------------------------------------------------------------
def test_rows_of_a_setting() -> None:
    rows = measure_setting(SOFTMAX, None, HostMeter(), EFFORT).rows
    copy = next(row for row in rows if row["provider"] == "copy")
    for row in rows:
        assert (row["kind"], row["N"], row["K"], row["sets"], row["batch"]) == ("device", 6, 19, 2, "made")
        assert row["bytes"] == 2 * 6 * 19 * 4 + 6 * 8
        for mode in ("graph", "eager"):
            ms = row[f"{mode}_ms"]
            assert 0 < ms["p20"] <= ms["p50"] <= ms["p80"]
            assert row["speed_up"][mode][row["provider"]] == 1
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["graph_ms"]["p50"] / 1e6)
    assert copy["errors"] is None
    assert all(row["errors"]["gradient"] > 0 for row in rows if row is not copy)
    json.dumps(rows)


class _WaitingMeter(HostMeter):
    """On which every loss waits for the GPU."""

    def costs(self, step: Any) -> meters.Costs:
        result = step()[1]
        return meters.Costs(7, 3, 0 if result.is_contiguous() and not result.requires_grad else 1, 2.5)

    def graph(self, steps: Any) -> Any:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")


def test_a_step_that_cannot_be_captured_is_timed_eagerly() -> None:
    rows = measure_setting(SOFTMAX, None, _WaitingMeter(), EFFORT).rows
    for row in rows:
        assert row["graph_ms"] is None
        assert row["not_in_graph"] == "RuntimeError: operation not permitted"
        assert set(row["speed_up"]) == {"eager"}
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["eager_ms"]["p50"] / 1e6)
        assert (row["peak_bytes"], row["launches"], row["host_us"]) == (7, 3, 2.5)


def test_a_step_that_waits_is_not_captured() -> None:
    class Meter(HostMeter):
        def costs(self, step: Any) -> meters.Costs:
            return meters.Costs(0, 0, 2, 1.0)

        def graph(self, steps: Any) -> Any:
            raise AssertionError("a failed capture would spoil the following ones")

    for row in measure_setting(SOFTMAX, None, Meter(), EFFORT).rows:
        assert row["not_in_graph"] == "it waits for the GPU 2 times in a call"


def _without_memory(name: str) -> Callable[..., Any]:
    def step(batch: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 EiB\nmore")

    def chosen(case: Any, where: str, *, compiled: bool) -> Any:
        found, absent = device_providers(case, where, compiled=compiled)
        return [Provider(name, "", step), *found], absent

    return chosen


def test_one_provider_fails_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, good in (("greedy", True), ("ours greedy", False)):
        monkeypatch.setattr(device, "device_providers", _without_memory(name))
        lines: list[str] = []
        rows: list[records.Row] = []
        settings = [(SOFTMAX, None)]
        done = measure(settings, HostMeter(), EFFORT, budget_s=60, write=rows.extend, report=lines.append)
        assert done is good
        assert {"released", "copy"} <= {row["provider"] for row in rows}
        refused = f"  refused: {name}: OutOfMemoryError: CUDA out of memory. Tried to allocate 3 EiB"
        assert refused in lines


def test_nothing_new_is_started_after_the_time() -> None:
    lines: list[str] = []
    rows: list[records.Row] = []
    settings = [(SOFTMAX, None)] * 3
    assert measure(settings, HostMeter(), EFFORT, budget_s=0, write=rows.extend, report=lines.append)
    assert lines == ["time is used up: 3 of 3 settings were not measured"]
    assert rows == []


def test_every_mode_is_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five sets in the graph, three in the eager sweep, and a clock of a millisecond a call."""

    class Timer:
        clock = "calls"

        def __call__(self, step: Any, calls: int) -> Sample:
            count = sum(len(step()) for _ in range(calls))
            return Sample(count / calls, 0.0, 0.0)

    meter = HostMeter()
    meter.timer = Timer()
    monkeypatch.setattr(meter, "sets", lambda size: 5)
    monkeypatch.setattr(device, "EAGER_SETS", 3)
    for row in measure_setting(SOFTMAX, None, meter, EFFORT).rows:
        assert row["sets"] == 5
        assert row["graph_ms"]["p50"] == row["eager_ms"]["p50"] == 1


def test_a_setting_without_memory_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    copy, calls, rows, lines = device._copy, [], [], []

    def copied(batch: Any) -> Any:
        calls.append(batch)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nfrom elsewhere")
        return copy(batch)

    monkeypatch.setattr(device, "_copy", copied)
    settings = [(SOFTMAX, None), (SOFTMAX, None)]
    assert measure(settings, HostMeter(), EFFORT, budget_s=100, write=rows.append, report=lines.append)
    assert len(rows) == 1
    assert "  not measured: CUDA out of memory. Tried to allocate 9 GiB" in lines


def test_large_batches_are_checked_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "CHECKED_ELEMENTS", 100)
    monkeypatch.setattr(device, "CHECKED_ROWS", 4)
    assert {row["checked_rows"] for row in measure_setting(SOFTMAX, None, HostMeter(), EFFORT).rows} == {4}


def test_profiles_measure_the_dear_settings_last() -> None:
    profile = Profile((8, 4), (20, 21), ("float32", "bfloat16"), (8,))
    settings = list(profile.settings(["gumbel", "softmax"]))
    assert len(settings) == 2 * 2 * 2 * 2 + 2 * 2
    assert [s.compiled for s in settings] == [False] * 16 + [True] * 4
    assert [(s.rows, s.columns, s.dtype, s.case.name) for s in settings[:3]] == [
        (8, 20, "float32", "gumbel"),
        (8, 20, "float32", "softmax"),
        (8, 20, "bfloat16", "gumbel"),
    ]
    assert {(s.rows, s.columns) for s in settings[16:]} == {(8, 20)}


# --- what is made of the records --------------------------------------------------------------------
def _rows(run: str, native_us: float = 160.0, **changes: Any) -> Iterator[records.Row]:
    """A complete run, made up: the copy takes 150 us at the large size, and the rest in proportion."""
    shared: records.Row = {"run": run, "date": "2026-01-02T03:04:05+00:00", "commit": "abc", "dirty": False}
    shared["versions"] = {
        "python": "3.12",
        "torch": "2.11.0",
        "cuda": "13.0",
        "triton": "3.6",
        "driver": "580",
    }
    shared["versions"] |= {"liger": "0.8.5", "quack": None}
    shared["machine"] = {"gpus": ["Z80, sm_10, 1 GiB"]}
    shared |= {"kind": "device", "clock": "CUDA events", "rounds": 9, "batch": "made"}
    us = {
        "ours native": native_us,
        "ours triton": 200.0,
        "released": 4000.0,
        "compiled": 480.0,
        "copy": 150.0,
    }
    for n, k, dtype in (
        (65536, 1204, "float32"),
        (65536, 1204, "bfloat16"),
        (65536, 8192, "float32"),
        (8192, 1204, "float32"),
        (512, 1204, "bfloat16"),
    ):
        for case in device.DEVICE_CASES:
            times = us | ({"liger": 300.0} if case == "softmax" else {})
            size = n / 65536 * k / 1204 * (1 if dtype == "float32" else 0.5)
            for provider, whole in times.items():
                waits = provider == "released"
                ratios = {other: t / whole for other, t in times.items() if not waits and other != "released"}
                row = {"case": case, "dtype": dtype, "N": n, "K": k, "provider": provider}
                row |= {
                    "graph_ms": None if waits else {"p50": whole * size / 1e3},
                    "eager_ms": {"p50": (whole * size + 10) / 1e3},
                    "speed_up": {"graph": ratios, "eager": {o: t / whole for o, t in times.items()}},
                    "gb_per_s": 632 / whole * 1e3,
                    "host_us": 21.5,
                    "peak_bytes": 4000 if provider.startswith("ours") else 48000,
                    "gradient_bytes": 3980,
                    "launches": 2,
                    "host_syncs": int(waits),
                }
                yield shared | row | changes


def test_the_newest_complete_run(tmp_path: Path) -> None:
    old, new, partial, dry = (
        list(_rows("1")),
        list(_rows("2")),
        list(_rows("3"))[:8],
        list(_rows("4", clock="CPU")),
    )
    assert device_report.newest(old + new + partial + dry) == new
    captured = list(_rows("5", batch="captured"))
    with pytest.raises(ValueError, match="no run on a GPU is complete"):
        device_report.newest(partial + dry + captured)


def test_targets() -> None:
    lines = device_report.target_lines(list(_rows("1")))
    for line in (
        "PASS gumbel           ours native  float32: 0.94 of copy at N = 65536 (at least 0.92)",
        "FAIL gumbel           ours triton  float32: 0.75 of copy at N = 65536 (at least 0.92)",
        "PASS seesaw           ours native  float32: 25.00 x released at N = 65536 (at least 20)",
        "PASS seesaw           ours native  float32: 3.00 x torch.compile at N = 65536 (at least 2)",
        "PASS gol              ours native  bfloat16: 3.00 x torch.compile at N = 65536 (at least 3)",
        "PASS gol              ours native  float32: 20.00 us at N = 8192 (at most 26)",
        "PASS gol              ours native  bfloat16: 0.62 us at N = 512 in a graph (at most 6)",
        "PASS gol              ours native  bfloat16: 21.50 us of the host at N = 512 (at most 25)",
        "PASS eqlv2            ours native  float32: 1.01 x gradient of peak memory (at most 1.05)",
    ):
        assert line in lines
    assert not any("sigmoid" in line for line in lines)  # was not measured


def test_tables() -> None:
    text = device_report.tables(list(_rows("1")))
    assert "| Gumbel | **160.0** | 3950 | 94% | 200.0 | 3160 | 75% | 4010* | 25.0x | 480.0 | 3.0x |" in text
    assert "liger-kernel 0.8.5 300.0 µs (50% of copy)." in text
    assert "| Softmax | 1.01; 2; 0 | 1.01; 2; 0 | 12.06; 2; 1 | 12.06; 2; 0 |" in text
    assert "| Softmax | 20.0 | 30.0 | 21.5 | 0.6 | 10.6 | 21.5 |" in text  # N = 8192, then N = 512
    assert "| Softmax | 94% | 94% | 94% |" in text  # K = 1204 in both dtypes, and 8192
    assert "Z80, sm_10, 1 GiB, driver 580, CUDA 13.0, torch 2.11.0" in text
    assert "commit abc; 2026-01-02" in text


def test_readme_and_plot_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written while there is no record; then the table stands between the markers."""
    from bench import demo, plots, report

    monkeypatch.setattr("bench.__main__.newest_complete", lambda *_: [])
    monkeypatch.setattr("bench.__main__.tables", lambda _: "cpu")
    monkeypatch.setattr(demo, "table", lambda _: "demo")
    monkeypatch.setattr(plots, "draw", lambda *_: None)
    (tmp_path / "empty.jsonl").touch()
    readme, store = tmp_path / "README.md", tmp_path / "gpu.jsonl"
    marks = f"{report.BEGIN}{report.END}{demo.BEGIN}{demo.END}"
    readme.write_text(marks)
    empty = str(tmp_path / "empty.jsonl")
    shared = ["--records", empty, "--gpu-records", str(store)]
    write = ["readme", *shared, "--demo-records", empty, "--readme", str(readme)]
    for kind in ("scale", "training", "learning"):
        write += [f"--{kind}-records", str(tmp_path / "none.jsonl")]
    main(write)
    main(["plot", *shared, "--folder", str(tmp_path / "plots")])
    assert "GB/s" not in readme.read_text()
    assert not (tmp_path / "plots").exists()
    records.append(store, _rows("1"))
    with pytest.raises(ValueError, match="expected <!-- bench:gpu:begin -->"):
        main(write)
    readme.write_text(f"{marks}{device_report.BEGIN}old{device_report.END}after")
    main(write)
    text = readme.read_text()
    assert device_report.tables(list(_rows("1"))) in text
    assert "old" not in text
    assert text.endswith("after")
    main(["plot", *shared, "--folder", str(tmp_path / "a")])
    records.append(store, _rows("2", native_us=155.0))
    main(["plot", *shared, "--folder", str(tmp_path / "b")])
    first, second = ((tmp_path / folder / "gpu.png").read_bytes() for folder in "ab")
    assert first.startswith(b"\x89PNG")
    assert first != second


# --- the command ------------------------------------------------------------------------------------
def test_the_command_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "dry.jsonl"
    command = ["gpu", "--dry-run", "--cases", "softmax", "--rows", "5", "--dtypes", "float32", "--eager"]
    command += ["--columns", "19", "--rounds", "1", "--min-ms", "0.01", "--skip", "released", "--run", "x"]
    assert main([*command, "--records", str(store)]) == 0
    rows = records.read(store)
    assert {(row["N"], row["K"], row["dtype"]) for row in rows} == {(5, 19, "float32")}
    assert all(row["machine"] and "liger" in row["versions"] for row in rows)
    assert not any(row["provider"] == "released" for row in rows)
    assert {row["run"] for row in rows} == {"x"}
    assert "softmax [5, 19] float32" in capsys.readouterr().out
    before = set(Path("bench/records").iterdir())
    assert main(command) == 0
    assert set(Path("bench/records").iterdir()) == before  # a dry run records nothing of itself


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured() -> None:
    with pytest.raises(SystemExit, match="torch sees no GPU"):
        main(["gpu"])


def test_the_commit_may_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOL_KERNELS_COMMIT", "0123abc")
    facts = records.info.environment()
    monkeypatch.setattr(records.info, "environment", lambda *_: {**facts, "commit": None})
    assert device.environment()["commit"] == "0123abc"
    monkeypatch.setattr(records.info, "environment", lambda *_: {**facts, "commit": "fed"})
    assert device.environment()["commit"] == "fed"


def _captured(path: Path, columns: int, dtype: torch.dtype = torch.float32) -> Path:
    """Of ten classes: eight rows of foreground, four of background."""
    labels = torch.cat([torch.arange(8), torch.full((4,), 10)])
    content = {
        "logits": (torch.randn(12, columns) - 1).clamp(-3, 9).to(dtype),
        "labels": labels,
        "rare": torch.arange(10) > 6,
        "counts": torch.arange(10, 0, -1) * 5,
    }
    torch.save(content | {"loss": "gol", "step": 3}, path)
    return path


def test_captured_batches_are_replayed(tmp_path: Path) -> None:
    """Every loss whose columns fit, in the batch's own dtype, without background where a loss has none."""
    store = tmp_path / "dry.jsonl"
    files = [_captured(tmp_path / "a.pt", 10, torch.bfloat16), _captured(tmp_path / "b.pt", 12)]
    command = ["gpu", "--dry-run", "--eager", "--rounds", "1", "--min-ms", "0.01", "--records", str(store)]
    assert main([*command, "--batch", *map(str, files)]) == 0
    found = {(row["case"], row["N"], row["K"], row["dtype"], row["batch"]) for row in records.read(store)}
    assert {item[0] for item in found if item[2] == 10} == {"gol", "eql", "gumbel_seesaw"}
    assert ("gol", 12, 10, "bfloat16", "captured") in found
    assert ("gumbel_seesaw", 8, 10, "bfloat16", "captured") in found
    assert ("seesaw", 8, 12, "float32", "captured") in found
    assert all(item[4] == "captured" for item in found)


def test_captured_batches_are_replayed_on_the_cpu(tmp_path: Path) -> None:
    store, file = tmp_path / "cpu.jsonl", _captured(tmp_path / "a.pt", 12, torch.bfloat16)
    command = ["worker", "default", str(store), "--batch", str(file), "--eager", "--rounds", "1"]
    assert main([*command, "--min-ms", "0.01"]) == 0
    rows = records.read(store)
    assert {row["case"] for row in rows} == {"seesaw"}
    assert {(row["N"], row["K"], row["dtype"], row["kind"]) for row in rows} == {(8, 12, "float32", "speed")}
