"""RF-RMSProp and RF-AdaGrad: the whole diagonal step of a list of tensors in one launch.

    s ← (1 − β₂γ)s + β₂·B·g²,    m ← α₁m + g/(s + λ) + κμ,    μ ← μ − β₁m

A program works on a chunk of one tensor. A whole chunk that begins on a 16-byte boundary in every tensor is read and
written without masks, 128 bits at a time. (BF16 next to FP32 is accessed 64 bits at a time, so that a thread holds the
same elements of both.) Every other chunk is accessed element by element. A list may have tensors of both kinds.

The last program of a tensor to finish counts the step in `skipped` if any program left an element out. A counter tells
which program is the last. That program sets the counter back to 0, so that a CUDA graph can replay the launch.
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
    element_of,
    is_finite,
    load_masked,
    load_stored,
    random_key,
    store_rounded,
)
from rootfree_kernels.triton_kernels.configuration import Configuration, Kind
from rootfree_kernels.triton_kernels.launch import kernel, launch

CHUNK, NUM_WARPS = 1024, 4
"""Elements of a program, eight a thread. They take 40 to 64 registers and keep enough loads in flight for any GPU."""

_CHUNK, _PART = tl.constexpr(CHUNK), tl.constexpr(CHUNK // 4)  # masked chunks take more registers, so in parts
_COLUMNS = tl.constexpr(8)  # of the table of tensors
_SLOT_SQUARE, _SLOT_WEIGHT = tl.constexpr(rnd.SLOT_SQUARE), tl.constexpr(rnd.SLOT_WEIGHT)


@triton.jit
def _step(
    addresses,  # of μ, gradient, s, m and both residuals
    start,
    offsets,
    mask,  # None for a whole chunk
    keys,  # of random bits for s and for μ
    scalars,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    SQUARE: tl.constexpr,
    BUFFER: tl.constexpr,
    ROUNDING: tl.constexpr,
    WEIGHT_ROUNDING: tl.constexpr,
    VECTOR: tl.constexpr,  # elements to whose size the addresses are aligned
):
    """Step the elements at `start + offsets` of one tensor. Return 1 if an element was left out, otherwise 0."""
    param, grad, square, buffer, square_residual, weight_residual = addresses
    grad_factor, lr, decay, growth, momentum, damping, weight_decay, shrinkage = scalars
    param_ptr, grad_ptr = element_of(param, start, PARAM, VECTOR), element_of(grad, start, GRAD, VECTOR)
    square_ptr, buffer_ptr = (
        element_of(square, start, SQUARE, VECTOR),
        element_of(buffer, start, BUFFER, VECTOR),
    )
    square_residual_ptr = element_of(square_residual, start, tl.int16, VECTOR)
    weight_residual_ptr = element_of(weight_residual, start, tl.int16, VECTOR)
    g = load_masked(grad_ptr + offsets, mask).to(tl.float32) * grad_factor
    old_s = load_stored(square_ptr, square_residual_ptr, offsets, mask, ROUNDING)
    old_m = load_masked(buffer_ptr + offsets, mask).to(tl.float32)
    old_w = load_stored(param_ptr, weight_residual_ptr, offsets, mask, WEIGHT_ROUNDING)

    s = old_s * decay + growth * g * g
    direction = g / (s + damping)
    keep = is_finite(s + direction)
    # Without `where`, a decay of 0 times an infinite weight would be NaN.
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
    # [n, 8], int64. Columns: addresses of 0 μ, 1 s, 2 m, 3 residual of s, 4 residual of μ and 5 `skipped`; 6 elements;
    # 7 first program
    tensor_table,
    grad_table,  # [n], int64: addresses of gradients
    owner_table,  # [programs], int32: the tensor that a program works on
    counter_ptr,  # [n], int64: programs that finished; in the upper half, how many of them left elements out
    seed_ptr,  # [n], int32
    step_ptr,  # [n] or one element, int64: added to `step_value`
    lr_ptr,  # one element, FP32: added to `lr_value`
    scale_ptr,  # one element, FP32: gradients are divided by it
    found_inf_ptr,  # one element, FP32
    seed_stride,  # 0 if no bits are drawn
    step_stride,  # 0 if all tensors have the same step
    step_value,  # int32
    lr_value,
    sign,  # −1 to maximize, otherwise 1
    decay,  # 1 − β₂γ
    growth,  # β₂B
    momentum,  # α₁
    damping,  # λ
    weight_decay,  # κ, or 0 if it is decoupled
    decoupled_decay,  # κ, or 0 if it is not
    PARAM: tl.constexpr,  # dtypes
    GRAD: tl.constexpr,
    SQUARE: tl.constexpr,
    BUFFER: tl.constexpr,
    ROUNDING: tl.constexpr,  # of s
    WEIGHT_ROUNDING: tl.constexpr,
):
    """Step a list of tensors. A program works on one chunk of one tensor."""
    tensor = tl.load(owner_table + tl.program_id(0)).to(tl.int64)
    row_table = tensor_table + tensor * _COLUMNS
    param, square, buffer = tl.load(row_table), tl.load(row_table + 1), tl.load(row_table + 2)
    square_residual, weight_residual = tl.load(row_table + 3), tl.load(row_table + 4)
    size, first_program = tl.load(row_table + 6), tl.load(row_table + 7)
    grad = tl.load(grad_table + tensor)
    addresses = param, grad, square, buffer, square_residual, weight_residual
    start = (tl.program_id(0) - first_program) * _CHUNK
    length = tl.minimum(size - start, _CHUNK).to(tl.int32)
    last = (tl.cdiv(size, _CHUNK) - 1).to(tl.int32)  # needed at the end; takes half of the registers of `size`

    # If GradScaler found an overflow, gradients become NaN, so that no element is stepped.
    overflow = tl.load(found_inf_ptr) != 0
    grad_factor = tl.where(overflow, float("nan"), sign / tl.load(scale_ptr))
    lr = lr_value + tl.load(lr_ptr)
    scalars = grad_factor, lr, decay, growth, momentum, damping, weight_decay, lr * decoupled_decay
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
            *(addresses, start, tl.arange(0, _CHUNK), None, keys, scalars),
            *(PARAM, GRAD, SQUARE, BUFFER, ROUNDING, WEIGHT_ROUNDING, VECTOR),
        )
    else:
        for first in range(0, length, _PART):
            offsets = first + tl.arange(0, _PART)
            part_is_bad = _step(
                *(addresses, start, offsets, offsets < length, keys, scalars),
                *(PARAM, GRAD, SQUARE, BUFFER, ROUNDING, WEIGHT_ROUNDING, 1),
            )
            bad = tl.maximum(bad, part_is_bad)

    # mypy: Triton turns the 0 above into a tensor
    before = tl.atomic_add(counter_ptr + tensor, (bad.to(tl.int64) << 32) + 1, sem="relaxed")  # type: ignore[attr-defined]
    if (before & 0xFFFFFFFF) == last:
        tl.store(counter_ptr + tensor, 0)
        skipped_ptr = tl.load(row_table + 5).to(tl.pointer_type(tl.int32))
        tl.store(skipped_ptr, tl.load(skipped_ptr) + ((before >> 32) + bad > 0).to(tl.int32))


# ---- configuration -----------------------------------------------------------------------------------------------


def _modes(dtype: torch.dtype) -> tuple[str, ...]:
    """Return the ways of rounding to `dtype`."""
    return rnd.ROUNDINGS if dtype == torch.bfloat16 else ("nearest",)


def configurations() -> Iterator[Configuration]:
    """Yield every configuration that `rf_rmsprop` can launch."""
    arguments = ("*i64", "*i64", "*i32", "*i64", "*i32", "*i64", *("*fp32",) * 3, *("i32",) * 3, *("fp32",) * 8)
    for param, square, buffer in product(GRAD_DTYPES, STATE_DTYPES, STATE_DTYPES):
        for grad in GRAD_DTYPES[param]:
            dtypes = [TRITON_DTYPES[dtype] for dtype in (param, grad, square, buffer)]
            # Next to an FP32 gradient, BF16 and FP16 are stored 64 bits at a time, and only FP32 in 128 bits.
            kind: Kind = "elementwise" if grad != torch.float32 or grad in (param, square, buffer) else "irregular"
            for modes in product(_modes(square), _modes(param)):
                yield Configuration(rf_rmsprop_kernel, arguments, (*dtypes, *modes), NUM_WARPS, 1, kind)


# ---- launcher ----------------------------------------------------------------------------------------------------


def _num_programs(row: tuple[int, ...]) -> int:
    """Return the programs of a tensor, from its row of the table, whose last column is the number of elements."""
    return -(-row[-1] // CHUNK)


def rf_rmsprop(
    params: list[Tensor],  # n tensors of any shapes and strides
    state: DiagonalState,
    grads: list[Tensor],  # of the parameters' shapes, any dtype and strides
    lr: Tensor,  # one element
    draws: Draws,
    scaling: Scaling,
    options: DiagonalOptions,
) -> None:
    """Step n tensors in place: see `rootfree_kernels.eager.rf_rmsprop`.

    Parameters are FP32, BF16 or FP16, s and m FP32 or BF16, each list of one dtype. Tensors whose dtype or layout the
    kernel does not read are copied first (see `rootfree_kernels.pointer_tables.rf_rmsprop.diagonal_call`).

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
