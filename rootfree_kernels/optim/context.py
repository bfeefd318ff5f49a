"""What all batches of one step share: the options of the group, the learning rate, and the gradient scaler."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from rootfree_kernels.arguments import DiagonalOptions, FactorOptions, Scaling, StepOptions
from rootfree_kernels.optim.state_spec import Group


class GroupOptions(NamedTuple):
    """The options of a group as the operators take them."""

    diagonal: DiagonalOptions
    factor: FactorOptions | None  # None for an optimizer without matrices
    step: StepOptions
    maximize: bool


def group_options(group: Group) -> GroupOptions:
    """Return the operators' options for the present values in a group."""
    descent = group["momentum"], group["weight_decay"], group["decoupled_weight_decay"]
    momentum, weight_decay, decoupled = descent
    curvature = group["batch_size"], group["beta2"]
    factor = None
    if "riemannian_momentum" in group:
        damped = group["riemannian_momentum"], group["damping"], group["gamma"]
        factor = FactorOptions(*curvature, *damped, group["clip"], group["rounding"])
    return GroupOptions(
        DiagonalOptions(
            *(*curvature, group["gamma"], momentum, group["damping"], weight_decay, decoupled),
            *(group["maximize"], group["rounding"], group["weight_rounding"]),
        ),
        factor,
        StepOptions(*descent, group["weight_rounding"]),
        group["maximize"],
    )


class StepContext(NamedTuple):
    """What the batches of a group on one device have in common in a step."""

    options: GroupOptions
    lr: Tensor  # 0-d
    scaling: Scaling
    is_profiled: bool  # whether a profiler wants to know where batches and phases begin
