"""`python -m detector analyze` from the command line: pictures, numbers, tables, and bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detector.analysis.locations import kl_divergence
from detector.cli import main
from detector.config import save_config, to_dict
from detector.data import LvisAnnotations
from detector.engine.checkpoint import load_checkpoint, save_checkpoint
from detector.engine.run_folder import CHECKPOINT, CONFIG, FILES
from detector.engine.train import train
from detector.model import ClassTable, build_model
from tests.detector.tiny_detector import run_config, write_data_set

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox"]  # two rare, two common, two frequent


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with the Gumbel."""
    root = tmp_path_factory.mktemp("analyze")
    write_data_set(root / "data")
    options = ["loss.name=gumbel", "train.max_steps=4", "train.gradient_interval=2", "eval.pictures=0"]
    config = run_config(root, *options, f"output={root / 'gumbel'}")
    train(config)
    return config.run_dir


@pytest.fixture(scope="module")
def cascade(trained: Path) -> Path:
    """A run that was made up: three stages, a cosine classifier, softmax, nothing detected."""
    config = run_config(
        trained.parent,
        "model.architecture=cascade_mask_rcnn",
        "model.class_agnostic_boxes=true",
        "model.normed_classifier=true",
        f"output={trained.parent / 'softmax'}",
    )
    classes = ClassTable.from_annotations(LvisAnnotations.from_file(config.data.train_file))
    model = build_model(config, classes)
    state = {"model": model.state_dict(), "classes": classes.to_dict(), "config": to_dict(config)}
    save_checkpoint(config.run_dir / CHECKPOINT, state)
    save_config(config, config.run_dir / CONFIG)
    (config.run_dir / "results.json").write_text("[]")
    return config.run_dir


def numbers(folder: Path) -> dict[str, Any]:
    """analysis.json, which must be JSON for everybody: no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads((folder / "analysis.json").read_text(), parse_constant=refuse)


def test_one_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", str(trained), "--grid", "8"]) == 0
    folder = trained / "analysis"
    pictures = {"locations_groups", "locations_classes", "weight_norms", "positive_gradients"}
    assert {path.name for path in folder.iterdir()} == {f"{name}.png" for name in pictures} | {
        "analysis.json"
    }
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            assert min(image.size) > 500
            assert len(image.convert("L").getcolors() or []) > 10  # not a blank page
    assert (folder / "analysis.json").relative_to(trained).match("analysis/*")
    assert "analysis/*" in FILES

    found = numbers(folder)
    assert list(found) == ["locations", "weight_norms", "positive_gradients"]
    maps = found["locations"]["maps"]
    drawn = [name for name in maps if "pooled" not in name]
    assert drawn == ["bee", "ant", "dog", "cat", "fox", "eel"]  # in each group those with more objects first
    fox = found["locations"]["classes"][5]
    assert (fox["name"], fox["id"], fox["group"]) == ("fox", 20, "frequent")
    truth, predicted = np.array(maps["fox"]["truth"]), np.array(maps["fox"]["predicted"]["gumbel"])
    assert truth.shape == (8, 8)
    assert fox["kl"]["gumbel"] == pytest.approx(float(kl_divergence(truth, predicted, 1e-3)), rel=1e-3)

    weight = load_checkpoint(trained / CHECKPOINT)["model"][
        "roi_heads.stages.0.box_predictor.classifier.weight"
    ]
    (norms,) = found["weight_norms"]["runs"]["gumbel"]
    assert norms["norms"] == pytest.approx(weight[:6].norm(dim=1).tolist(), rel=1e-6)
    gradients = found["positive_gradients"]["runs"]["gumbel"]
    assert gradients["steps"] == [2, 4]
    assert 6 < gradients["groups"]["frequent"][0] < 8  # e^2 at the start, where z = -2

    table = capsys.readouterr().out
    for text in ("KL(truth || predicted) in nats", "Spearman", "mean |dL/dz|", "missed", "gumbel"):
        assert text in table


def test_two_runs_a_file_and_the_curves(
    trained: Path, cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(trained / "results.json", tmp_path / "same.json")
    arguments = [str(trained), str(cascade), "--detections", f"same={tmp_path / 'same.json'}", "--curves"]
    options = ["--classes", "20", "cat", "--temperatures", "1", "3", "--output", str(tmp_path / "out")]
    assert main(["analyze", *arguments, *options]) == 0
    found = numbers(tmp_path / "out")
    locations = found["locations"]
    assert [name for name in locations["maps"] if "pooled" not in name] == ["fox", "cat"]
    assert locations["maps"]["cat"]["predicted"]["softmax"] is None
    runs = locations["runs"]
    assert runs["same"] == runs["gumbel"]
    assert runs["softmax"]["pooled"] == {"rare": None, "common": None, "frequent": None}
    assert runs["softmax"]["undetected_classes"] == {"rare": 2, "common": 2, "frequent": 2}
    assert runs["gumbel"]["mean"]["frequent"] is None  # no class was found by all
    norms = found["weight_norms"]["runs"]["softmax"]
    assert [(one["stage"], one["cosine_classifier"]) for one in norms] == [(1, True), (2, True), (3, True)]
    assert list(found["positive_gradients"]["runs"]) == ["gumbel"]
    note = "softmax: gradients do not exist: the softmax loss is not a sum of binary terms"
    assert found["positive_gradients"]["notes"] == [note]
    assert note in capsys.readouterr().out
    assert list(found["temperature"]["curves"]) == ["T = 1", "T = 3"]
    assert {"activations.png", "temperature.png"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_no_run_is_needed_for_curves_nor_for_other_detections(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["analyze", "--curves"]) == 0
    assert list(numbers(tmp_path / "analysis")) == ["activations", "temperature"]
    truth, results = trained.parent / "data" / "all.json", trained / "results.json"
    files = ["--annotations", str(truth), "--detections", f"theirs={results}", "--output", "theirs"]
    assert main(["analyze", *files]) == 0
    assert list(numbers(tmp_path / "theirs")["locations"]["runs"]) == ["theirs"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to analyze: give the folder of a run, or --detections, or --curves"),
        (["absent"], "absent holds no run: there is no absent/config.yaml"),
        (["gumbel", "--classes", "foxx"], "there is no class 'foxx', by name or id; did you mean fox?"),
        (["gumbel", "--grid", "1"], "--grid must lie in 2..128, got 1"),
        (["gumbel", "--smoothing", "0"], "--smoothing must lie between 0 and 1, got 0"),
        (["gumbel", "gumbel"], "a run is given twice"),
        (["gumbel", "--detections", "x"], "--detections needs NAME=JSON with a name of its own, got 'x'"),
        (["gumbel", "--detections", "x=absent"], "--detections x: absent does not exist"),
        (["gumbel", "--detections", "gumbel=absent"], "--detections gumbel: a run has that name already"),
        (["--detections", "x=gumbel/results.json"], "--detections without a run needs --annotations"),
        (["gumbel", "--temperatures", "1"], "--temperatures belongs to --curves"),
        (["--curves", "--temperatures", "0"], "temperature must be positive"),
        (["--curves", "--classes", "cat"], "--classes and --annotations say something about runs"),
        (["gumbel", "--annotations", "gumbel/config.yaml"], "gumbel/config.yaml: "),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    trained: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(trained.parent)
    assert main(["analyze", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert message in error


def test_broken_and_foreign_runs(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def complaint(*runs: Path) -> str:
        assert main(["analyze", *map(str, runs)]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    other = tmp_path / "other"
    shutil.copytree(trained, other)
    state = load_checkpoint(other / CHECKPOINT)

    def change(**changes: Any) -> None:
        save_checkpoint(other / CHECKPOINT, {**state, **changes})

    (other / "results.json").unlink()
    assert complaint(other).endswith(f"make it with python -m detector evaluate --run {other}")
    change(classes={**state["classes"], "names": ["gnu", *NAMES[1:]]})
    assert "were trained on different data: " in complaint(trained, other)
    moved = {**state["config"]["data"], "val": "other.json"}
    change(config={**state["config"], "data": moved})
    assert "the runs were evaluated on different files: " in complaint(trained, other)
    change(model={})
    assert complaint(other).endswith("last.pt: the checkpoint holds no box classifier of 6 classes")
    (other / CHECKPOINT).unlink()
    assert f"no checkpoint at {other / CHECKPOINT}" in complaint(other)


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["analyze", "--help"])
    assert "python -m detector analyze runs/gumbel runs/softmax" in capsys.readouterr().out
