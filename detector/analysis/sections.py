"""The parts of an analysis: each computes its numbers, draws its figures, and makes its table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from detector.analysis import activations, figures
from detector.analysis.classifier import pearson, spearman
from detector.analysis.gradients import mean_of_group
from detector.analysis.locations import (
    Divergences,
    Maps,
    compare,
    distributions,
    kl_divergence,
    predicted_maps,
    true_maps,
)
from detector.analysis.runs import Run
from detector.data.annotations import LvisAnnotations
from detector.evaluation.table import align
from detector.visualize.style import COLOURS, GROUP_NAMES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLASSES_SHOWN = 2  # of each group, where none are chosen


@dataclass(frozen=True)
class Section:
    """What one part has found: `numbers` for analysis.json, figures by file name, the printed text."""

    name: str
    numbers: dict[str, Any]
    text: str
    figures: dict[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True)
class Classes:
    """The classes, and which of them are drawn one by one."""

    names: Sequence[str]
    category_ids: Sequence[int]
    frequency: Sequence[str]
    shown: Sequence[int]  # labels

    @property
    def groups(self) -> list[str]:
        """Those that have a class, from rare to frequent."""
        return [group for group in GROUP_NAMES if group in self.frequency]

    def members(self, group: str) -> NDArray[np.bool_]:
        return np.array([name == group for name in self.frequency])


def most_annotated(annotations: LvisAnnotations, frequency: Sequence[str]) -> list[int]:
    """Of each group the labels of the classes with the most objects."""
    order = np.argsort(-annotations.instance_count, kind="stable")
    order = order[annotations.instance_count[order] > 0]
    return [
        int(label)
        for group in GROUP_NAMES
        for label in [label for label in order if frequency[label] == group][:CLASSES_SHOWN]
    ]


def locations(
    annotations: LvisAnnotations,
    results: Mapping[str, Path],
    classes: Classes,
    *,
    grid: int,
    smoothing: float,
    progress: Callable[[str], None],
) -> Section:
    """Distributions of object locations, true and predicted. Raises ValueError for results of other
    images."""
    truth = true_maps(annotations, grid)
    predicted = {}
    for name, path in results.items():
        progress(f"reading {path}")
        predicted[name] = predicted_maps(annotations, path, grid)
    found, compared = compare(truth, predicted, classes.frequency, smoothing)
    counts = annotations.instance_count
    groups = [
        _map_row(
            f"{GROUP_NAMES[group]}, pooled",
            f"{counts[members].sum()} objects, {members.sum()} classes",
            *_pooled(members, truth, predicted),
            smoothing,
        )
        for group, members in ((group, classes.members(group)) for group in classes.groups)
    ]
    shown = [
        _map_row(
            classes.names[label],
            f"{GROUP_NAMES[classes.frequency[label]]}, {counts[label]} objects",
            *_pooled([label], truth, predicted),
            smoothing,
        )
        for label in classes.shown
    ]
    numbers = {
        "grid": grid,
        "smoothing": smoothing,
        "images": len(annotations),
        **_divergences(found, compared, classes, counts),
        "maps": {line.title: _maps(line) for line in (*groups, *shown)},
    }
    drawn = {"locations_groups.png": figures.location_figure(groups)}
    if shown:
        drawn["locations_classes.png"] = figures.location_figure(shown)
    heading = (
        f"object locations, {grid} x {grid} cells: KL(truth || predicted) in nats, of a group's pooled",
        "objects, and as mean over those of its classes that every run has detected; missed: classes with",
        "objects that a run has not detected",
    )
    text = "\n".join([*heading, align(_divergence_table(found, compared, classes))])
    return Section("locations", numbers, text, drawn)


def _pooled(
    labels: NDArray[np.bool_] | list[int], truth: Maps, predicted: Mapping[str, Maps]
) -> tuple[Maps, dict[str, Maps]]:
    """The maps [G, G] of some classes together, true and of each run."""
    return truth[labels].sum(axis=0), {name: maps[labels].sum(axis=0) for name, maps in predicted.items()}


def _map_row(
    title: str, subtitle: str, truth: Maps, predicted: Mapping[str, Maps], smoothing: float
) -> figures.MapRow:
    panels = {
        name: (distributions(one), float(kl_divergence(truth, one, smoothing)))
        for name, one in predicted.items()
    }
    return figures.MapRow(title, subtitle, distributions(truth), panels)


def _maps(row: figures.MapRow) -> dict[str, Any]:
    """The distributions of a row of heat maps, by rows of cells; None where there are no objects."""

    def plain(values: Maps) -> list[list[float]] | None:
        return None if np.isnan(values).any() else [_short(line) for line in values]

    predicted = {name: plain(values) for name, (values, _) in row.predicted.items()}
    return {"truth": plain(row.truth), "predicted": predicted}


def _divergences(
    found: Mapping[str, Divergences],
    compared: NDArray[np.bool_],
    classes: Classes,
    counts: NDArray[np.int64],
) -> dict[str, Any]:
    runs = {
        name: {
            "pooled": _by_group(one.pooled),
            "mean": _by_group(one.mean),
            "undetected_classes": {GROUP_NAMES[group]: one.undetected[group] for group in classes.groups},
        }
        for name, one in found.items()
    }
    by_class = [
        {
            "id": int(classes.category_ids[label]),
            "name": classes.names[label],
            "group": GROUP_NAMES[classes.frequency[label]],
            "objects": int(counts[label]),
            "in_mean": bool(compared[label]),
            "kl": {name: _number(one.per_class[label]) for name, one in found.items()},
        }
        for label in range(len(classes.names))
    ]
    return {"runs": runs, "classes": by_class}


def _divergence_table(
    found: Mapping[str, Divergences], compared: NDArray[np.bool_], classes: Classes
) -> list[list[str]]:
    """A row for each run; in the last how many classes a group has, and how many its mean is over."""
    table = [["", *(text for group in classes.groups for text in (GROUP_NAMES[group], "mean", "missed"))]]
    for name, one in found.items():
        values = ((_cell(one.pooled[g]), _cell(one.mean[g]), str(one.undetected[g])) for g in classes.groups)
        table.append([name, *(cell for cells in values for cell in cells)])
    sizes = []
    for group in classes.groups:
        members = classes.members(group)
        sizes += [str(members.sum()), str((members & compared).sum()), ""]
    return [*table, ["classes", *sizes]]


def weight_norms(runs: Sequence[Run]) -> Section:
    """Norms of the classifiers' weights against training images."""
    image_count = runs[0].classes.stats.image_count.numpy()
    seen = image_count > 0
    log_images = np.log10(image_count[seen])
    numbers, labels, table = {}, {}, [["", "stage", "Spearman", "Pearson", "mean norm"]]
    for run in runs:
        cosine = run.config.model.normed_classifier
        numbers[run.name] = []
        for one in run.norms:
            norms = one.norms[seen]
            rank, linear = spearman(log_images, norms), pearson(log_images, norms)
            numbers[run.name].append(
                {
                    "stage": one.stage,
                    "cosine_classifier": cosine,
                    "spearman": _number(rank),
                    "pearson_of_log_images": _number(linear),
                    "norms": one.norms.tolist(),
                }
            )
            note = ", cosine: only its direction counts" if cosine else ""
            labels[run.name, one.stage] = f"{run.name} (Spearman {_cell(rank, 2)}{note})"
            table.append(
                [run.name, str(one.stage), _cell(rank), _cell(linear), _cell(float(norms.mean()), 4)]
            )
    figure = figures.norm_figure({run.name: run.norms for run in runs}, image_count, labels)
    text = f"classifier weights: L2 norm of a class against log(training images)\n{align(table)}"
    everything = {"image_count": image_count.tolist(), "runs": numbers}
    return Section("weight_norms", everything, text, {"weight_norms.png": figure})


def positive_gradients(runs: Sequence[Run], classes: Classes) -> Section:
    """Mean gradient of positives over training, of the runs that have gathered it."""
    image_count = runs[0].classes.stats.image_count.numpy()
    histories = {
        run.name if len(run.gradients) == 1 else f"{run.name}, stage {history.stage}": history
        for run in runs
        for history in run.gradients
    }
    notes = [f"{run.name}: gradients {run.note}" for run in runs if run.note]
    heading = (
        "positive gradients: mean |dL/dz| of a class's positives over all of training, mean over classes"
    )
    if not histories:
        return Section("positive_gradients", {"notes": notes}, "\n".join([heading, *notes]))
    numbers: dict[str, Any] = {}
    table = [["", *(GROUP_NAMES[group] for group in classes.groups), "last step"]]
    for name, history in histories.items():
        means, whole = history.mean_in_intervals(), history.mean_so_far()
        numbers[name] = {
            "steps": history.steps.tolist(),
            "groups": {
                GROUP_NAMES[group]: _numbers(mean_of_group(means, classes.members(group)))
                for group in classes.groups
            },
            "classes": {classes.names[label]: _numbers(means[:, label]) for label in classes.shown},
            "positives": history.positives[-1].tolist(),
            "whole_training": _numbers(whole),
        }
        overall = (float(mean_of_group(whole, classes.members(group))) for group in classes.groups)
        table.append([name, *map(_cell, overall), str(history.steps[-1])])
    chosen = {label: classes.names[label] for label in classes.shown}
    figure = figures.gradient_figure(histories, classes.frequency, image_count, chosen)
    text = "\n".join([heading, align(table), *notes])
    return Section(
        "positive_gradients", {"notes": notes, "runs": numbers}, text, {"positive_gradients.png": figure}
    )


def activation_curves() -> Section:
    """Activations and the gradients of their losses."""
    curves = activations.activation_curves()
    by_name = {curve.name: curve for curve in curves}
    dead = activations.dead_below(by_name["Gumbel"], by_name["Gumbel, released code"])
    blue, red, green, pink = COLOURS[:4]
    styles = [(blue, "-"), (COLOURS[5], ":"), (green, "-"), (pink, "--"), (COLOURS[6], "-."), (red, "-")]
    figure = figures.curve_figure(
        curves,
        title=f"dotted lines: the Gumbel's clip in training, beyond which it sends nothing back; "
        f"the released code loses its positives from z = {dead:.2f} down",
        styles=styles,
        marks=activations.CLIP,
        highest_negative=3.0,  # the probit's grows on
    )
    table = [["z", "p sigmoid", "p Gumbel", "positive sigmoid", "positive Gumbel", "... released"]]
    for z in (-5.0, -3.5, -2.0, 0.0, 2.0, 5.0):
        place = int(np.argmin(np.abs(curves[0].logits - z)))
        pairs = [("sigmoid", "probability"), ("Gumbel", "probability")]
        pairs += [(name, "positive") for name in ("sigmoid", "Gumbel", "Gumbel, released code")]
        table.append([f"{z:g}", *(f"{getattr(by_name[name], part)[place]:.3g}" for name, part in pairs)])
    numbers = {"clip": list(activations.CLIP), "released_dead_below": _number(dead), **_curves(curves)}
    text = f"activations p(z), and |dL/dz| of positive terms\n{align(table)}"
    return Section("activations", numbers, text, {"activations.png": figure})


def temperature_curves(temperatures: Sequence[float]) -> Section:
    """The Gumbel at several temperatures."""
    curves = activations.temperature_curves(temperatures)
    figure = figures.curve_figure(
        curves,
        title="Gumbel p(z) = exp(-exp(-z/T)), without its clip",
        styles=[(COLOURS[index % len(COLOURS)], "-") for index in range(len(curves))],
    )
    table = [["", "p(-2)", "p(0)", "p(2)", "positive at -2", "at 0", "at 2"]]
    places = [int(np.argmin(np.abs(curves[0].logits - z))) for z in (-2.0, 0.0, 2.0)]
    for curve in curves:
        parts = (curve.probability, curve.positive)
        table.append([curve.name, *(f"{part[place]:.3g}" for part in parts for place in places)])
    text = f"temperature of the Gumbel: p(z), and |dL/dz| of positive terms\n{align(table)}"
    return Section("temperature", _curves(curves), text, {"temperature.png": figure})


def _curves(curves: Sequence[activations.Curve]) -> dict[str, Any]:
    return {
        "logits": [round(z, 6) for z in curves[0].logits.tolist()],
        "curves": {
            curve.name: {
                part: _short(getattr(curve, part)) for part in ("probability", "positive", "negative")
            }
            for curve in curves
        },
    }


def _by_group(values: Mapping[str, float]) -> dict[str, float | None]:
    return {GROUP_NAMES[group]: _number(value) for group, value in values.items()}


def _numbers(values: NDArray[np.float64]) -> list[float | None]:
    return [_number(value) for value in values.tolist()]


def _short(values: NDArray[np.float64]) -> list[float]:
    """With six digits: what a picture shows needs no more, and the file stays small."""
    return [float(f"{value:.6g}") for value in values]


def _number(value: float) -> float | None:
    """For JSON, which knows no NaN."""
    return float(value) if math.isfinite(value) else None


def _cell(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"
