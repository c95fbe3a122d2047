"""`python -m detector analyze`: the analyses of Gumbel Optimized Loss (ECCV 2022) as pictures and numbers."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from detector.analysis import sections
from detector.analysis.activations import TEMPERATURES
from detector.analysis.runs import (
    Run,
    annotation_file,
    detection_files,
    find_classes,
    load_annotations,
    load_runs,
)
from detector.analysis.sections import Classes, Section
from detector.config import ConfigError
from detector.engine.run_folder import ANALYSIS

GRIDS = range(2, 129)
NUMBERS = "analysis.json"


def analyze(
    folders: Sequence[Path],
    *,
    detections: Mapping[str, Path] | None = None,
    annotations: Path | None = None,
    classes: Sequence[str] = (),
    grid: int = 32,
    smoothing: float = 1e-3,
    curves: bool = False,
    temperatures: Sequence[float] = TEMPERATURES,
    output: Path | None = None,
) -> Path:
    """Compare finished runs, write pictures and analysis.json, and print tables; returns the folder of the
    files.

    Args:
        folders: of the runs, which were trained on the same data; their results.json are the predictions.
        detections: further results files, by name.
        annotations: the truth of all results; by default the runs' own validation file.
        classes: names or category ids of those that are drawn one by one.
        grid: cells of a map along each axis.
        smoothing: see `locations.kl_divergence`.
        curves: also draw activations, and the Gumbel at `temperatures`; that alone needs no run.
        output: default: "analysis" in the first run's folder, or here.

    Raises ConfigError, CheckpointError, AnnotationError, ValueError or OSError for what cannot be used.
    """
    detections = detections or {}
    if not (folders or detections or curves):
        raise ConfigError("nothing to analyze: give the folder of a run, or --detections, or --curves")
    if grid not in GRIDS:
        raise ConfigError(f"--grid must lie in {GRIDS[0]}..{GRIDS[-1]}, got {grid}")
    if not 0 < smoothing < 1:
        raise ConfigError(f"--smoothing must lie between 0 and 1, got {smoothing:g}")
    found = _of_curves(temperatures) if curves else []  # first: bad temperatures are refused at once
    if folders or detections:
        runs = load_runs(folders)
        truth = annotation_file(runs, annotations)
        found = [*_of_runs(runs, detections, truth, classes, grid, smoothing), *found]
    elif classes or annotations:
        raise ConfigError("--classes and --annotations say something about runs or --detections: give one")
    folder = output or (folders[0] / ANALYSIS if folders else Path(ANALYSIS))
    _write(folder, found)
    return folder


def _of_curves(temperatures: Sequence[float]) -> list[Section]:
    return [sections.activation_curves(), sections.temperature_curves(temperatures)]


def _of_runs(
    runs: Sequence[Run],
    detections: Mapping[str, Path],
    truth: Path,
    wanted: Sequence[str],
    grid: int,
    smoothing: float,
) -> list[Section]:
    results = detection_files(runs, detections)
    annotations = load_annotations(truth, runs)
    frequency = runs[0].classes.frequency if runs else annotations.category_frequency
    names, category_ids = annotations.category_names, annotations.category_ids.tolist()
    shown = find_classes(wanted, names, category_ids) or sections.most_annotated(annotations, frequency)
    classes = Classes(names, category_ids, frequency, shown)
    found = [
        sections.locations(
            annotations,
            results,
            classes,
            grid=grid,
            smoothing=smoothing,
            progress=lambda text: print(text, file=sys.stderr),
        )
    ]
    if runs:
        found += [sections.weight_norms(runs), sections.positive_gradients(runs, classes)]
    return found


def _write(folder: Path, found: Sequence[Section]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for section in found:
        for name, figure in section.figures.items():
            figure.savefig(folder / name, dpi=130)
    numbers = {section.name: section.numbers for section in found}
    (folder / NUMBERS).write_text(json.dumps(numbers) + "\n", encoding="utf-8")
    print("\n\n".join(section.text for section in found))
    files = [name for section in found for name in section.figures]
    print(f"\n{', '.join(files)} and {NUMBERS} are in {folder}")
