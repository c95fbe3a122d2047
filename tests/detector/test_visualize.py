"""Curves from a run's log and pictures of detections."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from PIL import Image

from detector.data import LvisAnnotations, write_synthetic
from detector.evaluation import Detections, ResultsWriter
from detector.visualize import Example, class_colour, draw_detections, draw_page, draw_run_page, plot_curves
from detector.visualize import curves as curves_module
from detector.visualize import pictures as pictures_module

NAMES = ["cat", "dog", "teapot"]


def log_row(step: int, **values: float) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": 0,
        "lr": 0.01,
        "loss": 2.0 / step,
        "loss_cls": 1.5 / step,
        "loss_mask": 0.5 / step,
    } | values


def evaluation_row(step: int, ap: float) -> dict[str, Any]:
    groups = {"AP": ap, "APr": -1.0, "APc": ap / 2, "APf": 2 * ap}
    return {"step": step, "epoch": 0, "eval": {"bbox": groups, "segm": groups}}


def write_log(run_dir: Path, rows: list[dict[str, Any]], end: str = "") -> Path:
    run_dir.mkdir(exist_ok=True)
    path = run_dir / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return path


def texts(figure: Any) -> list[str]:
    return [text.get_text().strip() for axis in figure.axes for text in axis.texts]


class TestCurves:
    def test_log_of_a_killed_and_resumed_run(self, tmp_path: Path) -> None:
        rows = [log_row(10), log_row(20, loss=9.0), evaluation_row(20, 0.1), log_row(20), log_row(15)]
        rows.append({"step": 15, "epoch": 0, "bad_loss": [{"loss_cls": float("nan")}]})  # was skipped
        path = write_log(tmp_path, rows, end='{"step": 30, "lo')
        training, evaluations = curves_module.read_log(path)
        assert training == [log_row(10), log_row(15), log_row(20)]
        assert evaluations == [evaluation_row(20, 0.1)]

    @pytest.mark.parametrize(
        ("rows", "expected"),
        [
            ([], []),
            ([log_row(1)], ["losses.png", "lr.png"]),
            ([log_row(1), log_row(2, loss=float("nan"))], ["losses.png", "lr.png"]),
            ([evaluation_row(5, 0.2)], ["ap_groups.png"]),
            ([log_row(1), evaluation_row(5, 0.2)], ["losses.png", "lr.png", "ap_groups.png"]),
            ([evaluation_row(5, 0.2), evaluation_row(9, 0.3)], ["ap_groups.png", "ap.png"]),
            ([{"step": 1, "loss": 1.0, "lr": 0.1}], ["losses.png", "lr.png"]),
        ],
    )
    def test_draws_what_there_is(
        self, tmp_path: Path, rows: list[dict[str, Any]], expected: list[str]
    ) -> None:
        write_log(tmp_path / "run", rows)
        written = plot_curves(tmp_path / "run")
        assert written == [tmp_path / "run" / "plots" / name for name in expected]
        for path in written:
            with Image.open(path) as image:
                assert image.width >= 800
                assert len(image.convert("L").getcolors() or []) > 10  # not a blank page

    def test_no_log(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"log\.jsonl"):
            plot_curves(tmp_path)

    def test_losses_are_the_logged_values_and_their_average(self) -> None:
        rows = [log_row(step) for step in range(1, 101)] + [log_row(101, loss=float("inf"))]
        figure = curves_module._losses_figure(rows)
        raw, smooth = figure.axes[0].lines
        steps = np.arange(1, 101)
        assert np.array_equal(raw.get_xdata(), steps)
        np.testing.assert_allclose(raw.get_ydata(), 2 / steps, rtol=1e-12)
        # 100 values: windows of 5 values in the middle, 3 at the ends
        np.testing.assert_allclose(smooth.get_ydata()[50], np.mean(2 / steps[48:53]), rtol=1e-9)
        np.testing.assert_allclose(smooth.get_ydata()[0], np.mean(2 / steps[:3]), rtol=1e-9)
        labels = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
        assert labels == ["cls", "mask"]

    def test_moving_average(self) -> None:
        found = curves_module.moving_average(np.array([1.0, 2.0, 6.0, 3.0]), window=3)
        assert found == pytest.approx([1.5, 3.0, 11 / 3, 4.5])
        assert curves_module.moving_average(np.array([1.0, 5.0]), window=1) == pytest.approx([1.0, 5.0])

    def test_wide_ranges_are_drawn_on_a_log_scale(self) -> None:
        small = curves_module._losses_figure([log_row(step) for step in (1, 2)])
        assert small.axes[0].get_yscale() == "linear"
        wide = curves_module._losses_figure([log_row(step) for step in (1, 1000)])
        assert wide.axes[0].get_yscale() == "log"

    def test_groups_are_bars_of_an_evaluation(self) -> None:
        figure = curves_module._groups_figure(evaluation_row(9, 0.2))
        assert [text for text in texts(figure) if text not in ("box", "mask")] == [
            "20.0",
            "-",
            "10.0",
            "40.0",
        ] * 2
        assert figure.axes[0].get_title() == "AP at step 9"

    def test_history_has_a_line_for_each_group_of_boxes_and_of_masks(self) -> None:
        rows = [evaluation_row(5, 0.2), evaluation_row(9, 0.3)]
        rows[1]["eval"]["segm"] = {**rows[1]["eval"]["segm"], "APf": 0.7, "APr": 0.1}
        for axis, frequent, labels in zip(
            curves_module._history_figure(rows).axes,
            ([40.0, 60.0], [40.0, 70.0]),
            (["all", "common", "frequent"], ["all", "rare", "common", "frequent"]),  # absent: -1
            strict=True,
        ):
            lines = {line.get_label(): line for line in axis.lines}
            assert list(lines) == labels
            assert list(lines["all"].get_xdata()) == [5, 9]
            assert lines["all"].get_ydata() == pytest.approx([20.0, 30.0])
            assert lines["frequent"].get_ydata() == pytest.approx(frequent)

    def test_pyplot_is_not_needed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it raises
        write_log(tmp_path, [log_row(1), evaluation_row(1, 0.5)])
        assert len(plot_curves(tmp_path)) == 3


def rectangle_mask(height: int, width: int, box: tuple[int, int, int, int]) -> dict[str, Any]:
    plane = np.zeros((height, width), np.uint8, order="F")
    plane[box[1] : box[3], box[0] : box[2]] = 1
    return coco_mask.encode(plane)


def black(height: int = 100, width: int = 160) -> np.ndarray:
    return np.zeros((height, width, 3), np.uint8)


class TestDrawDetections:
    def test_mask_is_tinted_and_box_is_drawn(self) -> None:
        found = Detections(1, [[40, 40, 80, 80]], [0.9], [1], [rectangle_mask(100, 160, (50, 50, 80, 80))])
        picture = np.asarray(draw_detections(black(), found, NAMES))
        assert picture.shape == (400, 640, 3)  # enlarged 4 times
        colour = np.array(class_colour(1))
        # PIL blends with rounding; the tint's opacity is a whole number of 255ths.
        np.testing.assert_allclose(picture[260, 260], colour * pictures_module.MASK_OPACITY, atol=2)
        assert picture[160, 240].tolist() == colour.tolist()  # upper edge of the box
        assert picture[250, 160].tolist() == colour.tolist()  # left edge
        assert picture[200, 260].tolist() == colour.tolist()  # upper edge of the mask
        assert picture[180, 180].tolist() == [0, 0, 0]  # in the box, outside the mask
        assert picture[390, 600].tolist() == [0, 0, 0]

    def test_threshold_and_count_keep_the_best(self) -> None:
        boxes = [[10, 10, 30, 30], [60, 10, 80, 30], [110, 10, 130, 30]]
        found = Detections(1, boxes, [0.2, 0.9, 0.5], [0, 1, 2])

        def drawn(**options: Any) -> list[bool]:
            picture = np.asarray(draw_detections(black(), found, NAMES, long_side=160, **options))
            # In the lower left corner of a box no label covers its line.
            return [
                picture[29, box[0]].tolist() == list(class_colour(label)) for label, box in enumerate(boxes)
            ]

        assert drawn() == [True, True, True]
        assert drawn(score_threshold=0.5) == [False, True, True]
        assert drawn(max_detections=1) == [False, True, False]
        empty = draw_detections(black(), found, NAMES, score_threshold=0.95)
        assert not np.asarray(empty).any()

    def test_best_detection_lies_on_top(self) -> None:
        masks = [rectangle_mask(100, 160, (20, 20, 60, 60))] * 2
        boxes = [[20, 20, 60, 60]] * 2
        for scores, top in (([0.9, 0.5], 0), ([0.5, 0.9], 2)):
            found = Detections(1, boxes, scores, [0, 2], masks)
            picture = np.asarray(draw_detections(black(), found, NAMES, long_side=160))
            assert picture[50, 59].tolist() == list(class_colour(top))

    def test_kinds_of_images_give_the_same_picture(self) -> None:
        array = np.random.default_rng(0).integers(0, 256, (100, 160, 3), np.uint8)
        found = Detections(1, [[40, 40, 80, 80]], [0.9], [1])
        expected = np.asarray(draw_detections(array, found, NAMES))
        for image in (Image.fromarray(array), torch.from_numpy(array).permute(2, 0, 1)):
            assert np.array_equal(np.asarray(draw_detections(image, found, NAMES)), expected)

    def test_size(self) -> None:
        nothing = Detections(1, [], [], [])
        assert draw_detections(black(100, 160), nothing, NAMES).size == (640, 400)
        assert draw_detections(black(800, 1200), nothing, NAMES).size == (1200, 800)
        assert draw_detections(black(800, 1200), nothing, NAMES, long_side=300).size == (300, 200)

    def test_labels_keep_clear_of_each_other_and_inside(self) -> None:
        taken: list[Any] = []
        while (
            place := pictures_module._place_label(130, 17, (300, 5, 395, 120), (400, 300), taken)
        ) is not None:
            taken.append(place)
            assert len(taken) < 20
        # At the top edge, since above the box is no room; every 17 pixels from 5 on; below the box.
        assert sorted(top for _, top, _, _ in taken) == [0, 22, 39, 56, 73, 90, 120]
        for left, top, right, bottom in taken:
            assert 0 <= left < right <= 400
            assert 0 <= top < bottom <= 300

    def test_colours_are_fixed_and_distinct(self) -> None:
        colours = [class_colour(label) for label in range(60)]
        assert len(set(colours)) == 60
        distances = [
            max(abs(a - b) for a, b in zip(colours[i], colours[i + 1], strict=True)) for i in range(59)
        ]
        assert min(distances) > 60  # neighbouring labels are easy to tell apart
        assert class_colour(7) == colours[7]

    def test_bad_input_is_refused(self) -> None:
        found = Detections(4, [[0, 0, 9, 9]], [0.5], [3])
        with pytest.raises(ValueError, match="image 4: label 3 has no name, there are 3"):
            draw_detections(black(), found, NAMES)
        masked = Detections(4, [[0, 0, 9, 9]], [0.5], [0], [rectangle_mask(50, 50, (0, 0, 9, 9))])
        with pytest.raises(ValueError, match=r"mask of size \[50, 50\], the image has \[100, 160\]"):
            draw_detections(black(), masked, NAMES)
        with pytest.raises(TypeError, match=r"got ndarray of float32 \[100, 160, 3\]"):
            draw_detections(black().astype(np.float32), found, NAMES)
        with pytest.raises(TypeError, match=r"got ndarray of uint8 \[100, 160\]"):
            draw_detections(black()[..., 0], found, NAMES)


class TestPages:
    def test_truth_is_left_and_predictions_are_right(self, tmp_path: Path) -> None:
        truth = Detections(1, [[10, 10, 50, 50]], [1.0], [0])
        predictions = Detections(1, [[80, 40, 120, 90], [0, 0, 9, 9]], [0.8, 0.1], [2, 1])
        examples = [Example(black(), truth, predictions)] * 3
        path = draw_page(tmp_path / "new" / "page.png", examples, NAMES, panel=320)
        page = np.asarray(Image.open(path))
        pair_width, pair_height = 2 * 320 + pictures_module.GAP, pictures_module.HEADER + 200
        margin = pictures_module.MARGIN
        assert page.shape == (margin + 2 * (pair_height + margin), margin + 2 * (pair_width + margin), 3)
        top, right = margin + pictures_module.HEADER, margin + 320 + pictures_module.GAP

        def colours(left: int) -> set[tuple[int, ...]]:
            return set(map(tuple, page[top : top + 200, left : left + 320].reshape(-1, 3).tolist()))

        assert class_colour(0) in colours(margin)
        assert class_colour(2) not in colours(margin)
        assert class_colour(2) in colours(right)
        assert class_colour(0) not in colours(right)
        assert class_colour(1) not in colours(right)  # below the threshold
        assert (page[top + pair_height + margin :, margin + pair_width + margin :] == 255).all()  # no fourth

    def test_no_examples(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="at least one example"):
            draw_page(tmp_path / "page.png", [], NAMES)

    def test_one_class_at_each_place(self) -> None:
        """Two classes claim one object, a third is elsewhere, and a worse box of the first stands aside."""
        boxes = np.array([[0, 0, 10, 10], [1, 0, 10, 10], [40, 40, 60, 60], [6, 6, 16, 16]], dtype=np.float32)
        claims = Detections(1, boxes, np.array([0.6, 0.9, 0.5, 0.4]), np.array([0, 1, 2, 1]))
        kept = pictures_module._best_class_at_each_place(claims)
        assert kept.labels.tolist() == [1, 2, 1]
        assert kept.scores.tolist() == pytest.approx([0.9, 0.5, 0.4])
        assert len(pictures_module._best_class_at_each_place(claims.select(np.arange(0)))) == 0

    def test_page_of_a_run(self, tmp_path: Path) -> None:
        files = write_synthetic(
            tmp_path / "data", num_train=60, num_val=20, num_classes=6, image_size=64, seed=3
        )
        annotations = LvisAnnotations.from_file(files.val)
        chosen = pictures_module.choose_images(annotations, 4)
        rarity = [annotations.image_count[annotations.instances(index).labels].min() for index in chosen]
        assert len(chosen) == 4
        assert rarity == sorted(rarity)
        assert rarity[0] == annotations.image_count[annotations.image_label_pairs()[1]].min()

        truth = pictures_module.truth_of(annotations, chosen[0])
        expected = annotations.instances(chosen[0])
        assert np.array_equal(truth.boxes, expected.boxes)
        areas = coco_mask.area([mask | {"counts": mask["counts"].encode()} for mask in truth.masks or []])
        assert areas == pytest.approx(expected.areas, abs=12)  # the polygon's area against its pixels

        run_dir = tmp_path / "run"
        with ResultsWriter(run_dir / "results.json", annotations.category_ids) as writer:
            writer.add(truth)
        config: Any = SimpleNamespace(
            data=SimpleNamespace(val_file=files.val, image_folder=files.image_root),
            eval=SimpleNamespace(pictures=4),
            run_dir=run_dir,
        )
        classes: Any = SimpleNamespace(
            category_ids=annotations.category_ids.tolist(), names=annotations.category_names
        )
        path = draw_run_page(config, classes)
        assert path == run_dir / "predictions.png"
        page = np.asarray(Image.open(path))
        assert page.shape[1] == pictures_module.MARGIN + 2 * (
            2 * 480 + pictures_module.GAP + pictures_module.MARGIN
        )
        config.eval.pictures = 0
        assert draw_run_page(config, classes) is None
