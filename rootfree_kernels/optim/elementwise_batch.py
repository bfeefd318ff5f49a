"""The diagonal step of a list of tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rootfree_kernels import ops, ranges
from rootfree_kernels.arguments import DiagonalState, Draws, ScaledState
from rootfree_kernels.backend import Backend
from rootfree_kernels.ops.backends import choose
from rootfree_kernels.ops.dispatch import for_diagonal
from rootfree_kernels.optim.context import StepContext
from rootfree_kernels.optim.state_spec import (
    Group,
    arithmetic_dtype,
    is_pair,
    needs_bits,
    norms_dtype,
    real_view,
    state_dtype,
    takes_scaled_step,
    update_norm,
)


class ElementwiseBatch(NamedTuple):
    """Parameters of one dtype, with gradients of one dtype, that one `rf_rmsprop` or `scaled_rmsprop` steps."""

    params: list[Tensor]
    state: DiagonalState | ScaledState
    seeds: Tensor  # [n], int32
    backend: Backend
    owners: list[int]  # the row of each tensor's parameter in the counts of steps; empty if no random bits are drawn
    are_complex: bool  # each is then stepped as the real numbers that it consists of

    @property
    def label(self) -> str:
        """The name in profiles."""
        return f"diagonal step of {len(self.params)} tensor{'s' * (len(self.params) != 1)}"

    def step(self, grads: list[Tensor], steps: Tensor, context: StepContext) -> None:
        """Step the parameters along their gradients. `steps` [n] are the counts that the random bits depend on."""
        if context.is_profiled:
            ranges.phase("apply")
        params, state, draws, backend = self.params, self.state, Draws(self.seeds, steps), self.backend
        if self.are_complex:
            params, grads = list(map(real_view, params)), list(map(real_view, grads))
        lr, scaling, options = context.lr, context.scaling, context.options
        if isinstance(state, DiagonalState):
            ops.rf_rmsprop(params, state, grads, lr, draws, scaling, options.diagonal, backend)
        elif options.scaled is not None:  # as it is whenever the state is one for it
            ops.scaled_rmsprop(params, state, grads, lr, draws, scaling, options.scaled, backend)

    def own_tensors(self) -> list[Tensor]:
        """Return all tensors that no state of a parameter holds."""
        norms = self.state.update_norms if isinstance(self.state, ScaledState) else None
        return [self.seeds] if norms is None else [self.seeds, norms]


def elementwise_batches(
    rows: Mapping[Tensor, int],
    ranks: Sequence[int],
    excluded: set[Tensor],
    states: Any,
    group: Group,
    seed_of: Callable[[Tensor, int], int],
) -> list[ElementwiseBatch]:
    """Return the batches of the parameters in `rows` that are not excluded: one for each dtype of parameters and of
    gradients. `rows` maps every parameter with a gradient to its row in the counts of steps. `ranks` holds the overlap
    rank of every row, since parameters that share memory must be stepped one after the other."""
    lists: dict[Any, list[Tensor]] = defaultdict(list)
    for param, row in rows.items():
        if param.numel() and param not in excluded:
            alone = id(param) if group["foreach"] is False else None
            assert param.grad is not None  # `rows` holds no other parameters
            lists[param.dtype, param.grad.dtype, alone, ranks[row]].append(param)
    return [_batch(params, rows, states, group, seed_of) for params in lists.values()]


def _backend(params: list[Tensor], group: Group) -> Backend:
    """Return the backend of a list. Dispatch tables know the paper's diagonal step only."""
    first, dtype = params[0], arithmetic_dtype(params[0], group)
    if takes_scaled_step(group):
        return choose(first.device, dtype, group["fused"])
    return for_diagonal(params, dtype, group["fused"])


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
    kept = every("square"), every("momentum_buffer"), every("skipped")
    residuals = (
        every("square_residual") if is_pair(*stored[0]) else [],
        every("weight_residual") if is_pair(*stored[1]) else [],
    )
    state: DiagonalState | ScaledState = DiagonalState(*kept, *residuals)
    if takes_scaled_step(group):
        norms = None
        if group["update_norm"] is not None:
            sizes = [update_norm(param.shape, real_view(param).numel(), group) for param in params]
            norms = torch.tensor(sizes, dtype=norms_dtype(first, group), device=first.device)
        state = ScaledState(*kept, every("curvature") if group["relative_damping"] else [], *residuals, norms)
    return ElementwiseBatch(
        params,
        state,
        torch.tensor([seed_of(param, 0) for param in params], dtype=torch.int32, device=first.device),
        _backend(params, group),
        [rows[param] for param in params] if any(needs_bits(*kind) for kind in stored) else [],
        first.is_complex(),
    )
