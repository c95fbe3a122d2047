"""Detection and segmentation metrics by the LVIS protocol.

The data set is federated (Gupta et al., "LVIS: A Dataset for Large Vocabulary Instance Segmentation",
arXiv 1908.03195): a detection counts only if its class is annotated in its image or listed there as verified
absent (`neg_category_ids`), and unmatched detections of classes whose annotation is incomplete
(`not_exhaustive_category_ids`) are ignored. Each image keeps its `max_dets` highest scores over all classes.
AP is the mean of 101-point interpolated precision over IoU 0.50:0.05:0.95 and classes; APr, APc and APf
are the means over rare, common and frequent classes.

A detection's part in APs, APm and APl is decided by the area of its `bbox` where the results file gives one,
of its mask where not, for masks too: so does the lvis package, the metric of record.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from detector.evaluation.backends import choose_backend
from detector.evaluation.inputs import FREQUENCIES, check_results, load_truth

IOU_TYPES = ("bbox", "segm")
AREA_NAMES = ("s", "m", "l")  # after "all" on the area axis
IOU_50, IOU_75 = 0, 5  # on the IoU axis 0.50, 0.55, ... 0.95

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found, with what is needed to compare it with another one.

    `metrics[iou_type][name]` and `class_ap[iou_type][category_id]` are fractions in 0..1, -1 where nothing is
    annotated. `notes` are sentences about the input that a reader of the numbers should know.
    """

    metrics: dict[str, dict[str, float]]
    class_ap: dict[str, dict[int, float]]
    backend: str
    max_dets: int
    num_images: int
    num_detections: int
    notes: tuple[str, ...]

    @property
    def protocol(self) -> str:
        return (
            f"LVIS protocol, IoU 0.50:0.95, at most {self.max_dets} detections per image; "
            f"{self.num_images} images, {self.num_detections} detections; computed by {self.backend}"
        )


def evaluate(
    annotation_file: str | os.PathLike[str],
    results_file: str | os.PathLike[str],
    *,
    iou_types: Sequence[str] = IOU_TYPES,
    backend: str = "auto",
    max_dets: int = 300,
) -> dict[str, dict[str, float]]:
    """The metrics of `run_evaluation`; its protocol line and notes go to the log."""
    evaluation = run_evaluation(
        annotation_file, results_file, iou_types=iou_types, backend=backend, max_dets=max_dets
    )
    logger.info(evaluation.protocol)
    for note in evaluation.notes:
        logger.warning(note)
    return evaluation.metrics


def run_evaluation(
    annotation_file: str | os.PathLike[str],
    results_file: str | os.PathLike[str],
    *,
    iou_types: Sequence[str] = IOU_TYPES,
    backend: str = "auto",
    max_dets: int = 300,
    groups: Mapping[int, str] | None = None,
) -> Evaluation:
    """Evaluates a results file against an annotation file.

    Args:
        annotation_file: LVIS v1 or v0.5 JSON. Without `neg_category_ids` (COCO) every image counts as
            annotated for all classes.
        results_file: JSON list of {image_id, category_id, bbox [x, y, width, height], score, segmentation}.
        iou_types: "bbox" for boxes, "segm" for masks.
        backend: "hotcoco", "lvis" (the reference: slow, needs much memory), or "auto": hotcoco if installed.
        max_dets: detections kept per image, highest scores first.
        groups: frequency group ("r", "c", "f") by category id, of the training set; used for categories to
            which the file gives neither `frequency` nor `image_count`. Without it, the file's own images
            are counted, and a note says so.

    Returns:
        For each IoU type AP, AP50, AP75, APs, APm, APl, APr, APc, APf, AP50r, AP50c, AP50f, and with
        D = max_dets AR@D, ARs@D, ARm@D, ARl@D. A file without detections gives zeros and a note.

    Raises:
        ValueError: unknown arguments; annotations or results that cannot be evaluated (broken records,
            unknown image or category ids, masks of another size than their image), naming file and record.
        ImportError: the backend is not installed.
    """
    unknown = [iou_type for iou_type in iou_types if iou_type not in IOU_TYPES]
    if unknown or not iou_types:
        raise ValueError(f"iou_types must be some of {IOU_TYPES}, got {tuple(iou_types)}")
    if max_dets < 1:
        raise ValueError(f"max_dets must be at least 1, got {max_dets}")
    name, compute = choose_backend(backend)

    truth = load_truth(annotation_file, with_masks="segm" in iou_types, groups=groups)
    results = check_results(results_file, truth, iou_types)
    curves = compute(truth.dataset, results_file, iou_types, max_dets, results)

    categories = truth.dataset["categories"]
    frequencies = np.array([category["frequency"] for category in categories])
    notes = list(truth.notes)
    if results.count == 0:
        notes.append(f"{results_file} holds no detections: AP is 0 for every annotated class")
    return Evaluation(
        metrics={kind: summarize(*arrays, frequencies, max_dets) for kind, arrays in curves.items()},
        class_ap={
            kind: {category["id"]: _mean(precision[:, :, k, 0]) for k, category in enumerate(categories)}
            for kind, (precision, _) in curves.items()
        },
        backend=name,
        max_dets=max_dets,
        num_images=len(truth.image_sizes),
        num_detections=results.count,
        notes=tuple(notes),
    )


def summarize(
    precision: NDArray[np.float64], recall: NDArray[np.float64], frequencies: NDArray[np.str_], max_dets: int
) -> dict[str, float]:
    """The LVIS metrics from precision [IoU, recall, C, area], recall [IoU, C, area] and frequencies [C].

    Each is the mean over the entries that are not -1, or -1 if there are none.
    """
    all_areas = precision[..., 0]
    metrics = {"AP": _mean(all_areas), "AP50": _mean(all_areas[IOU_50]), "AP75": _mean(all_areas[IOU_75])}
    for area, name in enumerate(AREA_NAMES, start=1):
        metrics[f"AP{name}"] = _mean(precision[..., area])
    for prefix, values in (("AP", all_areas), ("AP50", all_areas[IOU_50])):
        for name in FREQUENCIES:
            metrics[prefix + name] = _mean(values[..., frequencies == name])
    for area, name in enumerate(("", *AREA_NAMES)):
        metrics[f"AR{name}@{max_dets}"] = _mean(recall[..., area])
    return metrics


def _mean(values: NDArray[np.float64]) -> float:
    present = values[values > -1]
    return float(present.mean()) if present.size else -1.0
