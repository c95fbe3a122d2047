"""The options of ``python -m bench training``: without the trainer, which only measuring needs."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.records import ROOT
from bench.training.formulas import RELEASED

RECORDS = ROOT / "bench" / "records" / "training.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of numbers of steps, None is what `run` takes for a measurement or a dry run."""
    parser.add_argument("--config", default="lvis_v1_gol", help="a preset or YAML file (%(default)s)")
    parser.add_argument(
        "--losses", nargs="+", choices=tuple(RELEASED), metavar="LOSS", help="default: gol, seesaw"
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="section.key=value", help="such as data.workers=4"
    )
    parser.add_argument("--steps", type=int, help="measured with each form of a loss (40)")
    parser.add_argument("--warm-up", type=int, help="steps with each form before them (10)")
    parser.add_argument("--block", type=int, help="steps with one form until it is the other's turn (5)")
    parser.add_argument("--folder", type=Path, help="for the files (default: a temporary one)")
    parser.add_argument(
        "--budget-s", type=float, default=3600.0, help="start no other loss after it (%(default)s)"
    )
    parser.add_argument("--run", help="the run that the rows belong to, where several commands make one")
    parser.add_argument("--records", type=Path, help=f"{RECORDS.relative_to(ROOT)}; of a dry run: none")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, nothing recorded")
