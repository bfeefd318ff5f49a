"""What the kernels of the diagonal step on a GPU are handed, Triton's and CUDA's: a table of tensors that lie alike in
memory, numbers, dtypes and modes of rounding. (C++ takes the tensors themselves.)"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from rootfree_kernels.memory_order import alike, without_negation, write_back
from rootfree_kernels.tables import Draws, TensorTable, draws, on_device, split_lr, table, tensor_table

GRAD_DTYPES = {
    torch.float32: (torch.float32, torch.bfloat16),
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float16: (torch.float16, torch.float32),
}
"""Dtypes of gradients that are read as they are, by dtype of the parameters; others are made FP32 first."""

STATE_DTYPES = (torch.float32, torch.bfloat16)


class Lists(NamedTuple):
    """The lists of tensors of a call; residuals may be empty."""

    params: Sequence[Tensor]
    squares: Sequence[Tensor]
    buffers: Sequence[Tensor]
    square_residuals: Sequence[Tensor]
    weight_residuals: Sequence[Tensor]
    grads: Sequence[Tensor]
    skipped: Sequence[Tensor]


class DiagonalCall(NamedTuple):
    """The arguments of a kernel, and what has to be done when it has been launched."""

    where: TensorTable  # addresses of μ, s, m, two residuals and `skipped`; size; first program
    grads: Tensor  # addresses
    drawn: Draws
    lr: Tensor  # this and `lr_value` add up to the learning rate
    lr_value: float
    grad_scale: Tensor
    found_inf: Tensor
    numbers: tuple[float, ...]  # sign, 1 − β₂γ, β₂B, α₁, λ, κ, κ where it is decoupled
    dtypes: tuple[torch.dtype, ...]  # of params, gradients, squares and buffers
    modes: tuple[str, str]  # in which squares and params are stored
    lists: Lists
    copies: Lists  # what the kernel works on: the same tensors, but for those that lie otherwise

    def finish(self) -> None:
        """Tell autograd what was changed, and copy back what had to be copied."""
        *state, _, skipped = self.copies
        torch.autograd.graph.increment_version([*chain(*state, skipped)])
        write_back(self.lists[:-2], self.copies[:-2])


def diagonal_call(
    programs_of: Callable[[tuple[int, ...]], int],
    params: list[Tensor],
    squares: list[Tensor],
    buffers: list[Tensor],
    skipped: list[Tensor],
    square_residuals: list[Tensor],
    weight_residuals: list[Tensor],
    grads: Sequence[Tensor],
    lr: Tensor,
    seeds: Tensor,
    steps: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    batch_size: float,
    beta2: float,
    gamma: float,
    momentum: float,
    damping: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    rounding: str,
    weight_rounding: str,
) -> DiagonalCall:
    """The call of a kernel with the arguments of `rootfree_kernels.eager.rf_rmsprop`; there is at least one tensor.

    In each list all tensors are of one dtype: parameters FP32, BF16 or FP16, gradients any (copies are made of those
    in dtypes that no kernel reads, and where they are mixed), s and m FP32 or BF16. `lr`, `grad_scale` and `found_inf`
    have one element. Of tensors that do not lie in memory as their parameter does, or row by row where random bits are
    drawn, copies are made. `programs_of` says how many programs work on a tensor, from a row of the table.

    Raises:
        ValueError: dtypes that no kernel serves.
    """
    device = params[0].device
    param, square = _dtype_of("params", params, GRAD_DTYPES), _dtype_of("squares", squares, STATE_DTYPES)
    buffer = _dtype_of("buffers", buffers, STATE_DTYPES)
    if _dtypes(grads) not in [{dtype} for dtype in GRAD_DTYPES[param]]:
        grads = [grad.float() for grad in grads]
    grads = without_negation(grads)
    modes = (_mode(square, square_residuals, rounding), _mode(param, weight_residuals, weight_rounding))
    decays = (0.0, weight_decay) if decoupled else (weight_decay, 0.0)
    numbers = (-1 if maximize else 1, 1 - beta2 * gamma, beta2 * batch_size, momentum, damping, *decays)

    lists = Lists(params, squares, buffers, square_residuals, weight_residuals, grads, skipped)
    copies = Lists._make([*alike(lists[:-1], in_any_order="stochastic" not in modes), skipped])
    nothing = (0,) * len(params)
    *state, grads_alike, _ = copies
    addresses = [tuple(map(Tensor.data_ptr, tensors)) or nothing for tensors in (*state, skipped)]
    lr_value, lr = split_lr(lr, device)
    return DiagonalCall(
        tensor_table((*addresses, tuple(map(Tensor.numel, params))), programs_of, device),
        table(tuple(map(Tensor.data_ptr, grads_alike)), device),
        draws(seeds, steps, device),
        lr,
        lr_value,
        on_device(device, grad_scale, 1.0),
        on_device(device, found_inf, 0.0),
        tuple(map(float, numbers)),
        (param, grads_alike[0].dtype, square, buffer),
        modes,
        lists,
        copies,
    )


def _dtypes(tensors: Sequence[Tensor]) -> set[torch.dtype]:
    return set(map(attrgetter("dtype"), tensors))


def _dtype_of(name: str, tensors: Sequence[Tensor], allowed: Collection[torch.dtype]) -> torch.dtype:
    """The one dtype of a list."""
    dtypes = _dtypes(tensors)
    dtype = dtypes.pop()
    if dtypes or dtype not in allowed:
        found = ", ".join(map(str, (dtype, *dtypes)))
        raise ValueError(f"{name} of {found}: pass tensors of one dtype, {' or '.join(map(str, allowed))}.")
    return dtype


def _mode(dtype: torch.dtype, residuals: Sequence[Tensor], rounding: str) -> str:
    """How a tensor is stored; as in eager PyTorch, it is the residuals that make it compensated."""
    if residuals:
        return "compensated"
    return "stochastic" if (dtype, rounding) == (torch.bfloat16, "stochastic") else "nearest"
