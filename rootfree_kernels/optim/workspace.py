"""Memory that kernels take during a step and give back. It is taken once before anything changes, so that a step for
which there is no memory leaves weights and state as they were, whichever batch would have been the one to fail."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rootfree_kernels.backends import implementation, makes_products

if TYPE_CHECKING:
    from rootfree_kernels.optim.plan import Matrices, Plan

DEVICES = ("cuda",)
"""Types of devices whose allocator keeps at hand what was given back."""


def workspace(part: Matrices) -> list[int]:
    """Bytes of each piece of memory that a fused backend holds at once while it steps `part`; none of eager PyTorch."""
    batch = part.batch
    if not makes_products(batch.backend):
        return []
    count = len(batch.seeds if part.blocks is None else part.blocks)
    p, d = batch.block_shape
    padded_side, num_partial_sums = (implementation(batch.backend, x) for x in ("padded_side", "num_partial_sums"))
    p8, d8 = padded_side(p), padded_side(d)
    grad = count * p8 * d8
    factors = [count * p8 * p8, count * d8 * d8]
    copies = [count * n8 * n8 for n, n8 in ((p, p8), (d, d8)) if n != n8]  # of factors, padded

    numbers = [grad, grad]  # G and X
    if part.update:
        numbers += [grad, *factors * 2, *copies * 4]  # A; new factors and momenta; the old ones
        if batch.packs_momenta:
            numbers += [count * p * p, count * d * d, (max(p8, d8) // 2) ** 2]  # unpacked; conditions, of a byte each
    if not batch.products:
        numbers += factors
    numbers += copies  # the products
    sizes = [x * batch.matmul_dtype.itemsize for x in numbers]
    sizes += [sum(factors) // 8 + 72 * count, 12 * count * num_partial_sums(p, d)]  # norms, sums of rows; of squares
    if part.blocks is not None:
        sizes += [_bytes(x) * count // len(x) for x in batch.part(None).values()]
    return sizes + [_bytes(x) for x in part.params if not (x.dim() == 2 or x.is_contiguous())]


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def reserve(plans: Iterable[Plan]) -> None:
    """Take the memory of the largest part of all plans of a device, piece by piece, and give it back.

    Raises:
        torch.OutOfMemoryError: there is not so much.
    """
    largest: dict[torch.device, Plan] = {}
    for plan in plans:
        if plan.workspace and plan.device.type in DEVICES:
            before = largest.setdefault(plan.device, plan)
            if sum(plan.workspace) > sum(before.workspace):
                largest[plan.device] = plan
    for plan in largest.values():
        new_empty = plan.params[0].new_empty  # takes a third of the time of torch.empty
        pieces = [new_empty(size, dtype=torch.uint8) for size in plan.workspace]
        del pieces
