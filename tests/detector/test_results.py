"""Detections, and the results files that carry them between processes and to other tools."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

import detector.evaluation.results as results_module
from detector.evaluation import (
    Detections,
    ResultsWriter,
    iterate_results,
    merge_results,
    part_path,
    read_results,
)

CATEGORY_IDS = [3, 7, 20]
RLE = {"size": [10, 20], "counts": b"0`6"}


def some_detections(image_id: int, count: int = 2, *, masks: bool = True) -> Detections:
    rng = np.random.default_rng(image_id)
    corners = rng.uniform(0, 50, (count, 2)).astype(np.float32)
    boxes = np.concatenate([corners, corners + rng.uniform(1, 40, (count, 2)).astype(np.float32)], axis=1)
    scores = np.sort(rng.random(count, dtype=np.float32))[::-1]
    return Detections(image_id, boxes, scores, rng.integers(0, 3, count), [RLE] * count if masks else None)


class TestDetections:
    def test_tensors_and_lists_become_arrays(self) -> None:
        found = Detections(
            5,
            torch.tensor([[1.0, 2.0, 3.0, 4.5]], dtype=torch.float64),
            torch.tensor([0.25]),
            torch.tensor([2], dtype=torch.int32),
            [RLE],
        )
        assert (found.boxes.dtype, found.scores.dtype, found.labels.dtype) == (
            np.float32,
            np.float32,
            np.int64,
        )
        assert (found.boxes.tolist(), found.scores.tolist(), found.labels.tolist()) == (
            [[1, 2, 3, 4.5]],
            [0.25],
            [2],
        )
        assert found.masks == [{"size": [10, 20], "counts": "0`6"}]

    def test_none_found(self) -> None:
        found = Detections(5, [], [], [])
        assert len(found) == 0
        assert found.boxes.shape == (0, 4)

    def test_select(self) -> None:
        found = some_detections(1, 4)
        for rows in (np.array([2, 0]), np.array([True, False, True, False])):
            chosen = found.select(rows)
            expected = np.arange(4)[rows]
            assert np.array_equal(chosen.boxes, found.boxes[expected])
            assert np.array_equal(chosen.scores, found.scores[expected])
            assert len(chosen.masks or []) == 2

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"boxes": [[0, 0, 1]]}, r"image 9: expected boxes \[D, 4\].*got \[1, 3\]"),
            ({"scores": [0.5, 0.5]}, r"got \[1, 4\], \[2\] and \[1\]"),
            ({"labels": [[1]]}, r"got \[1, 4\], \[1\] and \[1, 1\]"),
            ({"boxes": [[0, 0, float("nan"), 1]]}, r"image 9: boxes must be finite, got nan"),
            ({"scores": [float("inf")]}, r"image 9: scores must be finite, got inf"),
            ({"boxes": [[5, 0, 4, 1]]}, r"box 0 must be \(x1, y1, x2, y2\), got \[5.0, 0.0, 4.0, 1.0\]"),
            ({"labels": [-1]}, r"labels must be >= 0, got -1"),
            ({"masks": []}, r"expected 1 masks, got 0"),
            ({"masks": [np.zeros((4, 4))]}, r"a mask must be"),
            ({"masks": [{"size": [4, 4], "counts": [3, 13]}]}, r"a mask must be"),
        ],
    )
    def test_bad_input_is_refused(self, change: dict, message: str) -> None:
        good = {"image_id": 9, "boxes": [[0, 0, 1, 1]], "scores": [0.5], "labels": [1], "masks": [RLE]}
        assert len(Detections(**good)) == 1
        with pytest.raises(ValueError, match=message):
            Detections(**(good | change))

    def test_labels_must_be_integers(self) -> None:
        with pytest.raises(TypeError, match="labels must be integers, got float64"):
            Detections(9, [[0, 0, 1, 1]], [0.5], [1.0])


class TestResultsWriter:
    def test_file_is_a_lvis_results_list(self, tmp_path: Path) -> None:
        path = tmp_path / "new folder" / "results.json"
        with ResultsWriter(path, np.array(CATEGORY_IDS)) as writer:
            writer.add(Detections(42, [[1, 2, 4, 8]], [0.5], [2], [RLE]))
            writer.add(Detections(43, [], [], []))
            writer.add(Detections(44, [[0, 0, 1, 1]], [0.25], [0]))
        assert json.loads(path.read_text()) == [
            {
                "image_id": 42,
                "category_id": 20,
                "bbox": [1, 2, 3, 6],
                "score": 0.5,
                "segmentation": {"size": [10, 20], "counts": "0`6"},
            },
            {"image_id": 44, "category_id": 3, "bbox": [0, 0, 1, 1], "score": 0.25},
        ]

    def test_values_come_back_exactly(self, tmp_path: Path) -> None:
        expected = {image_id: some_detections(image_id, 50) for image_id in (1, 2)}
        with ResultsWriter(tmp_path / "results.json", CATEGORY_IDS) as writer:
            for found in expected.values():
                writer.add(found)
        found = read_results(tmp_path / "results.json", CATEGORY_IDS)
        assert list(found) == [1, 2]
        for image_id, one in found.items():
            assert np.array_equal(one.scores, expected[image_id].scores)
            assert np.array_equal(one.labels, expected[image_id].labels)
            assert one.masks == expected[image_id].masks
            # x2 = x1 + (x2 - x1) rounds once more.
            np.testing.assert_allclose(one.boxes, expected[image_id].boxes, rtol=2e-7, atol=0)

    def test_no_detections_give_an_empty_list(self, tmp_path: Path) -> None:
        path = tmp_path / "results.json"
        with ResultsWriter(path, CATEGORY_IDS):
            pass
        assert json.loads(path.read_text()) == []
        assert list(iterate_results(path)) == []

    def test_an_exception_leaves_the_old_file_and_nothing_else(self, tmp_path: Path) -> None:
        path = tmp_path / "results.json"

        def write_and_fail() -> None:
            with ResultsWriter(path, CATEGORY_IDS) as writer:
                writer.add(some_detections(1))
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_and_fail()
        assert list(tmp_path.iterdir()) == []
        path.write_text("old")
        with pytest.raises(KeyboardInterrupt):
            write_and_fail()
        assert [found.name for found in tmp_path.iterdir()] == ["results.json"]
        assert path.read_text() == "old"

    def test_file_has_its_name_only_when_complete(self, tmp_path: Path) -> None:
        path = tmp_path / "results.json"
        (tmp_path / "results.json.tmp").write_text("left by a killed process")
        with ResultsWriter(path, CATEGORY_IDS) as writer:
            writer.add(some_detections(1))
            assert not path.exists()
        assert [found.name for found in tmp_path.iterdir()] == ["results.json"]
        assert len(json.loads(path.read_text())) == 2

    def test_bad_use_is_refused(self, tmp_path: Path) -> None:
        writer = ResultsWriter(tmp_path / "results.json", CATEGORY_IDS)
        with pytest.raises(RuntimeError, match="enter the writer first"):
            writer.add(some_detections(1))
        with writer:
            writer.add(some_detections(1))
            with pytest.raises(ValueError, match="image 1 was added twice"):
                writer.add(some_detections(1))
            with pytest.raises(ValueError, match=r"image 2: expected labels 0\.\.2, got 3"):
                writer.add(Detections(2, [[0, 0, 1, 1]], [0.5], [3]))


def test_memory_does_not_grow_with_the_detections(tmp_path: Path) -> None:
    """2,000 images of 50 detections, a file of 12 MB; of each image only its id is kept."""
    rng = np.random.default_rng(0)
    boxes = rng.random((50, 4)).cumsum(axis=1)
    tracemalloc.start()
    with ResultsWriter(tmp_path / "results.json", CATEGORY_IDS) as writer:
        for image_id in range(2_000):
            writer.add(Detections(image_id, boxes, rng.random(50), rng.integers(3, size=50)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "results.json").stat().st_size > 10e6
    assert peak < 1e6


class TestMergeResults:
    def test_images_of_several_ranks_are_kept_once(self, tmp_path: Path) -> None:
        path = tmp_path / "results.json"
        shares = [[1, 4], [2, 5, 1], [], [3, 2, 4]]  # ranks that padded with images of other ranks
        for rank, share in enumerate(shares):
            with ResultsWriter(part_path(path, rank), CATEGORY_IDS) as writer:
                for image_id in share:
                    writer.add(some_detections(image_id, image_id))
        assert merge_results([part_path(path, rank) for rank in range(4)], path) == 1 + 2 + 3 + 4 + 5

        with ResultsWriter(tmp_path / "one.json", CATEGORY_IDS) as writer:
            for image_id in (1, 4, 2, 5, 3):
                writer.add(some_detections(image_id, image_id))
        assert list(iterate_results(path)) == list(iterate_results(tmp_path / "one.json"))
        assert sorted(found.name for found in tmp_path.iterdir()) == ["one.json", "results.json"]

    def test_lines_are_kept_as_they_are(self, tmp_path: Path) -> None:
        path = tmp_path / "results.json"
        lines = []
        for rank in range(2):
            with ResultsWriter(part_path(path, rank), CATEGORY_IDS) as writer:
                for image_id in range(rank, 5, 2):
                    writer.add(some_detections(image_id, 3))
            lines += [row.rstrip(",") for row in part_path(path, rank).read_text().splitlines()[1:-1]]
        merge_results([part_path(path, 0), part_path(path, 1)], path)
        assert [row.rstrip(",") for row in path.read_text().splitlines()[1:-1]] == lines
        assert len(json.loads(path.read_text())) == 15

    @pytest.mark.parametrize("lost", [1, 2, 3, 40, 200])
    def test_a_part_that_is_cut_off_is_refused(self, tmp_path: Path, lost: int) -> None:
        path = tmp_path / "results.json"
        with ResultsWriter(part_path(path, 0), CATEGORY_IDS) as writer:
            writer.add(some_detections(1, 4))
        whole = part_path(path, 0).read_text()
        part_path(path, 0).write_text(whole[:-lost])
        with pytest.raises(ValueError, match=r"rank0: broken or cut off at detection [2-4]"):
            merge_results([part_path(path, 0)], path)
        part_path(path, 0).write_text(whole.partition("\n")[2])
        with pytest.raises(ValueError, match=r"rank0: broken or cut off at detection 0"):
            merge_results([part_path(path, 0)], path)
        assert not path.exists()

    def test_a_missing_part_is_named_and_nothing_is_lost(self, tmp_path: Path) -> None:
        path = tmp_path / "results.json"
        with ResultsWriter(part_path(path, 0), CATEGORY_IDS) as writer:
            writer.add(some_detections(1))
        with pytest.raises(FileNotFoundError, match=r"no results from 1 of 2 ranks: .*rank1"):
            merge_results([part_path(path, 0), part_path(path, 1)], path)
        part_path(path, 1).write_text("[{")
        with pytest.raises(ValueError, match=r"rank1: broken or cut off at detection 0"):
            merge_results([part_path(path, 0), part_path(path, 1)], path)
        assert sorted(found.name for found in tmp_path.iterdir()) == [
            "results.json.rank0",
            "results.json.rank1",
        ]


RECORDS = [{"image_id": i, "category_id": 3, "bbox": [0.5, 1, 2, 3], "score": i / 10} for i in range(8)]


class TestReading:
    @pytest.mark.parametrize("indent", [None, 0, 2])
    @pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
    def test_any_layout_in_any_chunks(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int | None, chunk: int
    ) -> None:
        monkeypatch.setattr(results_module, "READ_CHUNK", chunk)
        path = tmp_path / "results.json"
        path.write_text("  " + json.dumps(RECORDS, indent=indent) + "\n")
        assert list(iterate_results(path)) == RECORDS

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "must be a JSON list"),
            ('{"annotations": []}', "must be a JSON list"),
            ("[", r"cut off at detection 0 \(the list is not closed\)"),
            (json.dumps(RECORDS)[:-1], r"cut off at detection 8 \(the list is not closed\)"),
            (json.dumps(RECORDS)[:-9], r"broken or cut off at detection 7"),
            (json.dumps(RECORDS[:3])[:-1] + ", {'image_id': 1}]", r"broken or cut off at detection 3"),
            ("[5]", r"detection 0 must be an object, got 5"),
            (
                '[{"image_id": 1, "score": 1, "bbox": [0, 0, 1, 1]}]',
                r"detection 0 needs a number as category_id",
            ),
            ('[{"image_id": "1", "category_id": 1, "score": 1}]', r"needs a number as image_id, got '1'"),
            (
                '[{"image_id": 1, "category_id": 1, "score": 1}]',
                r"detection 0 has neither bbox nor segmentation",
            ),
        ],
    )
    def test_broken_files_are_named(self, tmp_path: Path, text: str, message: str) -> None:
        path = tmp_path / "broken.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"broken\.json.*{message}"):
            list(iterate_results(path))

    def test_read_results_sorts_and_selects(self, tmp_path: Path) -> None:
        records = [record | {"image_id": index % 3} for index, record in enumerate(RECORDS)]
        path = tmp_path / "results.json"
        path.write_text(json.dumps(records))
        found = read_results(path, CATEGORY_IDS, image_ids=[2, 0, 99])
        assert sorted(found) == [0, 2]
        assert found[0].scores == pytest.approx([0.6, 0.3, 0.0])
        assert found[2].boxes.tolist() == [[0.5, 1, 2.5, 4]] * 2
        assert found[0].masks is None
        with pytest.raises(ValueError, match="detection 0 has the unknown category id 3"):
            read_results(path, [4, 5])
