"""The temporary memory of a step of the Triton backend."""

from __future__ import annotations

from rootfree_kernels.backend import BlockWork
from rootfree_kernels.triton_kernels.sizes import num_partial_sums, num_step_programs, padded


def workspace(work: BlockWork) -> list[int]:
    """Return the bytes of each piece of memory that the operators hold at once during a step of a batch."""
    count, (p, d) = work.num_blocks, work.block_shape
    p8, d8 = padded(p), padded(d)
    grad = count * p8 * d8
    factors = [count * p8 * p8, count * d8 * d8]
    copies = [count * n8 * n8 for n, n8 in ((p, p8), (d, d8)) if n != n8]  # padded factors

    elements = [grad, grad]  # G and X; U of its own takes the memory of G
    if work.updates_factors:
        elements += [grad, *factors * 2, *copies * 4]  # A; new factors and momenta; the old ones
        if work.packs_momenta:
            elements += [count * p * p, count * d * d, (max(p8, d8) // 2) ** 2]  # unpacked; masks of one byte each
    if not (work.keeps_products or work.is_whitened):
        elements += factors
    elements += copies  # the products
    sizes = [x * work.matmul_dtype.itemsize for x in elements]
    squares = 12 * num_partial_sums(p, d) + 4 * num_step_programs(p, d)  # of G, C and K; of U
    return [*sizes, sum(factors) // 8 + 88 * count, count * squares]  # norms, row sums and weights; squares
