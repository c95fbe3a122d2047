"""The configuration: inheritance, overrides, and every way of getting it wrong."""

from __future__ import annotations

import pytest
import yaml

from detector.config import Config, ConfigError, from_dict, load_config, presets, save_config, to_dict
from detector.engine.schedule import is_finished, learning_rate


def test_every_preset_loads_and_carries_its_own_name():
    assert {"mask_rcnn_r50_fpn_1x", "mask_rcnn_r50_fpn_2x", "lvis_v1_gol", "lvis_v1_seesaw", "demo"} <= set(
        presets()
    )
    assert "gol/gumbel_r50_1x_rfs" in presets(rows=True)
    assert set(presets()) == {name for name in presets(rows=True) if "/" not in name}
    for preset in presets(rows=True):
        config = load_config(preset)
        assert config.name == preset
        assert config.run_dir.as_posix() == f"runs/{preset}"


def test_base_file_and_override_win_in_that_order(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "base: lvis_v1_gol_star\ntrain: {lr: 0.005, epochs: 7}\n", encoding="utf-8"
    )
    config = load_config(tmp_path / "mine.yaml", ["train.epochs=9", "data.min_sizes=[320, 352]"])
    assert (config.train.lr, config.train.epochs) == (0.005, 9)
    assert config.train.milestones == (16, 22)  # from 2x, three bases up
    assert config.eval.nms_threshold == 0.3  # from lvis_v1_gol
    assert config.loss.name == "gol_star"
    assert config.data.min_sizes == (320, 352)
    assert config.model == load_config("lvis_v1_gol").model
    assert config.name == "mine"  # its own, not its base's


def test_base_is_found_beside_the_file(tmp_path):
    (tmp_path / "parent.yaml").write_text("seed: 41\n", encoding="utf-8")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "child.yaml").write_text("base: ../parent.yaml\nname: heir\n", encoding="utf-8")
    child = load_config(tmp_path / "sub" / "child.yaml")
    assert (child.seed, child.name) == (41, "heir")


def test_saved_configuration_reads_back_equal(tmp_path):
    config = load_config("lvis_v1_seesaw", ["train.lr=3e-3", "model.anchor_sizes=[8, 16, 32, 64, 128]"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert from_dict(to_dict(config)) == config
    assert set(yaml.safe_load((tmp_path / "config.yaml").read_text())["train"]) == set(
        to_dict(Config())["train"]
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rte=1", "unknown key train.learning_rte"),
        ("train.momentun=0.8", "did you mean train.momentum"),
        ("trian.lr=1", "did you mean train"),
        ("loss.name=seasaw", "did you mean seesaw"),
        ("train.lr=fast", "train.lr must be a number, got 'fast'"),
        ("train.epochs=2.5", "train.epochs must be an integer, got 2.5"),
        ("train.epochs=true", "train.epochs must be an integer, got True"),
        ("model.normed_mask=1", "model.normed_mask must be true or false, got 1"),
        ("data.min_sizes=640", "data.min_sizes must be a list"),
        ("data.min_sizes=[640, tall]", r"data.min_sizes\[1\] must be an integer"),
        ("train=3", "train is a section"),
        ("train.lr.x=3", "train.lr"),
        ("train.lr", "must look like section.key=value"),
        ("train.milestones=[11, 8]", "must ascend"),
        ("model.first_level=2", "needs one size per pyramid level, 4"),
        ("model.architecture=htc", "needs model.class_agnostic_boxes=true"),
        ("model.backbone=resnext101_32x16d", "did you mean resnext101_32x"),
        ("train.batch_size=0", "train.batch_size must be positive"),
        ("data.min_sizes=[", "not valid YAML"),
    ],
)
def test_bad_override_is_refused_with_its_reason(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config("mask_rcnn_r50_fpn_1x", [override])


def test_bad_file_is_named(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("train: {epoch: 3}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bad.yaml: unknown key train.epoch; did you mean train.epochs"):
        load_config(path)
    path.write_text("- 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="expected a mapping"):
        load_config(path)
    path.write_text(f"base: {path}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="leads back to itself"):
        load_config(path)
    with pytest.raises(ConfigError, match="did you mean lvis_v1_gol"):
        load_config("lvis_v1_goll")
    with pytest.raises(ConfigError, match="did you mean gol/gumbel_r101_1x_random"):
        load_config("gol/gumbel_r102_1x_random")


def test_exponent_without_a_dot_is_a_number():
    assert load_config("mask_rcnn_r50_fpn_1x", ["train.weight_decay=5e-4"]).train.weight_decay == 5e-4


@pytest.mark.parametrize(
    ("step", "epoch", "expected"),
    [
        (0, 0, 0.02 * 0.001),
        (250, 0, 0.02 * (1 - 0.5 * 0.999)),
        (500, 0, 0.02),
        (60_000, 7, 0.02),
        (60_000, 8, 0.002),
        (90_000, 11, 0.0002),
    ],
)
def test_the_1x_schedule(step, epoch, expected):
    assert learning_rate(load_config("mask_rcnn_r50_fpn_1x").train, step, epoch) == pytest.approx(
        expected, rel=1e-12
    )


def test_schedule_by_steps_and_linear_scaling():
    train = load_config(
        "mask_rcnn_r50_fpn_1x", ["train.max_steps=100", "train.milestones=[60, 90]", "train.batch_size=4"]
    ).train
    rates = [
        learning_rate(train, step, epoch=50) * 500 / (step + (500 - step) * 0.001)
        for step in (59, 60, 89, 90)
    ]
    assert rates == pytest.approx([0.005, 0.0005, 0.0005, 0.00005], rel=1e-9)
    assert [is_finished(train, step, epoch=0) for step in (99, 100)] == [False, True]
    assert is_finished(load_config("mask_rcnn_r50_fpn_1x").train, 5, epoch=12)
