"""The benches' own logic: equal work, ratios, records, tables. Nothing here judges a speed."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from bench import demo, records, report
from bench.__main__ import main
from bench.cases import CASES, COLUMNS, LOGIT_RANGE, ROWS, Batch, Case, Form
from bench.measure import MALLOC_MODES, speed_rows
from bench.providers import Provider, Refused, check, eager_providers, providers
from bench.timing import Sample, interleave, quantiles, speed_up
from detector.config import load_config, save_config
from gol_kernels import info, reference


def _eager(form: Form) -> Provider:
    """A closed form without the compiler, which is slow to start."""
    return Provider("closed", "", lambda b: lambda: form.function(b.logits, *form.arguments(b)))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_provider_computes_the_same(case: Case) -> None:
    """K = 37: neither a multiple of the vectors' width nor of the four draws in a word."""
    batch = case.batch(65, 37)
    for provider in (*eager_providers(case), *map(_eager, case.closed.values())):
        if provider.computes:
            found = check(provider, case, batch)
            assert found["gradient"] > 0, "float32 agrees with float64 to the last bit: is it the reference?"


def _without_a_positive(loss: Tensor, grad: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    grad = grad.clone()
    grad[0, batch.labels[0].clamp(max=grad.shape[1] - 1)] = 0
    return loss, grad


WRONG = {
    "one row without its positive": _without_a_positive,
    "loss of another scale": lambda loss, grad, _: (loss * 1.001, grad),
    "gradient of another scale": lambda loss, grad, _: (loss, grad * 1.001),
    "not a number": lambda loss, grad, _: (loss, grad * float("nan")),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("name", ["gumbel", "softmax"])
def test_a_wrong_provider_is_refused(name: str, change: object) -> None:
    case = CASES[name]
    batch = case.batch(256, 101)
    right = next(p for p in eager_providers(case) if p.name == "released")

    def step(fixed: Batch) -> object:
        return lambda: change(*right.step(fixed)(), fixed)  # type: ignore[operator]

    check(right, case, batch)
    with pytest.raises(Refused, match=f"{name}, wrong: not the same loss"):
        check(Provider("wrong", "", step), case, batch)  # type: ignore[arg-type]


def test_a_refused_provider_gets_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["sigmoid"]
    softmax = Provider("softmax", "", next(p for p in eager_providers(CASES["softmax"])).step)
    monkeypatch.setattr("bench.measure.eager_providers", lambda case: [*eager_providers(case), softmax])
    batch = case.batch(8, 33)
    rows, refused = speed_rows(case, batch, malloc="default", eager=True, threads=1, rounds=2, min_ms=0.1)
    assert {row["provider"] for row in rows} == {p.name for p in eager_providers(case)}
    assert len(refused) == 1
    assert refused[0].startswith("sigmoid, softmax: not the same loss")


def test_batch_has_the_shape_of_lvis() -> None:
    batch = CASES["gol"].batch()
    assert batch.logits.shape == (ROWS, COLUMNS)
    assert LOGIT_RANGE[0] <= batch.logits.min() < batch.logits.max() <= LOGIT_RANGE[1]
    assert int(batch.rare.sum()) == pytest.approx(815, abs=2)
    foreground = batch.labels < COLUMNS
    assert foreground.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert 0 < batch.rare[batch.labels[foreground]].float().mean() < 0.15  # rare classes are rare
    assert (CASES["seesaw"].batch(50, 30).labels < 28).all()


def test_fixed_draws_are_those_of_the_kernels() -> None:
    case = CASES["gol"]
    fixed = case.fixed(case.batch(5, 21))
    seed, offset = torch.randint(2**63 - 1, (2,), generator=fixed.generator())
    expected = reference.philox_uint16(seed, offset, 5, 21)
    assert torch.equal(fixed.draws().long() + 2**15, expected)
    uniform = fixed.uniform()
    assert uniform is not None
    torch.testing.assert_close(uniform * 2**16, expected + 0.5, rtol=0, atol=0.01)


def test_free_draws_are_uniform() -> None:
    batch = CASES["gol"].batch(300, 1001)
    draws = batch.draws()
    assert draws.shape == (300, 1001)
    assert draws.double().mean().item() == pytest.approx(-0.5, abs=300)  # 8 standard errors of 35
    assert draws.double().std().item() == pytest.approx(2**16 / 12**0.5, rel=0.01)
    assert not torch.equal(draws, batch.draws())
    assert batch.uniform() is None


class _Script:
    """A timer that runs the step and reads its time from a list."""

    clock = "script"

    def __init__(self, ms: dict[str, list[float]]) -> None:
        self.ms, self.calls = {name: iter(values) for name, values in ms.items()}, []

    def __call__(self, step: object, calls: int) -> Sample:
        name = step()  # type: ignore[operator]
        self.calls.append((name, calls))
        ms = next(self.ms[name])
        return Sample(ms, ms, 0.0)


def test_interleaving() -> None:
    """Warm-up, estimate, then rounds of an untimed and a timed visit, every step in each round."""
    timer = _Script({"a": [9, 2, 9, 10, 9, 20, 9, 30], "b": [9, 80, 9, 40, 9, 40, 9, 30]})
    steps = {"a": lambda: "a", "b": lambda: "b"}
    samples = interleave(steps, timer, rounds=3, min_ms=60.0)
    assert [s.ms for s in samples["a"]] == [10, 20, 30]
    assert [s.ms for s in samples["b"]] == [40, 40, 30]
    visits = timer.calls[4:]
    assert all({name for name, _ in visits[i : i + 4]} == {"a", "b"} for i in (0, 4, 8))
    assert {calls for name, calls in visits if name == "a"} == {1, 30}  # 60 ms of 2 ms steps
    assert {calls for name, calls in visits if name == "b"} == {1}
    # Ratios within the rounds are 4, 2, 1; the ratio of the medians is 2 as well, but not that of the means.
    assert speed_up(samples["a"], samples["b"]) == 2
    assert speed_up(samples["b"], samples["b"]) == 1


def test_quantiles() -> None:
    assert quantiles([5.0, 1.0, 2.0, 4.0, 3.0, 0.0]) == {"p20": 1.0, "p50": 2.5, "p80": 4.0}
    assert quantiles([7.0]) == {"p20": 7.0, "p50": 7.0, "p80": 7.0}


def _rows(run: str, ratio: float = 31.25) -> list[records.Row]:
    """A complete run, made up."""
    shared = {"run": run, "date": "2026-01-02T03:04:05+00:00", "commit": "abc", "dirty": True}
    shared["versions"] = {"python": "3.11", "torch": "2.11.0", "gol_kernels": "0.1.0", "compiler": "gcc"}
    shared["machine"] = {"cpu": "Z80 (family 1, model 2)", "cores": 2}
    speed = {"kind": "speed", "N": 4096, "K": 1204, "threads": 1, "rounds": 15, "clock": "process CPU time"}
    rows: list[records.Row] = []
    for case in CASES:
        for malloc in MALLOC_MODES:
            for provider, ms, speed_ups in (
                ("ours avx512", 4.0, {"released": ratio, "compiled": 3.25}),
                ("released", 125.0, {"released": 1.0}),
                ("compiled", 13.0, {"released": 9.6}),
            ):
                row = {"case": case, "malloc": malloc, "provider": provider, "speed_up": speed_ups}
                rows.append(shared | speed | row | {"ms": {"p50": ms}, "load_average": [0.5, 1, 1]})
        accuracy = {"kind": "accuracy", "case": case, "provider": "released", "errors": {"gradient": 5.8e-6}}
        rows.append(shared | accuracy)
    return rows


def test_records_are_appended_and_the_newest_complete_run_is_found(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cpu.jsonl"
    old, new, partial = _rows("1"), _rows("2"), _rows("3")[:-4]
    for rows in (old, new, partial):
        records.append(path, rows)
    assert records.read(path) == old + new + partial
    assert records.newest_complete(records.read(path), CASES, MALLOC_MODES) == new
    with pytest.raises(ValueError, match="no run is complete"):
        records.newest_complete(partial, CASES, MALLOC_MODES)
    with path.open("a") as file:
        file.write("{broken\n")
    with pytest.raises(ValueError, match=rf"cpu.jsonl, line {len(old + new + partial) + 1}: "):
        records.read(path)


def test_environment_says_where_and_with_what() -> None:
    facts = records.environment()
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["machine"]["cores"] == os.cpu_count()
    assert len(facts["machine"]["cpu"]) > 2
    json.dumps(facts)


def test_targets() -> None:
    lines = report.target_lines(_rows("1"))
    assert "PASS gumbel  ours avx512  31.2x released (at least 30x), malloc kept" in lines
    assert "FAIL gumbel  ours avx512   3.2x compiled (at least 3.5x), malloc default" in lines
    assert len(lines) == 10  # five targets of AVX-512, two modes; AVX2 was not measured


def _finished_run(folder: Path) -> Path:
    run = folder / "run"
    run.mkdir()
    save_config(load_config("demo", ["seed=4"]), run / "config.yaml")
    log = [{"step": 20, "loss": 2.0, "step_s": 1.5}, {"step": 30, "loss": 1.0, "step_s": 2.4}, {"eval": {}}]
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    metrics = {"protocol": "LVIS protocol; x", "metrics": {"bbox": {"AP": 0.3}, "segm": {"AP": 0.2}}}
    (run / "metrics.json").write_text(json.dumps(metrics))
    start = {**info.environment(), "date": "2026-01-02T03:04:05+00:00", "commit": "0123abc", "dirty": False}
    resumed = {**start, "date": "2026-01-03T03:04:05+00:00", "dirty": True}
    (run / "environment.json").write_text(json.dumps([start, resumed]))
    page = Image.new("RGB", (500, 900))
    page.paste("white", (0, 0, 500, 420))
    page.save(run / "predictions.png")
    return run


def test_readme_tables_stand_between_the_markers(tmp_path: Path) -> None:
    path, store = tmp_path / "README.md", tmp_path / "cpu.jsonl"
    records.append(store, _rows("1", ratio=12.0) + _rows("2"))
    demo_store = tmp_path / "demo.jsonl"
    run = _finished_run(tmp_path)
    assert main(["demo", str(run), "--records", str(demo_store), "--folder", str(tmp_path)]) == 0
    with Image.open(tmp_path / "demo_predictions.jpg") as picture:
        assert picture.size == (1200, 1008)
        assert min(picture.getpixel((600, 990))) > 250  # all of it from the page's upper part
    path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\n{demo.BEGIN}{demo.END}\nafter\n")
    arguments = ["readme", "--records", str(store), "--readme", str(path), "--demo-records", str(demo_store)]
    for kind in ("scale", "training", "learning"):
        arguments += [f"--{kind}-records", str(tmp_path / "none.jsonl")]
    assert main(arguments) == 0
    text = path.read_text()
    assert text.startswith("before\n<!--")
    assert text.endswith("-->\nafter\n")
    assert "old" not in text
    assert "| Gumbel | 125 | 13.00 |  | **4.00** | 31.2 | 3.2 |" in text
    assert "| Seesaw, all rows foreground | 5.8e-06 |" in text
    assert "commit abc with changes; 2026-01-02" in text
    assert "Seed 4, 30 steps in 0.9 minutes:" in text  # 20 steps of 1.5 s and 10 of 2.4 s
    assert "| box | 30.0 |" in text
    assert "commit 0123abc with changes. Made by" in text  # that of the training, not of this moment
    main(arguments)
    assert path.read_text() == text
    path.write_text("no markers")
    with pytest.raises(ValueError, match="each once"):
        main(arguments)


def test_a_demo_of_two_commits_is_not_recorded(tmp_path: Path) -> None:
    run = _finished_run(tmp_path)
    first, second = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps([first, {**second, "commit": "4567def"}]))
    with pytest.raises(ValueError, match="trained by 2 commits, expected one: 0123abc, 4567def"):
        demo.record(run)


def test_plot(tmp_path: Path) -> None:
    store, first, second = tmp_path / "cpu.jsonl", tmp_path / "a/cpu.png", tmp_path / "b/cpu.png"
    without = str(tmp_path / "no GPU was measured")
    records.append(store, _rows("1"))
    main(["plot", "--records", str(store), "--gpu-records", without, "--folder", str(first.parent)])
    records.append(store, _rows("2", ratio=3.0))
    main(["plot", "--records", str(store), "--gpu-records", without, "--folder", str(second.parent)])
    assert [path.name for path in first.parent.iterdir()] == ["cpu.png"]
    assert first.read_bytes().startswith(b"\x89PNG")
    assert first.read_bytes() != second.read_bytes()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_run_end_to_end(tmp_path: Path) -> None:
    """The real command on 8 rows, both malloc modes; the compiled forms have the next test."""
    store = tmp_path / "cpu.jsonl"
    command = [sys.executable, "-m", "bench", "run", "--cases", "sigmoid", "--rows", "8", "--columns", "40"]
    command += ["--rounds", "2", "--min-ms", "0.2", "--eager", "--records", str(store)]
    subprocess.run(command, cwd=records.ROOT, check=True, timeout=300)
    rows = records.read(store)
    case = CASES["sigmoid"]
    expected = {p.name for p in eager_providers(case)}
    for malloc in MALLOC_MODES:
        found = [row for row in rows if row["kind"] == "speed" and row["malloc"] == malloc]
        assert {row["provider"] for row in found} == expected
        for row in found:
            assert 0 < row["ms"]["p20"] <= row["ms"]["p50"] <= row["ms"]["p80"]
            assert row["bytes"] == 8 * 40 * 8 + 8 * 8
            assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["ms"]["p50"] / 1e6)
        assert next(row for row in found if row["provider"] == "copy")["speed_up"]["copy"] == 1
    accuracy = {row["provider"]: row["errors"]["gradient"] for row in rows if row["kind"] == "accuracy"}
    assert set(accuracy) == expected - {"copy"} | {"torch closed form"}
    assert all(0 < error < 1e-6 for error in accuracy.values())


def test_compiled_closed_form_computes_the_same() -> None:
    case = CASES["gol"]
    compiled = next(p for p in providers(case) if p.name == "compiled")
    check(compiled, case, case.batch(8, 40))


def test_worker_needs_a_known_case() -> None:
    with pytest.raises(SystemExit):
        main(["run", "--cases", "hinge"])


def test_case_tolerance_is_used() -> None:
    """The same provider passes or not with the tolerance alone."""
    case = CASES["softmax"]
    provider = next(p for p in eager_providers(case) if p.name == "released")
    with pytest.raises(Refused):
        check(provider, dataclasses.replace(case, tolerance=1e-12), case.batch(64, 50))
