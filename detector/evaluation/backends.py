"""The two evaluators: hotcoco (fast) and the lvis package (the reference). Their arrays are equal."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detector.evaluation.inputs import ResultsSummary

# Per IoU type: precision [IoU 10, recall 101, class C, area 4] and recall [IoU 10, class C, area 4];
# classes by ascending id, areas all, small, medium, large; -1 where a class has no annotation.
Curves = dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]
Dataset = dict[str, list[dict[str, Any]]]
# A backend may empty the list of annotations that it is given.
Backend = Callable[[Dataset, str | os.PathLike[str], Sequence[str], int, ResultsSummary], Curves]


def _hotcoco_curves(
    dataset: Dataset,
    results_file: str | os.PathLike[str],
    iou_types: Sequence[str],
    max_dets: int,
    summary: ResultsSummary,
) -> Curves:
    import hotcoco

    truth = hotcoco.COCO(dataset)
    dataset["annotations"].clear()  # hotcoco has its own of them, and the peak is still to come
    detections = hotcoco.LVISResults(truth, os.fspath(results_file), max_dets=max_dets)
    if summary.may_hold_empty:  # lvis drops them, too, after they took their places in the cap per image
        above_zero = [float(np.nextafter(0, 1)), float(np.finfo(np.float64).max)]
        detections = detections.filter(area_rng=above_zero, drop_empty_images=False)
    curves: Curves = {}
    for iou_type in iou_types:
        evaluator = hotcoco.LVISeval(truth, detections, iou_type)
        evaluator.evaluate()
        evaluator.accumulate()
        arrays = evaluator.eval
        curves[iou_type] = (np.asarray(arrays["precision"])[..., -1], np.asarray(arrays["recall"])[..., -1])
    return curves


class _NumpyWithFloat:
    """NumPy as lvis 0.5.3 knows it: `np.float` was an alias of `float` until NumPy 1.24."""

    float = float

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


_LVIS_LOCK = threading.RLock()


def _import_lvis() -> tuple[ModuleType, ModuleType]:
    """lvis and lvis.eval, also where OpenCV lacks its system libraries (libGL): only lvis.vis draws."""
    try:
        import cv2  # noqa: F401
    except ImportError:
        without_drawing = ModuleType("lvis.vis")
        without_drawing.LVISVis = None  # type: ignore[attr-defined]
        sys.modules["lvis.vis"] = without_drawing
    import lvis
    import lvis.eval as module

    return lvis, module


@contextmanager
def lvis_package() -> Iterator[ModuleType]:
    """The lvis package, made to work with current NumPy for the length of the block; one thread at a time.

    Only the name `np` inside `lvis.eval` is exchanged: NumPy itself is never touched. Importing lvis
    configures the root logger, which is undone.
    """
    with _LVIS_LOCK:
        root = logging.getLogger()
        handlers, level = list(root.handlers), root.level
        try:
            lvis, module = _import_lvis()
        finally:
            for handler in [handler for handler in root.handlers if handler not in handlers]:
                root.removeHandler(handler)
            root.setLevel(level)
        numpy, module.np = module.np, _NumpyWithFloat()
        try:
            yield lvis
        finally:
            module.np = numpy


def _lvis_curves(
    dataset: Dataset,
    results_file: str | os.PathLike[str],
    iou_types: Sequence[str],
    max_dets: int,
    summary: ResultsSummary,
) -> Curves:
    with lvis_package() as lvis:

        class Truth(lvis.LVIS):
            def _load_json(self, path: object) -> Dataset:
                return dataset

        class Results(lvis.LVISResults):
            """LVISResults indexes the first detection, so it cannot be built from none."""

            def __init__(self, truth: Truth) -> None:
                if summary.count:
                    super().__init__(truth, os.fspath(results_file), max_dets)
                else:
                    self.dataset = {**dataset, "annotations": []}
                    self.logger = logging.getLogger(lvis.results.__name__)
                    self._create_index()

        truth = Truth("")
        detections = Results(truth)
        curves: Curves = {}
        for iou_type in iou_types:
            evaluator = lvis.LVISEval(truth, detections, iou_type)
            evaluator.evaluate()
            evaluator.accumulate()
            curves[iou_type] = (evaluator.eval["precision"], evaluator.eval["recall"])
        return curves


BACKENDS: dict[str, Backend] = {"hotcoco": _hotcoco_curves, "lvis": _lvis_curves}


def choose_backend(backend: str) -> tuple[str, Backend]:
    """The evaluator of that name, or with "auto" the first one installed, with its name and version.

    Raises:
        ValueError: an unknown name.
        ImportError: not installed.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto', 'hotcoco' or 'lvis', got {backend!r}")
    wanted = list(BACKENDS) if backend == "auto" else [backend]
    for name in wanted:
        if find_spec(name) is not None:
            return f"{name} {version(name)}", BACKENDS[name]
    raise ImportError(f"evaluation needs {' or '.join(wanted)}: pip install {wanted[0]}")
