"""What all batches of one step share: the options of the group, the learning rate, and the gradient scaler."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rootfree_kernels.arguments import DiagonalOptions, FactorOptions, ScaledOptions, Scaling, StepOptions
from rootfree_kernels.optim.state_spec import Group, takes_scaled_step


class GroupOptions(NamedTuple):
    """The options of a group as the operators take them."""

    diagonal: DiagonalOptions
    scaled: ScaledOptions | None  # of the diagonal step, unless the group follows the paper's rule
    factor: FactorOptions | None  # None for an optimizer without matrices
    step: StepOptions
    maximize: bool


def factor_damping(group: Group) -> float:
    """Return λ of the factors: at least ε² of the dtype that they are computed in, while they average (γ = 1).

    A row or a column that never has a gradient has the curvature 0, and its factor would grow until it overflows. ε² is
    the curvature of gradients that are lost in a sum with gradients of size 1, so nothing that matters is smaller. The
    growth ends where C and K multiply a gradient by at most about 1/ε².
    """
    is_wide = (group["matmul_dtype"] or group["factor_dtype"]) == torch.float64
    least: float = torch.finfo(torch.float64 if is_wide else torch.float32).eps ** 2
    return max(float(group["damping"]), least) if group["gamma"] else float(group["damping"])


def group_options(group: Group) -> GroupOptions:
    """Return the operators' options for the present values in a group."""
    diagonal = DiagonalOptions(
        batch_size=1.0 if group["batch_size"] is None else group["batch_size"],  # None: it cancels
        beta2=group["beta2"],
        gamma=group["gamma"],
        momentum=group["momentum"],
        damping=group["damping"],
        weight_decay=group["weight_decay"],
        decoupled=group["decoupled_weight_decay"],
        maximize=group["maximize"],
        rounding=group["rounding"],
        weight_rounding=group["weight_rounding"],
    )
    step = StepOptions(diagonal.momentum, diagonal.weight_decay, diagonal.decoupled, diagonal.weight_rounding)
    if "riemannian_momentum" not in group:
        return GroupOptions(diagonal, None, None, step, diagonal.maximize)
    curvature = group["direction"], group["relative_damping"], group["factor_init"]
    average = group["momentum_on"], group["nesterov"]
    factor = FactorOptions(
        diagonal.batch_size,
        diagonal.beta2,
        group["riemannian_momentum"],
        factor_damping(group),
        diagonal.gamma,
        group["clip"],
        diagonal.rounding,
        *curvature,
    )
    scaled = ScaledOptions(*diagonal, *curvature[:2], *average) if takes_scaled_step(group) else None
    step = step._replace(momentum_on=average[0], nesterov=average[1])
    return GroupOptions(diagonal, scaled, factor, step, diagonal.maximize)


class StepContext(NamedTuple):
    """What the batches of a group on one device have in common in a step."""

    options: GroupOptions
    lr: Tensor  # 0-d
    scaling: Scaling
    is_profiled: bool  # whether a profiler wants to know where batches and phases begin
