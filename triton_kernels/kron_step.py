"""The preconditioned step of the weights of a batch of blocks.

1  P_C = CCᵀ,  P_K = KKᵀ                                   one launch (see `products`), unless they are cached
2  X = P_C·G                                               cuBLAS, batched
3  U = X·P_K,  buf ← α₁buf + U + κW,  W ← W − β₁buf        one launch

The whitened direction has C and K in the place of P_C and P_K. With gradient momentum, or an update of a fixed size, 2
and 3 are those of `kron_apply`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton.language as tl
from torch import Tensor

from rootfree_kernels import ranges
from rootfree_kernels.arguments import Draws, Gathered, Preconditioner, StepOptions, Weights
from rootfree_kernels.blocks import matrix_views
from rootfree_kernels.pointer_tables.tables import (
    block_table,
    constant,
    no_random_bits,
    on_device,
    random_bits,
    split_lr,
)
from rootfree_kernels.rounding import SLOT_WEIGHT
from rootfree_kernels.triton_kernels.common import (
    TRITON_DTYPES,
    block_is_stepped,
    block_pointers,
    count_program,
    effective_rounding,
    is_finite,
    load_stored,
    only_if,
    random_key,
    store_rounded,
)
from rootfree_kernels.triton_kernels.configuration import Configuration
from rootfree_kernels.triton_kernels.kron_apply import StepCall, step_in_parts
from rootfree_kernels.triton_kernels.launch import kernel, launch
from rootfree_kernels.triton_kernels.products import (
    SMALL,
    TILE_CONFIGS,
    MakeProducts,
    make_products,
    pad_square,
    part_of_columns,
    product_nn,
    tile_config,
)
from rootfree_kernels.triton_kernels.sizes import PADDING

_SLOT = tl.constexpr(SLOT_WEIGHT)


@kernel
def kron_step_kernel(
    x_ptr,  # X = P_C·G [L, p8*8, d8*8], BF16
    product_k_ptr,  # P_K [L, d8*8, d8*8], BF16
    blocks_table,  # [L, 3, 3], int64: (address, row stride, column stride) of weights, buffer and residuals
    counter_ptr,  # [L], int64: see `count_program`
    skipped_ptr,  # [L], int32: updated
    squares_ptr,  # [1 or 3, L, num_parts], FP32: only the sums of G² are read
    ok_ptr,  # [L] or one element, bool: whether the factors were updated
    found_inf_ptr,  # one element, FP32
    seeds_ptr,  # [L] or one element, int32
    steps_ptr,  # [L] or one element, int64: added to `step_value`
    lr_ptr,  # one element, FP32: added to `lr_value`
    lr_value,
    step_value,  # int32
    ok_stride,  # 0 without an update in this step
    seed_stride,  # 0 if no bits are drawn
    step_stride,  # 0 if all blocks have the same step
    num_parts,  # partial sums of a block
    p,  # sides without padding
    d,
    p8,  # padded sides / 8
    d8,
    momentum,  # α₁
    weight_decay,  # κ
    decoupled,  # 0 or 1
    WEIGHT: tl.constexpr,  # dtypes
    BUFFER: tl.constexpr,
    ROUNDING: tl.constexpr,  # of the weights
    ALIGNED: tl.constexpr,  # whether all rows begin on 16 bytes and d is a multiple of 8
    BLOCK: tl.constexpr,  # rows and columns of a tile
    DEPTH: tl.constexpr,  # of a step of the inner product
):
    """Step weights and buffers. A program works on one tile of one block."""
    rows, cols = p8 * 8, d8 * 8
    tiles_d = tl.cdiv(cols, BLOCK)
    per_block = tl.cdiv(rows, BLOCK) * tiles_d
    block = (tl.program_id(0) // per_block).to(tl.int64)
    t = tl.program_id(0) % per_block
    row, col = t // tiles_d * BLOCK, t % tiles_d * BLOCK
    direction = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    x_ptr += block * rows * cols
    product_k_ptr += block * cols * cols
    direction = product_nn(x_ptr, product_k_ptr, row, col, rows, cols, cols, direction, BLOCK, DEPTH)
    # The largest magnitude as a bit pattern, since `tl.max` of floats drops NaN. Padding is not finite only if an
    # operand is not, and then neither are elements of the block.
    worst = tl.max(direction.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    direction = tl.where(is_finite(direction), direction, 0.0)

    ok = block_is_stepped(squares_ptr, ok_ptr, found_inf_ptr, block, ok_stride, num_parts)
    left_out = tl.where(ok & (worst < 0x7F800000), 0, 1)
    count_program(counter_ptr, skipped_ptr, block, left_out, per_block)

    lr = lr_value + tl.load(lr_ptr)
    step = step_value + tl.load(steps_ptr + block * step_stride)
    key = random_key(tl.load(seeds_ptr + block * seed_stride), step, _SLOT)
    if ALIGNED:
        d = cols  # the same value, which the compiler knows to be a multiple of 8; p only limits a mask
    # With compensated weights and an FP32 buffer, quarters of a large tile would take more than 128 registers.
    PARTS: tl.constexpr = 8 if (ROUNDING == "compensated") & (tl.float32 == BUFFER) & (BLOCK > 64) else 4
    WIDTH: tl.constexpr = BLOCK // PARTS
    for part in tl.static_range(PARTS):
        i, j = tl.arange(0, BLOCK)[:, None], part * WIDTH + tl.arange(0, WIDTH)[None, :]
        mask = only_if(ok, (i < p - row) & (j < d - col))
        weight_ptrs = block_pointers(blocks_table + 9 * block, row, col, i, j, WEIGHT, ALIGNED)
        buffer_ptrs = block_pointers(blocks_table + 9 * block + 3, row, col, i, j, BUFFER, ALIGNED)
        residual_ptrs = block_pointers(blocks_table + 9 * block + 6, row, col, i, j, tl.int16, ALIGNED)
        weight = load_stored(weight_ptrs, residual_ptrs, 0, mask, ROUNDING)
        buffer = load_stored(buffer_ptrs, buffer_ptrs, 0, mask, "nearest")
        decay = tl.where(weight_decay != 0.0, weight_decay * weight, 0.0)  # 0·∞ would be NaN
        buffer = momentum * buffer + part_of_columns(direction, part, PARTS) + tl.where(decoupled != 0, 0.0, decay)
        weight -= lr * (buffer + tl.where(decoupled != 0, decay, 0.0))
        index = (row + i) * d + (col + j)
        store_rounded(buffer, buffer_ptrs, buffer_ptrs, 0, mask, 0, index, "nearest")
        store_rounded(weight, weight_ptrs, residual_ptrs, 0, mask, key, index, ROUNDING)


# ---- configuration -----------------------------------------------------------------------------------------------


def configurations() -> Iterator[Configuration]:
    """Yield every configuration that `kron_step` can launch."""
    weights = [(tl.float32, "nearest"), (tl.float16, "nearest")]
    weights += [(tl.bfloat16, rounding) for rounding in ("stochastic", "compensated", "nearest")]
    for weight, rounding in weights:
        for buffer in (tl.float32, tl.bfloat16):
            for aligned in (True, False):
                for config in TILE_CONFIGS if aligned else (SMALL,):
                    yield Configuration(
                        kron_step_kernel,
                        (
                            *(
                                "*bf16",
                                "*bf16",
                                "*i64",
                                "*i64",
                                "*i32",
                                "*fp32",
                                "*i1",
                                "*fp32",
                                "*i32",
                                "*i64",
                                "*fp32",
                            ),
                            *("fp32", *("i32",) * 9, "fp32", "fp32", "i32"),
                        ),
                        (weight, buffer, rounding, aligned, config.block, config.depth),
                        config.num_warps,
                        config.num_stages,
                        kind="matrix",
                        max_registers=config.max_registers,
                    )


# ---- launcher ----------------------------------------------------------------------------------------------------


def _matrices(make_products: MakeProducts, preconditioner: Preconditioner, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return X and Y of U = X·G·Y in `dtype`, padded. P_C and P_K are computed unless they are cached."""
    c, k = pad_square(preconditioner.factor_c.to(dtype)), pad_square(preconditioner.factor_k.to(dtype))
    if preconditioner.cached:
        return c, k
    product_c, product_k = torch.empty_like(c), torch.empty_like(k)
    make_products(c, k, product_c, product_k, kept=None)
    return product_c, product_k


def kron_step_by(
    make_products: MakeProducts,
    weights: Weights,
    preconditioner: Preconditioner,
    gathered: Gathered,
    lr: Tensor,  # one element
    draws: Draws,
    found_inf: Tensor | None,  # one element
    options: StepOptions,
) -> None:
    """Step the weights as `kron_step` does, with P_C and P_K from `make_products` or a function with its signature."""
    grad, device, ok = gathered.grad, gathered.grad.device, preconditioner.ok
    sides = preconditioner.factor_c.shape[-1], preconditioner.factor_k.shape[-1]
    ranges.phase("precondition")
    # All memory is allocated before the weights change.
    x = torch.empty_like(grad)
    lists = [matrix_views(tensors) for tensors in weights[:3] if tensors]
    lists = [*lists, *lists[1:]][:3]  # without residuals, buffers instead
    table = block_table(lists, weights.tiles, sides, device, with_counters=True)
    written = effective_rounding(weights.params[0].dtype, options.rounding)
    bits = random_bits(draws, device) if written == "stochastic" else no_random_bits(device)
    lr_value, lr = split_lr(lr, device)
    left, right = _matrices(make_products, preconditioner, grad.dtype)
    aligned, ok_stride = table.aligned and sides[1] % PADDING == 0, int(ok is not None)
    ok = constant(1.0, device, torch.bool) if ok is None else ok
    where, found_inf = (grad, gathered.squares, x, sides, table, aligned, written), on_device(device, found_inf, 0.0)
    call = StepCall(*where, ok, ok_stride, found_inf, bits, lr, lr_value)
    in_parts = options.momentum_on == "gradient" or weights.update_norms is not None
    (step_in_parts if in_parts else _step_at_once)(call, weights, left, right, options)
    ranges.end_phase()
    changed = [*weights.params, *weights.buffers, *weights.residuals, weights.skipped]
    torch.autograd.graph.increment_version([*changed, grad] if in_parts else changed)


def _step_at_once(call: StepCall, weights: Weights, left: Tensor, right: Tensor, options: StepOptions) -> None:
    """Step the weights with the heavy ball along U = X·G·Y, in one launch after X·G: see `step_in_parts`."""
    grad, (p, d), bits = call.grad, call.sides, call.bits
    config = tile_config(p, d) if call.aligned else SMALL
    torch.bmm(left, grad, out=call.x)

    ranges.phase("apply")  # includes the last product, which is in the same launch
    launch(
        kron_step_kernel,
        len(grad) * config.tiles(p) * config.tiles(d),
        (
            *(call.x, right, call.table.rows, call.table.counters, weights.skipped, call.squares, call.ok),
            *(call.found_inf, bits.seeds, bits.steps, call.lr),
        ),
        (
            *(call.lr_value, bits.step, call.ok_stride, bits.stride, bits.step_stride, call.squares.shape[-1]),
            *(p, d, grad.shape[1] // PADDING, grad.shape[2] // PADDING),
            *(float(options.momentum), float(options.weight_decay), int(options.decoupled)),
        ),
        (
            *(TRITON_DTYPES[weights.params[0].dtype], TRITON_DTYPES[weights.buffers[0].dtype]),
            *(call.rounding, call.aligned, config.block, config.depth),
        ),
        config.num_warps,
        config.num_stages,
        config.max_registers,
    )


def kron_step(
    weights: Weights,
    preconditioner: Preconditioner,
    gathered: Gathered,
    lr: Tensor,  # one element
    draws: Draws,
    found_inf: Tensor | None,  # one element
    options: StepOptions,
) -> None:
    """Step the weights in place: see `rootfree_kernels.eager.kron_step`.

    Parameters are FP32, BF16 or FP16, buffers FP32 or BF16, each list of one dtype. `gathered` is the result of this
    backend's `kron_gather`. G is changed only with gradient momentum or an update of a fixed size. C and K are
    converted to the dtype of G: BF16, or FP32 in Triton's interpreter.
    """
    kron_step_by(make_products, weights, preconditioner, gathered, lr, draws, found_inf, options)
