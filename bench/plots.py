"""The pictures of a run: on the CPU how many times faster than the released formula, on a GPU how near to the
speed of a copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from . import device_report
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
DEVICE_SERIES = {
    "ours native": ("gol_kernels, CUDA", "#1b5e9e"),
    "ours triton": ("gol_kernels, Triton", "#5b9bd5"),
    "compiled": SERIES["compiled"],
    "compiled released": SERIES["compiled released"],
    "released": ("released formula, eager", "#a0a0a0"),
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
        f"{first['machine']['cpu'].split(' (')[0]}, torch {first['versions']['torch']}\n"
        f"times faster than the released formula in eager PyTorch",
        fontsize=11,
    )
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(series), frameon=False, fontsize=8.5)
    _save(figure, path)


def draw_device(path: Path, rows: Sequence[Row]) -> None:
    """One panel for each dtype measured at the large size; bars of the share of the copy's speed."""
    dtypes = [dtype for dtype in device_report.DTYPES if device_report.large(rows, dtype, provider="copy")]
    cases = [name for name in CASES if device_report.large(rows, dtypes[0], case=name)]
    series = [name for name in DEVICE_SERIES if device_report.large(rows, dtypes[0], provider=name)]
    height = 1.4 + len(cases) * (len(series) * 0.19 + 0.22)
    figure, panels = plt.subplots(
        1, len(dtypes), figsize=(11, height), sharey=True, sharex=True, squeeze=False, layout="constrained"
    )
    for panel, dtype in zip(panels[0], dtypes, strict=True):
        _bars(
            panel,
            {name: [_of_copy(rows, dtype, case, name) for case in cases] for name in series},
            DEVICE_SERIES,
            "{:.0%}",
        )
        panel.set_yticks(range(len(cases)), [CASES[case].title for case in cases])
        panel.set_ylim(len(cases) - 0.5, -0.5)
        panel.set_title(dtype, fontsize=10)
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        panel.axvline(1, color="#333333", linewidth=1)
        _plain(panel)
    first = rows[0]
    figure.suptitle(
        f"Loss and gradient of logits [{device_report.LARGE}, {device_report.COLUMNS}], "
        f"{first['machine']['gpus'][0].split(',')[0]}, torch {first['versions']['torch']}\n"
        f"speed, a device-to-device copy of the logits is 100 %",
        fontsize=11,
    )
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(series), frameon=False, fontsize=8.5)
    _save(figure, path)


def _of_copy(rows: Sequence[Row], dtype: str, case: str, provider: str) -> float | None:
    return device_report.over(device_report.large(rows, dtype, case=case, provider=provider), "copy")


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without metadata the same rows give the same file.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _bars(
    panel: Axes,
    values: Mapping[str, Sequence[float | None]],
    series: Mapping[str, tuple[str, str]],
    form: str,
    left: float = 0.0,
) -> None:
    """For each series one bar in each group, from ``left``, with its value written beside it."""
    thickness = 0.84 / len(values)
    for index, (name, found) in enumerate(values.items()):
        places = [i + (index - (len(values) - 1) / 2) * thickness for i in range(len(found))]
        label, colour = series[name]
        widths = [left if value is None else value for value in found]
        panel.barh(places, [w - left for w in widths], thickness * 0.92, left=left, color=colour, label=label)
        for place, value in zip(places, found, strict=True):
            if value is not None:
                panel.annotate(
                    form.format(value),
                    (max(value, left), place),
                    xytext=(3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7.5,
                    color="#333333",
                )


def _plain(panel: Axes) -> None:
    panel.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.margins(x=0.12)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(axis="y", length=0)


def _panel(panel: Axes, rows: Sequence[Row], cases: Sequence[str], series: Sequence[str]) -> None:
    def ratio(case: str, name: str) -> float | None:
        row = find(rows, case=case, provider=name)
        return None if row is None else row["speed_up"].get("released", 1.0)

    _bars(panel, {name: [ratio(case, name) for case in cases] for name in series}, SERIES, "{:.1f}", left=1.0)
    panel.set_yticks(range(len(cases)), [CASES[case].title for case in cases])
    panel.set_ylim(len(cases) - 0.5, -0.5)
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(FixedLocator([0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200]))
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    panel.xaxis.set_minor_locator(NullLocator())
    panel.axvline(1, color="#333333", linewidth=1)
    _plain(panel)
