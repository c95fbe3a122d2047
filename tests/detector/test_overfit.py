"""The whole detector learns two pictures by heart in 20 steps, with each family of losses."""

from __future__ import annotations

import pytest
import torch

from detector.model import build_model
from tests.detector.tiny_detector import tiny_classes, tiny_config, two_pictures

STEPS = 20


@pytest.mark.parametrize("name", ["gol", "seesaw", "softmax"])
def test_loss_falls_by_half_in_20_steps(name):
    torch.manual_seed(0)
    model = build_model(tiny_config(f"loss.name={name}"), tiny_classes())
    images, targets = two_pictures()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    totals, classes = [], []
    for _ in range(STEPS):
        losses = model(images, targets)
        optimizer.zero_grad()
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        totals.append(total.item())
        classes.append(losses["loss_cls"].item())
    assert sum(totals[-3:]) / 3 < totals[0] / 2
    assert sum(classes[-3:]) / 3 < classes[0]
