"""The number of processes is no part of the result: two train as one, and go on where one has stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from detector.config import Config, save_config
from detector.engine.checkpoint import load_checkpoint
from detector.engine.run_folder import CHECKPOINT, METRICS, RESULTS
from detector.engine.train import Trainer, train
from tests.detector.ranks import error_lines, start_ranks, train_only, training_rows
from tests.detector.test_resume import assert_same
from tests.detector.tiny_detector import run_config, write_data_set

STEPS, FIRST_PART = 5, 2


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Seesaw, whose counts are a state of their own; RoIs and anchors are drawn.

    Few proposals and small steps: of hundreds, two have nearly equal scores and change places with the last
    digit, and from then on other RoIs are drawn.
    """
    root = tmp_path_factory.mktemp("ranks")
    write_data_set(root / "data", num_images=13)
    return run_config(
        root,
        "loss.name=seesaw",
        "model.pre_nms_train=5",
        "model.rois_per_image=8",
        "model.rpn_rois=64",
        "train.batch_size=4",
        "train.lr=0.001",
        f"train.max_steps={STEPS}",
        "train.milestones=[4]",
        "train.log_interval=1",
    )


def in_folder(config: Config, name: str, steps: int = STEPS) -> Config:
    return replace(
        config, output=str(config.run_dir.with_name(name)), train=replace(config.train, max_steps=steps)
    )


@pytest.fixture(scope="module")
def alone(config: Config) -> Path:
    """The run's folder of one process."""
    config = in_folder(config, "alone")
    run = Trainer.run

    def save_and_run(trainer: Trainer) -> None:
        torch.save(trainer.model.state_dict(), config.run_dir / "start.pt")
        run(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "finish", lambda trainer: None)
        patch.setattr(Trainer, "run", save_and_run)
        train(config)
    return config.run_dir


@pytest.fixture(scope="module")
def two(config: Config) -> Path:
    """The run's folder of two processes."""
    config = in_folder(config, "two")
    train_only(2, config)
    return config.run_dir


def assert_same_run(alone: Path, other: Path) -> None:
    """Every loss of every step, and the way of every parameter, up to float32's rounding."""
    rows, others = training_rows(alone), training_rows(other)
    assert [row["step"] for row in rows] == [row["step"] for row in others] == list(range(1, STEPS + 1))
    for row, other_row in zip(rows, others, strict=True):
        names = [name for name in row if name.startswith("loss") or name in ("epoch", "lr")]
        assert len(names) == 8
        for name in names:
            assert row[name] == pytest.approx(other_row[name], rel=1e-5, abs=1e-8), (row["step"], name)
    start = torch.load(alone / "start.pt", weights_only=True)
    first, second = (load_checkpoint(run / CHECKPOINT)["model"] for run in (alone, other))
    moved = {key: float((first[key] - start[key]).norm()) for key in start if start[key].is_floating_point()}
    assert sum(way > 0 for way in moved.values()) > 100
    for key, value in first.items():
        if key in moved:
            allowed = 0.01 * moved[key] + 1e-7 * float(value.norm())
            assert float((value - second[key]).norm()) <= allowed, key
        else:
            assert torch.equal(value, second[key]), key


def test_two_ranks_take_the_steps_of_one(alone, two):
    assert_same_run(alone, two)
    first, second = (torch.load(two / f"model_of_rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_same(first, second)


def test_a_run_of_one_goes_on_in_two(config, alone, capsys):
    start = in_folder(config, "one_then_two", FIRST_PART)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "finish", lambda trainer: None)
        train(start)
    errors = train_only(2, in_folder(config, "one_then_two"), resume=True)
    assert errors.count("was written by 1 processes, now there are 2: the batches stay the same") == 1
    assert_same_run(alone, start.run_dir)
    starts = json.loads((start.run_dir / "environment.json").read_text())
    facts = [(entry["start_step"], entry["processes"], entry["devices"]) for entry in starts]
    assert facts == [(0, 1, ["cpu"]), (FIRST_PART, 2, ["cpu", "cpu"])]


def test_a_run_of_two_goes_on_in_one_or_in_two(config, alone, two, capsys, monkeypatch):
    """In two as if it had never stopped, bit for bit."""
    start = in_folder(config, "two_then_one", FIRST_PART)
    train_only(2, start)
    again = in_folder(config, "two_then_two")
    shutil.copytree(start.run_dir, again.run_dir)

    monkeypatch.setattr(Trainer, "finish", lambda trainer: None)
    train(in_folder(config, "two_then_one"), resume=True)
    assert "was written by 2 processes, now there are 1" in capsys.readouterr().err
    assert_same_run(alone, start.run_dir)

    assert "was written by" not in train_only(2, again, resume=True)
    for part in ("step", "epoch", "batch", "model", "optimizer"):
        saved = (load_checkpoint(run / CHECKPOINT)[part] for run in (two, again.run_dir))
        assert_same(*saved, part)


def test_two_ranks_evaluate_as_one(alone):
    """An odd number of images: each is seen once, with the same detections, and judged the same.

    (After "--" torchrun does not take --run for one of its own options.)
    """
    metrics, found = [], []
    for ranks in (1, 2):
        output = alone.with_name(f"evaluated_by_{ranks}")
        options = ["--run", str(alone), "--output", str(output), "eval.max_detections=30"]
        process = start_ranks(ranks, "-m", "--", "detector", "evaluate", *options)
        table, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert table.count("APr") == 1
        metrics.append(json.loads((output / METRICS).read_text())["metrics"])
        rows = json.loads((output / RESULTS).read_text())
        assert {row["image_id"] for row in rows} == set(range(1, 14))
        found.append(sorted(rows, key=lambda row: (row["image_id"], -row["score"])))
        assert not list(output.glob("*.rank*"))
    assert found[0] == found[1]
    assert metrics[0] == metrics[1]


def rank_process(torchrun: int, rank: int) -> int:
    """The id of the process that torchrun has started for a rank."""
    for folder in Path("/proc").iterdir():
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == torchrun and f"\0RANK={rank}\0" in (folder / "environ").read_text():
                return int(folder.name)
        except (OSError, ValueError):
            continue
    raise AssertionError(f"torchrun has no rank {rank}")


def test_a_killed_rank_ends_the_run_with_a_message(config):
    """From the command line, to the evaluation by two ranks after the resume."""
    config = in_folder(config, "killed", steps=400)
    config = replace(
        config,
        train=replace(config.train, checkpoint_interval=1, timeout=1.0),
        eval=replace(config.eval, max_detections=10, pictures=0),
    )
    save_config(config, config.run_dir.with_suffix(".yaml"))
    process = start_ranks(2, "-m", "detector", "train", "--config", str(config.run_dir.with_suffix(".yaml")))
    log, deadline = config.run_dir / "log.jsonl", time.monotonic() + 120
    while not (log.is_file() and len(log.read_text().splitlines()) >= 3):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(rank_process(process.pid, rank=1), signal.SIGKILL)
    killed = time.monotonic()
    errors = process.communicate(timeout=60)[1]
    assert time.monotonic() - killed < 30
    assert process.returncode != 0
    (message,) = error_lines(errors)
    assert message.startswith("error: another process of the run has ended or does not answer")
    assert "--resume continues from the last checkpoint" in message
    step = load_checkpoint(config.run_dir / CHECKPOINT)["step"]
    assert step >= 2

    last = f"train.max_steps={step + 1}"
    process = start_ranks(2, "-m", "detector", "train", "--resume", str(config.run_dir), last)
    table, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert table.count("APr") == 1
    results = json.loads((config.run_dir / "results.json").read_text())
    assert {row["image_id"] for row in results} == set(range(1, 14))
    assert not list(config.run_dir.glob("*.rank*"))
