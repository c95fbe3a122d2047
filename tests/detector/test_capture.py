"""Batches that training saves for the benches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import gol_kernels as gk
from bench.captured import Captured
from bench.cases import CASES
from detector.config import ConfigError, LossConfig
from detector.engine.capture import BATCHES, capture_batches
from detector.engine.train import train
from tests.detector.tiny_detector import run_config, tiny_classes, tiny_config, write_data_set


def test_a_run_saves_the_batches_of_chosen_steps(tmp_path: Path) -> None:
    """Of each loss what its benches need; the file tells which losses it fits."""
    write_data_set(tmp_path / "data")
    config = run_config(
        tmp_path, "train.max_steps=3", "train.capture_steps=[1, 3]", "loss.name=seesaw", "data.workers=0"
    )
    train(config)
    files = sorted((config.run_dir / BATCHES).iterdir())
    assert [path.name for path in files] == ["step000001.pt", "step000003.pt"]
    first, third = map(Captured.load, files)
    assert (first.loss, first.step, third.step) == ("seesaw", 1, 3)
    assert first.cases() == [name for name, case in CASES.items() if case.extra_logits == 2]
    seen = torch.bincount(first.labels, minlength=7)[:-1]
    assert torch.equal(first.counts, seen)
    assert (third.counts >= seen).all()
    assert third.counts.sum() > seen.sum()
    assert not torch.equal(first.logits, third.logits)
    batch = first.batch(CASES["seesaw"])
    assert len(batch.logits) == (first.labels < 6).sum() > 0  # this bench has no background rows


def test_a_loss_without_counts_has_those_of_the_data(tmp_path: Path) -> None:
    stats, step = tiny_classes().stats, [4]
    loss = gk.DropLoss(stats, threshold=0.03)
    handle = capture_batches(
        loss,
        LossConfig(name="gol", threshold=0.03),
        stats,
        steps=(5, 6),
        folder=tmp_path,
        current_step=lambda: step[0],
    )
    logits, labels = torch.randn(5, 6, dtype=torch.bfloat16), torch.tensor([0, 6, 6, 3, 5], dtype=torch.int32)
    loss(logits, labels)
    assert not (tmp_path / BATCHES).exists()
    step[0] = 5
    loss.eval()(logits, labels)
    assert not (tmp_path / BATCHES).exists()
    loss.train()(logits.requires_grad_(True), labels, avg_factor=3)
    saved = Captured.load(tmp_path / BATCHES / "step000005.pt")
    assert torch.equal(saved.logits, logits.detach())
    assert saved.labels.tolist() == labels.tolist()
    assert saved.rare.tolist() == [True, True, True, False, False, False]
    assert saved.counts.tolist() == [2, 10, 40, 120, 300, 800]
    assert saved.batch(CASES["gol"]).logits.dtype == torch.bfloat16
    step[0] = 6
    handle.remove()
    loss(logits, labels)
    assert len(list((tmp_path / BATCHES).iterdir())) == 1


def test_files_that_are_no_batch(tmp_path: Path) -> None:
    torch.save({"logits": torch.zeros(2, 3)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: not a captured batch, which has loss, step, logits"):
        Captured.load(tmp_path / "a.pt")
    content = {"loss": "gol", "step": 1, "logits": torch.zeros(2, 3), "labels": torch.zeros(3).long()}
    torch.save(content | {"rare": torch.zeros(3).bool(), "counts": torch.ones(3).long()}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"b\.pt: logits \[2, 3\], labels \[3\].* do not fit"):
        Captured.load(tmp_path / "b.pt")


def test_steps_are_counted_from_one() -> None:
    with pytest.raises(ConfigError, match="capture_steps are counted from 1"):
        tiny_config("train.capture_steps=[0]")
