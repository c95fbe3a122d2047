"""The pictures of an analysis; all numbers come from the other modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from detector.analysis.activations import Curve
from detector.analysis.classifier import WeightNorms
from detector.analysis.gradients import GradientHistory, mean_of_group
from detector.data.annotations import COMMON_UP_TO, RARE_UP_TO
from detector.visualize.curves import moving_average
from detector.visualize.style import COLOURS, GROUP_COLOURS, GROUP_NAMES, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

SCALE_ABOVE_TRUTH = 1.5
DASHES = ((5, 2), (1, 1.5), (6, 1.5, 1, 1.5))


@dataclass(frozen=True)
class MapRow:
    """One row of heat maps: a class or group, its true map, and each run's map with its divergence."""

    title: str
    subtitle: str
    truth: NDArray[np.float64]  # [G, G], a distribution
    predicted: dict[str, tuple[NDArray[np.float64], float]]


def location_figure(rows: Sequence[MapRow]) -> Figure:
    """Heat maps beside each other: truth, then every run. A row has one scale of colours, which ends a little
    above the truth: a run that has found a class once would leave all else of the row in the dark."""
    runs = list(rows[0].predicted)
    figure, axes = new_figure(
        len(rows),
        1 + len(runs),
        width=1.9 + 2.35 * (1 + len(runs)),
        height=2.75 * len(rows),
        sharex=True,
        sharey=True,
    )
    for row, line in zip(rows, axes, strict=True):
        panels = [("truth\n", row.truth)]
        panels += [
            (f"{run}\nKL {divergence:.3f}" if np.isfinite(divergence) else f"{run}\nKL -", values)
            for run, (values, divergence) in row.predicted.items()
        ]
        cells = row.truth.size
        peaks = [np.nan_to_num(values).max() * cells for _, values in panels]
        highest = min(max(peaks), SCALE_ABOVE_TRUTH * peaks[0] or max(peaks)) or 1.0
        for axis, (title, values) in zip(line, panels, strict=True):
            image = axis.imshow(values * cells, extent=(0, 1, 1, 0), cmap="magma", vmin=0, vmax=highest)
            axis.set_xticks([0, 0.5, 1])
            axis.set_yticks([0, 0.5, 1])
            axis.tick_params(labelsize=8)
            axis.set_title(title, fontsize=10)
            if np.isnan(values).any():
                axis.text(0.5, 0.5, "none", ha="center", va="center", color="#555555")
        line[0].set_ylabel(f"{row.title}\n{row.subtitle}", fontsize=10)
        bar = figure.colorbar(
            image, ax=line, shrink=0.85, pad=0.02, extend="max" if max(peaks) > highest else "neither"
        )
        bar.set_label("density (uniform = 1)", fontsize=8)
        bar.ax.tick_params(labelsize=8)
    return figure


def norm_figure(
    runs: dict[str, list[WeightNorms]], image_count: NDArray[np.int64], labels: dict[tuple[str, int], str]
) -> Figure:
    """Norms over training images, a panel for each stage; points are classes, lines their moving average.

    labels: text of the legend for each (run, stage).
    """
    stages = max(len(norms) for norms in runs.values())
    figure, (axes,) = new_figure(1, stages, width=2.2 + 5.2 * stages, height=4.6)
    order = np.argsort(image_count, kind="stable")
    order = order[image_count[order] > 0]
    images = image_count[order]
    window = max(3, len(order) // 15)
    for stage, axis in enumerate(axes, start=1):
        plain(axis)
        for index, (run, norms) in enumerate(runs.items()):
            if len(norms) < stage:
                continue
            colour, values = COLOURS[index % len(COLOURS)], norms[stage - 1].norms[order]
            axis.plot(images, values, "o", color=colour, markersize=4, alpha=0.45, markeredgewidth=0)
            axis.plot(
                np.exp(moving_average(np.log(images), window)),
                moving_average(values, window),
                color=colour,
                linewidth=2,
                label=labels[run, stage],
            )
        axis.set_xscale("log")
        _plain_numbers(axis.xaxis)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("training images of the class")
        axis.set_ylabel("L2 norm of the class's weights")
        if stages > 1:
            axis.set_title(f"stage {stage}", pad=18)
        _mark_groups(axis, images)
        axis.legend(loc="upper left", bbox_to_anchor=(0, -0.16), frameon=False, fontsize=9)
    return figure


def _mark_groups(axis: Axes, images: NDArray[np.int64]) -> None:
    """Lines between LVIS's groups on an axis of training images, and their names above it."""
    left, right = images.min() / 1.25, images.max() * 1.25
    axis.set_xlim(left, right)
    bounds = [left, RARE_UP_TO + 0.5, COMMON_UP_TO + 0.5, right]
    for (group, name), low, high in zip(GROUP_NAMES.items(), bounds[:-1], bounds[1:], strict=True):
        low, high = max(low, left), min(high, right)
        if high <= low:
            continue
        if low > left:
            axis.axvline(low, color="#999999", linewidth=0.8, linestyle=":")
        axis.annotate(
            name,
            (np.sqrt(low * high), 1.01),
            xycoords=axis.get_xaxis_transform(),
            ha="center",
            va="bottom",
            color=GROUP_COLOURS[group],
            fontsize=9,
        )


def gradient_figure(
    histories: dict[str, GradientHistory],
    frequency: Sequence[str],
    image_count: NDArray[np.int64],
    classes: dict[int, str],
) -> Figure:
    """For each run (or stage of one): mean positive gradient over the steps, of the groups and of chosen
    classes (label: name); below, that of every class over all of training against its images. Zeros, which
    the logarithmic axes lack, are triangles at the foot."""
    from matplotlib.ticker import MaxNLocator

    names = list(histories)
    figure, (upper, lower) = new_figure(2, len(names), width=2.6 + 4.8 * len(names), height=8.2, sharey="row")
    groups = {group: np.array([name == group for name in frequency]) for group in GROUP_NAMES}
    for name, axis, below in zip(names, upper, lower, strict=True):
        history = histories[name]
        means = history.mean_in_intervals()
        for group, members in groups.items():
            if members.any():
                values = mean_of_group(means, members)
                style = {"linewidth": 2.2, "marker": "o" if len(values) < 3 else ""}
                axis.plot(
                    history.steps, values, color=GROUP_COLOURS[group], label=GROUP_NAMES[group], **style
                )
        used = dict.fromkeys(GROUP_NAMES, 0)
        for label, text in classes.items():
            group = frequency[label]
            known = np.isfinite(means[:, label])
            style = {"linewidth": 1.1, "alpha": 0.75, "dashes": DASHES[used[group] % len(DASHES)]}
            used[group] += 1
            axis.plot(
                history.steps[known],
                means[known, label],
                color=GROUP_COLOURS[group],
                label=text,
                **style,
            )
        axis.set_title(name)
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        _scatter(below, image_count, history.mean_so_far(), frequency)
        for panel in (axis, below):
            plain(panel)
            panel.set_yscale("log", nonpositive="clip")
            _plain_numbers(panel.yaxis, steps=(1, 2, 3, 5))
    upper[0].set_ylabel("mean |dL/dz| of positives,\nsince the row before")
    lower[0].set_ylabel("mean |dL/dz| of positives,\nof each class over all of training")
    upper[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    return figure


def _scatter(
    axis: Axes, image_count: NDArray[np.int64], values: NDArray[np.float64], frequency: Sequence[str]
) -> None:
    style = {"linestyle": "", "markersize": 4.5, "alpha": 0.7, "markeredgewidth": 0}
    for group, colour in GROUP_COLOURS.items():
        members = np.array([name == group for name in frequency]) & (image_count > 0)
        alive, dead = members & (values > 0), members & (values == 0)  # all positives beyond the clip
        axis.plot(image_count[alive], values[alive], marker="o", color=colour, **style)
        at_the_foot = {"transform": axis.get_xaxis_transform(), "marker": "v", "color": colour}
        axis.plot(image_count[dead], np.full(dead.sum(), 0.015), **at_the_foot, **style)
    axis.set_xscale("log")
    axis.set_xlabel("training images of the class")
    _plain_numbers(axis.xaxis)


def _plain_numbers(axis: Axis, steps: Sequence[float] = (1,)) -> None:
    """Labels such as 0.5 and 20 on a logarithmic axis, at `steps` times the powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def curve_figure(
    curves: Sequence[Curve],
    *,
    title: str,
    styles: Sequence[tuple[str, str]],
    marks: Sequence[float] = (),
    highest_negative: float | None = None,
) -> Figure:
    """Activation, and gradients of positive and negative terms, of (colour, line style) curves.

    marks: logits with a dotted line. highest_negative: end of the last panel's axis.
    """
    from matplotlib.ticker import MultipleLocator

    figure, (axes,) = new_figure(1, 3, width=15.5, height=4.4)
    titles = ("activation p(z)", "positive term, |d loss / d z|", "negative term, |d loss / d z|")
    for axis, heading, part in zip(axes, titles, ("probability", "positive", "negative"), strict=True):
        plain(axis)
        for curve, (colour, line) in zip(curves, styles, strict=True):
            axis.plot(
                curve.logits,
                getattr(curve, part),
                color=colour,
                linestyle=line,
                linewidth=1.9,
                label=curve.name,
            )
        for mark in marks:
            axis.axvline(mark, color="#999999", linewidth=0.8, linestyle=":")
        axis.set_xlim(curves[0].logits[0], curves[0].logits[-1])
        axis.xaxis.set_major_locator(MultipleLocator(4))
        axis.set_xlabel("logit z")
        axis.set_title(heading)
    axes[1].set_yscale("log", nonpositive="clip")
    axes[1].set_ylim(1e-5, 1e3)
    axes[2].set_ylim(0, highest_negative)
    axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure
