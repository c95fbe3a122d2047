"""The counter generator and what DropLoss makes of it."""

from __future__ import annotations

import pytest
import torch

import gol_kernels as gk
from gol_kernels import reference
from tests.cases import generator, loss_and_grad, rare_mask


def _words(key: tuple[int, int], counter: tuple[int, int, int, int]) -> list[int]:
    """The four words of one counter, from the 16-bit draws of its eight columns."""
    column, row, low, high = counter
    signed = lambda lo, hi: int.from_bytes((lo | hi << 32).to_bytes(8, "little"), "little", signed=True)  # noqa: E731
    seed, offset = torch.tensor(signed(*key)), torch.tensor(signed(low, high))
    draws = reference.philox_uint16(seed, offset, row + 1, 8 * column + 8)[row, 8 * column :].tolist()
    return [draws[2 * w] | draws[2 * w + 1] << 16 for w in range(4)]


def test_philox_known_answer() -> None:
    """Random123's known-answer vector of Philox4x32-10 for counter 0 and key 0."""
    assert _words((0, 0), (0, 0, 0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_philox_counter_layout() -> None:
    """Every part of the counter and of the key matters, and columns share nothing with rows."""
    base = _words((1, 2), (3, 4, 5, 6))
    others = [
        _words((7, 2), (3, 4, 5, 6)),
        _words((1, 7), (3, 4, 5, 6)),
        _words((1, 2), (7, 4, 5, 6)),
        _words((1, 2), (3, 7, 5, 6)),
        _words((1, 2), (3, 4, 7, 6)),
        _words((1, 2), (3, 4, 5, 7)),
        _words((1, 2), (4, 3, 5, 6)),
    ]
    assert all(len(set(base) & set(words)) == 0 for words in others)


def _kept(backend: str, labels: torch.Tensor, rare: torch.Tensor, seed: int) -> torch.Tensor:
    """[N, C] bool: which elements have a gradient."""
    logits = torch.zeros(len(labels), len(rare))
    reweight = gk.Drop(rare, generator(seed=seed))
    _, grad = loss_and_grad(lambda z: gk.sigmoid_loss(z, labels, reweight=reweight, backend=backend), logits)
    return grad != 0


@pytest.mark.parametrize("c", [1, 7, 8, 63, 64, 65, 130, 1203])
def test_every_backend_draws_the_same(native_backend: str, c: int) -> None:
    labels = torch.randint(0, c + 1, (50,))
    labels[:20] = c
    rare = torch.rand(c) < 0.6
    rare[0] = True
    ours = _kept(native_backend, labels, rare, seed=9)
    assert torch.equal(ours, _kept("reference", labels, rare, seed=9))
    assert c < 64 or not torch.equal(ours, _kept(native_backend, labels, rare, seed=10))


def test_probability(backend: str) -> None:
    """3 of 10 foreground rows are rare: background rows keep 3 of 10 rare negatives, and all others."""
    rare = rare_mask(600)
    labels = torch.full((400,), 600)
    labels[:3], labels[3:10] = 0, 1
    kept = _kept(backend, labels, rare, seed=1)
    assert bool(kept[10:, ~rare].all())
    share = kept[10:][:, rare].double().mean().item()
    n = 390 * int(rare.sum())
    assert share == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / n) ** 0.5)
    by_row = kept[10:][:, rare].double().mean(1)
    assert by_row.std().item() == pytest.approx((0.3 * 0.7 / int(rare.sum())) ** 0.5, rel=0.2)
    # Foreground rows drop every rare negative, and keep their own positive.
    assert torch.equal(kept[0], ~rare | (torch.arange(600) == 0))


@pytest.mark.parametrize(("rare_rows", "expected"), [(0, 0.0), (4, 1.0)])
def test_ends_of_the_probability(backend: str, rare_rows: int, expected: float) -> None:
    rare = rare_mask(600)
    labels = torch.full((2000,), 600)  # 800 000 draws: twelve of them are 0, and none may survive
    labels[:4] = 1
    labels[:rare_rows] = 0
    assert _kept(backend, labels, rare, seed=2)[4:][:, rare].double().mean() == expected


def test_no_foreground_drops_nothing(backend: str) -> None:
    assert bool(_kept(backend, torch.full((30,), 90), rare_mask(90), seed=3).all())


def test_ignored_rows_do_not_count_in_the_share(backend: str) -> None:
    rare = rare_mask(600)
    labels = torch.full((100,), 600)
    labels[:2], labels[2:4] = 0, -100
    kept = _kept(backend, labels, rare, seed=4)
    assert bool(kept[4:].all())  # both counted foreground rows are rare
    assert not kept[2:4].any()


def test_forward_and_backward_drop_the_same(backend: str) -> None:
    """fp16 makes its gradient in backward: the same elements must be gone there."""
    labels = torch.full((20,), 200)
    labels[:5] = torch.tensor([0, 1, 2, 4, 7])
    rare = rare_mask(200)
    grads = []
    for dtype in (torch.float32, torch.float16):
        logits = torch.zeros(20, 200, dtype=dtype)
        reweight = gk.Drop(rare, generator(seed=6))
        grads.append(
            loss_and_grad(
                lambda z, r=reweight: gk.sigmoid_loss(z, labels, reweight=r, backend=backend), logits
            )[1]
        )
    assert torch.equal(grads[0] != 0, grads[1] != 0)


def test_draws_follow_torch_seed(backend: str) -> None:
    stats = gk.ClassStats(image_count=[1] * 60, num_images=5000)
    loss = gk.DropLoss(stats, link="sigmoid")
    logits, labels = torch.zeros(30, 60), torch.full((30,), 60)
    labels[0] = 3
    labels[1:3] = 60
    loss.rare[:30] = False
    labels[3] = 3
    labels[4] = 40
    values = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        values.append(loss(logits, labels).item())
    assert values[0] == values[1] != values[2]
