"""Measuring: the rows of one process. The malloc mode is the process's, set before it began."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch

from .cases import Batch, Case
from .providers import Refused, check, eager_providers, errors, plain_closed_form, providers
from .records import Row
from .timing import CpuTimer, interleave, quantiles, speed_up

# glibc gives big blocks back to the kernel and takes them again, zeroed page by page. PyTorch's eager
# formulas, with a dozen temporaries of 20 MB, then spend most of their time there. "kept" is what a
# process with a caching allocator or raised thresholds sees: the stronger baseline.
MALLOC_MODES: dict[str, dict[str, str]] = {
    "kept": {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)},
    "default": {},
}
BYTES_FORMULA = "N*K*(4 + 4) + N*8: logits read, gradient written, labels read"
BASELINES = ("released", "compiled released", "compiled", "compiled, 1-exp(-e)", "copy")
ACCURACY_ROWS, ACCURACY_SPREAD = 512, 2.5


def speed_rows(
    case: Case, batch: Batch, *, malloc: str, eager: bool, threads: int, rounds: int, min_ms: float
) -> tuple[list[Row], list[str]]:
    """One row for each provider (with ``eager``, none compiled), and the reasons why others were refused."""
    (n, k), steps, facts, refused = batch.logits.shape, {}, {}, []
    for provider in (eager_providers if eager else providers)(case):
        try:
            found = check(provider, case, batch) if provider.computes else None
        except Refused as reason:
            refused.append(str(reason))
            continue
        steps[provider.name] = provider.step(batch)
        facts[provider.name] = {"instruction_set": provider.instruction_set, "errors": found}
    load = os.getloadavg()
    timer = CpuTimer(threads)
    samples = interleave(steps, timer, rounds=rounds, min_ms=min_ms)
    size = n * k * 8 + n * 8
    rows = []
    for name, own in samples.items():
        ms = quantiles([sample.ms for sample in own])
        rows.append(
            {
                "kind": "speed",
                "case": case.name,
                "provider": name,
                **facts[name],
                "dtype": "float32",
                "N": n,
                "K": k,
                "threads": threads,
                "malloc": malloc,
                "clock": timer.clock,
                "rounds": rounds,
                "ms": ms,
                "wall_ms": quantiles([sample.wall_ms for sample in own]),
                "page_faults": quantiles([sample.page_faults for sample in own])["p50"],
                "bytes": size,
                "bytes_formula": BYTES_FORMULA,
                "gb_per_s": size / ms["p50"] / 1e6,
                "speed_up": {base: speed_up(own, samples[base]) for base in BASELINES if base in samples},
                "load_average": load,
            }
        )
    return rows, refused


def accuracy_rows(case: Case, k: int) -> list[Row]:
    """Errors against float64 over the whole range of logits, for ours, the released formula, and the
    closed form in PyTorch's own float32 operations."""
    batch = case.batch(ACCURACY_ROWS, k, spread=ACCURACY_SPREAD)
    chosen = [provider for provider in eager_providers(case) if provider.computes]
    return [
        {
            "kind": "accuracy",
            "case": case.name,
            "provider": provider.name,
            "dtype": "float32",
            "N": ACCURACY_ROWS,
            "K": k,
            "errors": errors(provider, case, batch),
        }
        for provider in (*chosen, plain_closed_form(case))
    ]


def measure(
    cases: Sequence[Case],
    *,
    batch_of: Callable[[Case], Batch],
    accuracy_columns: int | None,
    malloc: str,
    eager: bool,
    threads: int,
    rounds: int,
    min_ms: float,
    report: Callable[[str], None] = print,
) -> tuple[list[Row], list[str]]:
    """All rows of this process, and what was refused; a line of progress for each case.

    accuracy_columns: K of the accuracy's batches; None measures speed alone.
    """
    torch.set_num_threads(threads)
    rows, refused = [], []
    for case in cases:
        speed, reasons = speed_rows(
            case,
            batch_of(case),
            malloc=malloc,
            eager=eager,
            threads=threads,
            rounds=rounds,
            min_ms=min_ms,
        )
        rows += speed
        refused += reasons
        report(f"{case.name}, malloc {malloc}, load average {os.getloadavg()[0]:.1f}")
        for row in speed:
            report(f"  {row['provider']:<22} {row['ms']['p50']:8.2f} ms {row['gb_per_s']:6.1f} GB/s")
        if accuracy_columns is not None and malloc == next(iter(MALLOC_MODES)):
            rows += accuracy_rows(case, accuracy_columns)
    for reason in refused:
        report(f"refused: {reason}")
    return rows, refused
