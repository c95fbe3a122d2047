"""Evaluations during training: when they come, what they leave behind, and that training does not notice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from detector.config import Config
from detector.engine import train as train_module
from detector.engine.checkpoint import load_checkpoint
from detector.engine.run_folder import CHECKPOINT
from detector.engine.train import Trainer, train
from detector.evaluation import Evaluation
from tests.detector.test_resume import assert_same
from tests.detector.tiny_detector import run_config, write_data_set


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def evaluated_steps(run: Path) -> list[int]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "eval" in row]


def test_training_does_not_notice_evaluations(tmp_path, monkeypatch, capsys):
    """Bit for bit the same parameters, although the evaluation here draws random numbers, too."""
    write_data_set(tmp_path / "data")
    monkeypatch.setattr(Trainer, "finish", lambda trainer: None)
    real = train_module.evaluate_model

    def evaluate_and_draw(*arguments):
        torch.rand(1000)
        return real(*arguments)

    monkeypatch.setattr(train_module, "evaluate_model", evaluate_and_draw)
    config = run_config(tmp_path, "loss.name=gol", "train.max_steps=5", "data.workers=1")
    train(config)
    often = replace(config, output=str(tmp_path / "often"), eval=replace(config.eval, interval=2))
    train(often)
    quiet, noisy = (load_checkpoint(Path(run.run_dir, CHECKPOINT)) for run in (config, often))
    for part in ("step", "epoch", "batch", "model", "optimizer"):
        assert_same(quiet[part], noisy[part], part)

    assert evaluated_steps(config.run_dir) == []
    assert evaluated_steps(often.run_dir) == [2, 4]
    assert "step 4: box AP " in capsys.readouterr().err
    events = EventAccumulator(str(often.run_dir)).Reload()
    row = [json.loads(line) for line in (often.run_dir / "log.jsonl").read_text().splitlines()][-2]
    for kind in ("bbox", "segm"):
        for name in ("AP", "APr", "APc", "APf"):
            points = events.Scalars(f"{kind}/{name}")
            assert [point.step for point in points] == [2, 4]
            assert points[-1].value == pytest.approx(row["eval"][kind][name], abs=1e-6)
    assert (often.run_dir / "plots" / "ap.png").is_file()


def quick_evaluation(*arguments: object) -> Evaluation:
    metrics = {kind: dict.fromkeys(("AP", "APr", "APc", "APf"), 0.5) for kind in ("bbox", "segm")}
    return Evaluation(metrics, {}, "none", 300, 10, 10, ())


@pytest.fixture
def quick(tmp_path, monkeypatch) -> Config:
    """A run whose evaluations cost nothing, with one at its end."""
    write_data_set(tmp_path / "data")
    monkeypatch.setattr(train_module, "evaluate_model", quick_evaluation)
    for name in ("write_report", "plot_curves"):
        monkeypatch.setattr(train_module, name, lambda *arguments: None)
    return run_config(tmp_path, "train.epochs=3", "train.batch_size=5", "train.milestones=[3]")


@pytest.mark.parametrize(
    ("max_steps", "interval", "expected"),
    [
        (0, 0, [6]),
        (0, 1, [2, 4, 6]),
        (0, 2, [4, 6]),
        (5, 1, [1, 2, 3, 4, 5]),
        (5, 2, [2, 4, 5]),
        (4, 2, [2, 4]),
    ],
)
def test_the_interval_counts_epochs_or_steps(quick, max_steps, interval, expected):
    """Two batches an epoch. At the end there is always one, and never a second one."""
    config = replace(quick, eval=replace(quick.eval, interval=interval))
    train(replace(config, train=replace(config.train, max_steps=max_steps)))
    assert evaluated_steps(config.run_dir) == expected


def test_an_evaluation_that_was_killed_is_made_after_the_resume(quick, monkeypatch):
    config = replace(quick, eval=replace(quick.eval, interval=1))

    def killed(*arguments: object) -> Evaluation:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "evaluate_model", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert load_checkpoint(config.run_dir / CHECKPOINT)["step"] == 2
    assert evaluated_steps(config.run_dir) == []
    train(config, resume=True)
    assert evaluated_steps(config.run_dir) == [2, 4, 6]
