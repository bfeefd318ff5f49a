"""Two optimizers for the two parts of a model."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer


class Together(Optimizer):
    """Step two parts of a model with two optimizers. A scheduler sees the groups of both."""

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        self.state = {param: state for part in self.parts for param, state in part.state.items()}  # type: ignore[assignment]
        return loss
