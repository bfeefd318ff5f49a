"""The Python blocks of README.md and docs/ run unchanged. Optimizers that they create train a model."""

from __future__ import annotations

import ast
import importlib.util
import io
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from tests.tools.pages import DOCS, PAGES, ROOT, Block, blocks, name_of

STEPS = 96
ALONE = {DOCS / "trainers.md"}  # each block runs alone and needs other packages


class Unit(NamedTuple):
    """Blocks that run one after the other in one namespace."""

    page: Path
    blocks: list[Block]

    @property
    def packages(self) -> set[str]:
        """Return the packages that the blocks import."""
        nodes = [node for block in self.blocks for node in ast.walk(ast.parse(block.text))]
        plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        from_ = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
        return {name.partition(".")[0] for name in plain | from_}

    @property
    def id(self) -> str:
        return name_of(self.page) + (f": {', '.join(sorted(self.packages))}" if self.page in ALONE else "")


def units() -> list[Unit]:
    found = []
    for page in PAGES:
        python = blocks(page, "python")
        found += [Unit(page, [block]) for block in python] if page in ALONE else [Unit(page, python)] if python else []
    return found


class Task:
    """Define the variables that pages assume: `model`, `loader`, `loss_fn` and `device`."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Embedding(7, 6), nn.Flatten(), nn.Linear(18, 8), nn.Tanh(), nn.Linear(8, 4))
        self.inputs = torch.randint(0, 7, (16, 3))
        self.targets = self.inputs.sum(1) % 4
        self.names: dict[str, Any] = {
            "model": self.model,
            "loader": [(self.inputs, self.targets)] * STEPS,
            "loss_fn": nn.functional.cross_entropy,
            "device": "cpu",
        }
        self._first = {name: value.clone() for name, value in self.model.state_dict().items()}

    def loss(self) -> torch.Tensor:
        return nn.functional.cross_entropy(self.model(self.inputs), self.targets)

    def run(self, block: Block) -> None:
        """Run a block. If it creates an optimizer of the model, check that this optimizer trains."""
        optimizer = self.names.get("optimizer")
        if "optimizer = " in block.text:
            self.model.load_state_dict(self._first)
        before = self.loss().item()
        written = io.StringIO()
        with redirect_stdout(written):
            exec(block.text, self.names)
        if block.output is not None:
            assert written.getvalue().split() == block.output.split()
        if self.names.get("optimizer") is not optimizer and self._is_of_the_model(self.names["optimizer"]):
            if "in loader:" not in block.text and "enumerate(loader)" not in block.text:
                self._train()
            assert self.loss().item() < before - 0.01, block.text

    def _is_of_the_model(self, optimizer: Any) -> bool:
        stepped = {param for group in optimizer.param_groups for param in group["params"]}
        return bool(stepped & set(self.model.parameters()))

    def _train(self) -> None:
        for _ in range(STEPS):
            self.loss().backward()
            self.names["optimizer"].step()
            self.model.zero_grad()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread. On a busy machine, threads would wait for each other longer than these steps take."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


@pytest.mark.parametrize("unit", units(), ids=lambda unit: unit.id)
def test_blocks_run(unit: Unit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = sorted(name for name in unit.packages if importlib.util.find_spec(name) is None)
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    task = Task()
    for block in unit.blocks:
        task.run(block)
    history = getattr(getattr(task.names.get("trainer"), "state", None), "log_history", [])
    losses = [entry["loss"] for entry in history if "loss" in entry]  # the log of transformers
    assert losses[-1:] <= losses[:1]


def test_the_readme_has_a_training_loop() -> None:
    loops = [block for block in blocks(ROOT / "README.md", "python") if "loader" in block.text]
    assert any("optimizer.step()" in block.text for block in loops)
