"""The diagonal step with a scale of its own for each tensor, in three launches for a list of any size.

1  partial sums of g²
2  s, the mean curvature q of its tensor, and partial sums of u²
3  M and μ, with u computed again, from the s that is stored

See `rootfree_kernels.eager.scaled_rmsprop` for the formulas. A tensor is cut into shares, one for each program, and few
enough that every program can add the partial sums of its tensor: always in the same order, so that results repeat
bitwise. What the third launch has to know of a tensor, the first program of the second one writes.

As in `rf_rmsprop`, whole chunks that begin on 16 bytes in every tensor are accessed 128 bits at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from rootfree_kernels import rounding as rnd
from rootfree_kernels.arguments import Draws, ScaledOptions, ScaledState, Scaling
from rootfree_kernels.pointer_tables.rf_rmsprop import GRAD_DTYPES, STATE_DTYPES, diagonal_call
from rootfree_kernels.pointer_tables.tables import constant
from rootfree_kernels.triton_kernels.common import (
    TRITON_DTYPES,
    element_of,
    is_finite,
    join_compensated,
    load_masked,
    load_stored,
    random_bits,
    random_key,
    round_nearest,
    round_stochastic,
    split_compensated,
    store_rounded,
    sum_of_parts,
)
from rootfree_kernels.triton_kernels.configuration import Configuration, Kind
from rootfree_kernels.triton_kernels.launch import kernel, launch

CHUNK, MAX_SHARES, NUM_WARPS = 1024, 1024, 4
"""A share is one chunk of elements, or as many as leave a tensor MAX_SHARES programs. Each of these reads the partial
sums of all of them."""

MAX_REGISTERS = 96
"""Registers of a thread that the last two launches may use on Hopper. Without a number, the compiler saves some, and
spills."""

_CHUNK, _PART = tl.constexpr(CHUNK), tl.constexpr(CHUNK // 4)  # masked chunks take more registers, so in parts
_MAX_SHARES = tl.constexpr(MAX_SHARES)
_COLUMNS = tl.constexpr(9)  # of the table of tensors
_SLOT_SQUARE, _SLOT_WEIGHT = tl.constexpr(rnd.SLOT_SQUARE), tl.constexpr(rnd.SLOT_WEIGHT)


@triton.jit
def _share(tensor_table, owner_table):
    """Return what this program works on: (tensor, its row of the table, its elements, its first program, its programs,
    first element, elements)."""
    tensor = tl.load(owner_table + tl.program_id(0)).to(tl.int64)
    row_table = tensor_table + tensor * _COLUMNS
    size, first_program = tl.load(row_table + 7), tl.load(row_table + 8)
    # Chunks are counted in 32 bits: a division of 64 bits is a call, around which registers are spilled.
    chunks = tl.maximum(tl.cdiv(size, _CHUNK), 1).to(tl.int32)
    share = tl.cdiv(chunks, _MAX_SHARES)
    start = (tl.program_id(0) - first_program) * share * _CHUNK
    length = tl.minimum(size - start, share.to(tl.int64) * _CHUNK).to(tl.int32)
    return tensor, row_table, size, first_program, tl.cdiv(chunks, share), start, length


@triton.jit
def _store_square(s, square_ptr, residual_ptr, offsets, mask, key, index, ROUNDING: tl.constexpr):
    """Store s as `store_rounded` does, and return the FP32 value of what is stored."""
    if ROUNDING == "compensated":
        stored, lo = split_compensated(s)
        tl.store(residual_ptr + offsets, lo, mask=mask)
        value = join_compensated(stored, lo)
    else:
        if ROUNDING == "stochastic":
            stored = round_stochastic(s, random_bits(key, index))
        else:
            stored = round_nearest(s, square_ptr.dtype.element_ty)
        value = stored.to(tl.float32)
    tl.store(square_ptr + offsets, stored, mask=mask)
    return value


@triton.jit
def _direction(g, m, s, damping, of_g, of_m, whitened):
    """Return u = M'/(s + λ) or M'/(√s + √λ), or 0 where it is not finite, and where that leaves an element out. M' is
    of_g·g + of_m·m, `damping` λ or √λ. Before the first gradient u is 0/0, which leaves nothing out."""
    average = of_g * g + tl.where(of_m != 0.0, of_m * m, 0.0)
    u = average / (tl.where(whitened != 0, tl.sqrt(s), s) + damping)
    finite = is_finite(u)
    return tl.where(finite, u, 0.0), ~finite & (average != 0.0)


@triton.jit
def _squares(grad, start, offsets, mask, factor, GRAD: tl.constexpr, VECTOR: tl.constexpr):
    """Return the squares of the gradient's elements at `start + offsets`."""
    g = load_masked(element_of(grad, start, GRAD, VECTOR) + offsets, mask).to(tl.float32) * factor
    return g * g


@kernel
def scaled_squares_kernel(
    # [n, 9], int64. Columns: addresses of 0 μ, 1 s, 2 M, 3 residual of s, 4 residual of μ, 5 `skipped` and 6 q;
    # 7 elements; 8 first program
    tensor_table,
    grad_table,  # [n], int64: addresses of gradients
    owner_table,  # [programs], int32: the tensor that a program works on
    sums_ptr,  # [programs], FP32: written
    scalars_ptr,  # [n, 4], FP32: 3 is set to 0 (see `scaled_average_kernel`)
    scale_ptr,  # one element, FP32: gradients are divided by it
    GRAD: tl.constexpr,  # dtype
):
    """Write the partial sums of g²."""
    tensor, _, _, first_program, _, start, length = _share(tensor_table, owner_table)
    if tl.program_id(0) == first_program:
        tl.store(scalars_ptr + 4 * tensor + 3, 0.0)
    grad = tl.load(grad_table + tensor)
    factor = 1.0 / tl.load(scale_ptr)
    VECTOR: tl.constexpr = 4 if tl.float32 == GRAD else 8
    whole = tl.where(grad % 16 == 0, length // _CHUNK * _CHUNK, 0)
    squares = tl.zeros((_CHUNK,), tl.float32)
    for first in range(0, whole, _CHUNK):
        squares += _squares(grad, start + first, tl.arange(0, _CHUNK), None, factor, GRAD, VECTOR)
    total = tl.sum(squares)
    squares = tl.zeros((_PART,), tl.float32)
    for first in range(whole, length, _PART):
        offsets = first + tl.arange(0, _PART)
        squares += _squares(grad, start, offsets, offsets < length, factor, GRAD, 1)
    tl.store(sums_ptr + tl.program_id(0), total + tl.sum(squares))


@triton.jit
def _average(
    addresses,  # of the gradient, s, M and the residual of s
    start,
    offsets,
    mask,  # None for a whole chunk
    key,  # of random bits for s
    flag_ptr,  # one element, FP32
    scalars,
    GRAD: tl.constexpr,
    SQUARE: tl.constexpr,
    BUFFER: tl.constexpr,
    ROUNDING: tl.constexpr,
    VECTOR: tl.constexpr,  # elements to whose size the addresses are aligned
):
    """Write s of the elements at `start + offsets` of one tensor, and a flag if u leaves any out. Return their u²."""
    grad, square, buffer, residual = addresses
    factor, decay, growth, moves, damping, of_g, of_m, whitened = scalars
    square_ptr = element_of(square, start, SQUARE, VECTOR)
    residual_ptr = element_of(residual, start, tl.int16, VECTOR)
    g = load_masked(element_of(grad, start, GRAD, VECTOR) + offsets, mask).to(tl.float32) * factor
    m = load_masked(element_of(buffer, start, BUFFER, VECTOR) + offsets, mask).to(tl.float32)
    old_s = load_stored(square_ptr, residual_ptr, offsets, mask, ROUNDING)
    s = tl.where(moves, old_s * decay + growth * g * g, old_s)
    index = start.to(tl.int32) + offsets
    s = _store_square(s, square_ptr, residual_ptr, offsets, mask, key, index, ROUNDING)
    u, is_left_out = _direction(g, m, s, damping, of_g, of_m, whitened)
    if mask is not None:
        u = tl.where(mask, u, 0.0)
    tl.store(flag_ptr + offsets * 0, 1.0, mask=is_left_out)  # costs less than a reduction, and is hardly ever done
    return u * u


@kernel
def scaled_average_kernel(
    tensor_table,  # [n, 9], int64, as in `scaled_squares_kernel`
    grad_table,  # [n], int64: addresses of gradients
    owner_table,  # [programs], int32: the tensor that a program works on
    sums_ptr,  # [programs], FP32: partial sums of g²
    update_sums_ptr,  # [programs], FP32: written; partial sums of u²
    # [n, 4], FP32: written. 0 whether the tensor is stepped; 1 λ, or √λ for the whitened direction; 2 q; 3 whether u
    # leaves elements out, which was 0 before
    scalars_ptr,
    seed_ptr,  # [n], int32
    step_ptr,  # [n] or one element, int64: added to `step_value`
    scale_ptr,  # one element, FP32: gradients are divided by it
    found_inf_ptr,  # one element, FP32
    seed_stride,  # 0 if no bits are drawn
    step_stride,  # 0 if all tensors have the same step
    step_value,  # int32
    sign,  # −1 to maximize, otherwise 1
    batch_size,  # B
    decay,  # 1 − β₂γ
    growth,  # β₂B
    damping,  # λ
    of_g,  # M' = of_g·g + of_m·M
    of_m,
    is_relative,  # 0 or 1: whether λq stands in the place of λ
    whitened,  # 0 or 1
    scaled,  # 0 or 1: whether u is scaled to a norm
    GRAD: tl.constexpr,  # dtypes
    SQUARE: tl.constexpr,
    BUFFER: tl.constexpr,
    ROUNDING: tl.constexpr,  # of s
):
    """Write s, and the partial sums of u²."""
    tensor, row_table, size, first_program, num_programs, start, length = _share(tensor_table, owner_table)
    grad, square, buffer = tl.load(grad_table + tensor), tl.load(row_table + 1), tl.load(row_table + 2)
    residual = tl.load(row_table + 3)
    total = sum_of_parts(sums_ptr + first_program, num_programs)
    mean = total / tl.maximum(size, 1).to(tl.float32)
    # The sum bounds every new element of s.
    ok = is_finite(total * tl.maximum(batch_size, growth)) & (tl.load(found_inf_ptr) == 0.0)
    q_ptr = tl.load(row_table + 6).to(tl.pointer_type(tl.float32))
    old_q = tl.load(q_ptr, mask=is_relative != 0, other=0.0)
    moves = tl.where(is_relative != 0, ok & (mean != 0.0), ok)
    q = tl.where(moves, decay * old_q + growth * mean, old_q)
    damping = tl.where(damping > 0.0, damping * tl.where(is_relative != 0, q, 1.0), 0.0)
    damping = tl.where(whitened != 0, tl.sqrt(damping), damping)
    if tl.program_id(0) == first_program:
        tl.store(scalars_ptr + 4 * tensor, tl.where(ok, 1.0, 0.0))
        tl.store(scalars_ptr + 4 * tensor + 1, damping)
        tl.store(scalars_ptr + 4 * tensor + 2, q)

    key = tl.full((), 0, tl.uint32)
    if ROUNDING == "stochastic":
        step = step_value + tl.load(step_ptr + tensor * step_stride).to(tl.int32)
        key = random_key(tl.load(seed_ptr + tensor * seed_stride), step, _SLOT_SQUARE)
    WIDE: tl.constexpr = (tl.float32 == GRAD) | (tl.float32 == SQUARE) | (tl.float32 == BUFFER)
    VECTOR: tl.constexpr = 4 if WIDE else 8
    addresses = grad, square, buffer, residual
    factor = sign / tl.load(scale_ptr)
    scalars = factor, decay, growth, moves, damping, of_g, of_m, whitened
    length = tl.where(ok, length, 0)
    whole = tl.where((grad | square | buffer | residual) % 16 == 0, length // _CHUNK * _CHUNK, 0)
    flag_ptr = scalars_ptr + 4 * tensor + 3
    squares = tl.zeros((_CHUNK,), tl.float32)
    for first in range(0, whole, _CHUNK):
        squares += _average(
            *(addresses, start + first, tl.arange(0, _CHUNK), None, key, flag_ptr, scalars),
            *(GRAD, SQUARE, BUFFER, ROUNDING, VECTOR),
        )
    total = tl.sum(squares)
    squares = tl.zeros((_PART,), tl.float32)
    for first in range(whole, length, _PART):
        offsets = first + tl.arange(0, _PART)
        squares += _average(
            *(addresses, start, offsets, offsets < length, key, flag_ptr, scalars),
            *(GRAD, SQUARE, BUFFER, ROUNDING, 1),
        )
    total += tl.sum(squares)
    tl.store(update_sums_ptr + tl.program_id(0), total)
    # The next kernel scales u to 0 then. It is noted here, since that kernel has no register to spare.
    tl.store(flag_ptr, 1.0, mask=(scaled != 0) & (is_finite(total) == 0))


@triton.jit
def _step(
    addresses,  # of μ, gradient, s, M and both residuals
    start,
    offsets,
    mask,  # None for a whole chunk
    key,  # of random bits for μ
    scalars,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    SQUARE: tl.constexpr,
    BUFFER: tl.constexpr,
    ROUNDING: tl.constexpr,
    WEIGHT_ROUNDING: tl.constexpr,
    VECTOR: tl.constexpr,  # elements to whose size the addresses are aligned
):
    """Step the elements at `start + offsets` of one tensor."""
    param, grad, square, buffer, square_residual, weight_residual = addresses
    factor, lr, damping, scale, momentum, of_g, of_m, averages, whitened, weight_decay, shrinkage = scalars
    param_ptr = element_of(param, start, PARAM, VECTOR)
    buffer_ptr = element_of(buffer, start, BUFFER, VECTOR)
    square_ptr = element_of(square, start, SQUARE, VECTOR)
    square_residual_ptr = element_of(square_residual, start, tl.int16, VECTOR)
    weight_residual_ptr = element_of(weight_residual, start, tl.int16, VECTOR)
    g = load_masked(element_of(grad, start, GRAD, VECTOR) + offsets, mask).to(tl.float32) * factor
    s = load_stored(square_ptr, square_residual_ptr, offsets, mask, ROUNDING)
    old_m = load_masked(buffer_ptr + offsets, mask).to(tl.float32)
    old_w = load_stored(param_ptr, weight_residual_ptr, offsets, mask, WEIGHT_ROUNDING)

    u, _ = _direction(g, old_m, s, damping, of_g, of_m, whitened)
    u *= scale
    # Without `where`, a decay of 0 times an infinite weight would be NaN.
    heavy_ball = u + tl.where(weight_decay != 0.0, weight_decay * old_w, 0.0)
    m = momentum * old_m + tl.where(averages != 0, (1.0 - momentum) * g, heavy_ball)
    w = old_w - tl.where(shrinkage != 0.0, shrinkage * old_w, 0.0) - lr * tl.where(averages != 0, u, m)

    index = start.to(tl.int32) + offsets
    store_rounded(m, buffer_ptr, buffer_ptr, offsets, mask, key, index, "nearest")
    store_rounded(w, param_ptr, weight_residual_ptr, offsets, mask, key, index, WEIGHT_ROUNDING)


@kernel
def scaled_step_kernel(
    tensor_table,  # [n, 9], int64, as in `scaled_squares_kernel`
    grad_table,  # [n], int64: addresses of gradients
    owner_table,  # [programs], int32: the tensor that a program works on
    update_sums_ptr,  # [programs], FP32: partial sums of u²
    scalars_ptr,  # [n, 4], FP32: what `scaled_average_kernel` wrote
    update_norms_ptr,  # [n], FP32, or one element
    seed_ptr,  # [n], int32
    step_ptr,  # [n] or one element, int64: added to `step_value`
    lr_ptr,  # one element, FP32: added to `lr_value`
    scale_ptr,  # one element, FP32: gradients are divided by it
    seed_stride,  # 0 if no bits are drawn
    step_stride,  # 0 if all tensors have the same step
    step_value,  # int32
    lr_value,
    sign,  # −1 to maximize, otherwise 1
    momentum,  # α₁
    of_g,  # M' = of_g·g + of_m·M
    of_m,
    weight_decay,  # κ, or 0 if it is decoupled
    decoupled_decay,  # κ, or 0 if it is not
    is_relative,  # 0 or 1: whether there are curvatures
    averages,  # 0 or 1: whether the momentum averages gradients
    scaled,  # 0 or 1: whether u is scaled to a norm
    whitened,  # 0 or 1
    PARAM: tl.constexpr,  # dtypes
    GRAD: tl.constexpr,
    SQUARE: tl.constexpr,
    BUFFER: tl.constexpr,
    ROUNDING: tl.constexpr,  # of s
    WEIGHT_ROUNDING: tl.constexpr,
):
    """Step M and μ, and write q and `skipped`."""
    tensor, row_table, _, first_program, num_programs, start, length = _share(tensor_table, owner_table)
    param, square, buffer = tl.load(row_table), tl.load(row_table + 1), tl.load(row_table + 2)
    square_residual, weight_residual = tl.load(row_table + 3), tl.load(row_table + 4)
    grad = tl.load(grad_table + tensor)
    ok = tl.load(scalars_ptr + 4 * tensor) != 0.0
    damping = tl.load(scalars_ptr + 4 * tensor + 1)
    if tl.program_id(0) == first_program:
        is_whole = ok & (tl.load(scalars_ptr + 4 * tensor + 3) == 0.0)
        skipped_ptr = tl.load(row_table + 5).to(tl.pointer_type(tl.int32))
        tl.store(skipped_ptr, tl.load(skipped_ptr) + tl.where(is_whole, 0, 1))
        q_ptr = tl.load(row_table + 6).to(tl.pointer_type(tl.float32))
        tl.store(q_ptr, tl.load(scalars_ptr + 4 * tensor + 2), mask=is_relative != 0)

    total = sum_of_parts(update_sums_ptr + first_program, num_programs * scaled)
    norm = tl.load(update_norms_ptr + tensor * scaled)
    scale = tl.where(scaled != 0, tl.where(total > 0.0, norm / tl.sqrt(total), 0.0), 1.0)
    lr = lr_value + tl.load(lr_ptr)
    factor = sign / tl.load(scale_ptr)
    key = tl.full((), 0, tl.uint32)
    if WEIGHT_ROUNDING == "stochastic":
        step = step_value + tl.load(step_ptr + tensor * step_stride).to(tl.int32)
        key = random_key(tl.load(seed_ptr + tensor * seed_stride), step, _SLOT_WEIGHT)
    WIDE: tl.constexpr = (tl.float32 == PARAM) | (tl.float32 == GRAD) | (tl.float32 == SQUARE) | (tl.float32 == BUFFER)
    VECTOR: tl.constexpr = 4 if WIDE else 8
    addresses = param, grad, square, buffer, square_residual, weight_residual
    shrinkage = lr * decoupled_decay
    scalars = factor, lr, damping, scale, momentum, of_g, of_m, averages, whitened, weight_decay, shrinkage
    length = tl.where(ok, length, 0)
    aligned = (param | grad | square | buffer | square_residual | weight_residual) % 16 == 0
    whole = tl.where(aligned, length // _CHUNK * _CHUNK, 0)
    TILE: tl.constexpr = _CHUNK // 2 if WIDE else _CHUNK  # as few registers as accesses of 128 bits allow
    for first in range(0, whole, TILE):
        _step(
            *(addresses, start, first + tl.arange(0, TILE), None, key, scalars),
            *(PARAM, GRAD, SQUARE, BUFFER, ROUNDING, WEIGHT_ROUNDING, VECTOR),
        )
    for first in range(whole, length, _PART):
        offsets = first + tl.arange(0, _PART)
        _step(
            *(addresses, start, offsets, offsets < length, key, scalars),
            *(PARAM, GRAD, SQUARE, BUFFER, ROUNDING, WEIGHT_ROUNDING, 1),
        )


# ---- configuration -----------------------------------------------------------------------------------------------


def _modes(dtype: torch.dtype) -> tuple[str, ...]:
    """Return the ways of rounding to `dtype`."""
    return rnd.ROUNDINGS if dtype == torch.bfloat16 else ("nearest",)


def _kind(stored: set[torch.dtype], read: set[torch.dtype]) -> Kind:
    """Return what a kernel is checked for. Next to FP32, BF16 and FP16 are stored 64 bits at a time."""
    return "elementwise" if torch.float32 in stored or torch.float32 not in read else "irregular"


def configurations() -> Iterator[Configuration]:
    """Yield every configuration that `scaled_rmsprop` can launch."""
    tables = "*i64", "*i64", "*i32"
    for grad in TRITON_DTYPES:
        dtypes = [TRITON_DTYPES[grad]]
        yield Configuration(scaled_squares_kernel, (*tables, *("*fp32",) * 3), (*dtypes,), NUM_WARPS, 1, "irregular")
    # Two kernels take as many arguments of each kind, but for the flags at the end.
    arguments = (*tables, *("*fp32",) * 3, "*i32", "*i64", "*fp32", "*fp32", *("i32",) * 3, *("fp32",) * 7)
    average, step = (*arguments, *("i32",) * 3), (*arguments, *("i32",) * 4)
    for grad, square, buffer in product(TRITON_DTYPES, STATE_DTYPES, STATE_DTYPES):
        dtypes = [TRITON_DTYPES[dtype] for dtype in (grad, square, buffer)]
        kind = _kind({square}, {grad, buffer})
        for mode in _modes(square):
            yield Configuration(scaled_average_kernel, average, (*dtypes, mode), NUM_WARPS, 1, kind, MAX_REGISTERS)
    for param, square, buffer in product(GRAD_DTYPES, STATE_DTYPES, STATE_DTYPES):
        for grad in GRAD_DTYPES[param]:
            dtypes = [TRITON_DTYPES[dtype] for dtype in (param, grad, square, buffer)]
            kind = _kind({param, buffer}, {grad, square})
            # How s was rounded does not matter to those who read it, unless there are residuals.
            for modes in product({*_modes(square)} - {"stochastic"}, _modes(param)):
                yield Configuration(scaled_step_kernel, step, (*dtypes, *modes), NUM_WARPS, 1, kind, MAX_REGISTERS)


# ---- launcher ----------------------------------------------------------------------------------------------------


def _num_programs(row: tuple[int, ...]) -> int:
    """Return the programs of a tensor, from its row of the table, whose last column is the number of elements."""
    chunks = max(1, -(-row[-1] // CHUNK))
    return -(-chunks // -(-chunks // MAX_SHARES))


def _weights_of_average(options: ScaledOptions) -> tuple[float, float]:
    """Return (a, b) of M' = a·g + b·M, with the old M."""
    keep, new = options.momentum, 1.0 - options.momentum
    if options.momentum_on == "update":
        return 1.0, 0.0
    return (new + keep * new, keep * keep) if options.nesterov else (new, keep)


def scaled_rmsprop(
    params: list[Tensor],  # n tensors of any shapes and strides
    state: ScaledState,
    grads: list[Tensor],  # of the parameters' shapes, any dtype and strides
    lr: Tensor,  # one element
    draws: Draws,
    scaling: Scaling,
    options: ScaledOptions,
) -> None:
    """Step n tensors in place: see `rootfree_kernels.eager.scaled_rmsprop`.

    Dtypes are those of `rootfree_kernels.triton_kernels.rf_rmsprop`; q is FP32.

    Raises:
        ValueError: no kernel serves these dtypes.
    """
    if not params:
        return
    call = diagonal_call(_num_programs, params, state, grads, lr, draws, scaling, options)
    where, bits, norms = call.where, call.bits, state.update_norms
    sums = call.lr.new_empty((2, where.num_programs))
    per_tensor = call.lr.new_empty((len(params), 4))
    sign, decay, growth, momentum, damping, *decays = call.scalars
    param, grad, square, buffer = (TRITON_DTYPES[dtype] for dtype in call.dtypes)
    tables, draw = (where.rows, call.grads, where.owners), (bits.stride, bits.step_stride, bits.step)
    average, flags = _weights_of_average(options), (int(options.relative_damping), int(options.direction == "whitened"))
    squares = *tables, sums[0], per_tensor, call.grad_scale
    launch(scaled_squares_kernel, where.num_programs, squares, (), (grad,), NUM_WARPS)
    launch(
        scaled_average_kernel,
        where.num_programs,
        (*tables, sums[0], sums[1], per_tensor, bits.seeds, bits.steps, call.grad_scale, call.found_inf),
        (
            *(*draw, sign, float(options.batch_size), decay, growth, damping, *average),
            *(*flags, int(norms is not None)),
        ),
        (grad, square, buffer, call.modes[0]),
        NUM_WARPS,
        max_registers=MAX_REGISTERS,
    )
    launch(
        scaled_step_kernel,
        where.num_programs,
        (
            *(*tables, sums[1], per_tensor, constant(0.0, params[0].device) if norms is None else norms),
            *(bits.seeds, bits.steps, call.lr, call.grad_scale),
        ),
        (
            *(*draw, call.lr_value, sign, momentum, *average, *decays, flags[0]),
            *(int(options.momentum_on == "gradient"), int(norms is not None), flags[1]),
        ),
        (param, grad, square, buffer, "nearest" if call.modes[0] == "stochastic" else call.modes[0], call.modes[1]),
        NUM_WARPS,
        max_registers=MAX_REGISTERS,
    )
    call.finish()
