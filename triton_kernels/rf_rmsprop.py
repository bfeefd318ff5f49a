"""RF-RMSProp and RF-AdaGrad: the whole diagonal step of a list of tensors in one launch.

    s ← (1 − β₂γ)s + β₂·B·g²,    m ← α₁m + g/(s + λ) + κμ,    μ ← μ − β₁m

A program takes a chunk of one tensor. A chunk that is whole and begins on 16 bytes in every one of its tensors is read
and written without masks, in accesses of 128 bits (64 of BF16 next to FP32, so that the same thread holds the same
numbers of both); any other, number by number. Tensors of one list may be of both kinds.

The last program of a tensor to finish counts the step in `skipped` where any of them left a number out. Which one is
the last is told by a counter that it sets back to 0: the same launch can be replayed in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from rootfree_kernels import rounding as rnd
from rootfree_kernels.arguments import DiagonalOptions, DiagonalState, Draws, Scaling
from rootfree_kernels.pointer_tables.rf_rmsprop import GRAD_DTYPES, STATE_DTYPES, diagonal_call
from rootfree_kernels.triton_kernels.common import (
    TRITON_DTYPES,
    is_finite,
    load_masked,
    load_stored,
    pointer_to,
    random_key,
    store_rounded,
)
from rootfree_kernels.triton_kernels.configuration import Configuration
from rootfree_kernels.triton_kernels.launch import kernel, launch

CHUNK, NUM_WARPS = 1024, 4
"""Numbers of a program, eight for each thread: in 40 to 64 registers, with enough bytes on their way for any memory."""

_CHUNK, _PART = tl.constexpr(CHUNK), tl.constexpr(CHUNK // 4)  # masked chunks in parts: they take more registers
_COLUMNS = tl.constexpr(8)
_SLOT_SQUARE, _SLOT_WEIGHT = tl.constexpr(rnd.SLOT_SQUARE), tl.constexpr(rnd.SLOT_WEIGHT)


@triton.jit
def _number(address, start, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """The pointer to number `start` of the tensor at an address."""
    return pointer_to(address + start * (DTYPE.primitive_bitwidth // 8), DTYPE, VECTOR)


@triton.jit
def _step(
    addresses,
    start,
    offsets,
    mask,
    keys,
    numbers,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    SQUARE: tl.constexpr,
    BUFFER: tl.constexpr,
    ROUNDING: tl.constexpr,
    WEIGHT_ROUNDING: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Step the numbers at `start + offsets` of the tensors at these addresses; 1 if any was left out, else 0."""
    param, grad, square, buffer, square_residual, weight_residual = addresses
    grad_factor, lr, decay, growth, momentum, damping, weight_decay, shrinkage = numbers
    param_ptr, grad_ptr = _number(param, start, PARAM, VECTOR), _number(grad, start, GRAD, VECTOR)
    square_ptr, buffer_ptr = _number(square, start, SQUARE, VECTOR), _number(buffer, start, BUFFER, VECTOR)
    square_residual_ptr = _number(square_residual, start, tl.int16, VECTOR)
    weight_residual_ptr = _number(weight_residual, start, tl.int16, VECTOR)
    g = load_masked(grad_ptr + offsets, mask).to(tl.float32) * grad_factor
    old_s = load_stored(square_ptr, square_residual_ptr, offsets, mask, ROUNDING)
    old_m = load_masked(buffer_ptr + offsets, mask).to(tl.float32)
    old_w = load_stored(param_ptr, weight_residual_ptr, offsets, mask, WEIGHT_ROUNDING)

    s = old_s * decay + growth * g * g
    direction = g / (s + damping)
    keep = is_finite(s + direction)
    # A decay of 0 times a weight that is not finite would be NaN.
    m = momentum * old_m + direction + tl.where(weight_decay != 0, weight_decay * old_w, 0.0)
    w = old_w - tl.where(shrinkage != 0, shrinkage * old_w, 0.0) - lr * m

    index = start.to(tl.int32) + offsets
    s, m, w = tl.where(keep, s, old_s), tl.where(keep, m, old_m), tl.where(keep, w, old_w)
    store_rounded(s, square_ptr, square_residual_ptr, offsets, mask, keys[0], index, ROUNDING)
    store_rounded(m, buffer_ptr, buffer_ptr, offsets, mask, keys[0], index, "nearest")
    store_rounded(w, param_ptr, weight_residual_ptr, offsets, mask, keys[1], index, WEIGHT_ROUNDING)
    if mask is not None:
        keep = keep | ~mask
    return tl.max((~keep).to(tl.int32))


@kernel
def rf_rmsprop_kernel(
    tensor_table,  # [n, 8]: addresses of μ, s, m, two residuals and `skipped`; size; first program
    grad_table,
    owner_table,  # [programs]: whose tensor a program works on
    counter_ptr,  # [n]: programs that finished, and, in the upper half, how many of them left numbers out
    seed_ptr,
    step_ptr,
    lr_ptr,
    scale_ptr,
    found_inf_ptr,
    seed_stride,  # 0 where no bits are drawn
    step_stride,  # 0 where all steps are `step_value`, which is added to what is read
    step_value,
    lr_value,
    sign,
    decay,
    growth,
    momentum,
    damping,
    weight_decay,
    decoupled_decay,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    SQUARE: tl.constexpr,
    BUFFER: tl.constexpr,
    ROUNDING: tl.constexpr,
    WEIGHT_ROUNDING: tl.constexpr,
):
    tensor = tl.load(owner_table + tl.program_id(0)).to(tl.int64)
    row_table = tensor_table + tensor * _COLUMNS
    param, square, buffer = tl.load(row_table), tl.load(row_table + 1), tl.load(row_table + 2)
    square_residual, weight_residual = tl.load(row_table + 3), tl.load(row_table + 4)
    size, first_program = tl.load(row_table + 6), tl.load(row_table + 7)
    grad = tl.load(grad_table + tensor)
    addresses = param, grad, square, buffer, square_residual, weight_residual
    start = (tl.program_id(0) - first_program) * _CHUNK
    length = tl.minimum(size - start, _CHUNK).to(tl.int32)
    last = (tl.cdiv(size, _CHUNK) - 1).to(tl.int32)  # kept until the end, in half the registers of `size`

    # Where GradScaler found an overflow, gradients count as NaN, so that no number steps.
    overflow = tl.load(found_inf_ptr) != 0
    grad_factor = tl.where(overflow, float("nan"), sign / tl.load(scale_ptr))
    lr = lr_value + tl.load(lr_ptr)
    numbers = grad_factor, lr, decay, growth, momentum, damping, weight_decay, lr * decoupled_decay
    keys = tl.full((), 0, tl.uint32), tl.full((), 0, tl.uint32)
    if ROUNDING == "stochastic" or WEIGHT_ROUNDING == "stochastic":
        seed = tl.load(seed_ptr + tensor * seed_stride)
        step = step_value + tl.load(step_ptr + tensor * step_stride)
        keys = random_key(seed, step, _SLOT_SQUARE), random_key(seed, step, _SLOT_WEIGHT)

    WIDE: tl.constexpr = (tl.float32 == PARAM) | (tl.float32 == GRAD) | (tl.float32 == SQUARE) | (tl.float32 == BUFFER)
    VECTOR: tl.constexpr = 4 if WIDE else 8
    aligned = (param | grad | square | buffer | square_residual | weight_residual) % 16 == 0
    bad = 0
    if aligned & (length == _CHUNK):
        bad = _step(
            *(addresses, start, tl.arange(0, _CHUNK), None, keys, numbers),
            *(PARAM, GRAD, SQUARE, BUFFER, ROUNDING, WEIGHT_ROUNDING, VECTOR),
        )
    else:
        for first in range(0, length, _PART):
            offsets = first + tl.arange(0, _PART)
            part_is_bad = _step(
                *(addresses, start, offsets, offsets < length, keys, numbers),
                *(PARAM, GRAD, SQUARE, BUFFER, ROUNDING, WEIGHT_ROUNDING, 1),
            )
            bad = tl.maximum(bad, part_is_bad)

    before = tl.atomic_add(counter_ptr + tensor, (bad.to(tl.int64) << 32) + 1, sem="relaxed")
    if (before & 0xFFFFFFFF) == last:
        tl.store(counter_ptr + tensor, 0)
        skipped_ptr = tl.load(row_table + 5).to(tl.pointer_type(tl.int32))
        tl.store(skipped_ptr, tl.load(skipped_ptr) + ((before >> 32) + bad > 0).to(tl.int32))


# ---- configuration -----------------------------------------------------------------------------------------------


def _modes(dtype: torch.dtype) -> tuple[str, ...]:
    return rnd.ROUNDINGS if dtype == torch.bfloat16 else ("nearest",)


def configurations() -> Iterator[Configuration]:
    arguments = ("*i64", "*i64", "*i32", "*i64", "*i32", *("*fp32",) * 4, "i32", "i32", *("fp32",) * 9)
    for param, square, buffer in product(GRAD_DTYPES, STATE_DTYPES, STATE_DTYPES):
        for grad in GRAD_DTYPES[param]:
            dtypes = [TRITON_DTYPES[dtype] for dtype in (param, grad, square, buffer)]
            # Next to an FP32 gradient what is stored goes 64 bits at a time, unless some of that is FP32 as well.
            kind = "elementwise" if grad != torch.float32 or grad in (param, square, buffer) else "irregular"
            for modes in product(_modes(square), _modes(param)):
                yield Configuration(rf_rmsprop_kernel, arguments, (*dtypes, *modes), NUM_WARPS, 1, kind)


# ---- launcher ----------------------------------------------------------------------------------------------------


def _num_programs(row: tuple[int, ...]) -> int:
    return -(-row[-1] // CHUNK)  # the last column is the size


def rf_rmsprop(
    params: list[Tensor],  # n tensors of any shapes and strides
    state: DiagonalState,
    grads: list[Tensor],
    lr: Tensor,  # one element
    draws: Draws,
    scaling: Scaling,
    options: DiagonalOptions,
) -> None:
    """Step n tensors in place: see `rootfree_kernels.eager.rf_rmsprop`.

    `rootfree_kernels.pointer_tables.rf_rmsprop.diagonal_call` says which tensors are copied first.

    Raises:
        ValueError: no kernel serves these dtypes.
    """
    if not params:
        return
    call = diagonal_call(_num_programs, params, state, grads, lr, draws, scaling, options)
    launch(
        rf_rmsprop_kernel,
        call.where.num_programs,
        (
            *(call.where.rows, call.grads, call.where.owners, call.where.counters),
            *(call.bits.seeds, call.bits.steps, call.lr, call.grad_scale, call.found_inf),
        ),
        (call.bits.stride, call.bits.step_stride, call.bits.step, call.lr_value, *call.scalars),
        (*(TRITON_DTYPES[dtype] for dtype in call.dtypes), *call.modes),
        NUM_WARPS,
    )
    call.finish()
