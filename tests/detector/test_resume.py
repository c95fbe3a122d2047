"""Killed, terminated and resumed: the same final state, bit for bit, as the run that never stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from detector.config import load_config, save_config, with_overrides
from detector.engine.checkpoint import CheckpointError, load_checkpoint
from detector.engine.run_folder import CHECKPOINT
from detector.engine.train import Interrupted, Trainer, train
from tests.detector.tiny_detector import run_config, write_data_set

STEPS = 24
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(*arguments: str) -> subprocess.Popen:
    """The command line in a process of its own, with one thread as in this process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "detector", "train", *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        rows = (run / "log.jsonl").read_text().splitlines() if (run / "log.jsonl").is_file() else []
        if rows and rows[-1].endswith("}") and json.loads(rows[-1])["step"] >= step:
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    raise AssertionError(f"step {step} never came")


def assert_same(one, other, path: str = "") -> None:
    """Equal trees of plain values and tensors, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{path}[{index}]")
    else:
        assert one == other, path


def test_kill_and_resume_end_in_the_same_state(tmp_path):
    """SIGTERM in one process, SIGKILL in the next, the rest here. GOL draws random numbers in its loss, the
    RPN and the RoI sampler draw more, images are flipped and resized, the epoch ends in between."""
    write_data_set(tmp_path / "data")
    config = run_config(
        tmp_path,
        "loss.name=gol",
        f"train.max_steps={STEPS}",
        "train.milestones=[16]",
        "train.checkpoint_interval=7",
        "train.log_interval=1",
        "data.min_sizes=[56, 64]",
        "data.repeat_threshold=0.3",
        "data.workers=1",
    )
    whole = replace(config, output=str(tmp_path / "whole"))
    train(whole)

    save_config(config, tmp_path / "tiny.yaml")
    run = config.run_dir
    process = start("--config", str(tmp_path / "tiny.yaml"))
    wait_for_step(run, 3, process)
    process.send_signal(signal.SIGTERM)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert f"stopped by SIGTERM after step {load_checkpoint(run / CHECKPOINT)['step']}" in message
    assert f"continue with --resume {run}" in message

    process = start("--resume", str(run))
    wait_for_step(run, 10, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 3 <= load_checkpoint(run / CHECKPOINT)["step"] < STEPS

    train(load_config(run / "config.yaml"), resume=True)
    first, second = (load_checkpoint(folder / CHECKPOINT) for folder in (whole.run_dir, run))
    for part in ("step", "epoch", "batch", "model", "optimizer", "classes"):
        assert_same(first[part], second[part], part)
    assert first["step"] == STEPS
    starts = json.loads((run / "environment.json").read_text())
    assert [start["start_step"] == 0 for start in starts] == [True, False, False]
    assert losses(whole.run_dir) == losses(run)  # every step logged once, with the same numbers
    assert (whole.run_dir / "results.json").read_text() == (run / "results.json").read_text()


def losses(run: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [
        (row["step"], row["epoch"], row["lr"], row["loss"], row["loss_cls"]) for row in rows if "loss" in row
    ]


def test_seesaw_counts_survive_a_resume(tmp_path, monkeypatch):
    """The loss's own state is part of the checkpoint: without it the resumed run weighs the classes anew."""
    write_data_set(tmp_path / "data")
    config = run_config(tmp_path, "loss.name=seesaw", "train.max_steps=4", "train.checkpoint_interval=2")
    monkeypatch.setattr(Trainer, "finish", lambda trainer: None)
    train(replace(config, output=str(tmp_path / "whole")))
    whole = load_checkpoint(tmp_path / "whole" / CHECKPOINT)

    real_save = Trainer.save

    def save_and_stop(trainer):
        real_save(trainer)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert load_checkpoint(config.run_dir / CHECKPOINT)["step"] == 2
    train(config, resume=True)
    resumed = load_checkpoint(config.run_dir / CHECKPOINT)
    assert_same(whole["model"], resumed["model"], "model")
    counted = [value for key, value in resumed["model"].items() if key.endswith("label_counts")]
    assert int(counted[0].sum()) == 4 * 2 * 32  # steps x images x RoIs


def test_interrupt_in_this_process_saves_and_says_so(tmp_path, monkeypatch):
    write_data_set(tmp_path / "data")
    config = run_config(tmp_path, "train.max_steps=6")
    real_update = Trainer._update

    def update(trainer, images, targets):
        if trainer.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real_update(trainer, images, targets)

    monkeypatch.setattr(Trainer, "_update", update)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped by SIGINT after step 2"):
        train(config)
    assert signal.getsignal(signal.SIGINT) is before
    assert load_checkpoint(config.run_dir / CHECKPOINT)["step"] == 2


def test_a_run_is_not_overwritten_by_accident(tmp_path, monkeypatch):
    write_data_set(tmp_path / "data")
    monkeypatch.setattr(Trainer, "finish", lambda trainer: None)
    config = run_config(tmp_path, "train.max_steps=1")
    train(config)
    with pytest.raises(ValueError, match="already holds a checkpoint: continue it with --resume"):
        train(config)
    kept = sorted(config.run_dir.rglob("*"))
    for refused in ("data.train=absent.json", "train.init_from=absent.pt", "train.gradient_interval=1"):
        with pytest.raises((ValueError, OSError)):
            train(with_overrides(config, [refused]), overwrite=True)
        assert sorted(config.run_dir.rglob("*")) == kept
    train(config, overwrite=True)
    assert [row[0] for row in losses(config.run_dir)] == [1]
    assert len(list(config.run_dir.glob("events.*"))) == 1

    def killed_early(trainer):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "run", killed_early)
    with pytest.raises(KeyboardInterrupt):
        train(config, overwrite=True)
    with pytest.raises(CheckpointError, match="no checkpoint at"):  # and not the old run's
        train(config, resume=True)


def test_resume_with_other_classes_is_refused(tmp_path, monkeypatch):
    write_data_set(tmp_path / "data")
    monkeypatch.setattr(Trainer, "finish", lambda trainer: None)
    config = run_config(tmp_path, "train.max_steps=1")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        train(config, resume=True)
    train(config)
    path = config.run_dir / CHECKPOINT
    state = load_checkpoint(path)
    torch.save({**state, "classes": {**state["classes"], "category_ids": [1, 2]}}, path)
    with pytest.raises(CheckpointError, match="trained on 2 categories that are not the 6"):
        train(config, resume=True)


def test_resume_with_another_batch_goes_on_after_as_many_images(tmp_path, monkeypatch, capsys):
    """Ten images an epoch: after three batches of two, the second batch of four comes next."""
    write_data_set(tmp_path / "data")
    monkeypatch.setattr(Trainer, "finish", lambda trainer: None)
    train(run_config(tmp_path, "train.max_steps=3"))
    config = run_config(tmp_path, "train.max_steps=4", "train.batch_size=4")
    train(config, resume=True)
    assert "batches of 2 images, now they have 4" in capsys.readouterr().err
    state = load_checkpoint(config.run_dir / CHECKPOINT)
    assert (state["step"], state["epoch"], state["batch"]) == (4, 0, 2)
