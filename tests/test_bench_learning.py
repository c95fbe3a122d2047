"""``python -m bench learning``: runs that are made once, continued, recorded and put side by side."""

from __future__ import annotations

import json

import pytest

from bench import __main__ as bench
from bench import learning

TINY = [
    "synthetic.num_train=12",
    "synthetic.num_val=4",
    "synthetic.num_classes=3",
    "synthetic.image_size=64",
    "data.min_sizes=[64]",
    "data.test_size=64",
    "train.max_steps=2",
    "train.milestones=[1]",
    "train.batch_size=2",
    "model.fpn_channels=32",
]


def call(tmp_path, *options, changes=()):
    folder, records = tmp_path / "learning", tmp_path / "learning.jsonl"
    where = ["--folder", str(folder), "--records", str(records), "--seeds", "3"]
    return bench.main(["learning", *where, *options, "--set", *TINY, *changes])


def test_a_run_is_made_once_and_only_for_its_settings(tmp_path, capsys):
    assert call(tmp_path, "--losses", "gumbel_released", "--budget-s", "0") == 0
    assert "0 runs finished, 1 to go" in capsys.readouterr().out
    assert call(tmp_path, "--losses", "gumbel_released") == 0
    out = capsys.readouterr().out
    assert "gumbel_released-seed3: exit status 0" in out
    assert "| Gumbel, gradients as released |" in out
    assert "3 classes, 12 training and 4 validation images, preset demo synthetic.num_train=12" in out

    assert call(tmp_path, "--losses", "gumbel_released") == 0
    assert "exit status" not in capsys.readouterr().out
    (row,) = [json.loads(line) for line in (tmp_path / "learning.jsonl").read_text().splitlines()]
    assert (row["kind"], row["variant"], row["seed"], row["steps"]) == ("learning", "gumbel_released", 3, 2)

    with pytest.raises(SystemExit, match="other settings of train"):
        call(tmp_path, "--losses", "gumbel_released", changes=["train.lr=0.5"])


def test_an_unknown_loss_is_named_before_anything_is_made(tmp_path):
    with pytest.raises(SystemExit, match=r"no loss gumble; there are softmax, sigmoid"):
        call(tmp_path, "--losses", "gumble")
    assert not (tmp_path / "learning").exists()


def row(variant, seed, ap, rare, **changes):
    values = {"AP": ap, "APr": rare, "APc": 0.1, "APf": -1.0}
    return {
        "variant": variant,
        "seed": seed,
        "config": "demo",
        "options": [],
        "classes": 24,
        "train_images": 1200,
        "val_images": 200,
        "steps": 550,
        "train_minutes": 6.0,
        "protocol": "LVIS protocol; more",
        "metrics": {"bbox": values, "segm": values},
        "machine": {"gpus": [], "cpu": "a CPU"},
        "versions": {"torch": "2.11"},
        "commit": "abc",
        "dirty": False,
    } | changes


def test_the_table_has_means_and_spreads_of_the_newest_rows_alike():
    text = learning.table(
        [
            row("gol", 0, 0.9, 0.9),
            row("softmax", 0, 0.10, 0.0, steps=9),
            row("gol", 0, 0.30, 0.10),
            row("gol", 1, 0.32, 0.16),
            row("softmax", 1, 0.25, 0.01),
        ]
    )
    lines = text.splitlines()
    assert lines[2].startswith("| softmax | 25.0 | 1.0 | 10.0 | - | 25.0 |")
    assert lines[3].startswith("| GOL | 31.0 ± 1.0 | 13.0 ± 3.0 | 10.0 ± 0.0 | - | 31.0 ± 1.0 |")
    assert lines[4] == ""
    assert "seeds 0, 1" in text
