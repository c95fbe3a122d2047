"""The bench of the trainer's step, gone through on the CPU; its way on a GPU on a stand-in for events."""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType

from bench import records
from bench.__main__ import main
from bench.training import profiled, report, run
from bench.training.formulas import RELEASED, in_place_of
from bench.training.options import add_arguments
from bench.training.timeline import PARTS, Passing, Timeline
from bench.training.trainer import FORMS, MEASURED, PROFILE, SYNCS, WARM_UP, Effort, MeasuredTrainer
from detector.config import LossConfig
from detector.engine.distributed import process_group
from detector.engine.train import Trainer
from detector.model.losses import build_loss
from gol_kernels import ClassStats

CPU = torch.device("cpu")
EFFORT = Effort(1, 2, 1, syncs=1, profiled=1)


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


# --- the command ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[records.Row]]:
    store = tmp_path_factory.mktemp("training") / "training.jsonl"
    status = main(["training", "--dry-run", "--losses", "gol", "--records", str(store), "--run", "first"])
    return status, records.read(store)


def test_dry_run_gives_a_row_for_each_form(dry_run: tuple[int, list[records.Row]]) -> None:
    status, rows = dry_run
    assert status == 0
    assert [(row["loss"], row["form"], row["run"]) for row in rows] == [
        ("gol", form, "first") for form in FORMS
    ]
    for row in rows:
        assert row["set"] == []
        assert {"commit", "versions", "machine", "load_average", "date"} <= row.keys()
        assert (row["kind"], row["config"], row["device"]) == ("training", "lvis_v1_gol", "cpu")
        assert (row["classes"], row["batch_size"], row["steps"], row["dtype"]) == (200, 2, 2, "fp32")
        assert row["norm"] == "frozen_bn"  # the preset's
        assert all(64 <= side <= 96 for side in row["padded"])
        assert row["rows"] == 64
        assert 0 <= row["foreground"] < 64
        ms = row["step_ms"]
        assert 0 < ms["p20"] <= ms["p50"] <= ms["p80"]
        assert row["images_per_s"] == pytest.approx(2e3 / ms["mean"])
        assert tuple(row["host_ms"]) == PARTS
        assert min(row["host_ms"].values()) > 0
        assert 0 < row["loss_share"] < 0.5
        assert row["loader_images_per_s"] > 0
        assert row["peak_mb"] > 50
        for key in ("device_ms", "host_syncs", "synced_at"):  # nothing of a GPU is claimed
            assert row[key] is None
        assert row["bound"]["data"] == pytest.approx(row["host_ms"]["data"] / ms["mean"])
        assert row["bound"]["device"] is row["bound"]["host"] is None
    assert sum(row["foreground"] for row in rows) > 0
    assert rows[1]["profile"] is None
    operators = {entry["name"]: entry for entry in rows[0]["profile"]["operators"]}
    assert operators["aten::convolution_backward"]["calls"] > 20
    assert rows[0]["profile"]["busy_ms"] is None


def test_parts_add_up_to_what_the_trainer_logged(dry_run: tuple[int, list[records.Row]]) -> None:
    rows = dry_run[1]
    assert report.problems(rows) == []
    for row in rows:
        step = sum(row["host_ms"].values())
        assert step == pytest.approx(row["step_ms"]["mean"])
        assert step - row["host_ms"]["other"] == pytest.approx(row["logged_ms"]["step"], rel=0.05)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda row: row["logged_ms"].update(step=1.1 * row["step_ms"]["mean"]), "the trainer logged"),
        (lambda row: row["logged_ms"].update(step=0.8 * row["step_ms"]["mean"]), "the trainer logged"),
        (lambda row: row["host_ms"].update(data=0.1 * row["step_ms"]["mean"] + 50), "ms of data"),
        (lambda row: row.update(device_ms=dict.fromkeys(PARTS, row["step_ms"]["mean"] / 6)), "on the GPU"),
    ],
)
def test_what_does_not_add_up_is_told(
    dry_run: tuple[int, list[records.Row]], change: Any, problem: str
) -> None:
    row = copy.deepcopy(dry_run[1][1])
    change(row)
    (found,) = report.problems([dry_run[1][0], row])
    assert found.startswith("FAIL gol, released: ")
    assert problem in found


def test_a_loss_that_fails_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(config: Any, *_: object) -> list[records.Row]:
        if config.loss.name == "gol":
            raise FloatingPointError("the loss is not finite")
        return []

    monkeypatch.setattr(run, "measure", measure)
    monkeypatch.setattr(run, "_prepare", lambda config, *_, dry: config)
    assert run.run(options("--dry-run", "--losses", "gol", "seesaw")) == 1
    assert capsys.readouterr().out.splitlines() == ["FAIL gol: not measured"]
    assert run.run(options("--dry-run", "--losses", "gol", "seesaw", "--budget-s", "-1")) == 0
    assert "time is used up: gol, seesaw not measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dry-run", "--set", "data.root=/tmp"], "data.root=/tmp cannot be set"),
        (["--dry-run", "--steps", "3", "--block", "2"], "not whole blocks of 2"),
        (["--dry-run", "--warm-up", "0"], "expected positive numbers"),
        (["--dry-run", "--set", "model.backbone=resnet19"], "model.backbone must be one of"),
        ([], "torch sees no GPU"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises((SystemExit, ValueError), match=message):
        run.run(options(*words))


def test_the_machine_at_hand_is_the_default() -> None:
    config = run._config(options("--set", "device=cpu", "data.workers=3", "train.batch_size=8"))
    assert (config.train.precision, config.train.batch_size, config.data.workers) == ("bf16", 8, 3)
    assert (config.data.min_sizes[0], config.data.max_size) == (640, 1333)


# --- the trainer with marks -------------------------------------------------------------------------
def test_plan() -> None:
    plan = Effort(2, 4, 2, syncs=3, profiled=2).plan(count_syncs=True)
    ours, released = FORMS
    assert [step.form for step in plan if step.purpose == MEASURED] == [
        *[ours] * 2,
        *[released] * 4,
        *[ours] * 2,
    ]
    assert [step.form for step in plan if step.purpose == SYNCS] == [ours] * 3 + [released] * 3
    assert [step.purpose for step in plan[-3:]] == [PROFILE, PROFILE, WARM_UP]


def test_forms_and_syncs_are_those_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer's update, replaced by one that tells which formula it has, and waits once or twice."""
    seen: list[tuple[int, bool]] = []

    def update(self: MeasuredTrainer, images: Any, targets: Any) -> bool:
        seen.append((self.step, "forward" in vars(self.losses[0])))
        for _ in range(2 if seen[-1][1] else 1):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        for part in ("forward", "backward", "optimizer"):
            self.timeline.begin(part)
        return False

    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(Trainer, "_update", update)
    plan = EFFORT.plan(count_syncs=True)
    config = run._prepare(run._config(options("--dry-run")), tmp_path, plan, 1, dry=True)
    config = run.replace(config, output=str(tmp_path / "run"))
    with warnings.catch_warnings(), process_group("cpu") as process:
        warnings.simplefilter("ignore")
        trainer = MeasuredTrainer(config, process, plan)
        trainer.run()
        trainer.logger.close()
    assert seen == [(k, step.form == "released") for k, step in enumerate(plan)]
    assert modes == ["warn", "default"] * 2
    (ours,), (released,) = (trainer.synced_at[form].items() for form in FORMS)
    assert (ours[1], released[1]) == (1, 2)
    assert ours[0].startswith("tests/test_bench_training.py:")
    assert len(trainer.times("ours")) == len(trainer.times("released")) == 2
    assert trainer.profile["steps"] == 1


class _Event:
    """A GPU whose clock is moved by hand."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = _Event.now

    def elapsed_time(self, end: _Event) -> float:
        return end.at - self.at


def test_timeline_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is between two marks belongs to the first; an epoch's end, to the wait for data."""
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    timeline = Timeline(torch.device("cuda"))

    def loader() -> Iterator[int]:
        for batch in range(2):
            _Event.now += 5
            yield batch
        _Event.now += 100

    for _ in range(2):
        for _ in timeline.batches(loader()):
            for part, ms in (("forward", 7), ("loss", 1), ("forward", 2), ("backward", 20), ("other", 3)):
                timeline.begin(part)
                _Event.now += ms
    steps = timeline.steps()
    assert [step.device["data"] for step in steps if step.device] == [5, 5, 105, 5]
    assert steps[0].device == {
        "data": 5,
        "prepare": 0,
        "forward": 9,
        "loss": 1,
        "backward": 20,
        "optimizer": 0,
        "other": 3,
    }
    assert 0 < sum(steps[0].host.values()) < 1000


class _Slow(torch.autograd.Function):
    """Whose backward pass takes 30 ms."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        time.sleep(0.03)
        return gradient


def test_backward_marks_hold_the_loss_alone() -> None:
    """As in the box head: a branch beside the logits, older than the loss, and losses younger than it."""
    timeline, features = Timeline(CPU), torch.ones(3, 4, requires_grad=True)
    timeline.begin("backward")
    logits = nn.Linear(4, 5)(_Slow.apply(features))
    beside = _Slow.apply(features * 2)
    inside = Passing.apply(logits, timeline, "backward")
    loss = Passing.apply(_Slow.apply(inside).square().sum(), timeline, "loss") * 2
    younger = _Slow.apply(beside).sum()
    timeline.begin("backward")
    torch.stack([younger, loss]).sum().backward()
    timeline.begin("data")
    marks = timeline.marks
    assert [mark.part for mark in marks] == ["backward", "backward", "loss", "backward", "data"]
    spent = [1e3 * (after.at - mark.at) for mark, after in pairwise(marks)]
    assert 30 <= spent[2] < 55  # one of four
    assert features.grad is not None


# --- the released formulas --------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RELEASED)
def test_released_formula_is_the_same_loss(name: str, dtype: torch.dtype) -> None:
    """With the module's state, under autocast; with rows that draw nothing at random."""
    stats = ClassStats(image_count=torch.arange(1, 13), num_images=40)
    results = {}
    for form in FORMS:
        module = build_loss(LossConfig(name=name, threshold=0.1), stats)  # type: ignore[arg-type]
        module = copy.deepcopy(module)
        logits = torch.randn(30, module.num_logits, generator=torch.Generator().manual_seed(1)).to(dtype)
        logits.requires_grad_(True)
        labels = torch.arange(30) % 12
        with torch.autocast("cpu", torch.bfloat16):
            if form == "released":
                with in_place_of(module, RELEASED[name]):
                    loss = module(logits, labels, avg_factor=torch.tensor(30.0))
            else:
                loss = module(logits, labels, avg_factor=torch.tensor(30.0))
        loss.backward()
        assert "forward" not in vars(module)
        assert logits.grad is not None
        assert logits.grad.dtype == dtype
        results[form] = (loss.detach(), logits.grad.float(), dict(module.named_buffers()))
    ours, released = results["ours"], results["released"]
    torch.testing.assert_close(released[0], ours[0].float(), rtol=1e-4, atol=0)
    error = (released[1] - ours[1]).norm() / ours[1].norm()
    assert error < (1e-4 if dtype == torch.float32 else 8e-3)
    released[2].pop("gradient_stats.label_counts", None)  # not needed by the released EQLv2
    for key, value in released[2].items():  # Seesaw's counts and EQLv2's sums have moved alike
        torch.testing.assert_close(value, ours[2][key], rtol=1e-3, atol=1e-5)


# --- the profile ------------------------------------------------------------------------------------
def test_overlapping_work_counts_once() -> None:
    assert profiled.union([(0, 4), (10, 12), (3, 6), (11, 11.5)]) == 8
    assert profiled.union([]) == 0


def test_summary_of_a_gpu() -> None:
    def event(name: str, begin: float, end: float, *, gpu: bool, note: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            name=name,
            device_type=DeviceType.CUDA if gpu else DeviceType.CPU,
            is_user_annotation=note,
            time_range=SimpleNamespace(start=begin, end=end),
        )

    def average(key: str, gpu_us: float, cpu_us: float, *, gpu: bool = False) -> SimpleNamespace:
        device = DeviceType.CUDA if gpu else DeviceType.CPU
        times = {"self_device_time_total": gpu_us, "self_cpu_time_total": cpu_us}
        return SimpleNamespace(key=key, count=4, device_type=device, **times)

    profile = SimpleNamespace(
        events=lambda: [
            event("kernel", 0, 2000, gpu=True),
            event("Memcpy", 1000, 4000, gpu=True),
            event("Optimizer.step", 0, 9000, gpu=True, note=True),
            event("aten::mm", 0, 9000, gpu=False),
            event("cudaLaunchKernel", 0, 10, gpu=False),
            event("cudaStreamSynchronize", 10, 610, gpu=False),
            event("cudaStreamSynchronize", 700, 800, gpu=False),
        ],
        key_averages=lambda: [
            average("aten::mm", 100, 50),
            average("aten::nonzero", 300, 70),
            average("kernel", 900, 0, gpu=True),
            average("cudaStreamSynchronize", 0, 700),
        ],
    )
    found = profiled.summary(profile, 2)  # type: ignore[arg-type]
    assert (found["busy_ms"], found["launches"]) == (2, 1)
    assert found["calls"] == [
        {"name": "cudaStreamSynchronize", "calls": 1, "ms": 0.35},
        {"name": "cudaLaunchKernel", "calls": 0.5, "ms": 0.005},
    ]
    assert [entry["name"] for entry in found["operators"]] == ["aten::nonzero", "aten::mm"]
    assert found["operators"][0] == {"name": "aten::nonzero", "calls": 2, "device_ms": 0.15, "host_ms": 0.035}


def test_bound_of_a_gpu() -> None:
    parts = dict.fromkeys(PARTS, 10.0) | {"data": 40.0}
    bound = run._bound(parts, on_gpu=True, profile={"busy_ms": 25.0})
    assert bound == pytest.approx({"device": 0.25, "data": 0.4, "host": 0.35})
    assert run._bound(parts, on_gpu=True, profile=None)["host"] is None


# --- the README -------------------------------------------------------------------------------------
def _on_gpu(row: records.Row) -> records.Row:
    row = copy.deepcopy(row)
    row |= {"device": "cuda", "device_ms": row["host_ms"], "host_syncs": 7, "dirty": False}
    row["machine"]["gpus"] = ["Z80, sm_10, 1 GiB"]
    row["bound"] = {"device": 0.5, "data": 0.125, "host": 0.375}
    return row


def test_readme_has_a_table_where_a_gpu_was_measured(
    dry_run: tuple[int, list[records.Row]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench import demo
    from bench import report as cpu

    monkeypatch.setattr("bench.__main__.newest_complete", lambda *_: [])
    monkeypatch.setattr("bench.__main__.tables", lambda _: "cpu")
    monkeypatch.setattr(demo, "table", lambda _: "demo")
    readme, store, none = tmp_path / "README.md", tmp_path / "training.jsonl", str(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    readme.write_text(f"{cpu.BEGIN}{cpu.END}{demo.BEGIN}{demo.END}")
    words = ["readme", "--readme", str(readme), "--training-records", str(store)]
    for kind in ("gpu", "scale", "learning"):
        words += [f"--{kind}-records", none]
    for kind in ("records", "demo-records"):
        words += [f"--{kind}", str(tmp_path / "empty.jsonl")]
    main(words)
    assert "images/s" not in readme.read_text()
    records.append(store, dry_run[1])
    with pytest.raises(ValueError, match="no step was measured on a GPU"):
        main(words)
    rows = [_on_gpu(row) for row in dry_run[1]]
    records.append(store, [row | {"run": "old", "images_per_s": 12345.6} for row in rows] + rows)
    readme.write_text(f"{cpu.BEGIN}{cpu.END}{demo.BEGIN}{demo.END}{report.BEGIN}old{report.END}after")
    main(words)
    text = readme.read_text()
    assert text.endswith(f"{report.END}after")
    assert text.count("| gol, ") == 2
    assert "gol: the GPU works 50% of a step, 12% it waits for data, 38% for the host" in text
    assert "Z80, sm_10, 1 GiB" in text
    assert "12345.6" not in text
    assert json.loads(store.read_text().splitlines()[0])["kind"] == "training"
