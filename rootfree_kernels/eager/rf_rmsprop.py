"""RF-RMSProp and RF-AdaGrad: the diagonal step without the square root, over lists of tensors.

Small tensors are laid end to end and stepped as one vector, so that a thousand of them cost a few dozen operations;
such a chunk is bounded, so that temporary memory stays within it, or within the largest tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rootfree_kernels import rounding as rnd
from rootfree_kernels.eager.common import Stored, as_scalar, heavy_ball_, wide

CHUNK_NUMBERS = 1 << 20
"""Numbers in a chunk: eight FP32 vectors of this length (32 MiB) fit a server's last-level cache."""


def chunks(tensors: list[Tensor]) -> Iterator[slice]:
    """Slices of neighbouring tensors that hold at most CHUNK_NUMBERS numbers together, or one larger tensor."""
    start, total = 0, 0
    for index, tensor in enumerate(tensors):
        if index > start and total + tensor.numel() > CHUNK_NUMBERS:
            yield slice(start, index)
            start, total = index, 0
        total += tensor.numel()
    if tensors:
        yield slice(start, len(tensors))


def _flat(tensors: list[Tensor]) -> Tensor:
    """All numbers as one vector, each tensor's in row-major order."""
    if len(tensors) == 1:
        return tensors[0].reshape(-1)
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _scatter(tensors: list[Tensor], vector: Tensor) -> None:
    """The inverse of `_flat`."""
    parts = vector.split([tensor.numel() for tensor in tensors])
    shaped = [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
    torch._foreach_copy_(tensors, shaped)


def _gather(tensors: list[Tensor], residuals: list[Tensor], mode: str, draw_bits: rnd.RaggedBits) -> Stored:
    return Stored(_flat(tensors), _flat(residuals) if residuals else None, mode, draw_bits)


def _store(stored: Stored, new: Tensor, tensors: list[Tensor], residuals: list[Tensor]) -> None:
    value, residual = stored.rounded(new)
    _scatter(tensors, value)
    if residual is not None:
        _scatter(residuals, residual)


def _descent_gradient(grads: list[Tensor], grad_scale: Tensor | None, maximize: bool) -> Tensor:
    """The gradient to descend along, wide, unscaled: one vector, never the caller's own tensor."""
    grad = wide(_flat(grads))
    if grad_scale is not None:
        grad = grad / as_scalar(grad_scale)
    return -grad if maximize else grad


def _skips(step_size: Tensor, sizes: list[int], found_inf: Tensor | None) -> tuple[Tensor, Tensor]:
    """(keep [N], wide: 1 for numbers to step, else 0; bad [n], int32: 1 for tensors that leave any out)."""
    keep = step_size.abs() < torch.inf
    bad = ~torch.stack(torch._foreach_norm(list(step_size.split(sizes)), torch.inf)).isfinite()
    if found_inf is not None:
        overflow = as_scalar(found_inf) != 0
        keep, bad = keep & ~overflow, bad | overflow
    return keep.to(step_size.dtype), bad.to(torch.int32)


def rf_rmsprop(
    params: list[Tensor],
    squares: list[Tensor],
    buffers: list[Tensor],
    skipped: list[Tensor],
    square_residuals: list[Tensor],
    weight_residuals: list[Tensor],
    grads: list[Tensor],
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
) -> None:
    """One step of n tensors of any shapes and strides, in place (Lin et al., ICML 2024, Fig. 4 and 6):

        s ← (1 − β₂γ)s + β₂·B·g²,    m ← α₁m + g/(s + λ) + κμ,    μ ← μ − β₁m

    `squares` (s) and `buffers` (m) are wide or BF16; residuals are int16, for compensated BF16, else none at all.
    A number whose s or g/(s + λ) would not be finite keeps its s, m and μ; `skipped` (0-d, int32) of its tensor
    grows by one in such a step.
    """
    for chunk in chunks(params):
        sizes = [tensor.numel() for tensor in params[chunk]]
        square_bits = rnd.RaggedBits(seeds[chunk], steps[chunk], rnd.SLOT_SQUARE, sizes)
        weight_bits = rnd.RaggedBits(seeds[chunk], steps[chunk], rnd.SLOT_WEIGHT, sizes)
        square = _gather(squares[chunk], square_residuals[chunk], rounding, square_bits)
        weight = _gather(params[chunk], weight_residuals[chunk], weight_rounding, weight_bits)
        grad = _descent_gradient(grads[chunk], grad_scale, maximize)
        new_square = square.load() * (1 - beta2 * gamma)
        new_square.addcmul_(grad, grad, value=beta2 * batch_size)
        direction = (grad / (new_square + damping)).to(new_square.dtype)

        keep, bad = _skips(new_square + direction, sizes, found_inf)
        torch._foreach_add_(skipped[chunk], list(bad.unbind()))
        new_square = square.load().lerp_(new_square.nan_to_num_(0.0, 0.0, 0.0), keep)
        new_weight, buffer = weight.load(), wide(_flat(buffers[chunk]))
        direction.nan_to_num_(0.0, 0.0, 0.0)
        heavy_ball_([new_weight], [buffer], [direction], keep[None], lr, momentum, weight_decay, decoupled)
        _scatter(buffers[chunk], buffer)
        _store(square, new_square, squares[chunk], square_residuals[chunk])
        _store(weight, new_weight, params[chunk], weight_residuals[chunk])
