"""``python -m bench``: measure, print the targets, append to the record file. See ``--help``."""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from . import __doc__ as description
from . import device, device_report
from .captured import Captured
from .cases import CASES, COLUMNS, ROWS, Batch, Case
from .measure import MALLOC_MODES, measure
from .meters import CudaMeter, HostMeter, Meter
from .records import ROOT, Row, append, environment, newest_complete, read
from .report import BEGIN, END, replace_between, tables, target_lines
from .training import options as training_options
from .training import report as training_report

RECORDS = ROOT / "bench" / "records" / "cpu.jsonl"
GPU_RECORDS = RECORDS.with_name("gpu.jsonl")
DEMO_RECORDS = RECORDS.with_name("demo.jsonl")
SCALE_RECORDS = RECORDS.with_name("scale.jsonl")
LEARNING_RECORDS = RECORDS.with_name("learning.jsonl")
SCALE_README = ROOT / "bench" / "scale" / "README.md"
PLOTS = ROOT / "bench" / "plots"


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1 when a provider was refused or a measuring process failed."""
    options = _parser().parse_args(argv)
    if options.command == "readme":
        _write_readme(options)
    elif options.command == "demo":
        from . import demo

        append(options.records, [demo.record(run) for run in options.runs])
        demo.draw(options.runs[0], options.folder / "demo_predictions.jpg")
    elif options.command == "plot":
        _draw(options)
    elif options.command == "scale":
        from .scale import run

        if options.records is None and not options.small:
            options.records = SCALE_RECORDS
        return run.run(options)
    elif options.command == "learning":
        from . import learning

        return learning.run(options)
    elif options.command == "training":
        from .training import run as training_run

        return training_run.run(options)
    elif options.command == "gpu":
        return _run_on_gpu(options)
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


# The trainer and matplotlib are imported where they are needed: a machine that measures need not have them.
def _draw(options: argparse.Namespace) -> None:
    from . import plots

    if options.only != "gpu":
        plots.draw(options.folder / "cpu.png", newest_complete(read(options.records), CASES, MALLOC_MODES))
    if options.only != "cpu" and options.gpu_records.exists():
        plots.draw_device(options.folder / "gpu.png", device_report.newest(read(options.gpu_records)))


def _write_readme(options: argparse.Namespace) -> None:
    """The tables of all record files that are there: of what was not measured nothing is written."""
    from . import demo, learning
    from .scale import report as scale

    def speed(rows: list[Row]) -> str:
        return tables(newest_complete(rows, CASES, MALLOC_MODES))

    def on_gpu(rows: list[Row]) -> str:
        return device_report.tables(device_report.newest(rows))

    readme = options.readme
    for records, page, begin, end, table in (
        (options.records, readme, BEGIN, END, speed),
        (options.gpu_records, readme, device_report.BEGIN, device_report.END, on_gpu),
        (options.training_records, readme, training_report.BEGIN, training_report.END, training_report.table),
        (options.learning_records, readme, learning.BEGIN, learning.END, learning.table),
        (options.demo_records, readme, demo.BEGIN, demo.END, demo.table),
        (options.scale_records, options.scale_readme, scale.BEGIN, scale.END, scale.table),
    ):
        if records.exists():
            replace_between(page, begin, end, table(read(records)))


def _measure(options: argparse.Namespace) -> tuple[list[Row], list[str]]:
    if options.batch is None:
        names, columns = options.cases or list(CASES), options.columns
        batch_of = partial(Case.batch, n=options.rows, k=columns)
    else:
        captured = Captured.load(options.batch)
        names, columns = options.cases or captured.cases(), None
        batch_of = partial(captured.batch, dtype=torch.float32)
    return measure(
        [CASES[name] for name in names],
        batch_of=batch_of,
        accuracy_columns=columns,
        malloc=options.malloc,
        eager=options.eager,
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
            command += ["--cases", *options.cases] if options.cases else []
            command += ["--batch", str(options.batch.resolve())] if options.batch else []
            command += ["--eager"] if options.eager else []
            set_here = variables | {"OMP_NUM_THREADS": str(options.threads)}
            finished = subprocess.run(command, cwd=ROOT, env=plain | set_here, check=False)
            failed = failed or finished.returncode != 0
            if output.exists():
                rows += [facts | row for row in read(output)]
    return rows, failed


def _run_on_gpu(options: argparse.Namespace) -> int:
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("python -m bench gpu: torch sees no GPU (--dry-run goes through it on the CPU)")
    meter = HostMeter() if options.dry_run else CudaMeter()
    facts, rows = device.environment(), []
    facts["run"] = options.run or facts["run"]

    def write(found: list[Row]) -> None:
        rows.extend(facts | row for row in found)
        if options.records is not None:
            append(options.records, [facts | row for row in found])

    if options.records is None and not options.dry_run:
        options.records = GPU_RECORDS
    good = device.measure(
        _settings(options, meter),
        meter,
        device.Effort(options.rounds, options.min_ms, tuple(options.skip)),
        budget_s=options.budget_s,
        write=write,
        report=partial(print, flush=True),
    )
    print(*device_report.target_lines(rows), sep="\n")
    if device_report.is_complete(rows):
        print(device_report.tables(rows))
    return int(not good)


def _settings(options: argparse.Namespace, meter: Meter) -> list[tuple[device.Setting, Batch | None]]:
    """Those of the profile with what the options say otherwise, or those of captured batches."""
    profile = device.PROFILES["dry" if options.dry_run else options.profile]
    changes = {
        name: tuple(getattr(options, name))
        for name in ("rows", "columns", "dtypes")
        if getattr(options, name)
    }
    if options.eager:
        changes["compiled_rows"] = ()
    elif options.rows:
        changes["compiled_rows"] = tuple(options.rows)
    if not options.batch:
        profile = replace(profile, **changes)
        return [(setting, None) for setting in profile.settings(options.cases or device.DEVICE_CASES)]
    settings: list[tuple[device.Setting, Batch | None]] = []
    for captured in map(Captured.load, options.batch):
        own = str(captured.logits.dtype).removeprefix("torch.")
        for dtype in options.dtypes or [own]:
            for name in options.cases or captured.cases():
                batch = captured.batch(CASES[name], meter.device, device.DTYPES[dtype])
                setting = device.Setting(CASES[name], *batch.logits.shape, dtype, not options.eager)
                settings.append((setting, batch))
    return settings


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--cases", nargs="+", choices=tuple(CASES), metavar="CASE", help="default: all that fit"
    )
    common.add_argument("--eager", action="store_true", help="leave torch.compile out")
    settings = argparse.ArgumentParser(add_help=False, parents=[common])
    settings.add_argument("--rows", type=int, default=ROWS, help="N (%(default)s)")
    settings.add_argument("--columns", type=int, default=COLUMNS, help="K (%(default)s)")
    settings.add_argument("--threads", type=int, default=1)
    settings.add_argument("--rounds", type=int, default=15)
    settings.add_argument("--min-ms", type=float, default=60.0, help="of one step in a round (%(default)s)")
    settings.add_argument("--batch", type=Path, metavar="FILE", help="a captured batch")

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
    _add_scale(commands.add_parser("scale", help="the trainer at LVIS's size: measure and record"))
    _add_learning(commands.add_parser("learning", help="train a detector with each loss in turn, and record"))
    training_options.add_arguments(
        commands.add_parser("training", help="the trainer's step on the GPU: measure and record")
    )
    _add_gpu(commands.add_parser("gpu", parents=[common], help="measure on the GPU and record"))
    readme = commands.add_parser("readme", help="write the README's tables")
    readme.add_argument("--records", type=Path, default=RECORDS)
    readme.add_argument("--gpu-records", type=Path, default=GPU_RECORDS)
    readme.add_argument("--demo-records", type=Path, default=DEMO_RECORDS)
    readme.add_argument("--learning-records", type=Path, default=LEARNING_RECORDS)
    readme.add_argument("--scale-records", type=Path, default=SCALE_RECORDS)
    readme.add_argument("--training-records", type=Path, default=training_options.RECORDS)
    readme.add_argument("--readme", type=Path, default=ROOT / "README.md")
    readme.add_argument("--scale-readme", type=Path, default=SCALE_README)
    demo_runs = commands.add_parser("demo", help="record finished runs of the demo, and draw its picture")
    demo_runs.add_argument("runs", type=Path, nargs="+", metavar="RUN_FOLDER")
    demo_runs.add_argument("--records", type=Path, default=DEMO_RECORDS)
    demo_runs.add_argument("--folder", type=Path, default=PLOTS, help="of the picture of the first run")
    plot = commands.add_parser("plot", help="draw the newest complete runs")
    plot.add_argument("--records", type=Path, default=RECORDS)
    plot.add_argument("--gpu-records", type=Path, default=GPU_RECORDS)
    plot.add_argument("--folder", type=Path, default=PLOTS)
    plot.add_argument("--only", choices=("cpu", "gpu"))
    return parser


def _add_scale(scale: argparse.ArgumentParser) -> None:
    scale.add_argument("--small", action="store_true", help="files of seconds instead of LVIS's size")
    scale.add_argument("--parts", nargs="+", metavar="PART", help="default: all, see bench/scale/parts.py")
    scale.add_argument(
        "--folder", type=Path, help="for 4 GB of files that are kept (default: a temporary one)"
    )
    scale.add_argument("--records", type=Path, help=f"{SCALE_RECORDS.relative_to(ROOT)}; with --small: none")


def _add_learning(learning: argparse.ArgumentParser) -> None:
    learning.add_argument("--config", default="demo", help="a preset with a synthetic section (%(default)s)")
    learning.add_argument(
        "--folder", type=Path, default=ROOT / "runs" / "learning", help="of the data and the runs"
    )
    learning.add_argument("--losses", nargs="+", metavar="LOSS", help="default: all, see bench/learning.py")
    learning.add_argument("--seeds", nargs="+", type=int, default=[0, 1], metavar="SEED")
    learning.add_argument("--jobs", type=int, default=1, help="runs side by side (%(default)s)")
    learning.add_argument(
        "--budget-s", type=float, default=math.inf, help="stop after it; the same command goes on"
    )
    learning.add_argument("--set", nargs="+", default=[], metavar="section.key=value", help="for every run")
    learning.add_argument("--records", type=Path, default=LEARNING_RECORDS)


def _add_gpu(gpu: argparse.ArgumentParser) -> None:
    gpu.add_argument("--profile", choices=("check", "full"), default="check", help="sizes (%(default)s)")
    gpu.add_argument("--rows", type=int, nargs="+", help="N, instead of the profile's")
    gpu.add_argument("--columns", type=int, nargs="+", help="K, instead of the profile's")
    gpu.add_argument("--dtypes", nargs="+", choices=tuple(device.DTYPES), help="instead of the profile's")
    gpu.add_argument("--batch", type=Path, nargs="+", metavar="FILE", help="captured batches")
    gpu.add_argument(
        "--budget-s", type=float, default=3600.0, help="start nothing new after it (%(default)s)"
    )
    gpu.add_argument("--skip", nargs="+", default=(), metavar="PROVIDER", help='such as "ours triton"')
    gpu.add_argument("--rounds", type=int, default=9)
    gpu.add_argument("--min-ms", type=float, default=6.0, help="of one provider in a round (%(default)s)")
    gpu.add_argument("--run", help="the run that the rows belong to, where several commands make one")
    gpu.add_argument("--records", type=Path, help=f"{GPU_RECORDS.relative_to(ROOT)}; of a dry run: none")
    gpu.add_argument(
        "--dry-run", action="store_true", help="tiny sizes on the CPU, nothing of a GPU measured"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["run"]))
