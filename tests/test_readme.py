"""The README's code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


LOOPS = [code for code in BLOCKS if "loader" in code]


def test_the_readme_has_three_loops_and_two_optimizers():
    assert (len(LOOPS), len(BLOCKS)) == (3, 5)


@pytest.mark.parametrize("code", BLOCKS)
def test_the_code_trains(code):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 6), nn.Flatten(), nn.Linear(18, 8), nn.Tanh(), nn.Linear(8, 4))
    inputs = torch.randint(0, 7, (16, 3))
    targets = inputs.sum(1) % 4
    loss_fn = nn.functional.cross_entropy
    before = loss_fn(model(inputs), targets).item()
    names = {"model": model, "loader": [(inputs, targets)] * 96, "loss_fn": loss_fn, "device": "cpu"}
    exec(code, names)
    for _ in range(0 if code in LOOPS else 96):
        loss_fn(model(inputs), targets).backward()
        names["optimizer"].step()
        names["optimizer"].zero_grad()
    assert loss_fn(model(inputs), targets).item() < before - 0.01
