"""What goes wrong leaves a clear message, what is needed to look into it, and the last good checkpoint."""

from __future__ import annotations

import io
import json
import math
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from detector.cli import main
from detector.config import Config, save_config
from detector.engine import bad_loss
from detector.engine.bad_loss import PendingLosses, is_bad
from detector.engine.checkpoint import load_checkpoint, save_checkpoint
from detector.engine.run_folder import CHECKPOINT
from detector.engine.train import Trainer, train
from detector.model import MaskRCNN
from tests.detector.ranks import error_lines, start_ranks, training_rows
from tests.detector.test_resume import assert_same
from tests.detector.tiny_detector import run_config, write_data_set


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(tmp_path, monkeypatch) -> Config:
    """Five steps with Seesaw, whose counts must not keep a step that was not made; no evaluation."""
    write_data_set(tmp_path / "data")
    monkeypatch.setattr(Trainer, "finish", lambda trainer: None)
    return run_config(
        tmp_path,
        "loss.name=seesaw",
        "train.max_steps=5",
        "train.log_interval=1",
        "train.checkpoint_interval=1",
        "train.clip_grad_norm=5.0",
    )


def with_train(config: Config, name: str = "", **changes: object) -> Config:
    output = str(config.run_dir.with_name(name)) if name else config.output
    return replace(config, output=output, train=replace(config.train, **changes))


def spoil(monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...], value: float) -> None:
    """From now on the classification loss of these steps (from 1) is `value`."""
    made = MaskRCNN.forward
    update = Trainer._update
    now: list[int] = []

    def forward(model: MaskRCNN, images: list[Tensor], targets: list | None = None):
        losses = made(model, images, targets)
        if now[-1] in steps:
            losses["loss_cls"] = losses["loss_cls"] * 0 + value
        return losses

    def noted(trainer: Trainer, *batch: object) -> bool:
        now.append(trainer.step + 1)
        return update(trainer, *batch)

    monkeypatch.setattr(MaskRCNN, "forward", forward)
    monkeypatch.setattr(Trainer, "_update", noted)


def test_what_is_bad():
    assert not is_bad({"a": 5.0, "b": 5.0}, limit=10.0)
    assert is_bad({"a": 5.0, "b": 5.1}, limit=10.0)
    for value in (math.nan, math.inf):
        assert is_bad({"a": value, "b": 0.0}, limit=10.0)
    read = PendingLosses({"a": torch.tensor(1.5, dtype=torch.bfloat16), "b": torch.tensor(math.inf)}).read()
    assert read == {"a": 1.5, "b": math.inf}


@pytest.mark.parametrize(("value", "text"), [(math.nan, "loss_cls=nan, "), (2e4, "loss_cls=2e+04, ")])
def test_a_bad_loss_stops_and_leaves_batch_and_state(config, value, text):
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, (3,), value)
        with pytest.raises(FloatingPointError) as caught:
            train(config)
    folder = config.run_dir / "bad_loss" / "step_3"
    batch, state = (load_checkpoint(folder / name) for name in ("batch_rank0.pt", "state.pt"))
    image_ids = [target["image_id"] for target in batch["targets"]]
    message = str(caught.value)
    assert f"not finite or too high at step 3: {text}" in message
    assert f"on images {image_ids[0]}, {image_ids[1]}. Batch and state are in {folder}." in message
    assert batch["losses"]["loss_cls"] == pytest.approx(value, nan_ok=True)
    shown = Image.open(config.data.image_folder / f"{image_ids[0] - 1}.png")
    pixels = torch.from_numpy(np.array(shown)).permute(2, 0, 1)
    assert torch.equal(
        batch["images"][0].flip(-1) if batch["targets"][0]["flipped"] else batch["images"][0], pixels
    )
    assert batch["targets"][0]["boxes"].shape[1] == 4

    last = load_checkpoint(config.run_dir / CHECKPOINT)
    for part in ("step", "epoch", "batch", "model", "optimizer"):
        assert_same(last[part], state[part], part)
    assert state["step"] == 2

    # The state in the place of the last checkpoint comes to the same step, now a good one, and goes on.
    save_checkpoint(config.run_dir / CHECKPOINT, state)
    train(config, resume=True)
    whole = with_train(config, "whole")
    train(whole)
    first, second = (load_checkpoint(run.run_dir / CHECKPOINT) for run in (config, whole))
    assert_same(first["model"], second["model"], "model")
    assert training_rows(config.run_dir)[2]["loss"] == training_rows(whole.run_dir)[2]["loss"]


def test_a_bad_loss_is_skipped_by_option(config, monkeypatch, capsys):
    """Parameters, momentum and counts are after the bad step what they were before it."""
    saved: list[dict] = []
    save = Trainer.save

    def keep(trainer: Trainer) -> None:
        save(trainer)
        saved.append(load_checkpoint(config.run_dir / CHECKPOINT))

    monkeypatch.setattr(Trainer, "save", keep)
    spoil(monkeypatch, (2, 3), math.inf)
    train(with_train(config, on_bad_loss="skip"))
    one, two, three, four = saved[:4]
    for state in (two, three):
        assert_same(one["model"], state["model"], "model")
        assert_same(one["optimizer"]["state"], state["optimizer"]["state"], "optimizer")
    assert [state["step"] for state in saved[:4]] == [1, 2, 3, 4]
    assert not torch.equal(
        one["model"]["rpn.head.cls_logits.weight"], four["model"]["rpn.head.cls_logits.weight"]
    )
    assert [row["step"] for row in training_rows(config.run_dir)] == [1, 4, 5]
    rows = [json.loads(line) for line in (config.run_dir / "log.jsonl").read_text().splitlines()]
    skipped = [row for row in rows if "bad_loss" in row]
    assert [row["step"] for row in skipped] == [2, 3]
    assert skipped[0]["bad_loss"][0]["loss_cls"] == math.inf
    assert len(skipped[0]["image_ids"][0]) == 2
    assert "skipped: the loss is not finite or too high at step 2: loss_cls=inf" in capsys.readouterr().err


def test_skipping_ends_when_nothing_else_is_left(config, monkeypatch):
    monkeypatch.setattr(bad_loss, "PATIENCE", 3)
    spoil(monkeypatch, (1, 3, 4, 5), math.nan)
    with pytest.raises(FloatingPointError, match=r"at step 5: .* These were 3 such steps in a row"):
        train(with_train(config, on_bad_loss="skip"))
    kept = {path.parent.name for path in config.run_dir.rglob("state.pt")}
    assert kept == {"step_1", "step_3", "step_4"}  # of the first three only


def test_a_real_explosion_is_found(config):
    with pytest.raises(FloatingPointError, match=r"not finite or too high at step \d: loss_"):
        train(with_train(config, lr=1e12, clip_grad_norm=0.0))


def test_parameters_that_are_not_finite_are_not_saved(config, monkeypatch):
    """A gradient that overflows where the loss did not leaves the checkpoint from before."""
    step = torch.optim.SGD.step

    def overflow(optimizer: torch.optim.SGD) -> None:
        step(optimizer)
        if overflow.calls == 2:
            optimizer.param_groups[0]["params"][-1].data.view(-1)[-1] = math.inf
        overflow.calls += 1

    overflow.calls = 0
    monkeypatch.setattr(torch.optim.SGD, "step", overflow)
    with pytest.raises(FloatingPointError, match="a parameter is not finite after step 3"):
        train(config)
    assert load_checkpoint(config.run_dir / CHECKPOINT)["step"] == 2


SPOILED_ON_RANK_1 = """
import sys
import torch
from detector.cli import main
from detector.model import MaskRCNN

def forward(model, images, targets=None, made=MaskRCNN.forward):
    losses = made(model, images, targets)
    if torch.distributed.get_rank() == 1 and any(target["image_id"] == 5 for target in targets):
        losses["loss_mask"] = losses["loss_mask"] * float("nan")
    return losses

MaskRCNN.forward = forward
torch.set_num_threads(1)
sys.exit(main(["train", "--config", sys.argv[1]]))
"""


def test_two_ranks_stop_alike(tmp_path):
    """Image 5 comes to rank 1 sooner or later."""
    write_data_set(tmp_path / "data")
    config = run_config(tmp_path, "train.max_steps=100", "train.batch_size=4")
    save_config(config, tmp_path / "config.yaml")
    (tmp_path / "script.py").write_text(SPOILED_ON_RANK_1)
    process = start_ranks(2, str(tmp_path / "script.py"), str(tmp_path / "config.yaml"))
    errors = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    (message,) = set(error_lines(errors))  # torchrun may end one before it speaks
    assert "; loss_mask=nan, " in message  # behind those of rank 0
    (state,) = config.run_dir.rglob("state.pt")
    losses = [load_checkpoint(state.with_name(f"batch_rank{rank}.pt"))["losses"] for rank in (0, 1)]
    assert [is_bad(each, 1e4) for each in losses] == [False, True]


def run_command(config: Config, capsys: pytest.CaptureFixture[str], *, resume: bool = False) -> str:
    """Train from the command line to a failure of code 2; the line that it prints."""
    save_config(config, config.run_dir.with_suffix(".yaml"))
    source = (
        ["--resume", str(config.run_dir)]
        if resume
        else ["--config", str(config.run_dir.with_suffix(".yaml"))]
    )
    assert main(["train", *source]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_full_disk_keeps_the_old_checkpoint(config, monkeypatch, capsys):
    """No file may grow beyond a megabyte from the third step on, a tenth of the checkpoint."""
    update = Trainer._update
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(trainer: Trainer, *batch: object) -> bool:
        if trainer.step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
        return update(trainer, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", limited)
        try:
            line = run_command(config, capsys)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    path = config.run_dir / CHECKPOINT
    assert line.startswith(f"error: cannot write {path}: [Errno 27] File too large")
    assert path.stat().st_size > 2**21
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert load_checkpoint(path)["step"] == 2
    train(config, resume=True)
    assert load_checkpoint(path)["step"] == 5


def test_a_failed_write_names_the_reason(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 1})

    def full_disk(state: object, file: io.BufferedWriter) -> None:
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match=r"cannot write .*last.pt: \[Errno 28\] No space left on device"):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path)["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_jpeg_is_named(config, capsys, workers):
    """Half of a JPEG, for the last image of the epoch."""
    config = replace(config, data=replace(config.data, workers=workers))
    trainer_saw: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Trainer,
            "_update",
            lambda trainer, images, targets: trainer_saw.extend(target["image_id"] for target in targets),
        )
        train(with_train(config, "order"))
    file = config.data.image_folder / f"{trainer_saw[-1] - 1}.png"
    data = io.BytesIO()
    Image.open(file).convert("RGB").resize((64, 64)).save(data, "JPEG", quality=95)
    file.write_bytes(data.getvalue()[: len(data.getvalue()) // 2])
    line = run_command(config, capsys)
    assert line.startswith("error: ")
    assert f"{file} (image {trainer_saw[-1]}) cannot be decoded (image file is truncated" in line
    assert load_checkpoint(config.run_dir / CHECKPOINT)["step"] == 4


@pytest.mark.parametrize(
    ("spoil_text", "message"),
    [
        (lambda text: text[: len(text) // 2], "(at character "),
        (lambda text: text.replace('"category_id": 5', '"category_id": 500', 1), "unknown category id 500"),
    ],
    ids=["truncated", "category"],
)
def test_a_broken_annotation_file_is_named(config, capsys, spoil_text, message):
    """At the start, and at a resume, which leaves the checkpoint as it was."""
    train(with_train(config, max_steps=1))
    before = (config.run_dir / CHECKPOINT).read_bytes()
    file = Path(config.data.train_file)
    file.write_text(spoil_text(file.read_text()))
    for run, resume in ((with_train(config, "another"), False), (config, True)):
        line = run_command(run, capsys, resume=resume)
        assert line.startswith(f"error: {file}: ")
        assert message in line
    assert (config.run_dir / CHECKPOINT).read_bytes() == before
    assert not (config.run_dir.with_name("another") / CHECKPOINT).exists()
