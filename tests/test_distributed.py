"""Two gloo ranks with half of the rows each are one rank with all of them."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import gol_kernels as gk

STEPS, ROWS, CLASSES, FEATURES = 3, 24, 7, 5


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(11)
    return [
        (
            torch.randn(ROWS, FEATURES, generator=generator),
            torch.randint(0, CLASSES + 1, (ROWS,), generator=generator),
        )
        for _ in range(STEPS)
    ]


LOSSES = {"seesaw": gk.SeesawLoss, "eqlv2": gk.EQLv2Loss, "equilibrium": gk.EquilibriumLoss}


def _train(name: str, rank: int, world: int, broadcast_buffers: bool) -> dict[str, torch.Tensor]:
    """STEPS of SGD on rank's share of each batch; what is left of it."""
    torch.manual_seed(0)
    loss = LOSSES[name](CLASSES)
    model = nn.ModuleDict({"fc": nn.Linear(FEATURES, loss.num_logits), "loss": loss})

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.parts["loss"](self.parts["fc"](x), y)

    step: nn.Module = Step()
    if world > 1:
        step = nn.parallel.DistributedDataParallel(step, broadcast_buffers=broadcast_buffers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for x, y in _batches():
        value = step(x[rank::world], y[rank::world])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    return {"losses": torch.stack(losses), "weight": model["fc"].weight.detach(), **loss.state_dict()}


def _worker(rank: int, world: int, port: int, name: str, broadcast_buffers: bool, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.save(_train(name, rank, world, broadcast_buffers), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "broadcast_buffers"),
    [("seesaw", True), ("seesaw", False), ("eqlv2", False), ("equilibrium", True)],
)
def test_two_ranks_equal_one(tmp_path: Path, name: str, broadcast_buffers: bool) -> None:
    """Loss, gradient (through three steps of weights) and the state: counts, gradients, mean scores."""
    mp.spawn(_worker, (2, _free_port(), name, broadcast_buffers, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    alone = _train(name, 0, 1, False)
    for key, expected in alone.items():
        if key in ("losses", "weight"):
            continue
        assert torch.equal(ranks[0][key], ranks[1][key])
        if expected.is_floating_point():
            torch.testing.assert_close(ranks[0][key], expected, rtol=1e-6, atol=1e-9)
        else:
            assert torch.equal(ranks[0][key], expected)
    if name != "equilibrium":
        counts = next(value for key, value in alone.items() if key.endswith("label_counts"))
        assert int(counts.sum()) == STEPS * ROWS
    both = (ranks[0]["losses"] + ranks[1]["losses"]) / 2
    torch.testing.assert_close(both, alone["losses"], rtol=1e-5, atol=0)
    torch.testing.assert_close(ranks[0]["weight"], alone["weight"], rtol=1e-4, atol=1e-6)
    assert torch.equal(ranks[0]["weight"], ranks[1]["weight"])


def _count_locally(rank: int, world: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    stats = gk.ClassStats(2, sync="local")
    stats.count(torch.full((rank + 1,), rank))
    torch.save(stats.label_counts, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_local_counts_stay_local(tmp_path: Path) -> None:
    mp.spawn(_count_locally, (2, _free_port(), str(tmp_path)), nprocs=2)
    assert torch.load(tmp_path / "0.pt", weights_only=True).tolist() == [1, 0, 0]
    assert torch.load(tmp_path / "1.pt", weights_only=True).tolist() == [0, 2, 0]
