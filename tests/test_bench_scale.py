"""The bench at LVIS's size, on small files: these are sound, every part runs, limits can be missed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from bench import demo, records
from bench import report as cpu_report
from bench.__main__ import main
from bench.scale import report
from bench.scale.files import (
    SMALL,
    TRAIN,
    VAL,
    draw_detections,
    make_files,
    write_annotations,
)
from bench.scale.findings import compare, finding
from bench.scale.parts import PARTS
from detector.data import LvisAnnotations, check_data

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's account of memory")


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scale")
    make_files(folder, SMALL)
    return folder


def test_files_are_sound_lvis_files_of_the_size(folder: Path, tmp_path: Path) -> None:
    for name, images, instances in (
        (TRAIN, SMALL.train_images, SMALL.train_instances),
        (VAL, SMALL.val_images, SMALL.val_instances),
    ):
        found = LvisAnnotations.from_file(folder / name)
        assert (found.version, len(found), found.num_instances) == ("LVIS v1", images, instances)
        assert found.num_classes == SMALL.classes
        stated = [c["image_count"] for c in json.loads((folder / name).read_text())["categories"]]
        assert found.image_count.tolist() == stated
        assert not check_data(folder / name, folder).problems
    write_annotations(tmp_path / VAL, SMALL.val_images, SMALL.val_instances, SMALL, 1)
    assert (tmp_path / VAL).read_bytes() == (folder / VAL).read_bytes()


def test_outlines_fill_their_boxes(folder: Path) -> None:
    found = LvisAnnotations.from_file(folder / VAL)
    for k in range(len(found)):
        objects = found.instances(k)
        for box, area, (outline,) in zip(objects.boxes, objects.areas, objects.segmentations, strict=True):
            points = outline.reshape(-1, 2)
            np.testing.assert_allclose([*points.min(axis=0), *points.max(axis=0)], box, atol=0.011)
            assert 0 < area <= (box[2] - box[0]) * (box[3] - box[1]) + 0.01


def test_masks_of_detections_are_pycocotools_own_text(folder: Path) -> None:
    truth = LvisAnnotations.from_file(folder / VAL)
    for found in draw_detections(truth, 12, masks=True, images=range(len(truth))):
        assert len(found) == 12
        assert (np.diff(found.scores) <= 0).all()
        for box, rle in zip(found.boxes, found.masks or [], strict=True):
            plane = coco_mask.decode(rle)
            assert coco_mask.encode(plane)["counts"].decode() == rle["counts"]
            x, _, width, height = coco_mask.toBbox(rle)
            assert (x, width) == (box[0], box[2] - box[0])
            assert 0.5 * (box[3] - box[1]) <= height <= box[3] - box[1]


@pytest.mark.parametrize("name", ["data", "evaluate_masks", "agreement", "select", "match"])
def test_parts_find_equal_results(folder: Path, name: str) -> None:
    rows = PARTS[name](folder, SMALL)
    assert all(row["value"] > 0 for row in rows if row["what"].startswith("a worker's own memory"))
    for row in rows:
        if row["unit"] == "":
            assert row["passed"], row
        if "metrics" in row:
            assert all(metrics["AP"] > 0.05 for metrics in row["metrics"].values())
    assert not list(folder.glob("*.rank*"))


def test_command_records_and_prints(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "scale.jsonl"
    arguments = ["--small", "--folder", str(folder), "--records", str(store)]
    code = main(["scale", "--parts", "rasterise", *arguments])
    rows = records.read(store)
    assert code == int(any(row["passed"] is False for row in rows))
    assert {row["part"] for row in rows} == {"rasterise"}
    assert {"commit", "versions", "machine", "load_average"} <= rows[0].keys()
    assert len(capsys.readouterr().out.splitlines()) >= len(rows)

    with pytest.raises(SystemExit, match="parts are data,"):
        main(["scale", "--parts", "hinge", *arguments])


def row(run: str, what: str, value: float, passed: bool, size: str = "full") -> records.Row:
    facts = {
        "run": run,
        "part": what.split()[0],
        "dirty": False,
        "commit": "0123abc",
        "date": "2026-01-02T03:04:05",
        "load_average": [1.5, 1, 1],
    }
    machine = {"machine": {"cpu": "a CPU", "cores": 2}, "versions": {"torch": "2"}, "size": size}
    found = finding(what, value, "s", at_most=60, beside={"wall clock, s": 70.0})
    return facts | machine | found | {"passed": passed}


def test_readme_shows_the_newest_finding_of_the_full_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("newest_complete", "tables"):
        monkeypatch.setattr(f"bench.__main__.{name}", lambda *_: "")
    monkeypatch.setattr("bench.demo.table", lambda _: "")
    readme, store, empty = (tmp_path / name for name in ("README.md", "scale.jsonl", "empty.jsonl"))
    empty.touch()
    pairs = ((cpu_report.BEGIN, cpu_report.END), (demo.BEGIN, demo.END), (report.BEGIN, report.END))
    readme.write_text("".join(f"{begin}old{end}" for begin, end in pairs))
    paths = {"--records": empty, "--demo-records": empty, "--scale-records": store, "--readme": readme}
    paths["--scale-readme"] = readme
    for kind in ("gpu", "training", "learning"):
        paths[f"--{kind}-records"] = tmp_path / "none"
    options = [str(part) for pair in paths.items() for part in pair]
    with pytest.raises(ValueError, match="nothing was measured at the full size"):
        report.table([row("1", "read", 1.0, True, "small")])
    records.append(
        store, [row("1", "read it", 61.0, False), row("1", "write", 0.25, True), row("2", "read", 42.0, True)]
    )
    main(["readme", *options])
    text = readme.read_text()
    assert "| read | 42 s | ≤ 60 | passed | wall clock, s: 70 |" in text
    assert "| write | 0.25 s | ≤ 60 | passed |" in text
    assert text.index("| read |") < text.index("| write |")
    assert "61" not in text
    assert "old" not in text
    records.append(store, [row("3", "read", 61.0, False)])
    main(["readme", *options])
    assert "| read | 61 s | ≤ 60 | **missed** |" in readme.read_text()


def test_a_failing_part_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_files(tmp_path, SMALL)
    (tmp_path / VAL).write_text("{}")
    assert main(["scale", "--small", "--folder", str(tmp_path), "--parts", "rasterise"]) == 2


def test_limits_can_be_missed() -> None:
    assert finding("x", 61, "s", at_most=60)["passed"] is False
    assert finding("x", 60, "s", at_most=60)["passed"] is True
    assert finding("x", 2.4, "images/s", at_least=2.5)["passed"] is False
    assert finding("x", 1, "s")["passed"] is None
    rows = compare("x", lambda: torch.zeros(3), lambda: torch.tensor([0, 0, 1]), rounds=1, faster=False)
    assert rows[-1]["value"] == 1
    assert rows[-1]["passed"] is False
    big = 100 << 20
    rows = compare("x", lambda: torch.ones(big).sum(), lambda: torch.tensor(big), rounds=1, faster=False)
    assert rows[1]["value"] > 350
    assert rows[1]["passed"] is False
