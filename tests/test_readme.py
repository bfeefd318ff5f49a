"""The README's code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_the_quick_start_has_three_loops():
    assert len(BLOCKS) == 3


@pytest.mark.parametrize("code", BLOCKS, ids=["plain", "mixed precision and schedule", "accumulation"])
def test_the_quick_start_trains(code):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 6), nn.Flatten(), nn.Linear(18, 8), nn.Tanh(), nn.Linear(8, 4))
    inputs = torch.randint(0, 7, (16, 3))
    targets = inputs.sum(1) % 4
    loss_fn = nn.functional.cross_entropy
    before = loss_fn(model(inputs), targets).item()
    loader = [(inputs, targets)] * 96
    exec(code, {"model": model, "loader": loader, "loss_fn": loss_fn, "device": "cpu"})
    assert loss_fn(model(inputs), targets).item() < before - 0.01
