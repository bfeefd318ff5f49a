"""The step of a batch of blocks: gather the gradients, update the factors if they are due, step the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rootfree_kernels import ops, ranges
from rootfree_kernels.arguments import Draws, Factors, Gathered, Preconditioner, Tiling, Weights
from rootfree_kernels.backend import Backend, BlockWork
from rootfree_kernels.optim.block_batch import BatchEntry, BlockBatch
from rootfree_kernels.optim.context import StepContext
from rootfree_kernels.optim.state_spec import Group, is_pair, needs_bits, norms_dtype, update_norm


class BlockBatchStep(NamedTuple):
    """Entries of a batch that are stepped together: all of them with an update of their factors, or all without."""

    weights: Weights  # with the `skipped` of all blocks of the batch
    tiling: Tiling
    batch: BlockBatch
    blocks: Tensor | None  # their indices in the batch; None stands for all
    update: bool
    are_matrices: bool  # whether every parameter has two axes, so that its blocks are views of it
    owners: list[int]  # the row of each block's parameter in the counts of steps; empty if no random bits are drawn

    @property
    def params(self) -> list[Tensor]:
        return self.weights.params

    @property
    def label(self) -> str:
        """The name in profiles."""
        return f"{self.num_blocks} block{'s' * (self.num_blocks != 1)} of {self.tiling.rows}x{self.tiling.cols}"

    @property
    def num_blocks(self) -> int:
        tiles = self.tiling.tiles
        return sum(down * across for down, across in zip(tiles[1::4], tiles[3::4], strict=True))

    @property
    def backend(self) -> Backend:
        return self.batch.backend

    def step(self, grads: list[Tensor], steps: Tensor, context: StepContext) -> None:
        """Step the blocks along their gradients. `steps` [L] are the counts that the random bits depend on."""
        batch, scaling = self.batch, context.scaling
        update = context.options.factor if self.update else None  # the options of an update, if one is due
        if context.is_profiled:
            ranges.phase("gather")
        part = batch.part(self.blocks)
        factors, draws = part.factors, Draws(part.seeds, steps)
        damped = []  # the factors whose squared norms an update needs
        if update is not None and update.damping and update.direction == "root_free":
            damped = [factors.factor_c, factors.factor_k]
        dtype, maximize = batch.matmul_dtype, context.options.maximize
        gathered = ops.kron_gather(grads, self.tiling, damped, scaling.grad_scale, dtype, maximize, batch.backend)
        ok = None
        if update is not None:
            if context.is_profiled:
                ranges.phase("factor update")
            if batch.backend.makes_products and factors.product_c is None and not batch.is_whitened:
                product_c, product_k = batch.empty_products(factors.factor_c, factors.factor_k)
                factors = factors._replace(product_c=product_c, product_k=product_k)
            ok = ops.kron_factor(factors, gathered, draws, scaling.found_inf, update, batch.backend)
        if context.is_profiled:
            ranges.end_phase()  # kron_step has two phases of its own
        self._step_weights(part.skipped, self._preconditioner(factors, ok), gathered, draws, context)
        if self.blocks is not None:
            batch.put_back(self.blocks, part, self.update)

    def _step_weights(
        self,
        skipped: Tensor,
        preconditioner: Preconditioner,
        gathered: Gathered,
        draws: Draws,
        context: StepContext,
    ) -> None:
        weights = self.weights if self.blocks is None else self.weights._replace(skipped=skipped)
        if not self.are_matrices:
            matrices = [p if p.dim() == 2 or p.is_contiguous() else p.contiguous() for p in weights.params]
            weights = weights._replace(params=matrices)
        lr, found_inf, options = context.lr, context.scaling.found_inf, context.options.step
        ops.kron_step(weights, preconditioner, gathered, lr, draws, found_inf, options, self.batch.backend)
        if not self.are_matrices:
            for param, matrix in zip(self.params, weights.params, strict=True):
                if matrix is not param:
                    param.copy_(matrix)

    def _preconditioner(self, factors: Factors, ok: Tensor | None) -> Preconditioner:
        if factors.product_c is not None and factors.product_k is not None:
            return Preconditioner(factors.product_c, factors.product_k, True, ok)
        return Preconditioner(factors.factor_c, factors.factor_k, self.batch.is_whitened, ok)

    def workspace(self) -> list[int]:
        """Return the bytes of each piece of memory that a step holds at once, if the backend says so, else nothing."""
        batch = self.batch
        if batch.backend.workspace is None:
            return []
        options = self.update, bool(batch.products), batch.packs_momenta, batch.is_whitened
        work = BlockWork(self.num_blocks, batch.block_shape, batch.matmul_dtype, *options)
        sizes = batch.backend.workspace(work)
        if self.blocks is not None:
            sizes += [_num_bytes(x) * len(self.blocks) // len(x) for x in batch.tensors()]
        return sizes + [_num_bytes(x) for x in self.params if not (x.dim() == 2 or x.is_contiguous())]


def _num_bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _norms(batch: BlockBatch, entries: Sequence[BatchEntry], group: Group) -> Tensor | None:
    """Return the norms of the updates of the entries' blocks, or None if updates keep their size."""
    if group["update_norm"] is None:
        return None
    numel = prod(batch.block_shape)
    norms = [update_norm(x.param.shape, numel, group) for x in entries for _ in range(x.tile.num_blocks)]
    return torch.tensor(norms, dtype=norms_dtype(entries[0].param, group), device=batch.device)


def block_steps(
    batches: Iterable[BlockBatch],
    rows: Mapping[Tensor, int],
    is_due: Mapping[Tensor, bool],
    states: Any,
    group: Group,
) -> list[BlockBatchStep]:
    """Return the steps of all batches: one for the parameters whose factors are due, one for the others.

    `rows` maps every parameter with a gradient to its row in the counts of steps.
    """
    found = []
    for batch in batches:
        for update in (True, False):
            entries = [entry for entry in batch.entries if is_due.get(entry.param) is update]
            if entries:
                params = [entry.param for entry in entries]
                stored = (group["factor_dtype"], group["rounding"]), (params[0].dtype, group["weight_rounding"])
                owners = [rows[entry.param] for entry in entries for _ in range(entry.tile.num_blocks)]
                buffers = [states[param]["momentum_buffer"] for param in params]
                residuals = [states[param]["weight_residual"] for param in params] if is_pair(*stored[1]) else []
                tiling = Tiling([x for entry in entries for x in entry.tile.as_ints], *batch.block_shape)
                norms = _norms(batch, entries, group)
                step = BlockBatchStep(
                    Weights(params, buffers, residuals, tiling.tiles, batch.storage["skipped"], norms),
                    tiling,
                    batch,
                    batch.index(entries),
                    update,
                    all(param.dim() == 2 for param in params),
                    owners if any(needs_bits(*kind) for kind in stored) else [],
                )
                found.append(step)
    return found
