"""Which batches an optimizer steps, and which backend steps each of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from rootfree_kernels.backend import Backend
from rootfree_kernels.optim.base import RootFreeOptimizer
from rootfree_kernels.optim.block_step import BlockBatchStep
from rootfree_kernels.optim.elementwise_batch import ElementwiseBatch
from rootfree_kernels.optim.plan import StepPlan


class BatchReport(NamedTuple):
    """One batch of a step: blocks of one shape, or a list of tensors that take the diagonal step."""

    label: str  # the name of its range in profiles
    backend: Backend
    params: list[Tensor]
    grad_dtype: torch.dtype
    state_dtype: torch.dtype  # of the momentum buffer
    block_shape: tuple[int, int] | None = None  # None for the diagonal step, as are the fields below
    num_blocks: int = 0
    updates_factors: bool = False
    matmul_dtype: torch.dtype | None = None
    computes_products: bool = False  # whether CCᵀ and KKᵀ are computed in an update, kept or not


def step_reports(optimizer: Optimizer) -> list[list[BatchReport]]:
    """Return the batches of every kind of step that an optimizer has planned, a list for each.

    There is one for each group and device, for each set of parameters with gradients, and for steps with and without
    an update of the factors. The list is empty before the first step, and for optimizers of other packages.
    """
    if not isinstance(optimizer, RootFreeOptimizer):
        return []
    states = [state for cache in optimizer._planner.caches.values() for state in cache.device_states]
    return [_reports(plan) for state in states for plan in state.plans.values()]


def _reports(plan: StepPlan) -> list[BatchReport]:
    dtypes = plan.grad_dtypes
    return [_report(batch, dtypes[where.start]) for batch, where in zip(plan.batches, plan.slices, strict=True)]


def _report(batch: ElementwiseBatch | BlockBatchStep, grad_dtype: torch.dtype) -> BatchReport:
    common = batch.label, batch.backend, batch.params, grad_dtype
    if isinstance(batch, ElementwiseBatch):
        return BatchReport(*common, batch.state.buffers[0].dtype)
    blocks = batch.batch
    return BatchReport(
        *common,
        batch.weights.buffers[0].dtype,
        blocks.block_shape,
        batch.num_blocks,
        batch.update,
        blocks.matmul_dtype,
        bool(blocks.products) or blocks.backend.makes_products,
    )
