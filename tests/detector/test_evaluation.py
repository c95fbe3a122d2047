"""The LVIS protocol: cases computed by hand, and equality of both backends with the lvis package."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import pytest

from detector.evaluation import evaluate, format_markdown, format_table, run_evaluation
from detector.evaluation.backends import lvis_package

BACKENDS = ("hotcoco", "lvis")
HEIGHT, WIDTH = 100, 200
Json = dict[str, Any]


def truth(num_images: int = 1, classes: str = "f") -> Json:
    """An annotation file with one class per letter of `classes` (its frequency), nothing annotated."""
    images = [
        {
            "id": 10 + i,
            "height": HEIGHT,
            "width": WIDTH,
            "neg_category_ids": [],
            "not_exhaustive_category_ids": [],
        }
        for i in range(num_images)
    ]
    categories = [{"id": k, "name": f"class {k}", "frequency": f} for k, f in enumerate(classes, start=1)]
    return {"images": images, "annotations": [], "categories": categories}


def rectangle(bbox: list[float]) -> list[list[float]]:
    x, y, width, height = bbox
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def rle(polygons: list[list[float]]) -> Json:
    encoded = coco_mask.merge(coco_mask.frPyObjects(polygons, HEIGHT, WIDTH))
    return {"size": [HEIGHT, WIDTH], "counts": encoded["counts"].decode()}


def annotate(data: Json, image: int, category_id: int, bbox: list[float]) -> Json:
    annotation = {
        "id": len(data["annotations"]) + 1,
        "image_id": 10 + image,
        "category_id": category_id,
        "bbox": bbox,
        "area": bbox[2] * bbox[3],
        "segmentation": rectangle(bbox),
    }
    data["annotations"].append(annotation)
    return annotation


def detection(image: int, category_id: int, bbox: list[float], score: float) -> Json:
    return {
        "image_id": 10 + image,
        "category_id": category_id,
        "bbox": bbox,
        "score": score,
        "segmentation": rle(rectangle(bbox)),
    }


def write(folder: Path, data: Json, results: list[Json]) -> tuple[Path, Path]:
    paths = (folder / "truth.json", folder / "results.json")
    for path, content in zip(paths, (data, results), strict=True):
        path.write_text(json.dumps(content))
    return paths


# Rectangles on whole pixels, so a box and its mask have the same intersections and unions.
OBJECT = [20.0, 20.0, 40.0, 40.0]
ELSEWHERE = [120.0, 20.0, 40.0, 40.0]
ONE = pytest.approx(1.0, abs=1e-12)  # precision is TP / (TP + FP + 2.2e-16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["bbox", "segm"])
class TestByHand:
    def metrics(
        self, folder: Path, data: Json, results: list[Json], backend: str, kind: str, **options: Any
    ) -> Json:
        return evaluate(*write(folder, data, results), backend=backend, iou_types=[kind], **options)[kind]

    def test_perfect_detection(self, tmp_path: Path, backend: str, kind: str) -> None:
        data = truth(classes="f")
        annotate(data, 0, 1, OBJECT)
        found = self.metrics(tmp_path, data, [detection(0, 1, OBJECT, 0.3)], backend, kind)
        ones = {"AP", "AP50", "AP75", "APm", "APf", "AP50f", "AR@300", "ARm@300"}  # 40 x 40 lies in 32²..96²
        absent = {"APs", "APl", "APr", "APc", "AP50r", "AP50c", "ARs@300", "ARl@300"}
        assert found == pytest.approx(dict.fromkeys(ones, 1.0) | dict.fromkeys(absent, -1.0), abs=1e-12)

    def test_unverified_class_is_ignored_and_verified_negative_counts(
        self, tmp_path: Path, backend: str, kind: str
    ) -> None:
        data = truth(num_images=2)
        annotate(data, 0, 1, OBJECT)
        results = [detection(0, 1, OBJECT, 0.5), detection(1, 1, OBJECT, 0.9)]
        assert self.metrics(tmp_path, data, results, backend, kind)["AP"] == ONE
        data["images"][1]["neg_category_ids"] = [1]
        # The false positive ranks first: precision is 1/2 at every recall.
        assert self.metrics(tmp_path, data, results, backend, kind)["AP"] == pytest.approx(0.5, abs=1e-12)

    def test_unmatched_detection_of_a_class_that_is_not_exhaustive_is_ignored(
        self, tmp_path: Path, backend: str, kind: str
    ) -> None:
        data = truth()
        annotate(data, 0, 1, OBJECT)
        results = [detection(0, 1, ELSEWHERE, 0.9), detection(0, 1, OBJECT, 0.5)]
        assert self.metrics(tmp_path, data, results, backend, kind)["AP"] == pytest.approx(0.5, abs=1e-12)
        data["images"][0]["not_exhaustive_category_ids"] = [1]
        assert self.metrics(tmp_path, data, results, backend, kind)["AP"] == ONE

    def test_interpolated_precision(self, tmp_path: Path, backend: str, kind: str) -> None:
        data = truth(num_images=2)
        annotate(data, 0, 1, OBJECT)
        annotate(data, 1, 1, OBJECT)
        results = [
            detection(0, 1, OBJECT, 0.9),
            detection(0, 1, ELSEWHERE, 0.8),
            detection(1, 1, OBJECT, 0.7),
        ]
        found = self.metrics(tmp_path, data, results, backend, kind)
        # Recall 0.00..0.50 has precision 1 (51 of 101 points), recall 0.51..1.00 has 2/3 (50 points).
        assert found["AP"] == pytest.approx((51 + 50 * 2 / 3) / 101, abs=1e-12)
        assert found["AR@300"] == ONE

    def test_overlap_decides_the_thresholds(self, tmp_path: Path, backend: str, kind: str) -> None:
        data = truth()
        annotate(data, 0, 1, OBJECT)
        results = [detection(0, 1, [20.0, 20.0, 40.0, 31.0], 0.5)]  # IoU 31/40 = 0.775: 0.50..0.75 are met
        found = self.metrics(tmp_path, data, results, backend, kind)
        assert found["AP"] == pytest.approx(0.6, abs=1e-12)
        assert (found["AP50"], found["AP75"]) == (ONE, ONE)
        assert found["AR@300"] == pytest.approx(0.6, abs=1e-12)

    def test_frequency_groups_and_class_ap(self, tmp_path: Path, backend: str, kind: str) -> None:
        data = truth(classes="rcfcf")
        for category_id in (1, 2, 3):
            annotate(data, 0, category_id, OBJECT)
        results = [detection(0, 1, OBJECT, 0.5), detection(0, 2, [20.0, 20.0, 40.0, 31.0], 0.5)]
        evaluation = run_evaluation(*write(tmp_path, data, results), backend=backend, iou_types=[kind])
        assert evaluation.class_ap[kind] == pytest.approx(
            {1: 1.0, 2: 0.6, 3: 0.0, 4: -1.0, 5: -1.0}, abs=1e-12
        )
        found = evaluation.metrics[kind]
        expected = {"APr": 1.0, "APc": 0.6, "APf": 0.0, "AP50r": 1.0, "AP50c": 1.0, "AP50f": 0.0}
        expected |= {"AP": 1.6 / 3, "AP50": 2 / 3}
        assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)

    def test_highest_scores_of_the_image_are_kept_over_all_classes(
        self, tmp_path: Path, backend: str, kind: str
    ) -> None:
        data = truth(classes="ff")
        annotate(data, 0, 1, OBJECT)
        annotate(data, 0, 2, ELSEWHERE)
        results = [detection(0, 1, OBJECT, 0.5), detection(0, 2, ELSEWHERE, 0.9)]
        found = self.metrics(tmp_path, data, results, backend, kind, max_dets=1)
        assert (found["AP"], found["AR@1"]) == pytest.approx((0.5, 0.5), abs=1e-12)
        assert self.metrics(tmp_path, data, results, backend, kind, max_dets=2)["AP"] == ONE

    def test_no_detections_give_zero_for_annotated_classes(
        self, tmp_path: Path, backend: str, kind: str
    ) -> None:
        data = truth(classes="rf")
        annotate(data, 0, 1, OBJECT)
        evaluation = run_evaluation(*write(tmp_path, data, []), backend=backend, iou_types=[kind])
        found = evaluation.metrics[kind]
        assert (found["AP"], found["APr"], found["APf"], found["AR@300"]) == (0.0, 0.0, -1.0, 0.0)
        assert any("no detections" in note for note in evaluation.notes)

    def test_no_annotations_give_nothing_to_measure(self, tmp_path: Path, backend: str, kind: str) -> None:
        found = self.metrics(tmp_path, truth(), [detection(0, 1, OBJECT, 0.5)], backend, kind)
        assert set(found.values()) == {-1.0}

    def test_without_federated_lists_every_class_is_verified(
        self, tmp_path: Path, backend: str, kind: str
    ) -> None:
        data = truth(num_images=2)
        annotate(data, 0, 1, OBJECT)
        for image in data["images"]:
            del image["neg_category_ids"], image["not_exhaustive_category_ids"]
        results = [detection(0, 1, OBJECT, 0.5), detection(1, 1, OBJECT, 0.9)]
        assert self.metrics(tmp_path, data, results, backend, kind)["AP"] == pytest.approx(0.5, abs=1e-12)

    def test_annotation_number_zero_can_be_matched(self, tmp_path: Path, backend: str, kind: str) -> None:
        data = truth()
        annotate(data, 0, 1, OBJECT)["id"] = 0
        assert self.metrics(tmp_path, data, [detection(0, 1, OBJECT, 0.5)], backend, kind)["AP"] == ONE

    def test_ignored_annotation_is_neither_missed_nor_found(
        self, tmp_path: Path, backend: str, kind: str
    ) -> None:
        data = truth()
        annotate(data, 0, 1, OBJECT)
        annotate(data, 0, 1, ELSEWHERE)["ignore"] = 1
        found = [detection(0, 1, OBJECT, 0.5), detection(0, 1, ELSEWHERE, 0.9)]
        assert self.metrics(tmp_path, data, found, backend, kind)["AP"] == ONE
        assert self.metrics(tmp_path, data, found[:1], backend, kind)["AP"] == ONE


def random_case(
    seed: int, *, num_images: int = 16, detections: tuple[int, int] = (0, 40)
) -> tuple[Json, list[Json]]:
    """A federated set with score ties, images without annotations or detections, classes that are never
    annotated, near hits, wrong classes, and detections of unverified classes, in shuffled order."""
    rng = np.random.default_rng(seed)
    data = truth(num_images, classes="rcfrcfrcfrcf")
    classes = [category["id"] for category in data["categories"]]
    results = []
    for index, image in enumerate(data["images"]):
        objects = []
        for _ in range(rng.integers(0, 7)):
            sides = rng.uniform(4, 90, 2)
            corner = rng.uniform(0, [WIDTH, HEIGHT] - sides)
            annotation = annotate(
                data, index, int(rng.choice(classes[:-2])), [*corner.tolist(), *sides.tolist()]
            )
            angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 8)))
            outline = corner + sides / 2 * (1 + np.stack([np.cos(angles), np.sin(angles)], axis=1))
            annotation["segmentation"] = [outline.round(2).ravel().tolist()]
            annotation["area"] = float(coco_mask.area(rle(annotation["segmentation"]))) + 0.25
            objects.append(annotation)
        present = sorted({annotation["category_id"] for annotation in objects})
        absent = [k for k in classes if k not in present]
        image["neg_category_ids"] = rng.choice(absent, rng.integers(0, 5), replace=False).tolist()
        image["not_exhaustive_category_ids"] = [k for k in present if rng.random() < 0.3]
        for _ in range(0 if rng.random() < 0.15 else rng.integers(*detections)):
            category_id = int(rng.choice(classes))
            if objects and rng.random() < 0.6:
                source = objects[rng.integers(len(objects))]
                shift = rng.normal(0, 2.0, 2) * (rng.random() < 0.7)
                bbox = np.array(source["bbox"])
                bbox[:2] += shift
                polygon = np.array(source["segmentation"][0]).reshape(-1, 2) + shift
                category_id = source["category_id"] if rng.random() < 0.8 else category_id
            else:
                sides = rng.uniform(2, 80, 2)
                bbox = np.array([*rng.uniform(0, [WIDTH, HEIGHT] - sides), *sides])
                polygon = np.array(rectangle(bbox.tolist())).reshape(-1, 2)
            found = detection(index, category_id, bbox.tolist(), round(float(rng.random()), 1))
            found["segmentation"] = rle([polygon.ravel().tolist()])
            results.append(found)
    return data, [results[index] for index in rng.permutation(len(results))]


def lvis_by_itself(annotation_file: Path, results_file: Path, kind: str) -> dict[str, float]:
    """The metrics as the lvis package prints them, from the untouched files."""
    with lvis_package() as lvis:
        evaluator = lvis.LVISEval(str(annotation_file), str(results_file), kind)
        evaluator.run()
        return {name: float(value) for name, value in evaluator.get_results().items()}


def assert_equal_to_lvis(paths: tuple[Path, Path], kinds: tuple[str, ...] = ("bbox", "segm")) -> None:
    found = {name: run_evaluation(*paths, iou_types=kinds, backend=name) for name in BACKENDS}
    for kind in kinds:
        expected = lvis_by_itself(*paths, kind)
        assert len(expected) == 13
        for evaluation in found.values():
            metrics = evaluation.metrics[kind]
            assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-9)
        fast, reference = (found[name] for name in BACKENDS)
        assert fast.metrics[kind] == pytest.approx(reference.metrics[kind], abs=1e-12)
        assert fast.class_ap[kind] == pytest.approx(reference.class_ap[kind], abs=1e-12)


class TestParity:
    @pytest.mark.parametrize("seed", range(4))
    def test_federated_sets(self, tmp_path: Path, seed: int) -> None:
        data, results = random_case(seed)
        paths = write(tmp_path, data, results)
        assert_equal_to_lvis(paths)
        metrics = evaluate(*paths)
        assert 0.1 < metrics["bbox"]["AP"] < 0.9  # the case has hits and misses
        assert metrics["bbox"]["AP"] != metrics["segm"]["AP"]

    def test_more_than_300_detections(self, tmp_path: Path) -> None:
        data, results = random_case(4, num_images=4, detections=(320, 420))
        for found in results:
            found["score"] *= found["category_id"] != 1  # last in every image: the cap cuts class 1
        paths = write(tmp_path, data, results)
        assert_equal_to_lvis(paths)
        capped, uncapped = (evaluate(*paths, max_dets=count)["bbox"] for count in (300, 10_000))
        assert capped["AP"] != uncapped["AP"]

    def test_empty_boxes_and_empty_masks(self, tmp_path: Path) -> None:
        data, results = random_case(6, num_images=6, detections=(280, 420))
        nothing = coco_mask.encode(np.zeros((HEIGHT, WIDTH), np.uint8, order="F"))["counts"].decode()
        for found in results[::4]:
            found["bbox"][2] = 0.0
        for found in results[1::4]:
            found["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": nothing}
        assert_equal_to_lvis(write(tmp_path, data, results))

    def test_masks_without_boxes(self, tmp_path: Path) -> None:
        data, results = random_case(7)
        for found in results:
            del found["bbox"]
        assert_equal_to_lvis(write(tmp_path, data, results), kinds=("segm",))

    def test_truth_as_run_lengths_and_in_several_parts(self, tmp_path: Path) -> None:
        data, results = random_case(8)
        for index, annotation in enumerate(data["annotations"]):
            if index % 3 == 0:
                annotation["segmentation"] = rle(annotation["segmentation"])
            elif index % 3 == 1:
                annotation["segmentation"].append([1.0, 1.0, 9.0, 1.0, 9.0, 9.0])
        assert_equal_to_lvis(write(tmp_path, data, results))

    def test_order_of_the_file_and_empty_annotations_do_not_matter(self, tmp_path: Path) -> None:
        data, results = random_case(9)
        for annotation in data["annotations"][::5]:
            annotation["area"] = 0
        for section in data.values():
            section.reverse()
        assert_equal_to_lvis(write(tmp_path, data, results))

    def test_crowd_is_no_part_of_the_protocol(self, tmp_path: Path) -> None:
        data, results = random_case(10)
        for annotation in data["annotations"][::3]:
            annotation["iscrowd"] = 1
        paths = write(tmp_path, data, results)
        assert_equal_to_lvis(paths)
        assert any("crowd" in note for note in run_evaluation(*paths).notes)


class TestBackends:
    def test_auto_takes_hotcoco_and_falls_back_to_lvis(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        paths = write(tmp_path, *random_case(0, num_images=3))
        assert run_evaluation(*paths).backend.startswith("hotcoco ")
        monkeypatch.setitem(sys.modules, "hotcoco", None)
        assert run_evaluation(*paths).backend.startswith("lvis ")
        with pytest.raises(ImportError, match="pip install hotcoco"):
            run_evaluation(*paths, backend="hotcoco")

    def test_numpy_and_logging_are_left_as_they_were(self, tmp_path: Path) -> None:
        annotation_file, results_file = write(tmp_path, *random_case(0, num_images=3))
        program = f"""
import logging, sys
import numpy as np
before = set(vars(np))
import detector.evaluation as evaluation
loaded = [name for name in ("lvis", "hotcoco", "cv2", "matplotlib") if name in sys.modules]
assert not loaded, loaded
evaluation.evaluate({str(annotation_file)!r}, {str(results_file)!r}, backend="lvis")
import lvis.eval
assert lvis.eval.np is np
assert "float" not in vars(np) or "float" in before
assert logging.getLogger().handlers == [] and logging.getLogger().level == logging.WARNING
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def test_opencv_without_its_system_libraries(self, tmp_path: Path) -> None:
        """lvis imports cv2 for drawing alone; cv2 needs libGL, which a machine without a screen lacks."""
        annotation_file, results_file = write(tmp_path, *random_case(0, num_images=3))
        program = f"""
import sys
sys.modules["cv2"] = None  # import cv2 raises ImportError
import detector.evaluation as evaluation
metrics = evaluation.evaluate({str(annotation_file)!r}, {str(results_file)!r}, backend="lvis")
print(metrics["bbox"]["AP"])
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        expected = evaluate(annotation_file, results_file, backend="hotcoco")["bbox"]["AP"]
        assert float(done.stdout) == pytest.approx(expected, abs=1e-12)

    def test_shim_is_removed_after_an_error_and_serves_one_thread_at_a_time(self, tmp_path: Path) -> None:
        with lvis_package() as lvis:
            assert lvis.eval.np.float is float
            assert lvis.eval.np.cumsum is np.cumsum
        assert lvis.eval.np is np
        with pytest.raises(ZeroDivisionError), lvis_package():
            1 / 0  # noqa: B018
        assert lvis.eval.np is np

        paths = write(tmp_path, *random_case(0, num_images=6))
        expected = evaluate(*paths, backend="hotcoco")
        found: list[Json] = []
        threads = [
            threading.Thread(target=lambda: found.append(evaluate(*paths, backend="lvis"))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 3
        assert all(
            one[kind] == pytest.approx(expected[kind], abs=1e-12) for one in found for kind in expected
        )
        assert lvis.eval.np is np

    def test_protocol_says_what_was_measured(self, tmp_path: Path) -> None:
        data, results = random_case(0, num_images=3)
        protocol = run_evaluation(*write(tmp_path, data, results), max_dets=100).protocol
        assert "LVIS protocol" in protocol
        assert "at most 100 detections per image" in protocol
        assert f"3 images, {len(results)} detections" in protocol


class TestInput:
    def test_missing_frequency_is_derived_from_image_counts(self, tmp_path: Path) -> None:
        data = truth(num_images=11, classes="ffff")
        for image in range(11):
            annotate(data, image, 1, OBJECT)  # in 11 images: common
        for _ in range(11):
            annotate(data, 0, 2, OBJECT)  # 11 times in one image: rare
        annotate(data, 0, 3, OBJECT)
        annotate(data, 0, 4, OBJECT)
        for category in data["categories"][:3]:
            del category["frequency"]
        data["categories"][2]["image_count"] = 101  # the training set's count, in LVIS files: frequent
        results = [detection(0, 2, OBJECT, 0.9), detection(0, 3, OBJECT, 0.9)]
        found = evaluate(*write(tmp_path, data, results))["bbox"]
        # Class 2: one of 11 found, precision 1 at recall 0.00..0.09 (10 of 101 points); class 3: 1, 4: 0.
        assert found["APr"] == pytest.approx(10 / 101, abs=1e-12)
        assert (found["APc"], found["APf"]) == pytest.approx((0.0, 0.5), abs=1e-12)

    def test_missing_frequency_is_the_training_sets_where_it_is_known(self, tmp_path: Path) -> None:
        data = truth(classes="ffff")
        for category_id in (1, 2, 3, 4):
            annotate(data, 0, category_id, OBJECT)
        for category in data["categories"][:3]:
            del category["frequency"]
        data["categories"][2]["image_count"] = 50  # what the file says comes first
        paths = write(tmp_path, data, [detection(0, 1, OBJECT, 0.9), detection(0, 3, OBJECT, 0.9)])
        found = run_evaluation(*paths, groups={1: "f", 2: "r", 3: "r", 4: "r"})
        scores = found.metrics["bbox"]
        assert (scores["APr"], scores["APc"], scores["APf"]) == pytest.approx((0.0, 1.0, 0.5), abs=1e-12)
        assert not any("without frequency" in note for note in found.notes)
        assert any("without frequency" in note for note in run_evaluation(*paths).notes)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"image_id": 99}, r"results\.json: detection 1 has image_id 99"),
            ({"category_id": 7}, r"detection 1 has category_id 7"),
            ({"score": float("nan")}, r"detection 1 has the score nan"),
            ({"bbox": [0, 0, float("inf"), 1]}, r"detection 1 needs a finite bbox"),
            ({"bbox": [0, 0, -1, 1]}, r"detection 1 needs a finite bbox"),
            ({"bbox": [0, 0, 1]}, r"detection 1 needs a finite bbox"),
            ({"bbox": None}, r"detection 1 has no bbox"),
            ({"segmentation": None}, r"detection 1 has no segmentation"),
            ({"segmentation": {"size": [5, 5], "counts": "0"}}, r"detection 1 has a mask of size \[5, 5\]"),
            ({"score": "0.5"}, r"detection 1 needs a number as score"),
        ],
    )
    def test_bad_detections_are_named(self, tmp_path: Path, change: Json, message: str) -> None:
        data = truth()
        annotate(data, 0, 1, OBJECT)
        results = [detection(0, 1, OBJECT, 0.5), detection(0, 1, OBJECT, 0.5) | change]
        with pytest.raises(ValueError, match=message):
            evaluate(*write(tmp_path, data, results))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"image_id": 99}, r"truth\.json: annotation 1 has the unknown image_id 99"),
            ({"category_id": 99}, r"annotation 1 has the unknown category_id 99"),
            ({"segmentation": [[1, 2, 3, 4]]}, r"annotation 1 needs polygons of 3 or more points, got \[4\]"),
            ({"segmentation": []}, r"annotation 1 needs polygons"),
        ],
    )
    def test_bad_annotations_are_named(self, tmp_path: Path, change: Json, message: str) -> None:
        data = truth()
        annotate(data, 0, 1, OBJECT).update(change)
        with pytest.raises(ValueError, match=message):
            evaluate(*write(tmp_path, data, []))

    def test_broken_files_are_named(self, tmp_path: Path) -> None:
        good = truth(num_images=2)
        annotate(good, 0, 1, OBJECT)
        cases = []
        for section, change, message in [
            ("annotations", lambda record: record.pop("area"), "annotation 1 lacks area"),
            ("images", lambda record: record.pop("neg_category_ids"), "image 10 lacks neg_category_ids"),
            ("images", lambda record: record.update(id=11), "image 11 is listed twice"),
            ("categories", lambda record: record.update(frequency="x"), "category 1 has frequency 'x'"),
        ]:
            data = copy.deepcopy(good)
            change(data[section][0])
            cases.append((data, message))
        cases.append(({"images": []}, "must hold the lists images, annotations, categories"))
        for data, message in cases:
            with pytest.raises(ValueError, match=message):
                evaluate(*write(tmp_path, data, []))
        annotation_file, results_file = write(tmp_path, good, [])
        annotation_file.write_text('{"images": [')
        with pytest.raises(ValueError, match=r"truth\.json: not a JSON file"):
            evaluate(annotation_file, results_file)

    def test_bad_arguments(self, tmp_path: Path) -> None:
        paths = write(tmp_path, truth(), [])
        with pytest.raises(ValueError, match="iou_types must be some of"):
            evaluate(*paths, iou_types=["mask"])
        with pytest.raises(ValueError, match="max_dets must be at least 1"):
            evaluate(*paths, max_dets=0)
        with pytest.raises(ValueError, match="backend must be"):
            evaluate(*paths, backend="coco")


METRICS = {
    "bbox": {"AP": 0.25049, "AP50": 0.5, "AP75": 0.1, "APr": -1.0, "APc": 0.0, "APf": 1.0, "AP50f": 1.0},
    "segm": {"AP": 0.2, "AP50": 0.4, "AP75": 0.05, "APr": -1.0, "APc": 0.0, "APf": 0.9},
}


def test_plain_table() -> None:
    assert format_table(METRICS).splitlines() == [
        "        AP  AP50  AP75  APr  APc    APf  AP50f",
        "----------------------------------------------",
        "box   25.0  50.0  10.0    -  0.0  100.0  100.0",
        "mask  20.0  40.0   5.0    -  0.0   90.0      -",
    ]


def test_markdown_table() -> None:
    assert format_markdown({"segm": METRICS["segm"]}, columns=["AP", "APr"]).splitlines() == [
        "|  | AP | APr |",
        "| --- | ---: | ---: |",
        "| mask | 20.0 | - |",
    ]
