"""PyTorch's Muon, which iterates in FP32 where a processor multiplies BF16 slowly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Muon, _muon

from rootfree_kernels.eager import cpu_matmul_dtype


def muon_is_fp32(device: torch.device) -> bool:
    """Return whether Muon has to iterate in FP32: on a CPU that multiplies BF16 slowly, as ours does there."""
    return cpu_matmul_dtype(torch.bfloat16, device) != torch.bfloat16


def make_muon(params: Sequence[Parameter], **options: Any) -> Muon:
    """Return PyTorch's Muon, in FP32 where it has to be."""
    if muon_is_fp32(params[0].device):
        use_fp32_muon()
    return Muon(params, **options)


def use_fp32_muon() -> None:
    """Let every Muon of this process iterate in FP32.

    `torch.optim.Muon` casts to BF16. On a CPU that multiplies BF16 slowly it would take a time no user would accept.
    """
    _muon._zeropower_via_newtonschulz = orthogonalized


def orthogonalized(grad: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Return an approximation of the nearest semi-orthogonal matrix, by X ← aX + (b·XXᵀ + c·(XXᵀ)²)X in FP32.

    The arguments are those of `torch.optim._muon._zeropower_via_newtonschulz`, which this replaces.
    """
    a, b, c = coefficients
    tall = grad.shape[0] > grad.shape[1]
    x = (grad.T if tall else grad).float()
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
