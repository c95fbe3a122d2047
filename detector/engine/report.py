"""What an evaluation leaves behind: metrics.json, plots, a page of predictions, and the printed table."""

from __future__ import annotations

import json

from detector.config import Config
from detector.engine.run_folder import LOG, METRICS
from detector.evaluation import Evaluation, format_table
from detector.evaluation.table import ROW_NAMES
from detector.model import ClassTable
from detector.visualize import draw_run_page, plot_curves


def print_evaluation(evaluation: Evaluation) -> None:
    print(f"\n{evaluation.protocol}")
    for note in evaluation.notes:
        print(f"note: {note}")
    print(format_table(evaluation.metrics))


def summary(evaluation: Evaluation) -> str:
    """One line: AP of boxes and masks, and of the frequency groups."""
    parts = []
    for kind, name in ROW_NAMES.items():
        values = [evaluation.metrics[kind][f"AP{group}"] for group in ("", "r", "c", "f")]
        ap, *groups = ("-" if value < 0 else f"{100 * value:.1f}" for value in values)
        parts.append(f"{name} AP {ap} (rare {groups[0]}, common {groups[1]}, frequent {groups[2]})")
    return ", ".join(parts)


def write_report(config: Config, classes: ClassTable, evaluation: Evaluation) -> None:
    """Write what follows from results.json and log.jsonl into the run's folder, and print the table."""
    folder = config.run_dir
    record = {
        "protocol": evaluation.protocol,
        "metrics": evaluation.metrics,
        "class_ap": evaluation.class_ap,
        "notes": list(evaluation.notes),
    }
    (folder / METRICS).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if (folder / LOG).is_file():
        plot_curves(folder)
    draw_run_page(config, classes)
    print_evaluation(evaluation)
    print(f"metrics, plots, results and predictions.png are in {folder}")
