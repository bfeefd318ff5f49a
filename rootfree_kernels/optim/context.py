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
    diagonal = DiagonalOptions(
        batch_size=group["batch_size"],
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
        return GroupOptions(diagonal, None, step, diagonal.maximize)
    factor = FactorOptions(
        batch_size=group["batch_size"],
        beta2=group["beta2"],
        riemannian_momentum=group["riemannian_momentum"],
        damping=group["damping"],
        gamma=group["gamma"],
        clip=group["clip"],
        rounding=group["rounding"],
    )
    return GroupOptions(diagonal, factor, step, diagonal.maximize)


class StepContext(NamedTuple):
    """What the batches of a group on one device have in common in a step."""

    options: GroupOptions
    lr: Tensor  # 0-d
    scaling: Scaling
    is_profiled: bool  # whether a profiler wants to know where batches and phases begin
