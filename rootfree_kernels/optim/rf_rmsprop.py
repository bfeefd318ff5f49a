"""RF-RMSProp and RF-AdaGrad."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, required

from rootfree_kernels.optim.base import RootFreeOptimizer


class RFRMSProp(RootFreeOptimizer):
    r"""RMSProp without the square root (Lin et al., ICML 2024, Fig. 4 and 6)::

        s ← (1 − β₂γ)s + β₂·B·g²        s starts at 1
        m ← α₁m + g/(s + λ) + κμ
        μ ← μ − β₁m

    Args:
        params: parameters, named parameters or groups; FP32, BF16, FP16 or FP64, of any shape and strides.
        lr: β₁, a number or a one-element Tensor (which the host never reads).
        batch_size: B, the number of terms that the loss averages over; 1 for a summed loss. It is required, since a
            wrong B silently changes the method. A training loop can set it in the group at every step.
        beta2: β₂, how fast s follows the curvature: below 1, and 1 minus what Adam calls beta2.
        momentum: α₁ of the heavy ball. There is no factor 1 − α₁, so the step grows by 1/(1 − α₁).
        damping: λ. For small gradients, lr/(λ(1−α₁)) is the step size of plain SGD.
        weight_decay: κ, added to the preconditioned gradient before the momentum.
        decoupled_weight_decay: apply the decay to the weights instead, μ ← (1 − β₁κ)μ, as in AdamW.
        gamma: γ. 1 averages the curvature (RMSProp), 0 sums it (AdaGrad).
        state_dtype: dtype of s and m. None is FP32 (FP64 for FP64 parameters). m is rounded to nearest.
        rounding: how a BF16 s is rounded: "stochastic", "compensated" or "nearest" (see `rootfree_kernels.rounding`).
        weight_rounding: how BF16 parameters are rounded. "compensated" keeps bitwise the FP32 weight, in 2 more bytes.
        seed: the seed of stochastic rounding. It does not touch the global generators.
        maximize: ascend instead of descend.
        foreach: False steps one parameter at a time. None and True step all parameters of a dtype together.
        fused: True asks for a backend with kernels, False for eager PyTorch. None takes the best one available.
        capturable: keep the step count on the device. A CUDA graph can then capture the step, after a first step
            outside of it, and `torch.compile` makes one graph of it (`fullgraph=True`). Pass lr as a Tensor on the
            device, or its present value is compiled in.

    The state of a parameter is `step`, `square` (s), `momentum_buffer` (m), `skipped` (see `RootFreeOptimizer`), and
    int16 `square_residual` and `weight_residual` for compensated rounding.

    A step leaves out elements with a non-finite gradient: their weight and state stay. `skipped` counts such steps.

    Raises:
        ValueError: an option or a parameter cannot be served. The message names it, its value and the remedy.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-4,
        *,
        batch_size: float = required,  # type: ignore[assignment]
        beta2: float = 0.1,
        momentum: float = 0.9,
        damping: float = 1e-4,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        gamma: float = 1.0,
        state_dtype: torch.dtype | None = None,
        rounding: str = "stochastic",
        weight_rounding: str = "stochastic",
        seed: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        options = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        super().__init__(params, options)


class RFAdaGrad(RFRMSProp):
    """AdaGrad without the square root: `RFRMSProp` with γ = 0, so that s sums the curvature, s ← s + β₂·B·g².

    Since s starts at 1 and only grows, lr is the step size of plain SGD at first. The other options are those of
    `RFRMSProp`, without gamma. beta2 may be 1 or more.

    Raises:
        ValueError: gamma is given, or an option or a parameter cannot be served.
    """

    def __init__(self, params: ParamsT, lr: float | Tensor = 1e-2, *, beta2: float = 1.0, **options: Any) -> None:
        if "gamma" in options:
            raise ValueError(f"gamma={options['gamma']!r}: RFAdaGrad has gamma=0; choose RFRMSProp for another.")
        super().__init__(params, lr, beta2=beta2, gamma=0.0, **options)
