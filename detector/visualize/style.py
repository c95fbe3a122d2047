"""What all figures share: colours, and figures outside pyplot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with colour-blindness can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
GROUP_NAMES = {"r": "rare", "c": "common", "f": "frequent"}
GROUP_COLOURS = {"r": "#D55E00", "c": "#009E73", "f": "#0072B2"}


def new_figure(
    rows: int, columns: int, *, width: float, height: float, **options: Any
) -> tuple[Figure, list[list[Axes]]]:
    """A figure of its own, without global state or display, and its axes by row; sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False, **options)]


def plain(axis: Axes) -> None:
    """A faint grid, and no frame on the right and at the top."""
    axis.grid(alpha=0.25)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
