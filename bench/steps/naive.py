"""The plain implementation of IF-Shampoo: a loop over parameters, with nothing kept between steps.

`bench.steps.cpu` compares with it. It has no batches, cached products, rounding or checks, on purpose.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class NaiveIFShampoo(torch.optim.Optimizer):
    """Step FP32 matrices by the formulas of `rootfree_kernels.IFShampoo`, with the Frobenius clip.

    All of its options are needed: lr, batch_size, beta2, momentum, riemannian_momentum, damping and
    precondition_frequency.
    """

    def __init__(self, params: Iterable[Tensor], **options: float) -> None:
        super().__init__(params, options)
        self.num_steps = 0

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                self._step_param(group, param, self.state[param])
        self.num_steps += 1

    def _step_param(self, group: dict, w: Tensor, state: dict) -> None:
        g, (p, d) = w.grad, w.shape
        if not state:
            state.update(C=torch.eye(p), K=torch.eye(d), m_C=torch.zeros(p, p), m_K=torch.zeros(d, d))
            state["buf"] = torch.zeros_like(w)
        c, k = state["C"], state["K"]
        if self.num_steps % group["precondition_frequency"] == 0:
            b, lam, alpha2 = group["batch_size"], group["damping"], group["riemannian_momentum"]
            a = c.T @ g @ k
            delta_c = 0.5 * (b / d * (a @ a.T) + lam / d * k.square().sum() * (c.T @ c) - torch.eye(p))
            delta_k = 0.5 * (b / p * (a.T @ a) + lam / p * c.square().sum() * (k.T @ k) - torch.eye(d))
            for m, delta, factor in ((state["m_C"], delta_c, c), (state["m_K"], delta_k, k)):
                m.mul_(alpha2).add_((1 - alpha2) * delta)
                factor.sub_(group["beta2"] / m.norm().clamp(min=1.0) * (factor @ m))
        u = c @ (c.T @ g @ k) @ k.T
        state["buf"].mul_(group["momentum"]).add_(u)
        w.sub_(group["lr"] * state["buf"])
