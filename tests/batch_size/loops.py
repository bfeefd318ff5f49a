"""Small models and training loops for the tests of BatchSizeCounter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rootfree_kernels import RFRMSProp


class Keyword(nn.Module):
    """A model that is called with keywords only."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, *, inputs: Tensor, scale: float = 1.0) -> Tensor:
        return self.inner(inputs) * scale


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def batch(size: int) -> Tensor:
    return torch.randn(size, 3)


def rmsprop(*models: nn.Module) -> RFRMSProp:
    """Return an optimizer with one group for each model, and a batch_size that no test expects."""
    groups = [{"params": list(model.parameters())} for model in models]
    return RFRMSProp(groups, lr=1e-3, batch_size=999)


def sizes(optimizer: torch.optim.Optimizer) -> list[int]:
    return [group["batch_size"] for group in optimizer.param_groups]


def backward(model: nn.Module, size: int) -> None:
    """Run a forward and a backward pass over a batch."""
    model(batch(size)).square().mean().backward()
