"""LVIS evaluation: results files, metrics and the table that is printed at the end of a run."""

from __future__ import annotations

from detector.evaluation.lvis_eval import Evaluation, evaluate, run_evaluation
from detector.evaluation.results import (
    Detections,
    ResultsWriter,
    iterate_results,
    merge_results,
    part_path,
    read_results,
)
from detector.evaluation.table import format_markdown, format_table

__all__ = [
    "Detections",
    "Evaluation",
    "ResultsWriter",
    "evaluate",
    "format_markdown",
    "format_table",
    "iterate_results",
    "merge_results",
    "part_path",
    "read_results",
    "run_evaluation",
]
