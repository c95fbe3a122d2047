"""Checkpoints, logs, pasted masks, the command line, and two processes."""

from __future__ import annotations

import json
import os
import pickle
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch.nn import functional as F

from detector.cli import main
from detector.config import load_config, save_config
from detector.engine.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from detector.engine.distributed import Process
from detector.engine.infer import detect_all, load_run, to_detections
from detector.engine.log import LossMeter, RunLogger
from detector.engine.paste import encode_mask
from detector.engine.run_folder import CHECKPOINT, FILES
from detector.engine.train import train
from tests.detector.tiny_detector import run_config, write_data_set

ROOT = Path(__file__).parents[2]
ALONE = Process(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def full_paste(mask: np.ndarray, box: np.ndarray, height: int, width: int) -> np.ndarray:
    """The whole image sampled at pixel centres by grid_sample, as is usual on a GPU."""
    x = (torch.arange(width) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
    y = (torch.arange(height) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None].float()
    sampled = F.grid_sample(
        torch.from_numpy(mask)[None, None], grid, padding_mode="zeros", align_corners=False
    )
    return sampled[0, 0].numpy()


@pytest.mark.parametrize("seed", range(25))
def test_pasted_mask_equals_sampling_the_whole_image(seed):
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(20, 90, 2))
    mask = rng.random((28, 28), dtype=np.float32) ** 0.5
    corner = rng.uniform(0, 0.7, 2) * (width, height)
    box = np.concatenate([corner, np.minimum(corner + rng.uniform(0.5, 60, 2), (width, height))]).astype(
        np.float32
    )
    if seed % 5 == 0:
        box[[1, 3]] = 0, height  # full height: runs go on from one column to the next
        mask[:] = 0.9
    sampled = full_paste(mask, box, height, width)
    decided = np.abs(sampled - 0.5) > 1e-4  # the two ways round differently
    pasted = coco_mask.decode(encode_mask(mask, box, height, width))
    assert pasted.shape == (height, width)
    assert np.array_equal(pasted[decided], (sampled >= 0.5)[decided])
    assert decided.mean() > 0.99
    reference = coco_mask.encode(np.asfortranarray(pasted))
    assert encode_mask(mask, box, height, width)["counts"] == reference["counts"].decode()


def test_a_full_mask_fills_exactly_its_box():
    rle = encode_mask(np.ones((28, 28), np.float32), np.array([3.0, 5, 9, 12]), 20, 30)
    expected = np.zeros((20, 30), np.uint8)
    expected[5:12, 3:9] = 1
    assert np.array_equal(coco_mask.decode(rle), expected)
    nothing = encode_mask(np.zeros((28, 28), np.float32), np.array([3.0, 5, 9, 12]), 20, 30)
    assert coco_mask.area(nothing) == 0
    outside = encode_mask(np.ones((28, 28), np.float32), np.array([30.0, 5, 30.0, 12]), 20, 30)
    assert coco_mask.area(outside) == 0


def test_detections_return_to_the_original_pixels():
    found = {
        "boxes": torch.tensor([[20.0, 5, 60, 40]]),
        "scores": torch.tensor([0.5]),
        "labels": torch.tensor([3]),
        "masks": torch.ones(1, 28, 28),
    }
    detections = to_detections(found, 7, scale=(2.0, 0.5), original_size=(79, 30))
    assert detections.boxes.tolist() == [[10.0, 10.0, 30.0, 79.0]]  # the bottom, 80, is cut to the image
    assert detections.masks[0]["size"] == [79, 30]
    assert coco_mask.area(detections.masks[0]) == 20 * 69


def test_detections_leave_the_model_image_by_image():
    """However many images there are, what the model gave for at most two of them is alive at a time."""
    outputs: list[weakref.ref] = []
    alive, seen = [], []

    class Model(torch.nn.Module):
        def forward(self, images):
            masks = torch.ones(1, 28, 28)
            outputs.append(weakref.ref(masks))
            alive.append(sum(output() is not None for output in outputs))
            box, one = torch.tensor([[2.0, 2, 6, 6]]), torch.tensor([1])
            return [{"boxes": box, "scores": one.float(), "labels": one, "masks": masks}]

    batches = (
        ([torch.zeros(3, 8, 8)], [{"image_id": k, "scale": (1.0, 1.0), "original_size": (8, 8)}])
        for k in range(20)
    )
    detect_all(Model(), batches, lambda found: seen.append(found.image_id))
    assert seen == list(range(20))
    assert max(alive) <= 2


def test_unreadable_checkpoints_are_named(tmp_path):
    path = tmp_path / "last.pt"
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_checkpoint(path)
    save_checkpoint(path, {"step": 1, "weights": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_checkpoint(path)
    torch.save({"weights": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of this trainer"):
        load_checkpoint(path)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_a_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "step": Payload()}, tmp_path / "last.pt", pickle_module=pickle)
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "last.pt")
    assert not (tmp_path / "pwned").exists()


def test_meter_averages_over_the_steps():
    meter = LossMeter(ALONE)
    for value in (1.0, 2.0, 6.0):
        meter.add({"loss_cls": value, "loss_box": 0.5})
    assert meter.read() == {"loss_cls": 3.0, "loss_box": 0.5}
    assert meter.read() == {}


def test_log_forgets_what_the_resumed_run_repeats(tmp_path):
    rows = [{"step": step, "loss": 1.0} for step in (2, 4, 6)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "log.jsonl").write_text(text + '{"step": 8, "lo')
    logger = RunLogger(tmp_path, ALONE, start_step=4, total_steps=8)
    logger.evaluation(5, 0, {"bbox": {"AP": 0.25}})
    logger.close()
    written = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert written == [*rows[:2], {"step": 5, "epoch": 0, "eval": {"bbox": {"AP": 0.25}}}]


def test_a_run_leaves_what_it_promises(tmp_path, capsys):
    """Epoch schedule, bf16, odd image sizes; then evaluate again from the checkpoint, and predict."""
    write_data_set(tmp_path / "data")
    config = run_config(
        tmp_path, "train.epochs=1", "train.precision=bf16", "data.test_size=80", "data.workers=1"
    )
    metrics = train(config)
    run = config.run_dir
    assert load_config(run / "config.yaml") == config
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 5, 5]  # ten images in batches of two
    expected = {
        "step",
        "epoch",
        "lr",
        "loss",
        "loss_cls",
        "loss_box",
        "loss_mask",
        "loss_rpn_cls",
        "loss_rpn_box",
    }
    assert expected | {"data_s", "step_s", "images_per_s", "memory_mb"} == set(rows[0])
    assert rows[0]["loss"] == pytest.approx(
        sum(v for k, v in rows[0].items() if k.startswith("loss_")), rel=1e-6
    )
    assert rows[-1]["eval"] == metrics == json.loads((run / "metrics.json").read_text())["metrics"]
    assert list(run.glob("events.*"))
    assert {path.name for path in (run / "plots").iterdir()} >= {"losses.png", "lr.png", "ap_groups.png"}
    assert Image.open(run / "predictions.png").size[0] > 500
    results = json.loads((run / "results.json").read_text())
    assert {row["category_id"] for row in results} <= {3, 5, 8, 9, 12, 20}
    assert all(row["bbox"][0] + row["bbox"][2] <= 64.001 for row in results)  # of 64 pixels, seen at 80
    assert results[0]["segmentation"]["size"] == [64, 64]
    table = capsys.readouterr().out
    assert "APr" in table
    assert "10 images" in table
    explained = (run / "README.txt").read_text()
    for path in (path for path in run.rglob("*") if path.is_file()):
        (pattern,) = (pattern for pattern in FILES if path.relative_to(run).match(pattern))
        assert f"\n  {pattern}  " in explained
    (start,) = json.loads((run / "environment.json").read_text())
    assert (start["start_step"], start["devices"]) == (0, ["cpu"])
    assert start["versions"]["torch"] == torch.__version__

    assert (
        main(["evaluate", "--run", str(run), "--output", str(tmp_path / "again"), "eval.max_detections=300"])
        == 0
    )
    assert json.loads((tmp_path / "again" / "metrics.json").read_text())["metrics"] == metrics

    pictures = [str(tmp_path / "data" / "images"), str(tmp_path / "data" / "images" / "0.png")]
    arguments = ["predict", "--run", str(run), "--output", str(tmp_path / "drawn"), "--threshold", "0.0001"]
    assert main([*arguments, *pictures]) == 0
    drawn = {path.name for path in (tmp_path / "drawn").glob("*.png")}
    assert drawn == {f"{k}.png" for k in range(10)} | {"0-2.png"}
    records = json.loads((tmp_path / "drawn" / "predictions.json").read_text())
    best = max((r for r in records if r["file"].endswith("3.png")), key=lambda r: r["score"])
    truth = max((r for r in results if r["image_id"] == 4), key=lambda r: r["score"])
    assert best["score"] == pytest.approx(truth["score"], rel=1e-4)
    assert best["bbox"] == pytest.approx(truth["bbox"], abs=1e-2)


def test_training_starts_from_another_runs_weights(tmp_path):
    write_data_set(tmp_path / "data")
    train(run_config(tmp_path, "train.max_steps=1"))
    source = tmp_path / "run" / CHECKPOINT
    config = run_config(
        tmp_path,
        "train.max_steps=1",
        "train.lr=0.0",
        f"train.init_from={source}",
        f"output={tmp_path / 'second'}",
    )
    train(config)
    one, other = (load_run(tmp_path / name)[2].state_dict() for name in ("run", "second"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(ValueError, match="does not fit this model"):
        train(
            run_config(
                tmp_path,
                f"train.init_from={source}",
                "model.box_head_width=32",
                "output=" + str(tmp_path / "x"),
            )
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--config", "absent"], "no configuration 'absent'"),
        (["train", "--config", "demo", "train.lrr=1"], "unknown key train.lrr; did you mean train.lr?"),
        (["train", "--config", "demo", "data.root=absent"], "absent/annotations/lvis_synth_train.json"),
        (["train", "--config", "demo", "device=tpu"], "device must be auto, cpu, cuda"),
        (["train", "--resume", "absent"], "absent holds no run"),
        (["train", "--resume", "absent", "--overwrite"], "--resume continues a run in its own folder"),
        (["train", "--resume", "absent", "--weights", "none"], "--resume continues a run in its own folder"),
        (["evaluate", "--run", "absent"], "no checkpoint at absent"),
        (["evaluate", "--results", "absent.json"], "--results needs --annotations"),
        (["predict", "--run", "absent", "--output", "x", "absent.jpg"], "absent.jpg does not exist"),
        (["predict", "--run", "absent", "--output", "x", "."], "holds no images"),
        (["make-synthetic", "x", "synthetic.num_classes=0"], "num_classes must lie in"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    assert stderr.startswith("error: ")
    assert message in stderr


@pytest.mark.parametrize("workers", [0, 1])
def test_missing_image_is_one_line_even_from_a_loader_process(workers, tmp_path, capsys, monkeypatch):
    write_data_set(tmp_path / "data")
    for path in (tmp_path / "data" / "images").iterdir():
        path.unlink()
    save_config(run_config(tmp_path, f"data.workers={workers}", "train.max_steps=1"), tmp_path / "tiny.yaml")
    assert main(["train", "--config", str(tmp_path / "tiny.yaml")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "does not exist" in last
    assert "(image " in last


def test_faults_of_the_program_keep_their_traceback(monkeypatch):
    from detector import cli

    monkeypatch.setattr(cli, "load_config", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["train", "--config", "demo"])


def test_overrides_may_stand_before_and_after_options(tmp_path, capsys):
    sizes = ["synthetic.num_train=8", "--seed", "3", "synthetic.num_val=6", "synthetic.num_classes=4"]
    assert main(["make-synthetic", str(tmp_path), *sizes]) == 0
    assert "8 + 6 images of 4 classes" in capsys.readouterr().out
    annotations = tmp_path / "annotations" / "lvis_synth_train.json"
    assert main(["check-data", str(annotations), str(tmp_path), "--decode"]) == 0
    assert main(["check-data", str(annotations), str(tmp_path / "annotations")]) == 1
    with pytest.raises(SystemExit):
        main(["make-synthetic", str(tmp_path), "--sede", "3"])
    with pytest.raises(SystemExit):
        main(["check-data", str(annotations), str(tmp_path), "a=b"])


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for command in ("train", "evaluate", "predict", "analyze", "check-data", "make-synthetic"):
        assert command in text
