"""What the kernels of `rf_rmsprop` on a GPU are handed, Triton's and CUDA's: a table of tensors and some scalars.

The kernels of `scaled_rmsprop` are handed the same, with one more column: the addresses of q.

(The C++ kernels take the tensors themselves.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from rootfree_kernels.arguments import DiagonalOptions, DiagonalState, Draws, ScaledOptions, ScaledState, Scaling
from rootfree_kernels.pointer_tables.memory_order import match_layout, without_negation, write_back
from rootfree_kernels.pointer_tables.tables import (
    RandomBits,
    TensorTable,
    on_device,
    random_bits,
    split_lr,
    table,
    tensor_table,
)

GRAD_DTYPES = {
    torch.float32: (torch.float32, torch.bfloat16),
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float16: (torch.float16, torch.float32),
}
"""Dtypes of gradients that kernels read, by dtype of the parameters. Other gradients are converted to FP32 first."""

STATE_DTYPES = (torch.float32, torch.bfloat16)


class Lists(NamedTuple):
    """The lists of tensors of a call. Lists of residuals may be empty."""

    params: Sequence[Tensor]
    squares: Sequence[Tensor]
    buffers: Sequence[Tensor]
    square_residuals: Sequence[Tensor]
    weight_residuals: Sequence[Tensor]
    grads: Sequence[Tensor]


class DiagonalCall(NamedTuple):
    """The arguments of a kernel, and what has to be done after its launch."""

    # Columns: addresses of μ, s, m, both residuals and `skipped`, and q or 0 of `ScaledState`; size; first program
    where: TensorTable
    grads: Tensor  # [n]: addresses
    bits: RandomBits
    lr: Tensor  # the learning rate is the sum of this and `lr_value`
    lr_value: float
    grad_scale: Tensor
    found_inf: Tensor
    scalars: tuple[float, ...]  # sign, 1 − β₂γ, β₂B, α₁, λ, κ for L2 decay, κ for decoupled decay
    dtypes: tuple[torch.dtype, ...]  # of params, gradients, squares and buffers
    modes: tuple[str, str]  # roundings of squares and params
    lists: Lists
    copies: Lists  # what the kernel works on: the same tensors, or copies of those with another layout
    singles: Sequence[Tensor]  # 0-d: `skipped`, and q

    def finish(self) -> None:
        """Tell autograd what was changed, and write copies back."""
        state = self.copies[:-1]  # all but the gradients
        torch.autograd.graph.increment_version([*chain(*state, self.singles)])
        write_back(self.lists[:-1], state)


def diagonal_call(
    programs_of: Callable[[tuple[int, ...]], int],
    params: list[Tensor],
    state: DiagonalState | ScaledState,
    grads: Sequence[Tensor],
    lr: Tensor,
    draws: Draws,
    scaling: Scaling,
    options: DiagonalOptions | ScaledOptions,
) -> DiagonalCall:
    """Return the call of a kernel, with the arguments of the eager `rf_rmsprop` or `scaled_rmsprop`, for
    at least one tensor.

    The tensors of a list have one dtype: parameters FP32, BF16 or FP16, s and m FP32 or BF16. Gradients may have any;
    those that no kernel reads, and lists of mixed dtypes, are copied to FP32. `lr`, `grad_scale` and `found_inf` have
    one element. Tensors whose memory layout differs from their parameter's are copied, and if random bits are drawn,
    so are tensors that are not contiguous.

    `programs_of` returns how many programs work on a tensor, from its row of the table.

    Raises:
        ValueError: no kernel serves these dtypes.
    """
    device = params[0].device
    param, square = _dtype_of("params", params, GRAD_DTYPES), _dtype_of("squares", state.squares, STATE_DTYPES)
    buffer = _dtype_of("buffers", state.buffers, STATE_DTYPES)
    if _dtypes(grads) not in [{dtype} for dtype in GRAD_DTYPES[param]]:
        grads = [grad.float() for grad in grads]
    modes = (
        _mode(square, state.square_residuals, options.rounding),
        _mode(param, state.weight_residuals, options.weight_rounding),
    )
    residuals = state.square_residuals, state.weight_residuals
    lists = Lists(params, state.squares, state.buffers, *residuals, without_negation(grads))
    copies = Lists._make(match_layout(lists, in_any_order="stochastic" not in modes))
    nothing = (0,) * len(params)
    singles = [state.skipped, state.curvatures] if isinstance(state, ScaledState) else [state.skipped]
    addresses = [tuple(map(Tensor.data_ptr, x)) or nothing for x in (*copies[:-1], *singles)]
    lr_value, lr = split_lr(lr, device)
    return DiagonalCall(
        tensor_table((*addresses, tuple(map(Tensor.numel, params))), programs_of, device),
        table(tuple(map(Tensor.data_ptr, copies.grads)), device),
        random_bits(draws, device),
        lr,
        lr_value,
        on_device(device, scaling.grad_scale, 1.0),
        on_device(device, scaling.found_inf, 0.0),
        _scalars(options),
        (param, copies.grads[0].dtype, square, buffer),
        modes,
        lists,
        copies,
        [*chain(*singles)],
    )


def _scalars(options: DiagonalOptions | ScaledOptions) -> tuple[float, ...]:
    """Return `DiagonalCall.scalars`. With gradient momentum, weight decay is always decoupled."""
    batch_size, beta2, gamma, momentum, damping, weight_decay, decoupled, maximize, *_ = options
    if isinstance(options, ScaledOptions) and options.momentum_on == "gradient":
        decoupled = True
    decays = (0.0, weight_decay) if decoupled else (weight_decay, 0.0)
    scalars = (-1 if maximize else 1, 1 - beta2 * gamma, beta2 * batch_size, momentum, damping, *decays)
    return tuple(map(float, scalars))


def _dtypes(tensors: Sequence[Tensor]) -> set[torch.dtype]:
    return set(map(attrgetter("dtype"), tensors))


def _dtype_of(name: str, tensors: Sequence[Tensor], allowed: Collection[torch.dtype]) -> torch.dtype:
    """Return the one dtype of a list, which must be among those that are allowed."""
    dtypes = _dtypes(tensors)
    dtype = dtypes.pop()
    if dtypes or dtype not in allowed:
        found = ", ".join(map(str, (dtype, *dtypes)))
        raise ValueError(f"{name} of {found}: pass tensors of one dtype, {' or '.join(map(str, allowed))}.")
    return dtype


def _mode(dtype: torch.dtype, residuals: Sequence[Tensor], rounding: str) -> str:
    """Return how a tensor is rounded. As in eager PyTorch, residuals make it compensated."""
    if residuals:
        return "compensated"
    return "stochastic" if (dtype, rounding) == (torch.bfloat16, "stochastic") else "nearest"
