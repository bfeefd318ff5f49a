"""The diagonal step with what surrounds the recipe's matrices: each tensor has a scale of its own.

    s ← (1 − β₂γ)s + β₂·B·g²                       s starts at 1, or at 0 with `factor_init="gradient"`
    q ← (1 − β₂γ)q + β₂·B·mean(g²)                 the mean of s; for `relative_damping`
    M ← α₁M + (1−α₁)g,    M' = (1−α₁)g + α₁M       momentum_on="gradient"; M' is for `nesterov`, otherwise it is M
    u = M'/(s + λ)                                 direction="root_free"; with `relative_damping` λq replaces λ
    u = M'/(√s + √λ)                               direction="whitened"
    u ← u·norm/‖u‖                                 if `update_norms` are given
    μ ← (1 − β₁κ)μ − β₁u

With momentum_on="update", M' is g, and u takes a heavy-ball step as in `rf_rmsprop`. u is computed from s as it is
stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rootfree_kernels import rounding as rnd
from rootfree_kernels.arguments import Draws, ScaledOptions, ScaledState, Scaling
from rootfree_kernels.eager.common import WIDE, descend_, heavy_ball_, some_blocks
from rootfree_kernels.eager.rf_rmsprop import (
    chunks,
    descent_gradient,
    flat,
    gather_chunk,
    scatter,
    store_chunk,
)


def scaled_rmsprop(
    params: list[Tensor],  # n tensors of any shapes and strides
    state: ScaledState,
    grads: list[Tensor],  # of the parameters' shapes, any dtype and strides
    lr: Tensor,  # 0-d, or one element
    draws: Draws,
    scaling: Scaling,
    options: ScaledOptions,
) -> None:
    """Step n tensors in place.

    A tensor keeps its weights and its state, and its `skipped` grows by one, if B·Σg² is not finite. With relative
    damping s and q also stay while a gradient is 0. An element of u that is not finite counts as 0. The tensor's
    `skipped` then grows by one as well, unless u is 0/0, and so it does if ‖u‖ overflows where u is scaled.
    """
    for chunk in chunks(params):
        some, drawn = some_blocks(state, chunk), some_blocks(draws, chunk)
        _step_chunk(params[chunk], some, grads[chunk], lr, drawn, scaling, options)


def _step_chunk(
    params: list[Tensor],
    state: ScaledState,
    grads: list[Tensor],
    lr: Tensor,
    draws: Draws,
    scaling: Scaling,
    options: ScaledOptions,
) -> None:
    """Step as many tensors as are worked on at a time."""
    sizes = [param.numel() for param in params]
    square_bits = rnd.RaggedBits(draws.seeds, draws.steps, rnd.SLOT_SQUARE, sizes)
    weight_bits = rnd.RaggedBits(draws.seeds, draws.steps, rnd.SLOT_WEIGHT, sizes)
    square = gather_chunk(state.squares, state.square_residuals, options.rounding, square_bits)
    weight = gather_chunk(params, state.weight_residuals, options.weight_rounding, weight_bits)
    grad = descent_gradient(grads, scaling.grad_scale, options.maximize)

    old_square = square.load()
    dtype = old_square.dtype
    lengths = rnd.lengths_of(tuple(sizes), grad.device)
    square_sum = _norms(grad.to(dtype), sizes).square() * options.batch_size
    ok = square_sum * max(1.0, options.beta2) < torch.inf
    if scaling.found_inf is not None:
        ok = ok & (scaling.found_inf.reshape(()) == 0)
    keep = _spread(ok.to(dtype), lengths, len(grad))
    grad = torch.where(keep > 0, grad.to(dtype), 0.0)

    decay = 1 - options.beta2 * options.gamma
    is_whitened = options.direction == "whitened"
    damping: float | Tensor = options.damping**0.5 if is_whitened else options.damping
    moves = keep  # where s moves
    if options.relative_damping:
        curvatures, kept = torch.stack(state.curvatures), ok & (square_sum > 0)
        means = square_sum / lengths.clamp(min=1)
        curvatures = torch.where(kept, curvatures * decay + options.beta2 * means, curvatures)
        torch._foreach_copy_(state.curvatures, list(curvatures.unbind()))
        spread = _spread(curvatures.to(dtype), lengths, len(grad))
        damping = damping * (spread.sqrt() if is_whitened else spread)
        moves = _spread(kept.to(dtype), lengths, len(grad))

    new_square = old_square * decay
    new_square.addcmul_(grad, grad, value=options.beta2 * options.batch_size)
    stored = old_square.lerp(new_square, moves)
    store_chunk(square, stored, state.squares, state.square_residuals)
    if square.value.dtype not in WIDE:
        stored = gather_chunk(state.squares, state.square_residuals, options.rounding, square_bits).load()

    buffer = flat(state.buffers)
    buffer = buffer.to(torch.promote_types(buffer.dtype, dtype))
    averages = options.momentum_on == "gradient"
    if averages:
        buffer = buffer.lerp(grad.to(buffer.dtype), keep * (1 - options.momentum))
        grad = grad.lerp(buffer.to(dtype), options.momentum) if options.nesterov else buffer.to(dtype)
    direction = grad / ((stored.sqrt() if is_whitened else stored) + damping)
    if not options.damping:
        direction.nan_to_num_(0.0, torch.inf, -torch.inf)  # only 0/0 is NaN: an element without any gradient so far
    # Multiplied by 0, only elements that are not finite count. An infinity norm takes more time on a CPU.
    whole = _norms(direction if state.update_norms is not None else direction * 0.0, sizes) < torch.inf
    if options.relative_damping:
        whole = whole | (curvatures == 0)  # a tensor without any gradient so far
    direction = direction.nan_to_num_(0.0, 0.0, 0.0).to(buffer.dtype)
    if state.update_norms is not None:
        norms = _norms(direction, sizes)
        direction *= _spread(torch.where(norms > 0, state.update_norms / norms, 0.0), lengths, len(grad))

    torch._foreach_add_(state.skipped, list((~(ok & whole)).to(torch.int32).unbind()))
    new_weight = weight.load()
    if averages:
        descend_([new_weight], [direction], (keep * lr)[None], options.weight_decay)
    else:
        descent = options.momentum, options.weight_decay, options.decoupled
        heavy_ball_([new_weight], [buffer], [direction], keep[None], lr, *descent)
    scatter(state.buffers, buffer)
    store_chunk(weight, new_weight, params, state.weight_residuals)


def _norms(vector: Tensor, sizes: list[int]) -> Tensor:
    """Return the norms [n] of n tensors that are concatenated."""
    return torch.stack(torch._foreach_norm(list(vector.split(sizes))))


def _spread(values: Tensor, lengths: Tensor, total: int) -> Tensor:
    """Return the values [n] of n concatenated tensors, repeated for their elements: [N]."""
    return values.repeat_interleave(lengths, output_size=total)
