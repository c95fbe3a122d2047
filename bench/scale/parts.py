"""python -m bench.scale.parts PART FOLDER full|small OUTPUT: one part, in this process; for run.py."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.records import Row, append
from bench.scale.data import data, rasterise
from bench.scale.evaluation import agreement, evaluate_boxes, evaluate_masks
from bench.scale.files import SIZES, Size
from bench.scale.selection import match, select

PARTS: dict[str, Callable[[Path, Size], list[Row]]] = {
    part.__name__: part
    for part in (data, rasterise, evaluate_boxes, evaluate_masks, agreement, select, match)
}


def main(arguments: Sequence[str]) -> None:
    name, folder, size, output = arguments
    rows = PARTS[name](Path(folder), SIZES[size])
    append(Path(output), [{"kind": "scale", "size": size, "part": name, **row} for row in rows])


if __name__ == "__main__":
    main(sys.argv[1:])
