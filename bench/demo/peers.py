"""Other people's optimizers for the model of `bench.demo`: Distributed Shampoo, SOAP, and Muon with AdamW for the rest.

Each as its authors recommend; what is left to choose is tuned by `bench.demo.tune`, on the same budget as ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from bench.common.peers import find
from bench.demo.fp32_muon import use_fp32
from rootfree_kernels.eager import cpu_matmul_dtype

BF16 = torch.bfloat16


class Together(Optimizer):
    """Two optimizers of two parts of a model, as one: a scheduler sees the groups of both."""

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


def distributed_shampoo(
    model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float, T: int
) -> Optimizer:
    """Meta's, with the learning rate of Adam by grafting, roots by eigh every T-th step, from the T-th on."""
    package = find("distributed_shampoo")
    optimizer: Optimizer = package.DistributedShampoo(
        model.parameters(),
        lr=lr,
        betas=betas,
        epsilon=1e-12,
        weight_decay=weight_decay,
        max_preconditioner_dim=1024,
        precondition_frequency=T,
        start_preconditioning_step=T,
        grafting_config=package.AdamPreconditionerConfig(beta2=betas[1], epsilon=1e-8),
        distributed_config=package.SingleDeviceDistributedConfig(target_parameter_dimensionality=2),
        preconditioner_config=package.RootInvShampooPreconditionerConfig(use_symmetric_packing=False),
    )
    return optimizer


def soap(model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float, T: int) -> Optimizer:
    """The authors', with their β₁ of 0.95; its first step only makes the preconditioner."""
    options = {"lr": lr, "betas": (0.95, betas[1]), "weight_decay": weight_decay, "precondition_frequency": T}
    optimizer: Optimizer = find("soap").SOAP(model.parameters(), **options)
    return optimizer


def muon(model: nn.Module, lr: float, adamw_lr: float, weight_decay: float, momentum: float = 0.95) -> Optimizer:
    """PyTorch's for the matrices of the layers, AdamW for embeddings, head and vectors.

    On a CPU that multiplies BF16 slowly its iterations are in FP32, as ours are there.
    """
    if next(model.parameters()).device.type == "cpu" and cpu_matmul_dtype(BF16, torch.device("cpu")) != BF16:
        use_fp32()
    hidden = [x for name, x in model.named_parameters() if name.startswith("blocks.") and x.ndim == 2]
    inside = set(hidden)
    rest = [x for x in model.parameters() if x not in inside]
    return Together(
        torch.optim.Muon(hidden, lr=lr, weight_decay=weight_decay, momentum=momentum),
        torch.optim.AdamW(rest, lr=adamw_lr, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True),
    )


PEER_METHODS: dict[str, Callable[..., Optimizer]] = {"shampoo": distributed_shampoo, "soap": soap, "muon": muon}
MODULES = {"shampoo": "distributed_shampoo", "soap": "soap"}
"""The peer that a method needs; the others come with PyTorch."""
