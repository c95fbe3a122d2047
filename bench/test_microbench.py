"""Microbenchmarks of a size for CI: every loss with every instruction set that runs here, and a copy.

``make bench`` runs them; ``make test`` does not. The comparison with the baselines is ``python -m bench``.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import CASES
from bench.providers import INSTRUCTION_SETS, check, eager_providers

ROWS = 512
PROVIDERS = [*(f"ours {name}" for name in INSTRUCTION_SETS), "copy"]


@pytest.mark.parametrize("provider_name", PROVIDERS)
@pytest.mark.parametrize("case_name", CASES)
def test_loss_and_gradient(benchmark: BenchmarkFixture, case_name: str, provider_name: str) -> None:
    case = CASES[case_name]
    provider = next((p for p in eager_providers(case) if p.name == provider_name), None)
    if provider is None:
        pytest.skip(f"{provider_name} does not run here")
    batch = case.batch(ROWS)
    if provider.computes:
        check(provider, case, batch)
    benchmark.group = case.title
    benchmark.extra_info.update(N=ROWS, K=batch.logits.shape[1], dtype="float32")
    benchmark(provider.step(batch))
