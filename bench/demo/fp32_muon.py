"""PyTorch's Muon with Newton–Schulz iterations in FP32.

`torch.optim.Muon` casts to BF16. Some CPUs multiply BF16 slowly (see `rootfree_kernels.eager.cpu_products`): there it
would be compared by a time that no user would accept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import _muon


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


def use_fp32() -> None:
    """Let every Muon of this process iterate in FP32."""
    _muon._zeropower_via_newtonschulz = orthogonalized
