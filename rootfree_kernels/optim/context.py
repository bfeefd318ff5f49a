"""What all batches of one step share: the options of the group, the learning rate, and the gradient scaler."""

from __future__ import annotations

from typing import NamedTuple

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
        diagonal.damping,
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
