"""The diagonal step of a list of tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rootfree_kernels import ops, ranges
from rootfree_kernels.arguments import DiagonalState, Draws
from rootfree_kernels.backend import Backend
from rootfree_kernels.ops.dispatch import for_diagonal
from rootfree_kernels.optim.context import StepContext
from rootfree_kernels.optim.state_spec import Group, arithmetic_dtype, is_pair, needs_bits, state_dtype


class ElementwiseBatch(NamedTuple):
    """Parameters of one dtype, with gradients of one dtype, that one `rf_rmsprop` steps."""

    params: list[Tensor]
    state: DiagonalState
    seeds: Tensor  # [n], int32
    backend: Backend
    owners: list[int]  # the row of each tensor's parameter in the counts of steps; empty if no random bits are drawn

    @property
    def label(self) -> str:
        """The name in profiles."""
        return f"diagonal step of {len(self.params)} tensor{'s' * (len(self.params) != 1)}"

    def step(self, grads: list[Tensor], steps: Tensor, context: StepContext) -> None:
        """Step the parameters along their gradients. `steps` [n] are the counts that the random bits depend on."""
        if context.is_profiled:
            ranges.phase("apply")
        draws = Draws(self.seeds, steps)
        options, backend = context.options.diagonal, self.backend
        ops.rf_rmsprop(self.params, self.state, grads, context.lr, draws, context.scaling, options, backend)


def elementwise_batches(
    rows: Mapping[Tensor, int],
    excluded: set[Tensor],
    states: Any,
    group: Group,
    seed_of: Callable[[Tensor, int], int],
) -> list[ElementwiseBatch]:
    """Return the batches of the parameters in `rows` that are not excluded: one for each dtype of parameters and of
    gradients. `rows` maps every parameter with a gradient to its row in the counts of steps."""
    lists: dict[Any, list[Tensor]] = defaultdict(list)
    for param in rows:
        if param.numel() and param not in excluded:
            alone = id(param) if group["foreach"] is False else None
            assert param.grad is not None  # `rows` holds no other parameters
            lists[param.dtype, param.grad.dtype, alone].append(param)
    return [_batch(params, rows, states, group, seed_of) for params in lists.values()]


def _batch(
    params: list[Tensor],
    rows: Mapping[Tensor, int],
    states: Any,
    group: Group,
    seed_of: Callable[[Tensor, int], int],
) -> ElementwiseBatch:
    def every(name: str) -> list[Tensor]:
        return [states[param][name] for param in params]

    first = params[0]
    stored = (state_dtype(first, group), group["rounding"]), (first.dtype, group["weight_rounding"])
    state = DiagonalState(
        every("square"),
        every("momentum_buffer"),
        every("skipped"),
        every("square_residual") if is_pair(*stored[0]) else [],
        every("weight_residual") if is_pair(*stored[1]) else [],
    )
    return ElementwiseBatch(
        params,
        state,
        torch.tensor([seed_of(param, 0) for param in params], dtype=torch.int32, device=first.device),
        for_diagonal(params, arithmetic_dtype(first, group), group["fused"]),
        [rows[param] for param in params] if any(needs_bits(*kind) for kind in stored) else [],
    )
