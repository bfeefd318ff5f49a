"""RF-RMSProp and RF-AdaGrad: the diagonal step without the square root, over lists of tensors.

Small tensors are concatenated and stepped as one vector, so that a thousand of them cost a few dozen operations. The
size of such a chunk is bounded, and with it the temporary memory: to a chunk, or to the largest tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rootfree_kernels import rounding as rnd
from rootfree_kernels.arguments import DiagonalOptions, DiagonalState, Draws, Scaling
from rootfree_kernels.eager.common import Stored, heavy_ball_

CHUNK_ELEMENTS = 1 << 20
"""Elements in a chunk: eight FP32 vectors of this length (32 MiB) fit a server's last-level cache."""


def chunks(tensors: list[Tensor]) -> Iterator[slice]:
    """Yield slices of neighbouring tensors with at most CHUNK_ELEMENTS elements together, or of one larger tensor."""
    start, total = 0, 0
    for index, tensor in enumerate(tensors):
        if index > start and total + tensor.numel() > CHUNK_ELEMENTS:
            yield slice(start, index)
            start, total = index, 0
        total += tensor.numel()
    if tensors:
        yield slice(start, len(tensors))


def flat(tensors: list[Tensor]) -> Tensor:
    """Return all elements as one vector, each tensor's in row-major order."""
    if len(tensors) == 1:
        return tensors[0].reshape(-1)
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def scatter(tensors: list[Tensor], vector: Tensor) -> None:
    """Copy a vector back to the tensors: the inverse of `flat`.

    A vector that is the only tensor's own memory is in place already. Their strides may differ along axes of length 1,
    and `copy_` then refuses the copy as an overlap.
    """
    if len(tensors) == 1 and vector.data_ptr() == tensors[0].data_ptr():
        return
    parts = vector.split([tensor.numel() for tensor in tensors])
    shaped = [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
    torch._foreach_copy_(tensors, shaped)


def gather_chunk(tensors: list[Tensor], residuals: list[Tensor], mode: str, draw_bits: rnd.RaggedBits) -> Stored:
    """Return the tensors of a chunk, with their residuals, as one vector."""
    return Stored(flat(tensors), flat(residuals) if residuals else None, mode, draw_bits)


def store_chunk(stored: Stored, new: Tensor, tensors: list[Tensor], residuals: list[Tensor]) -> None:
    """Round the new values of a chunk and copy them to the tensors."""
    value, residual = stored.rounded(new)
    scatter(tensors, value)
    if residual is not None:
        scatter(residuals, residual)


def descent_gradient(grads: list[Tensor], grad_scale: Tensor | None, maximize: bool) -> Tensor:
    """Return the unscaled gradient to descend along as one wide vector, which is not the caller's tensor if changed."""
    grad = flat(grads)
    grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
    if grad_scale is not None:
        grad = grad / grad_scale.reshape(())
    return -grad if maximize else grad


def _skips(step_size: Tensor, sizes: list[int], found_inf: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return keep [N], wide, 1 for elements to step and 0 for others, and bad [n], int32, 1 for tensors with others."""
    keep = step_size.abs() < torch.inf
    bad = ~torch.stack(torch._foreach_norm(list(step_size.split(sizes)), torch.inf)).isfinite()
    if found_inf is not None:
        overflow = found_inf.reshape(()) != 0
        keep, bad = keep & ~overflow, bad | overflow
    return keep.to(step_size.dtype), bad.to(torch.int32)


def rf_rmsprop(
    params: list[Tensor],  # n tensors of any shapes and strides
    state: DiagonalState,
    grads: list[Tensor],  # of the parameters' shapes, any dtype and strides
    lr: Tensor,  # 0-d, or one element
    draws: Draws,
    scaling: Scaling,
    options: DiagonalOptions,
) -> None:
    """Step n tensors in place (Lin et al., ICML 2024, Fig. 4 and 6).

        s ← (1 − β₂γ)s + β₂·B·g²,    m ← α₁m + g/(s + λ) + κμ,    μ ← μ − β₁m

    An element whose s or g/(s + λ) would not be finite keeps its s, m and μ. `state.skipped` of its tensor then grows
    by one.
    """
    decay, growth = 1 - options.beta2 * options.gamma, options.beta2 * options.batch_size
    for chunk in chunks(params):
        sizes = [tensor.numel() for tensor in params[chunk]]
        squares, buffers, skipped, square_residuals, weight_residuals = (x[chunk] for x in state)
        square_bits = rnd.RaggedBits(draws.seeds[chunk], draws.steps[chunk], rnd.SLOT_SQUARE, sizes)
        weight_bits = rnd.RaggedBits(draws.seeds[chunk], draws.steps[chunk], rnd.SLOT_WEIGHT, sizes)
        square = gather_chunk(squares, square_residuals, options.rounding, square_bits)
        weight = gather_chunk(params[chunk], weight_residuals, options.weight_rounding, weight_bits)
        grad = descent_gradient(grads[chunk], scaling.grad_scale, options.maximize)
        old_square = square.load()
        new_square = old_square * decay
        new_square.addcmul_(grad, grad, value=growth)
        direction = (grad / (new_square + options.damping)).to(new_square.dtype)

        keep, bad = _skips(new_square + direction, sizes, scaling.found_inf)
        torch._foreach_add_(skipped, list(bad.unbind()))
        new_square = old_square.lerp_(new_square.nan_to_num_(0.0, 0.0, 0.0), keep)
        new_weight, buffer = weight.load(), flat(buffers)
        buffer = buffer.to(torch.promote_types(buffer.dtype, torch.float32))
        direction.nan_to_num_(0.0, 0.0, 0.0)
        descent = options.momentum, options.weight_decay, options.decoupled
        heavy_ball_([new_weight], [buffer], [direction], keep[None], lr, *descent)
        scatter(buffers, buffer)
        store_chunk(square, new_square, squares, square_residuals)
        store_chunk(weight, new_weight, params[chunk], weight_residuals)
