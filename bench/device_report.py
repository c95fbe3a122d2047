"""What a run on a GPU says: the targets, and the README's tables, from the rows of one run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from .cases import CASES, COLUMNS
from .device import DEVICE_CASES
from .providers import YARDSTICKS
from .records import Row
from .report import find, markdown

BEGIN, END = "<!-- bench:gpu:begin -->", "<!-- bench:gpu:end -->"
DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
LARGE, MIDDLE, SMALL = 65536, 8192, 512
OF_COPY = {"float32": 0.92, "bfloat16": 0.85}
OVER_COMPILED = {"float32": 2.0, "bfloat16": 3.0}
MIDDLE_US = {"float32": 26.0, "bfloat16": 16.0}
SMALL_US, SMALL_HOST_US, OVER_RELEASED, PEAK = 6.0, 25.0, 20.0, 1.05
KERNELS = {"ours native": "CUDA", "ours triton": "Triton"}
BASELINES = {
    "released": "released, eager",
    "compiled released": "released, `torch.compile`",
    "compiled": "closed form, `torch.compile`",
}


def is_complete(rows: Sequence[Row]) -> bool:
    """Whether a run has ours, the released formula and the copy for every loss at the large size."""
    needed = product(DEVICE_CASES, ("ours native", "released", "copy"))
    return all(large(rows, "float32", case=case, provider=provider) for case, provider in needed)


def newest(rows: Sequence[Row]) -> list[Row]:
    """Rows of the last complete run. Raises: ValueError when there is none."""
    for run in reversed(list(dict.fromkeys(row["run"] for row in rows))):
        chosen = [row for row in rows if row["run"] == run and row["clock"] == "CUDA events"]
        if is_complete(chosen):
            return chosen
    raise ValueError(
        f"no run on a GPU is complete: each needs ours, the released formula and the copy of "
        f"{', '.join(DEVICE_CASES)} at N = {LARGE}"
    )


def _at(row: Row, dtype: str, n: int, k: int = COLUMNS) -> bool:
    return (row["dtype"], row["N"], row["K"]) == (dtype, n, k)


def large(rows: Sequence[Row], dtype: str, **wanted: Any) -> Row | None:
    """The row at the large size."""
    return _find(rows, dtype, LARGE, **wanted)


def _find(rows: Sequence[Row], dtype: str, n: int, **wanted: Any) -> Row | None:
    """The last row at this size: torch.compile's settings come last, and have all providers."""
    k = wanted.pop("k", COLUMNS)
    made = [row for row in reversed(rows) if _at(row, dtype, n, k) and row["batch"] == "made"]
    return find(made, **wanted)


def us(row: Row | None) -> float | None:
    """Microseconds of a call: in a graph, where it can be captured, else eagerly."""
    return None if row is None else 1e3 * (row["graph_ms"] or row["eager_ms"])["p50"]


def over(row: Row | None, baseline: str) -> float | None:
    """How many times faster than a baseline: both in graphs where both can be captured, else both eagerly."""
    for mode in ("graph", "eager"):
        ratio = None if row is None else row["speed_up"].get(mode, {}).get(baseline)
        if ratio is not None:
            return ratio
    return None


# --- targets ------------------------------------------------------------------------------------
def target_lines(rows: Sequence[Row]) -> list[str]:
    """PASS or FAIL for every target that the rows can judge. The microseconds are those of an H200."""
    return [
        f"{'PASS' if good else 'FAIL'} {case:<16} {provider:<12} {text}"
        for case in CASES
        for provider in KERNELS
        for good, text in _judged(rows, case, provider)
    ]


def _judged(rows: Sequence[Row], case: str, provider: str) -> Iterator[tuple[bool, str]]:
    for dtype, least in OF_COPY.items():
        large, middle, small = (
            _find(rows, dtype, n, case=case, provider=provider) for n in (LARGE, MIDDLE, SMALL)
        )
        for value, bound, text in (
            (over(large, "copy"), least, f"of copy at N = {LARGE}"),
            (over(large, "released"), OVER_RELEASED, f"x released at N = {LARGE}"),
            (over(large, "compiled"), OVER_COMPILED[dtype], f"x torch.compile at N = {LARGE}"),
        ):
            if value is not None:
                yield value >= bound, f"{dtype}: {value:.2f} {text} (at least {bound:g})"
        peak = None if large is None or large["peak_bytes"] is None else _peak(large)
        for value, bound, text in (
            (peak, PEAK, "x gradient of peak memory"),
            (us(middle), MIDDLE_US[dtype], f"us at N = {MIDDLE}"),
            (us(small), SMALL_US, f"us at N = {SMALL} in a graph"),
            (small and small["host_us"], SMALL_HOST_US, f"us of the host at N = {SMALL}"),
        ):
            if value is not None:
                yield value <= bound, f"{dtype}: {value:.2f} {text} (at most {bound:g})"


def _peak(row: Row) -> float:
    return row["peak_bytes"] / row["gradient_bytes"]


# --- tables -------------------------------------------------------------------------------------
def tables(rows: Sequence[Row]) -> str:
    """Markdown: speed and cost at the large size, small sizes, other widths, and where it was measured."""
    first, versions = rows[0], rows[0]["versions"]
    state = f"commit {first['commit']}{' with changes' if first['dirty'] else ''}"
    parts = [
        f"Loss and gradient, logits [N, {COLUMNS}]. Microseconds of a call: median of {first['rounds']} "
        "interleaved rounds of CUDA graph replays with inputs that are not in the L2 cache; eager calls if "
        'a call waits for the GPU and cannot be captured (*). "of copy" is the time of a device-to-device '
        "copy of the logits, which moves the same bytes, over that of the loss.",
        *(_speed_table(rows, dtype) for dtype in DTYPES if _find(rows, dtype, LARGE, provider="copy")),
        _cost_table(rows),
        _small_table(rows),
        _width_table(rows),
        f"{', '.join(first['machine']['gpus'])}, driver {versions['driver']}, CUDA {versions['cuda']}, torch "
        f"{versions['torch']}, triton {versions['triton']}, Python {versions['python']}; {state}; "
        f"{first['date'][:10]}. Made by `python -m bench readme` from "
        "[bench/records/gpu.jsonl](bench/records/gpu.jsonl).",
    ]
    return "\n\n".join(part for part in parts if part)


def _speed_table(rows: Sequence[Row], dtype: str) -> str:
    def row_of(case: str, provider: str) -> Row | None:
        return _find(rows, dtype, LARGE, case=case, provider=provider)

    ours = [name for name in KERNELS if any(row_of(case, name) for case in CASES)]
    baselines = [name for name in BASELINES if any(row_of(case, name) for case in CASES)]
    header = ["Loss"]
    for name in ours:
        header += [f"{KERNELS[name]}, µs", "GB/s", "of copy"]
    for name in baselines:
        header += [f"{BASELINES[name]}, µs", f"{KERNELS[ours[0]]} is faster"]
    lines = []
    for case in (name for name in CASES if row_of(name, "copy")):
        cells = [CASES[case].title]
        for name in ours:
            row = row_of(case, name)
            cells += [_us(row, bold=name == ours[0]), _text(row and row["gb_per_s"], ".0f")]
            cells.append(_text(over(row, "copy"), ".0%"))
        for name in baselines:
            cells += [_us(row_of(case, name)), _text(over(row_of(case, ours[0]), name), ".1f", "x")]
        lines.append(cells)
    return f"{DTYPES[dtype]}, N = {LARGE}:\n\n{markdown(header, lines)}{_yardsticks(rows, dtype)}"


def _yardsticks(rows: Sequence[Row], dtype: str) -> str:
    """Cross-entropy of other projects, which moves the same bytes as every loss here."""
    found = {name: _find(rows, dtype, LARGE, case="softmax", provider=name) for name in YARDSTICKS}
    texts = [
        f"{title} {row['versions'].get(name) or ''} {_us(row)} µs ({_text(over(row, 'copy'), '.0%')} of copy)"
        for name, title in YARDSTICKS.items()
        if (row := found[name]) is not None
    ]
    return f"\n\nCross-entropy of other projects at this size: {'; '.join(texts)}." if texts else ""


def _cost_table(rows: Sequence[Row]) -> str:
    dtype = "float32"
    shown = ["ours native", "ours triton", *BASELINES]
    names = {**KERNELS, **BASELINES}
    chosen = [name for name in shown if _find(rows, dtype, LARGE, provider=name)]
    header = ["Loss", *(names[name] for name in chosen)]
    lines = []
    for case in (name for name in CASES if _find(rows, dtype, LARGE, case=name)):
        found = [_find(rows, dtype, LARGE, case=case, provider=name) for name in chosen]
        lines.append([CASES[case].title, *(_cost(row) for row in found)])
    return (
        f"Peak memory of a call beyond its inputs, in multiples of the gradient; kernel launches; host syncs "
        f"({DTYPES[dtype]}, N = {LARGE}):\n\n{markdown(header, lines)}"
    )


def _cost(row: Row | None) -> str:
    if row is None or row["peak_bytes"] is None:
        return ""
    return f"{_peak(row):.2f}; {row['launches']}; {row['host_syncs']}"


def _small_table(rows: Sequence[Row]) -> str:
    sizes = [(n, dtype) for n in (MIDDLE, SMALL) for dtype in DTYPES if _find(rows, dtype, n)]
    if not sizes:
        return ""
    header = ["Loss"]
    for n, dtype in sizes:
        header += [f"N = {n}, {DTYPES[dtype]}", "eager", "host"]
    lines = []
    for case, provider in product(CASES, ("ours native", "ours module")):
        found = [_find(rows, dtype, n, case=case, provider=provider) for n, dtype in sizes]
        if any(found):
            cells = [CASES[case].title + (", module" if provider == "ours module" else "")]
            for row in found:
                eager = row and row["eager_ms"]["p50"] * 1e3
                cells += [_us(row), _text(eager, ".1f"), _text(row and row["host_us"], ".1f")]
            lines.append(cells)
    return (
        "Small batches, CUDA kernels: microseconds in a graph, called eagerly, and until the host is free "
        "again; a module counts its labels or sums its gradients as well:\n\n" + markdown(header, lines)
    )


def _width_table(rows: Sequence[Row]) -> str:
    """Share of copy speed at every width that was measured."""
    widths = sorted({row["K"] for row in rows if row["N"] == LARGE and row["batch"] == "made"})
    if len(widths) < 2:
        return ""
    shown = [(k, dtype) for k in widths for dtype in DTYPES if _find(rows, dtype, LARGE, k=k)]
    header = ["Loss", *(f"{k}, {DTYPES[dtype]}" for k, dtype in shown)]
    lines = []
    for case in CASES:
        found = [_find(rows, dtype, LARGE, k=k, case=case, provider="ours native") for k, dtype in shown]
        if any(found):
            lines.append([CASES[case].title, *(_text(over(row, "copy"), ".0%") for row in found)])
    return f"Other widths K, CUDA kernels, of copy at N = {LARGE}:\n\n{markdown(header, lines)}"


def _us(row: Row | None, *, bold: bool = False) -> str:
    value = us(row)
    if row is None or value is None:
        return ""
    text = f"{value:.1f}" if value < 1000 else f"{value:.0f}"
    text += "" if row["graph_ms"] else "*"
    return f"**{text}**" if bold else text


def _text(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"
