"""Detections on their way to disk and to the metrics, at LVIS's size."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

from bench.records import Row
from bench.scale.files import SUBSET, VAL, Size, draw_detections
from bench.scale.findings import finding, kilobytes, peak_mb, spent
from detector.data import LvisAnnotations
from detector.evaluation import ResultsWriter, merge_results, part_path, run_evaluation

SECONDS = {"bbox": 60, "segm": 300}
NAMES = {"bbox": "boxes", "segm": "boxes and masks"}
Metrics = dict[str, dict[str, float]]


def evaluate_boxes(folder: Path, size: Size) -> list[Row]:
    return _evaluate(folder, size, ("bbox",))


def evaluate_masks(folder: Path, size: Size) -> list[Row]:
    return _evaluate(folder, size, ("bbox", "segm"))


def _evaluate(folder: Path, size: Size, kinds: tuple[str, ...]) -> list[Row]:
    """Two ranks' detections on the whole validation set, from the writing to the metrics."""
    name = NAMES[kinds[-1]]
    results = folder / f"{kinds[-1]}.json"
    truth = LvisAnnotations.from_file(folder / VAL)
    memory = _write_parts(results, size, truth, 2, masks="segm" in kinds)
    with spent() as merging:
        count = merge_results([part_path(results, rank) for rank in range(2)], results)
    if count != size.val_images * size.detections:
        raise AssertionError(f"{count} detections were merged")
    results_mb = results.stat().st_size / 2**20
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # a program that has written nothing
        cpu, wall, peak, metrics = pool.apply(_judge, (folder / VAL, results, kinds))
    results.unlink()
    what = f"evaluate {name} of {count:,} detections in {size.val_images:,} images"
    seconds = {"at_most": SECONDS[kinds[-1]], "results_mb": results_mb, "metrics": metrics}
    growth = max(memory) - memory[len(memory) // 20]
    return [
        finding(what, cpu, "s", beside={"wall clock, s": wall}, **seconds),
        finding(f"its peak memory ({name})", peak / 1024, "GiB", at_most=6),
        finding(f"join the files of two ranks ({name})", merging.cpu, "s", wall_s=merging.wall),
        finding(f"memory grows while they are written ({name})", growth, "MiB", at_most=50),
    ]


def _judge(truth: Path, results: Path, kinds: tuple[str, ...]) -> tuple[float, float, float, Metrics]:
    with spent() as taken:
        found = run_evaluation(truth, results, iou_types=kinds)
    return taken.cpu, taken.wall, peak_mb(), found.metrics


def _write_parts(
    results: Path, size: Size, truth: LvisAnnotations, ranks: int, *, masks: bool
) -> list[float]:
    """What so many ranks leave for `results`; gives the resident memory, MiB, after each hundredth."""
    memory = []
    for rank in range(ranks):
        with ResultsWriter(part_path(results, rank), truth.category_ids) as writer:
            images = range(rank, len(truth), ranks)
            for k, found in enumerate(draw_detections(truth, size.detections, masks=masks, images=images)):
                writer.add(found)
                if k % max(len(images) // 50, 1) == 0:
                    memory.append(kilobytes("/proc/self/status", "VmRSS:") / 1024)
    return memory


def agreement(folder: Path, size: Size) -> list[Row]:
    """One rank's metrics of an odd number of images beside two ranks', and beside the lvis package's."""
    truth = LvisAnnotations.from_file(folder / SUBSET)
    metrics: dict[str, Metrics] = {}
    seconds = {}
    for name, ranks, backend in (("one", 1, "auto"), ("two", 2, "auto"), ("lvis", 1, "lvis")):
        results = folder / f"agreement_{name}.json"
        _write_parts(results, size, truth, ranks, masks=True)
        merge_results([part_path(results, rank) for rank in range(ranks)], results)
        with spent() as taken:
            metrics[name] = run_evaluation(folder / SUBSET, results, backend=backend).metrics
        seconds[name] = taken.cpu
        results.unlink()
    what = f"largest difference of a metric, boxes and masks, {len(truth):,} images"
    times = {"ours, s": seconds["one"], "lvis, s": seconds["lvis"]}
    lvis, two = (_difference(metrics["one"], metrics[name]) for name in ("lvis", "two"))
    return [
        finding(f"{what}: lvis package", lvis, "", at_most=1e-6, beside=times, metrics=metrics["one"]),
        finding(f"{what}: two ranks and one", two, "", at_most=0),
    ]


def _difference(one: Metrics, other: Metrics) -> float:
    return max(abs(value - other[kind][name]) for kind, row in one.items() for name, value in row.items())
