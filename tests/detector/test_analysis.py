"""What an analysis computes: object locations and their divergence, weight norms, activation curves."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from detector.analysis import activations
from detector.analysis.classifier import classifier_norms, pearson, spearman
from detector.analysis.locations import (
    add_coverage,
    compare,
    distributions,
    kl_divergence,
    predicted_maps,
    true_maps,
)
from detector.data import LvisAnnotations
from detector.model import build_model
from tests.detector.lvis_files import annotation_entry, image_entry, lvis_file, write_json
from tests.detector.tiny_detector import tiny_classes, tiny_config

GRID, FINE = 7, 8  # cells, and pixels of the brute force along the side of a cell


def brute_force(labels, boxes, weights, classes: int) -> np.ndarray:
    """Boxes with corners on pixels, painted into a picture of GRID * FINE pixels, and the mean of each
    cell."""
    side = GRID * FINE
    maps = np.zeros((classes, GRID, GRID))
    for label, (x0, y0, x1, y1), weight in zip(
        labels, np.rint(boxes * side).astype(int), weights, strict=True
    ):
        canvas = np.zeros((side, side))
        canvas[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = weight
        maps[label] += canvas.reshape(GRID, FINE, GRID, FINE).mean(axis=(1, 3))
    return maps


class TestCoverage:
    @pytest.mark.parametrize("seed", range(5))
    def test_equals_painted_boxes(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        side, count, classes = GRID * FINE, 60, 4
        corners = rng.integers(-6, side + 6, (2, count, 2))
        boxes = np.concatenate([corners.min(axis=0), corners.max(axis=0)], axis=1) / side
        labels = rng.choice([0, 1, 3], count)  # class 2 has none
        weights = rng.random(count)
        maps = np.zeros((classes, GRID, GRID))
        half = count // 2
        for part in (slice(half), slice(half, None)):
            add_coverage(maps, labels[part], boxes[part], weights[part])
        np.testing.assert_allclose(maps, brute_force(labels, boxes, weights, classes), atol=1e-12)
        assert not maps[2].any()

    def test_sum_is_the_area(self) -> None:
        rng = np.random.default_rng(0)
        corners = np.sort(rng.random((2, 50, 2)), axis=0)
        maps = np.zeros((1, 32, 32))
        add_coverage(maps, np.zeros(50, int), np.concatenate(list(corners), axis=1), np.ones(50))
        area = np.prod(corners[1] - corners[0], axis=1).sum()
        assert maps.sum() == pytest.approx(32**2 * area, rel=1e-12)

    def test_rows_go_down_and_columns_to_the_right(self) -> None:
        maps = np.zeros((1, 2, 2))
        add_coverage(maps, np.array([0]), np.array([[0.5, 0.0, 1.0, 0.25]]), np.array([1.0]))
        assert maps[0].tolist() == [[0.0, 0.5], [0.0, 0.0]]


class TestDivergence:
    def test_known_values(self) -> None:
        p, q = np.array([[2.0, 2.0]]), np.array([[1.0, 3.0]])
        expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
        assert kl_divergence(p, q, 0.0) == pytest.approx(expected, rel=1e-12)
        assert kl_divergence(p, 1e-3 * p, 0.01) == 0.0
        apart = kl_divergence(np.array([[1.0, 0, 0, 0]]), np.array([[0, 0, 0, 1.0]]), 0.02)
        high, low = 0.98 + 0.005, 0.005
        assert apart == pytest.approx((high - low) * math.log(high / low), rel=1e-12)
        assert kl_divergence(np.array([[1.0, 0]]), np.array([[0, 1.0]]), 0.0) == math.inf

    def test_equals_the_definition(self) -> None:
        rng = np.random.default_rng(1)
        truth, predicted, share = rng.random((3, 5, 5)), rng.random((3, 5, 5)) ** 8, 1e-3
        truth[:, 0] = 0
        for one, other, found in zip(truth, predicted, kl_divergence(truth, predicted, share), strict=True):
            expected = 0.0
            for a, b in zip(one.ravel() / one.sum(), other.ravel() / other.sum(), strict=True):
                p, q = (1 - share) * a + share / 25, (1 - share) * b + share / 25
                expected += p * math.log(p / q)
            assert found == pytest.approx(expected, rel=1e-10)

    def test_nothing_there_is_no_number(self) -> None:
        some, none = np.ones((2, 2)), np.zeros((2, 2))
        assert np.isnan(kl_divergence(some, none, 0.1))
        assert np.isnan(kl_divergence(none, some, 0.1))
        assert np.isnan(distributions(none)).all()

    def test_means_are_over_the_classes_that_every_run_has_found(self) -> None:
        rng = np.random.default_rng(2)
        truth, one, two = rng.random((3, 4, 3, 3))
        truth[3] = one[1] = 0  # class 3 has no objects, the first run has not found class 1
        found, compared = compare(truth, {"one": one, "two": two}, ["r", "r", "f", "r"], 1e-3)
        assert compared.tolist() == [True, False, True, False]
        assert found["two"].mean == {"r": found["two"].per_class[0], "f": found["two"].per_class[2]}
        assert (found["one"].undetected, found["two"].undetected) == ({"r": 1, "f": 0}, {"r": 0, "f": 0})
        rare = [0, 1, 3]
        pooled = kl_divergence(truth[rare].sum(axis=0), two[rare].sum(axis=0), 1e-3)
        assert found["two"].pooled["r"] == pytest.approx(float(pooled), rel=1e-12)


class TestFiles:
    """Images of 64 x 48 pixels, categories 3, 7 and 9."""

    @pytest.fixture
    def annotations(self, tmp_path: Path) -> LvisAnnotations:
        images = [image_entry(1, neg_category_ids=[7]), image_entry(2)]
        objects = [
            annotation_entry(1, bbox=[0.0, 0.0, 32.0, 24.0]),
            annotation_entry(2, iscrowd=1),
            annotation_entry(3, image_id=2, category_id=9, bbox=[32.0, 24.0, 32.0, 12.0]),
        ]
        return LvisAnnotations.from_file(write_json(tmp_path, lvis_file(images, objects)))

    def results(self, tmp_path: Path, *rows: tuple) -> Path:
        keys = ("image_id", "category_id", "bbox", "score")
        path = tmp_path / "results.json"
        path.write_text(json.dumps([dict(zip(keys, row, strict=True)) for row in rows]))
        return path

    def test_truth(self, annotations: LvisAnnotations) -> None:
        maps = true_maps(annotations, 2)
        assert maps.tolist() == [[[1, 0], [0, 0]], [[0, 0], [0, 0]], [[0, 0], [0, 0.5]]]

    def test_detections_weigh_their_scores_and_count_where_the_class_is_known(
        self, annotations: LvisAnnotations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("detector.analysis.locations.CHUNK", 2)
        whole = [0.0, 0.0, 64.0, 48.0]
        path = self.results(
            tmp_path,
            (1, 3, whole, 0.5),  # there
            (1, 7, whole, 0.25),  # known to be absent
            (1, 9, whole, 0.125),  # not known
            (2, 9, [0.0, 24.0, 32.0, 24.0], 0.75),
            (2, 3, whole, 0.9),  # not known
        )
        maps = predicted_maps(annotations, path, 2)
        assert maps.tolist() == [[[0.5] * 2] * 2, [[0.25] * 2] * 2, [[0, 0], [0.75, 0]]]

    def test_coco_files_know_every_class_everywhere(self, tmp_path: Path) -> None:
        images = [{"id": 1, "width": 64, "height": 48, "file_name": "a.jpg"}]
        annotations = LvisAnnotations.from_file(write_json(tmp_path, lvis_file(images)))
        path = self.results(tmp_path, (1, 9, [0.0, 0.0, 64.0, 48.0], 0.5))
        assert predicted_maps(annotations, path, 1).ravel().tolist() == [0, 0, 0.5]

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ((5, 3, [0, 0, 1, 1], 0.5), "detection 0 has the image_id 5, which the annotations lack"),
            ((1, 4, [0, 0, 1, 1], 0.5), "detection 0 has the category_id 4, which the annotations lack"),
            ((1, 3, [0, 0, -1, 1], 0.5), "detection 0 needs a finite bbox"),
            ((1, 3, [0, 0, 1], 0.5), "detection 0 needs a finite bbox"),
            ((1, 3, [0, 0, 1, 1], float("nan")), "detection 0 needs a finite bbox"),
        ],
    )
    def test_results_of_other_images_are_refused(
        self, annotations: LvisAnnotations, tmp_path: Path, row: tuple, message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            predicted_maps(annotations, self.results(tmp_path, row), 2)


class TestNorms:
    @pytest.mark.parametrize("loss", ["gumbel", "seesaw", "gol"])  # one, two and no columns past the classes
    @pytest.mark.parametrize("normed", [False, True])
    def test_of_every_stage_of_a_model(self, loss: str, normed: bool) -> None:
        cascade = ["model.architecture=cascade_mask_rcnn", "model.class_agnostic_boxes=true"]
        config = tiny_config(*cascade, f"loss.name={loss}", f"model.normed_classifier={str(normed).lower()}")
        model = build_model(config, tiny_classes())
        expected = []
        for k, stage in enumerate(model.roi_heads):
            weight = stage.box_predictor.classifier.weight
            with torch.no_grad():
                weight.normal_(std=k + 1.0)
            expected.append([math.sqrt(sum(v * v for v in row)) for row in weight[:6].tolist()])
        found = classifier_norms(model.state_dict(), 6)
        assert [norms.stage for norms in found] == [1, 2, 3]
        np.testing.assert_allclose([norms.norms for norms in found], expected, rtol=1e-6)

    def test_other_checkpoints_are_refused(self) -> None:
        key = "roi_heads.stages.0.box_predictor.classifier.weight"
        for weights in ({}, {key: torch.zeros(5, 2)}, {key: torch.zeros(8)}):
            with pytest.raises(ValueError, match="no box classifier of 6 classes"):
                classifier_norms(weights, 6)

    def test_correlations(self) -> None:
        x = np.array([1.0, 2, 3, 4])
        assert pearson(x, 5 - 2 * x) == pytest.approx(-1)
        assert pearson(x, np.array([1.0, 3, 2, 4])) == pytest.approx(0.8)
        assert spearman(x, np.exp(x**2)) == pytest.approx(1)
        # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4
        assert spearman(np.array([0.0, 7, 7, 9]), x) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
        assert math.isnan(pearson(x, np.ones(4)))
        assert math.isnan(spearman(x[:1], x[:1]))


class TestCurves:
    def test_closed_forms_and_the_released_dead_zone(self) -> None:
        curves = {curve.name.partition(",")[0]: curve for curve in activations.activation_curves()[:4]}
        z = curves["sigmoid"].logits
        sigmoid = 1 / (1 + np.exp(-z))
        for name in ("sigmoid", "softmax of two"):
            np.testing.assert_allclose(curves[name].probability, sigmoid, rtol=1e-12)
            np.testing.assert_allclose(curves[name].positive, 1 - sigmoid, rtol=1e-9)
            np.testing.assert_allclose(curves[name].negative, sigmoid, rtol=1e-9)
        free = curves["Gumbel without clip"]
        e = np.exp(-z)
        np.testing.assert_allclose(free.probability, np.exp(-e), rtol=1e-12)
        np.testing.assert_allclose(free.positive, e, rtol=1e-12)
        finite = e < 700
        np.testing.assert_allclose(free.negative[finite], e[finite] / np.expm1(e[finite]), rtol=1e-9)
        released, clipped = activations.activation_curves()[4:]
        inside = (z >= -4) & (z <= 10)
        assert not clipped.positive[~inside].any()
        assert not released.negative[~inside].any()
        np.testing.assert_allclose(clipped.positive[inside], e[inside], rtol=1e-12)
        assert activations.dead_below(clipped, released) == pytest.approx(-3.35, abs=0.03)
        assert math.isnan(activations.dead_below(clipped, clipped))

    def test_temperatures(self) -> None:
        for curve, t in zip(activations.temperature_curves([0.5, 3.0]), (0.5, 3.0), strict=True):
            assert curve.name == f"T = {t:g}"
            e = np.exp(-curve.logits / t)
            np.testing.assert_allclose(curve.probability, np.exp(-e), rtol=1e-12, atol=1e-300)
            np.testing.assert_allclose(curve.positive, e / t, rtol=1e-12)
        with pytest.raises(ValueError, match="temperature must be positive"):
            activations.temperature_curves([0.0])
