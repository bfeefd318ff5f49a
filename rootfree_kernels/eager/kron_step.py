"""The preconditioned step of the weights of a batch of blocks.

U = CCᵀ·G·KKᵀ,    buf ← α₁buf + U + κW,    W ← W − β₁buf
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rootfree_kernels import ranges
from rootfree_kernels import rounding as rnd
from rootfree_kernels.arguments import Draws, Gathered, Preconditioner, StepOptions, Weights
from rootfree_kernels.blocks import tiled_blocks
from rootfree_kernels.eager.common import WIDE, Stored, cache_slices, heavy_ball_, some_blocks


class Blocks(NamedTuple):
    """`Weights` of blocks: views [p, d] in place of tensors that are cut into tiles."""

    params: list[Tensor]
    buffers: list[Tensor]
    residuals: list[Tensor]
    skipped: Tensor  # [L]


def precondition_(preconditioner: Preconditioner, grad: Tensor) -> Tensor:
    """Overwrite G [L, p, d] with U = CCᵀ·G·KKᵀ and return it. Cached products save half of the work."""
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

    Args:
        weights: parameters, momentum buffers, residuals, tiles and `skipped`.
        preconditioner: C and K, or P_C = CCᵀ and P_K = KKᵀ.
        gathered: what `kron_gather` returned for these tiles. G is overwritten.
        lr: the step size β₁, FP64 for a Python number.
        draws: seeds and steps of the L blocks.
    """
    rows, cols = gathered.grad.shape[1:]
    lists = weights.params, weights.buffers, weights.residuals
    params, buffers, residuals = tiled_blocks(lists, weights.tiles, rows, cols)
    blocks = Blocks(params, buffers, residuals, weights.skipped)
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
    blocks.skipped.add_(~finite)

    direction = precondition_(preconditioner, grad).to(wide_dtype)

    if ranges.listened:
        ranges.phase("apply")
    params, buffers, residuals = blocks.params, blocks.buffers, blocks.residuals
    bits = rnd.BlockBits(draws.seeds, draws.steps, rnd.SLOT_WEIGHT, grad[0].numel())
    weight = _as_batch(params, residuals, options.rounding, bits)
    buffer = _as_batch(buffers, [], "nearest", bits)
    wide_weights = params if weight is None else list(weight.load().unbind())
    wide_buffers = buffers if buffer is None else list(buffer.load().unbind())
    direction = direction.nan_to_num_(0.0, 0.0, 0.0).to(wide_buffers[0].dtype)
    keep = finite.to(direction.dtype)
    descent = options.momentum, options.weight_decay, options.decoupled
    heavy_ball_(wide_weights, wide_buffers, list(direction.unbind()), keep, lr, *descent)
    if weight is not None:
        _store_batch(weight, wide_weights, params, residuals)
    if buffer is not None:
        _store_batch(buffer, wide_buffers, buffers, [])


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
