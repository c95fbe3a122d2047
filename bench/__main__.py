"""``python -m bench``: measure, print the targets, append to the record file. See ``--help``."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import __doc__ as description
from . import demo
from .cases import CASES, COLUMNS, ROWS
from .measure import MALLOC_MODES, measure
from .plots import draw
from .records import ROOT, Row, append, environment, newest_complete, read
from .report import BEGIN, END, replace_between, tables, target_lines

RECORDS = ROOT / "bench" / "records" / "cpu.jsonl"
DEMO_RECORDS = RECORDS.with_name("demo.jsonl")
PLOT = ROOT / "bench" / "plots" / "cpu.png"


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 when a provider was refused or a measuring process failed."""
    options = _parser().parse_args(argv)
    if options.command == "readme":
        speed = newest_complete(read(options.records), CASES, MALLOC_MODES)
        replace_between(options.readme, BEGIN, END, tables(speed))
        replace_between(options.readme, demo.BEGIN, demo.END, demo.table(read(options.demo_records)))
    elif options.command == "demo":
        append(options.records, [demo.record(run) for run in options.runs])
    elif options.command == "plot":
        draw(options.output, newest_complete(read(options.records), CASES, MALLOC_MODES))
    elif options.command == "worker":
        rows, refused = _measure(options)
        append(options.output, rows)
        return int(bool(refused))
    else:
        rows, failed = _run(options)
        print(*target_lines(rows), sep="\n")
        if not options.no_record:
            append(options.records, rows)
        return int(failed)
    return 0


def _measure(options: argparse.Namespace) -> tuple[list[Row], list[str]]:
    return measure(
        [CASES[name] for name in options.cases],
        malloc=options.malloc,
        eager=options.eager,
        n=options.rows,
        k=options.columns,
        threads=options.threads,
        rounds=options.rounds,
        min_ms=options.min_ms,
    )


def _run(options: argparse.Namespace) -> tuple[list[Row], bool]:
    """Rows of all malloc modes, each from a process of its own, and whether one of them failed."""
    facts, rows, failed = environment(), [], False
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    with tempfile.TemporaryDirectory() as folder:
        for malloc, variables in MALLOC_MODES.items():
            output = Path(folder) / f"{malloc}.jsonl"
            command = [sys.executable, "-m", "bench", "worker", malloc, str(output)]
            for name in ("rows", "columns", "threads", "rounds", "min_ms"):
                command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
            command += ["--cases", *options.cases, *(["--eager"] if options.eager else [])]
            set_here = variables | {"OMP_NUM_THREADS": str(options.threads)}
            finished = subprocess.run(command, cwd=ROOT, env=plain | set_here, check=False)
            failed = failed or finished.returncode != 0
            if output.exists():
                rows += [facts | row for row in read(output)]
    return rows, failed


def _parser() -> argparse.ArgumentParser:
    settings = argparse.ArgumentParser(add_help=False)
    settings.add_argument("--cases", nargs="+", choices=tuple(CASES), default=list(CASES), metavar="CASE")
    settings.add_argument("--eager", action="store_true", help="leave torch.compile out")
    settings.add_argument("--rows", type=int, default=ROWS, help="N (%(default)s)")
    settings.add_argument("--columns", type=int, default=COLUMNS, help="K (%(default)s)")
    settings.add_argument("--threads", type=int, default=1)
    settings.add_argument("--rounds", type=int, default=15)
    settings.add_argument("--min-ms", type=float, default=60.0, help="of one step in a round (%(default)s)")

    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command")
    run = commands.add_parser("run", parents=[settings], help="measure and record (what no command does)")
    run.add_argument("--records", type=Path, default=RECORDS)
    run.add_argument("--no-record", action="store_true")
    worker = commands.add_parser("worker", parents=[settings], help="measure in this process's malloc mode")
    worker.add_argument("malloc", choices=tuple(MALLOC_MODES))
    worker.add_argument("output", type=Path)
    readme = commands.add_parser("readme", help="write the README's tables")
    readme.add_argument("--records", type=Path, default=RECORDS)
    readme.add_argument("--demo-records", type=Path, default=DEMO_RECORDS)
    readme.add_argument("--readme", type=Path, default=ROOT / "README.md")
    demo_runs = commands.add_parser("demo", help="record finished runs of the demo")
    demo_runs.add_argument("runs", type=Path, nargs="+", metavar="RUN_FOLDER")
    demo_runs.add_argument("--records", type=Path, default=DEMO_RECORDS)
    plot = commands.add_parser("plot", help="draw the newest complete run")
    plot.add_argument("--records", type=Path, default=RECORDS)
    plot.add_argument("--output", type=Path, default=PLOT)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["run"]))
