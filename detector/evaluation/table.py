"""The table of metrics that ends a training or evaluation run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

COLUMNS = ("AP", "AP50", "AP75", "APr", "APc", "APf", "AP50f")
ROW_NAMES = {"bbox": "box", "segm": "mask"}

Metrics = Mapping[str, Mapping[str, float]]


def format_table(metrics: Metrics, columns: Sequence[str] = COLUMNS) -> str:
    """A plain text table of `evaluate`'s metrics in percent; "-" where a metric is absent (-1).

    Args:
        metrics: {"bbox": {...}, "segm": {...}}, fractions in 0..1.
        columns: names of the metrics to show.
    """
    return align(_cells(metrics, columns))


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as columns of text: a rule below the first row, all cells but a row's first to the
    right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def format_markdown(metrics: Metrics, columns: Sequence[str] = COLUMNS) -> str:
    """The same table in Markdown."""
    head, *body = _cells(metrics, columns)
    alignment = ["---"] + ["---:"] * len(columns)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, alignment, *body])


def _cells(metrics: Metrics, columns: Sequence[str]) -> list[list[str]]:
    rows = [["", *columns]]
    for iou_type, values in metrics.items():
        numbers = [values.get(column, -1.0) for column in columns]
        cells = ["-" if number < 0 else f"{100 * number:.1f}" for number in numbers]
        rows.append([ROW_NAMES.get(iou_type, iou_type), *cells])
    return rows
