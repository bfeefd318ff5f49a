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
        lr: β₁, a number or a one-element Tensor (which is never read by the host).
        batch_size: B, the number of terms that the loss averages over; 1 for a summed loss. Required: a wrong B
            silently changes the method. It lives in the group, so that a training loop can set it at every step.
        beta2: β₂, how fast s follows the curvature; below 1, and 1 minus what Adam calls beta2.
        momentum: α₁, heavy ball, without a factor 1 − α₁: the step grows by 1/(1 − α₁).
        damping: λ. Where gradients are small, lr/(λ(1−α₁)) is the step size of plain SGD.
        weight_decay: κ, added to the preconditioned gradient before the momentum.
        decoupled_weight_decay: apply the decay to the weights instead, μ ← (1 − β₁κ)μ, as AdamW does.
        gamma: γ; 1 averages the curvature (RMSProp), 0 sums it (AdaGrad).
        state_dtype: dtype of s and m; None is FP32 (FP64 for FP64 parameters). m is rounded to nearest.
        rounding: of a BF16 s: "stochastic", "compensated" or "nearest" (see `rootfree_kernels.rounding`).
        weight_rounding: of BF16 parameters, likewise. "compensated" keeps the FP32 weight to the bit, in 2 bytes more.
        seed: of the random bits of stochastic rounding. The global generators are never touched.
        maximize: ascend.
        foreach: False steps one parameter at a time; None and True all of a dtype together.
        fused: True asks for a kernel backend, False for eager PyTorch, None takes the best that is there.
        capturable: keep the step count on the device. The step can then be captured in a CUDA graph, after one that
            was not, and `torch.compile` makes one graph of it (`fullgraph=True`); pass lr as a Tensor on the device,
            or its value is built in.

    State of a parameter: `step`, `square` (s), `momentum_buffer` (m), `skipped` (see `RootFreeOptimizer`), and int16
    `square_residual` and `weight_residual` where rounding is compensated.

    A number with a non-finite gradient is left out of the step and counted in `skipped`; its state stays.

    Raises:
        ValueError: an option or a parameter cannot be served; the message names it, its value and the remedy.
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

    As s starts at 1 and only grows, lr starts out as the step size of plain SGD. Other options are those of
    `RFRMSProp`, without gamma; beta2 may be 1 or more.

    Raises:
        ValueError: gamma is given, or as `RFRMSProp`.
    """

    def __init__(self, params: ParamsT, lr: float | Tensor = 1e-2, *, beta2: float = 1.0, **options: Any) -> None:
        if "gamma" in options:
            raise ValueError(f"gamma={options['gamma']!r}: RFAdaGrad has gamma=0; choose RFRMSProp for another.")
        super().__init__(params, lr, beta2=beta2, gamma=0.0, **options)
