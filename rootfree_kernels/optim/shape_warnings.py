"""Warnings about parameters whose shapes hide the matrices that Kronecker factors are meant for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor
from torch.nn.parameter import is_lazy

from rootfree_kernels.blocks import matrix_shape
from rootfree_kernels.optim.state_spec import Group, label_of

LONGEST_VECTOR = 1 << 20
"""Biases and gains are shorter than this. A longer parameter with one axis is a list of flattened weights."""

SHORTEST_SIDE = 16
"""The shortest side of matrices in a stack. It tells a stack of matrices from the weight of a 1-d convolution, whose
last axis is a short kernel."""


def warn_about_shapes(groups: Sequence[Group], stacklevel: int) -> None:
    """Warn about flattened parameters and about stacked matrices, at most once for each."""
    if any(is_lazy(param) for group in groups for param in group["params"]):
        return  # shapes are not known yet
    factored = [group for group in groups if group["structure"] == "dense"]
    has_matrices = any(matrix_shape(param.shape) for group in groups for param in group["params"])
    for number, group in enumerate(groups):
        if group["structure"] == "dense" and _is_flat(group["params"], has_matrices):
            warnings.warn(flat_warning(f"group {number}"), stacklevel=stacklevel + 1)
            break
    stacked = [(group, index) for group in factored for index, x in enumerate(group["params"]) if _is_stack(x)]
    if stacked:
        (group, index), more = stacked[0], len(stacked) - 1
        param = group["params"][index]
        rows, cols = matrix_shape(param.shape) or (0, 0)
        warnings.warn(
            f"{label_of(group, index)} of shape {tuple(param.shape)}{f' (and {more} more)' if more else ''} is viewed "
            f"as one matrix of {rows} x {cols}. If its first axis stacks matrices, such as experts, pass each of them "
            "as a parameter of its own, or structure='elementwise' in its group.",
            stacklevel=stacklevel + 1,
        )


def flat_warning(what: str) -> str:
    """Return the warning about a group, or a model, without matrices."""
    return (
        f"every parameter of {what} has one axis, so that all of them take the diagonal step and none has Kronecker "
        "factors. FSDP1 and ZeRO-2 and 3 flatten weights: use DDP, or ZeRO-1 on whole parameters "
        "(torch.distributed.optim.ZeroRedundancyOptimizer). If the diagonal step is meant, pass "
        "structure='elementwise'."
    )


def _is_flat(params: Sequence[Tensor], has_matrices: bool) -> bool:
    """Return whether a group looks as if its weights were flattened: no matrix anywhere, or very long vectors here."""
    if any(param.dim() > 1 for param in params) or not params:
        return False
    return not has_matrices or any(param.numel() > LONGEST_VECTOR for param in params)


def _is_stack(param: Tensor) -> bool:
    """Return whether a parameter looks like a stack of matrices: three axes, and the first is the shortest."""
    return param.dim() == 3 and 1 < param.shape[0] < min(param.shape[1:]) and min(param.shape[1:]) >= SHORTEST_SIDE
