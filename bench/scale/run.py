"""``python -m bench scale``: make the files, measure every part, print and record what was found."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.records import ROOT, append, environment, read
from bench.scale.files import SIZES, make_files
from bench.scale.parts import PARTS
from bench.scale.report import line


def run(options: argparse.Namespace) -> int:
    """0; 1 when a limit was missed, 2 when a part failed."""
    unknown = set(options.parts or ()) - set(PARTS)
    if unknown:
        raise SystemExit(f"python -m bench scale: parts are {', '.join(PARTS)}, not {', '.join(unknown)}")
    size = "small" if options.small else "full"
    facts, rows, failed = environment(), [], False
    with tempfile.TemporaryDirectory() as scratch:
        files = options.folder or Path(scratch)
        make_files(files, SIZES[size])
        for name in options.parts or PARTS:
            output = Path(scratch) / f"{name}.jsonl"
            command = [sys.executable, "-m", "bench.scale.parts", name, str(files), size, str(output)]
            load = {"load_average": list(os.getloadavg())}
            failed = bool(subprocess.run(command, cwd=ROOT, check=False).returncode) or failed
            found = [facts | load | row for row in read(output)] if output.exists() else []
            for row in found:
                print(line(row), flush=True)
            if options.records is not None:
                append(options.records, found)
            rows += found
    return 2 if failed else int(any(row["passed"] is False for row in rows))
