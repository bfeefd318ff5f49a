"""The preconditioned step of the weights of a batch of blocks.

    U = CCᵀ·G·KKᵀ,    buf ← α₁buf + U + κW,    W ← W − β₁buf                       momentum_on="update", the paper's

    M ← α₁M + (1−α₁)G,    M' = (1−α₁)G + α₁M with `nesterov`, otherwise M          momentum_on="gradient"
    U = CCᵀ·M'·KKᵀ, or U = C·M'·K for the whitened direction,    W ← (1 − β₁κ)W − β₁U

If `update_norms` are given, U is scaled to them: U ← U·norm/‖U‖_F.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rootfree_kernels import ranges
from rootfree_kernels import rounding as rnd
from rootfree_kernels.arguments import Draws, Gathered, Preconditioner, StepOptions, Weights
from rootfree_kernels.blocks import tiled_blocks
from rootfree_kernels.eager.common import WIDE, Stored, cache_slices, descend_, heavy_ball_, some_blocks


class Blocks(NamedTuple):
    """`Weights` of blocks: views [p, d] in place of tensors that are cut into tiles."""

    params: list[Tensor]
    buffers: list[Tensor]
    residuals: list[Tensor]
    skipped: Tensor  # [L]
    update_norms: Tensor | None  # [L]


def precondition_(preconditioner: Preconditioner, grad: Tensor) -> Tensor:
    """Overwrite G [L, p, d] with U = CCᵀ·G·KKᵀ and return it. Matrices that are `cached` save half of the work."""
    c, k = preconditioner.factor_c.to(grad.dtype), preconditioner.factor_k.to(grad.dtype)
    if preconditioner.cached:
        return torch.bmm(torch.bmm(c, grad), k, out=grad)
    half = torch.bmm(c.mT, grad)
    torch.bmm(half, k, out=grad)
    return torch.bmm(torch.bmm(c, grad, out=half), k.mT, out=grad)


def kron_step(
    weights: Weights,
    preconditioner: Preconditioner,
    gathered: Gathered,
    lr: Tensor,  # 0-d, or one element
    draws: Draws,
    found_inf: Tensor | None,  # one element
    options: StepOptions,
) -> None:
    """Step the weights of L blocks in place, along their preconditioned gradients.

    A block keeps its weights and its momentum, and its `skipped` grows by one, if ‖G‖ is not finite, if its factors
    were not updated (`preconditioner.ok`), or if `found_inf` is not 0. An element of U that is not finite counts as 0.
    The block's `skipped` then grows by one as well, and so it does if ‖U‖ overflows where U is scaled.

    Args:
        weights: parameters, momentum buffers, residuals, tiles, `skipped` and the norms of the updates.
        preconditioner: C and K; or, as they are, P_C = CCᵀ and P_K = KKᵀ, or C and K of the whitened direction.
        gathered: what `kron_gather` returned for these tiles. G is overwritten.
        lr: the step size β₁, FP64 for a Python number.
        draws: seeds and steps of the L blocks.
    """
    rows, cols = gathered.grad.shape[1:]
    lists = weights.params, weights.buffers, weights.residuals
    params, buffers, residuals = tiled_blocks(lists, weights.tiles, rows, cols)
    blocks = Blocks(params, buffers, residuals, weights.skipped, weights.update_norms)
    for part in cache_slices(len(gathered.grad), rows, cols, gathered.grad.device):
        some, factors, drawn = blocks, preconditioner, draws
        if part.stop < len(gathered.grad) or part.start:  # not all blocks at once
            some, drawn = some_blocks(blocks, part), some_blocks(draws, part)
            factors = some_blocks(preconditioner, part)
        _step_blocks(some, factors, gathered.grad[part], lr, drawn, found_inf, options)
    if ranges.listened:
        ranges.end_phase()


def _step_blocks(
    blocks: Blocks,
    preconditioner: Preconditioner,
    grad: Tensor,
    lr: Tensor,
    draws: Draws,
    found_inf: Tensor | None,
    options: StepOptions,
) -> None:
    """Step as many blocks as are worked on at a time."""
    if ranges.listened:
        ranges.phase("precondition")
    wide_dtype = torch.promote_types(grad.dtype, torch.float32)
    finite = torch.linalg.vector_norm(grad.to(wide_dtype), dim=(-2, -1)) < torch.inf
    if preconditioner.ok is not None:
        finite = finite & preconditioner.ok
    if found_inf is not None:
        finite = finite & (found_inf.reshape(()) == 0)

    params, buffers, residuals = blocks.params, blocks.buffers, blocks.residuals
    bits = rnd.BlockBits(draws.seeds, draws.steps, rnd.SLOT_WEIGHT, grad[0].numel())
    buffer = _as_batch(buffers, [], "nearest", bits)
    wide_buffers = buffers if buffer is None else list(buffer.load().unbind())
    keep = finite.to(wide_buffers[0].dtype)
    if options.momentum_on == "gradient":
        average_gradients_(grad, wide_buffers, keep, options)

    direction = precondition_(preconditioner, grad).to(wide_dtype)
    flat = direction.flatten(1)
    if blocks.update_norms is None:
        # These take less time on a CPU than an infinity norm.
        whole = (flat.amax(1) < torch.inf) & (flat.amin(1) > -torch.inf)
    else:
        whole = torch.linalg.vector_norm(flat, dim=1) < torch.inf

    if ranges.listened:
        ranges.phase("apply")
    weight = _as_batch(params, residuals, options.rounding, bits)
    wide_weights = params if weight is None else list(weight.load().unbind())
    direction = direction.nan_to_num_(0.0, 0.0, 0.0).to(wide_buffers[0].dtype)
    if blocks.update_norms is not None:
        norms = torch.linalg.vector_norm(direction, dim=(-2, -1))
        direction *= torch.where(norms > 0, blocks.update_norms / norms, 0.0)[:, None, None]
    blocks.skipped.add_(~(finite & whole))
    directions = list(direction.unbind())
    if options.momentum_on == "gradient":
        descend_(wide_weights, directions, keep * lr, options.weight_decay)
    else:
        descent = options.momentum, options.weight_decay, options.decoupled
        heavy_ball_(wide_weights, wide_buffers, directions, keep, lr, *descent)
    if weight is not None:
        _store_batch(weight, wide_weights, params, residuals)
    if buffer is not None:
        _store_batch(buffer, wide_buffers, buffers, [])


def average_gradients_(grad: Tensor, buffers: list[Tensor], keep: Tensor, options: StepOptions) -> None:
    """Update M ← α₁M + (1−α₁)G of the blocks to `keep`, and overwrite G [L, p, d] with M, or with Nesterov's M'."""
    wide = grad.to(buffers[0].dtype).nan_to_num(0.0, 0.0, 0.0)
    gradients, weight = list(wide.unbind()), 1 - options.momentum
    torch._foreach_lerp_(buffers, gradients, list((keep * weight).unbind()))
    if options.nesterov:
        torch._foreach_lerp_(gradients, buffers, options.momentum)
        grad.copy_(wide)
    else:
        torch._foreach_copy_(list(grad.unbind()), buffers)


def _as_batch(tensors: list[Tensor], residuals: list[Tensor], mode: str, draw_bits: rnd.BlockBits) -> Stored | None:
    """Return blocks of a narrow dtype as one batch to load and to round. None for wide ones: they are stepped in
    place."""
    if tensors[0].dtype in WIDE:
        return None
    residual = torch.stack(residuals) if residuals else None
    return Stored(torch.stack(tensors), residual, mode, draw_bits)


def _store_batch(stored: Stored, new: list[Tensor], tensors: list[Tensor], residuals: list[Tensor]) -> None:
    """Round the new values of a batch and copy them to the blocks."""
    value, residual = stored.rounded(torch.stack(new))
    torch._foreach_copy_(tensors, list(value.unbind()))
    if residual is not None:
        torch._foreach_copy_(residuals, list(residual.unbind()))
