"""Plots of a run from its log.jsonl: losses, learning rate, AP per frequency group and over time."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from detector.evaluation.table import ROW_NAMES
from detector.visualize.style import COLOURS, GROUP_COLOURS, GROUP_NAMES, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GROUPS = {"AP": ("all", "#000000")} | {
    f"AP{group}": (name, GROUP_COLOURS[group]) for group, name in GROUP_NAMES.items()
}
LOG_SCALE_RANGE = 50  # a loss whose smoothed curve spans more than this factor is drawn on a log scale

Rows = list[dict[str, Any]]


def read_log(path: str | os.PathLike[str]) -> tuple[Rows, Rows]:
    """The training rows and the evaluation rows of a log, by step; the last row of a step counts.

    Lines that are not complete JSON objects are passed over: a killed run leaves such a line at its end.
    """
    training: dict[int, dict[str, Any]] = {}
    evaluations: dict[int, dict[str, Any]] = {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                for key, rows in (("eval", evaluations), ("loss", training)):
                    if key in row:
                        rows[row["step"]] = row
    return [training[step] for step in sorted(training)], [evaluations[step] for step in sorted(evaluations)]


def plot_curves(run_dir: str | os.PathLike[str]) -> list[Path]:
    """Draws what run_dir/log.jsonl holds into run_dir/plots; returns the files written.

    losses.png and lr.png need training rows, ap_groups.png (the last AP) an evaluation, ap.png (AP over the
    steps) several.

    Raises:
        FileNotFoundError: the run has no log.jsonl.
    """
    run_dir = Path(run_dir)
    training, evaluations = read_log(run_dir / "log.jsonl")
    figures = {}
    if training:
        figures["losses.png"] = _losses_figure(training)
        figures["lr.png"] = _learning_rate_figure(training)
    if evaluations:
        figures["ap_groups.png"] = _groups_figure(evaluations[-1])
    if len(evaluations) > 1:
        figures["ap.png"] = _history_figure(evaluations)
    (run_dir / "plots").mkdir(exist_ok=True)
    written = []
    for name, figure in figures.items():
        figure.suptitle(run_dir.resolve().name, fontsize=13, fontweight="bold")
        figure.savefig(run_dir / "plots" / name, dpi=130)
        written.append(run_dir / "plots" / name)
    return written


def _figure(columns: int, width: float) -> tuple[Figure, list[Axes]]:
    figure, (axes,) = new_figure(1, columns, width=width, height=4.2)
    for axis in axes:
        plain(axis)
    return figure, axes


def _losses_figure(rows: Rows) -> Figure:
    parts = sorted({name for row in rows for name in row if name.startswith("loss_")})
    figure, axes = _figure(columns=1 + bool(parts), width=12 if parts else 7)
    _draw_losses(axes[0], rows, {"loss": "total"}, [COLOURS[-1]])
    axes[0].set_title("total loss")
    if parts:
        _draw_losses(
            axes[1], rows, {name: name.removeprefix("loss_").replace("_", " ") for name in parts}, COLOURS
        )
        axes[1].set_title("parts")
        axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def _draw_losses(axis: Axes, rows: Rows, labels: dict[str, str], colours: Any) -> None:
    """Raw values faint, their moving average strong; the range of the axis is that of the averages."""
    lows, highs = [], []
    for index, (name, label) in enumerate(labels.items()):
        points = [(row["step"], float(row[name])) for row in rows if _is_finite(row.get(name))]
        if not points:
            continue
        steps, values = np.array(points).T
        smooth = moving_average(values, window=max(1, len(values) // 25))
        colour = colours[index % len(colours)]
        axis.plot(steps, values, color=colour, alpha=0.22, linewidth=0.9)
        axis.plot(
            steps, smooth, color=colour, linewidth=1.9, label=label, marker="o" if len(steps) == 1 else ""
        )
        lows.append(smooth.min())
        highs.append(smooth.max())
    axis.set_xlabel("step")
    if highs and min(lows) > 0 and max(highs) > LOG_SCALE_RANGE * min(lows):
        axis.set_yscale("log")
    elif highs and max(highs) > 0:
        axis.set_ylim(min(0.0, min(lows)), 1.1 * max(highs))


def moving_average(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Centred mean over `window` (rounded up to odd) values, over fewer at the ends."""
    half = window // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, end = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[end] - sums[first]) / (end - first)


def _learning_rate_figure(rows: Rows) -> Figure:
    figure, (axis,) = _figure(columns=1, width=7)
    points = [(row["step"], row["lr"]) for row in rows if _is_finite(row.get("lr"))]
    axis.plot(
        *zip(*points, strict=True), color=COLOURS[0], linewidth=1.9, marker="o" if len(points) == 1 else ""
    )
    axis.set_ylim(bottom=0)
    axis.set_xlabel("step")
    axis.set_title("learning rate")
    return figure


def _history_figure(evaluations: Rows) -> Figure:
    """AP over the steps of the evaluations, of all classes and of each frequency group: boxes and masks."""
    kinds = [kind for kind in ROW_NAMES if any(kind in row["eval"] for row in evaluations)]
    figure, axes = _figure(columns=max(len(kinds), 1), width=12 if len(kinds) > 1 else 7)
    for axis, kind in zip(axes, kinds, strict=False):
        for name, (group, colour) in GROUPS.items():
            points = [
                (row["step"], 100 * row["eval"][kind][name])
                for row in evaluations
                if row["eval"].get(kind, {}).get(name, -1) >= 0
            ]
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, label=group)
        axis.set_xlabel("step")
        axis.set_ylabel("AP (%)")
        axis.set_ylim(bottom=0)
        axis.set_title(ROW_NAMES[kind])
    axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def _groups_figure(evaluation: dict[str, Any]) -> Figure:
    figure, (axis,) = _figure(columns=1, width=7)
    _draw_bars(axis, evaluation)
    return figure


def _draw_bars(axis: Axes, evaluation: dict[str, Any]) -> None:
    kinds = [kind for kind in ROW_NAMES if kind in evaluation["eval"]]
    width = 0.8 / max(len(kinds), 1)
    colours = [colour for _, colour in GROUPS.values()]
    highest = 0.0
    for index, kind in enumerate(kinds):
        values = [100 * evaluation["eval"][kind].get(name, -1) for name in GROUPS]
        places = np.arange(len(GROUPS)) + (index - (len(kinds) - 1) / 2) * width
        style: dict[str, Any] = {"hatch": "///", "alpha": 0.55} if kind == "segm" else {}
        axis.bar(
            places,
            np.maximum(values, 0),
            0.94 * width,
            color=colours,
            edgecolor="white",
            label=ROW_NAMES[kind],
            **style,
        )
        for place, value in zip(places, values, strict=True):
            text = "-" if value < 0 else f"{value:.1f}"
            axis.text(
                place, max(value, 0), f"{text}\n", ha="center", va="center", fontsize=9, linespacing=1.6
            )
            axis.text(place, 0, f"\n{ROW_NAMES[kind]}", ha="center", va="center", fontsize=8, color="#555555")
        highest = max(highest, *values)
    axis.set_xticks(range(len(GROUPS)), [group for group, _ in GROUPS.values()])
    axis.tick_params(axis="x", length=0, pad=14)
    axis.grid(visible=False, axis="x")
    axis.set_ylim(0, 1.18 * highest if highest > 0 else 1)
    axis.set_ylabel("AP (%)")
    axis.set_title(f"AP at step {evaluation['step']}")


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
