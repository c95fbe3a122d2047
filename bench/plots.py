"""The picture of a run: how many times faster than the released formula, for each loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from .cases import CASES
from .measure import MALLOC_MODES
from .records import Row
from .report import find

SERIES = {
    "ours avx512": ("gol_kernels, AVX-512", "#1b5e9e"),
    "ours avx2": ("gol_kernels, AVX2", "#5b9bd5"),
    "ours generic": ("gol_kernels, plain C++", "#b4d2ee"),
    "compiled": ("torch.compile, closed form", "#d9822b"),
    "compiled released": ("torch.compile, released formula", "#f2c18d"),
}
_TITLES = {"kept": "freed memory kept", "default": "glibc malloc as it is"}


def draw(path: Path, rows: Sequence[Row]) -> None:
    """One panel for each malloc mode; bars of the median ratio on a log scale, released = 1."""
    rows = [row for row in rows if row["kind"] == "speed"]
    cases = [name for name in CASES if find(rows, case=name)]
    series = [name for name in SERIES if find(rows, provider=name)]
    height = 1.4 + len(cases) * (len(series) * 0.19 + 0.22)
    figure, panels = plt.subplots(
        1, len(MALLOC_MODES), figsize=(11, height), sharey=True, sharex=True, layout="constrained"
    )
    for panel, malloc in zip(panels, MALLOC_MODES, strict=True):
        _panel(panel, [row for row in rows if row["malloc"] == malloc], cases, series)
        panel.set_title(_TITLES[malloc], fontsize=10)
    first = rows[0]
    figure.suptitle(
        f"Loss and gradient of float32 logits [{first['N']}, {first['K']}], {first['threads']} thread"
        f"{'s' if first['threads'] > 1 else ''}, "
        f"{first['machine']['cpu'].split(' (')[0]}, torch {first['versions']['torch']}",
        fontsize=11,
    )
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(series), frameon=False, fontsize=8.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without metadata the same rows give the same file.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _panel(panel: Axes, rows: Sequence[Row], cases: Sequence[str], series: Sequence[str]) -> None:
    thickness = 0.84 / len(series)
    for index, name in enumerate(series):
        found = [find(rows, case=case, provider=name) for case in cases]
        places = [i + (index - (len(series) - 1) / 2) * thickness for i in range(len(cases))]
        ratios = [row["speed_up"].get("released", 1.0) if row else 1.0 for row in found]
        label, colour = SERIES[name]
        widths = [ratio - 1 for ratio in ratios]
        panel.barh(places, widths, thickness * 0.92, left=1, color=colour, label=label)
        for place, ratio, row in zip(places, ratios, found, strict=True):
            if row is not None:
                panel.text(
                    max(ratio, 1) * 1.04, place, f"{ratio:.1f}", va="center", fontsize=7.5, color="#333333"
                )
    panel.set_yticks(range(len(cases)), [CASES[case].title for case in cases])
    panel.set_ylim(len(cases) - 0.5, -0.5)
    panel.set_xscale("log")
    panel.set_xlabel("times faster than the released formula in eager PyTorch")
    panel.xaxis.set_major_locator(FixedLocator([0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200]))
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    panel.xaxis.set_minor_locator(NullLocator())
    panel.axvline(1, color="#333333", linewidth=1)
    panel.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.margins(x=0.12)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(axis="y", length=0)
