"""gradients.jsonl: what the losses gather over training, written in rows and read by an analysis."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import gol_kernels as gk
from detector.analysis.gradients import GradientHistory, mean_of_group, read_gradients
from detector.config import Config, ConfigError
from detector.engine.capture import BATCHES
from detector.engine.checkpoint import load_checkpoint
from detector.engine.distributed import Process
from detector.engine.gradient_log import STATISTICS, GradientLog
from detector.engine.run_folder import CHECKPOINT, GRADIENTS
from detector.engine.train import Trainer, train
from tests.detector.ranks import train_only
from tests.detector.tiny_detector import run_config, write_data_set

ALONE = Process(0, 1, torch.device("cpu"))
STATS = "roi_heads.stages.0.loss.gradient_stats."


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Five steps of two images, without an evaluation."""
    write_data_set(tmp_path / "data", num_images=13)
    monkeypatch.setattr(Trainer, "finish", lambda trainer: None)
    return run_config(tmp_path, "loss.name=gumbel", "train.max_steps=5", "train.gradient_interval=2")


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / GRADIENTS).read_text().splitlines()]


def test_rows_hold_what_the_loss_has_seen(config: Config) -> None:
    """Against the logits that the loss received: a positive's gradient is exp(-z) inside the clip."""
    config = replace(config, train=replace(config.train, capture_steps=(1, 2, 3, 4, 5)))
    train(config)
    written = rows(config.run_dir)
    assert [(row["step"], row["stage"]) for row in written] == [(2, 1), (4, 1), (5, 1)]
    model = load_checkpoint(config.run_dir / CHECKPOINT)["model"]
    for name in STATISTICS:
        assert written[-1][name] == model[STATS + name].tolist()

    sums, counts = torch.zeros(6, dtype=torch.float64), torch.zeros(7, dtype=torch.int64)
    expected = {}
    for step in range(1, 6):
        batch = torch.load(config.run_dir / BATCHES / f"step{step:06d}.pt", weights_only=True)
        z = batch["logits"].double().clamp(-4, 10).gather(1, batch["labels"][:, None])[:, 0]
        foreground = batch["labels"] < 6
        sums.index_add_(0, batch["labels"][foreground], (-z[foreground]).exp())
        counts += torch.bincount(batch["labels"], minlength=7)
        expected[step] = sums.tolist(), counts.tolist()
    for row in written:
        sums, counts = expected[row["step"]]
        assert row["label_counts"] == counts
        assert row["positive_gradient"] == pytest.approx(sums, rel=1e-5)

    (history,) = read_gradients(config.run_dir / GRADIENTS, 6)
    stats = gk.ClassStats(6)
    stats.load_state_dict({key.removeprefix(STATS): value for key, value in model.items() if STATS in key})
    np.testing.assert_array_equal(history.mean_so_far(), stats.mean_positive_gradient.numpy())


def test_resumed_runs_write_each_row_once(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after step 4, with a row that the checkpoint of step 3 does not know; and resumed at the
    end."""
    every = replace(config.train, gradient_interval=1, checkpoint_interval=3)
    config = replace(config, train=every)
    whole = replace(config, output=str(config.run_dir.with_name("whole")))
    train(whole)
    real_update = Trainer._update

    def update(trainer, images, targets):
        if trainer.step == 4:
            raise KeyboardInterrupt
        return real_update(trainer, images, targets)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", update)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert [row["step"] for row in rows(config.run_dir)] == [1, 2, 3, 4]
    with open(config.run_dir / GRADIENTS, "a") as file:
        file.write('{"step": 5, "stage": 1, "label_cou')
    train(config, resume=True)
    train(config, resume=True)
    assert rows(config.run_dir) == rows(whole.run_dir)
    assert [row["step"] for row in rows(whole.run_dir)] == [1, 2, 3, 4, 5]


def test_the_sums_do_not_change_training(config: Config) -> None:
    train(config)
    other = replace(
        config, output=str(config.run_dir.with_name("off")), train=replace(config.train, gradient_interval=0)
    )
    train(other)
    one, two = (load_checkpoint(run.run_dir / CHECKPOINT)["model"] for run in (config, other))
    assert {key for key in one if key not in two} == {key for key in one if STATS in key}
    assert all(torch.equal(value, one[key]) for key, value in two.items())
    assert not (other.run_dir / GRADIENTS).exists()
    with pytest.raises(ConfigError, match=r"train.gradient_interval was 0 when .*last.pt was written"):
        train(replace(config, output=other.output), resume=True)


def test_two_ranks_gather_what_one_does(config: Config) -> None:
    """Few proposals and small steps, as in test_ranks."""
    few = replace(config.model, pre_nms_train=5, rois_per_image=8, rpn_rois=64)
    train_options = replace(config.train, batch_size=4, lr=0.001, max_steps=3)
    config = replace(config, model=few, train=train_options)
    train(config)
    two = replace(config, output=str(config.run_dir.with_name("two")))
    train_only(2, two)
    assert [row["step"] for row in rows(two.run_dir)] == [2, 3]
    for row, other in zip(rows(config.run_dir), rows(two.run_dir), strict=True):
        assert row["label_counts"] == other["label_counts"]
        assert row["positive_gradient"] == pytest.approx(other["positive_gradient"], rel=1e-4)
        assert row["negative_gradient"] == pytest.approx(other["negative_gradient"], rel=1e-4)


@pytest.mark.parametrize("loss", ["softmax", "seesaw", "balanced_softmax", "equilibrium"])
def test_losses_without_binary_terms_are_refused(config: Config, loss: str) -> None:
    with pytest.raises(ConfigError, match=f"gradients of binary terms, loss.name={loss} has none"):
        train(replace(config, loss=replace(config.loss, name=loss)))


def test_a_row_for_each_stage(tmp_path: Path) -> None:
    losses = [gk.GumbelLoss(2, gradient_stats=gk.ClassStats(2)), gk.EQLv2Loss(2)]
    losses[1](torch.zeros(3, 3, requires_grad=True), torch.tensor([0, 2, 0]))
    log = GradientLog(tmp_path, ALONE, losses, interval=3, start_step=0)
    for step in range(1, 5):
        log.after(step)
    assert [(row["step"], row["stage"]) for row in rows(tmp_path)] == [(3, 1), (3, 2)]
    one, two = read_gradients(tmp_path / GRADIENTS, 2)
    assert (one.stage, one.positives.tolist()) == (1, [[0, 0]])
    assert (two.stage, two.positives.tolist()) == (2, [[2, 0]])
    with pytest.raises(ValueError, match=r"gradients.jsonl: step 3 has 2 classes, the run has 5"):
        read_gradients(tmp_path / GRADIENTS, 5)
    (tmp_path / GRADIENTS).write_text('{"step": 3, "sta')
    with pytest.raises(ValueError, match="holds no row yet"):
        read_gradients(tmp_path / GRADIENTS, 2)
    (tmp_path / GRADIENTS).write_text('{"step": 3}')
    with pytest.raises(ValueError, match="a line is no row of gradients"):
        read_gradients(tmp_path / GRADIENTS, 2)


def test_means() -> None:
    history = GradientHistory(
        stage=1,
        steps=np.array([10, 20]),
        positives=np.array([[2, 0, 1], [6, 0, 1]]),
        positive_gradient=np.array([[1.0, 0.0, 4.0], [9.0, 0.0, 4.0]]),
    )
    nan = np.nan
    np.testing.assert_array_equal(history.mean_in_intervals(), [[0.5, nan, 4.0], [2.0, nan, nan]])
    np.testing.assert_array_equal(history.mean_so_far(), [1.5, nan, 4.0])
    members = np.array([True, True, True])
    np.testing.assert_array_equal(mean_of_group(history.mean_in_intervals(), members), [2.25, 2.0])
    assert np.isnan(mean_of_group(history.mean_so_far(), np.array([False, True, False])))
