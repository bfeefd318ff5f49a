"""Batches of blocks: the blocks of one shape of a parameter group, with one storage for the factors of all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rootfree_kernels.arguments import Factors
from rootfree_kernels.blocks import Tile
from rootfree_kernels.ops.dispatch import for_matrices
from rootfree_kernels.optim.state_spec import (
    Group,
    arithmetic_dtype,
    caches_products,
    factor_dtypes,
    suffix,
    tile_spec,
)

SLICED_DEVICES = ("cpu", "cuda")
"""Types of devices on which an address can be computed with, so that storages can be cut."""

MAX_BATCH_ELEMENTS = 1 << 26
"""The most elements of G in a batch. This bounds the temporary memory of a step, which is a few times as large."""


def own_storage(view: Tensor) -> Tensor:
    """Give a contiguous view a storage of its own size over the same memory, and return it.

    `torch.save` writes whole storages, so that a view would be saved with everything around it. The view keeps the
    version counter of its base. Fake tensors and devices whose memory cannot be cut keep the storage.
    """
    if view.device.type not in SLICED_DEVICES or type(view) is not Tensor or not view.numel():
        return view
    first, size = view.storage_offset() * view.element_size(), view.numel() * view.element_size()
    storage = view.untyped_storage()[first : first + size]
    view.data = torch.empty(0, dtype=view.dtype, device=view.device).set_(storage, 0, view.shape, view.stride())
    return view


class BatchEntry(NamedTuple):
    """One tile of one parameter, and where its blocks are in the batch."""

    param: Tensor
    tile: Tile
    suffix: str  # of its state keys: "", ".1", …
    first: int  # the index of its first block

    @property
    def blocks(self) -> slice:
        return slice(self.first, self.first + self.tile.num_blocks)


class BatchPart(NamedTuple):
    """The tensors of some blocks of a batch, or of all."""

    factors: Factors  # with P_C and P_K if they are kept
    skipped: Tensor  # [number of blocks]
    seeds: Tensor  # [number of blocks]


class BlockBatch:
    """L blocks of p × d of parameters that share a dtype and a device.

    `storage[name]` [L, …] holds one state tensor for all blocks. The state of each parameter holds a tensor over its
    part of that memory.
    `products` holds P_C = CCᵀ and P_K = KKᵀ, or nothing: they are derived from the factors and never saved. `seeds` [L]
    belong to the blocks.
    """

    def __init__(self, entries: Sequence[BatchEntry], states: Any, group: Group, seeds: Sequence[int]) -> None:
        self.entries = list(entries)
        param = entries[0].param
        self.device, self.block_shape = param.device, entries[0].tile.block_shape
        kind = (param.device, arithmetic_dtype(param, group), group["fused"], factor_dtypes(group))
        self.backend = for_matrices(*kind, self.block_shape, len(seeds))
        default = self.backend.matmul_dtype(group["factor_dtype"], param.device)
        self.matmul_dtype: torch.dtype = group["matmul_dtype"] or default
        self.packs_momenta: bool = group["packed_momentum"]
        self.is_whitened = group["direction"] == "whitened"
        self.storage: dict[str, Tensor] = {}
        self.products: dict[str, Tensor] = {}
        self.seeds = torch.tensor(seeds, dtype=torch.int32, device=self.device)
        for name in tile_spec(Tile.single(1, 1), group):
            self._adopt(states, name)
        if caches_products(group):
            self.products = self._new_products()
        named = {**self.storage, **self.products}
        factors = Factors(**{name: named.get(name) for name in Factors._fields})  # type: ignore[arg-type]
        self._whole = BatchPart(factors, self.storage["skipped"], self.seeds)
        self.note_versions()

    def _adopt(self, states: Any, name: str) -> None:
        """Move one state tensor of all entries into one storage, and leave their parts of it in their states."""
        parts = [states[entry.param][name + entry.suffix] for entry in self.entries]
        self.storage[name] = torch.cat(parts)
        for entry in self.entries:
            states[entry.param][name + entry.suffix] = own_storage(self.storage[name][entry.blocks])

    def note_versions(self) -> None:
        """Remember the version counters of the factors, so that a change from outside shows."""
        self._versions = self._factor_versions()

    def _factor_versions(self) -> list[int]:
        factors = (self.storage["factor_c"], self.storage["factor_k"])
        return [0 if factor.is_inference() else factor._version for factor in factors]

    def products_are_valid(self) -> bool:
        """Return whether the products still belong to the factors: a user may have written into one."""
        return not self.products or self._versions == self._factor_versions()

    def _new_products(self) -> dict[str, Tensor]:
        """Compute P_C and P_K from the factors, bitwise as an update does, so that a resumed run repeats."""
        factors = self.storage["factor_c"], self.storage["factor_k"]
        if type(factors[0]) is not Tensor:  # fake tensors have nothing to multiply
            products = self.empty_products(*factors)
        else:
            products = self.backend.operators.kron_products(*factors, self.matmul_dtype)
        return dict(zip(("product_c", "product_k"), products, strict=True))

    def empty_products(self, factor_c: Tensor, factor_k: Tensor) -> tuple[Tensor, Tensor]:
        """Return memory for P_C and P_K of some blocks, for a step that does not keep them."""
        dtype = self.matmul_dtype
        return torch.empty_like(factor_c, dtype=dtype), torch.empty_like(factor_k, dtype=dtype)

    def index(self, entries: Sequence[BatchEntry]) -> Tensor | None:
        """Return the indices of these entries' blocks. None stands for all blocks of the batch."""
        if len(entries) == len(self.entries):
            return None
        return torch.cat([torch.arange(m.blocks.start, m.blocks.stop, device=self.device) for m in entries])

    def part(self, index: Tensor | None) -> BatchPart:
        """Return the tensors of some blocks as copies, or those of all blocks (None) themselves."""
        if index is None:
            return self._whole
        some = [x if x is None else x[index] for x in self._whole.factors]
        factors = Factors(*some)  # type: ignore[arg-type]  # C, K and their momenta are never None
        return BatchPart(factors, self._whole.skipped[index], self.seeds[index])

    def put_back(self, index: Tensor, part: BatchPart, update: bool) -> None:
        """Write the copies in `part` back. Without an update of the factors, only `skipped` has changed."""
        self._whole.skipped[index] = part.skipped
        for x, copy in zip(self._whole.factors, part.factors, strict=True) if update else ():
            if x is not None and copy is not None:
                x[index] = copy

    def tensors(self) -> list[Tensor]:
        """Return all tensors of the batch."""
        return [x for x in (*self._whole.factors, self._whole.skipped, self.seeds) if x is not None]


def make_batches(
    tiles_of: Mapping[Tensor, Sequence[Tile]],
    ranks: Sequence[int],
    states: Any,
    group: Group,
    seed_of: Callable[[Tensor, int], int],
) -> list[BlockBatch]:
    """Return the batches of a group, over the tiles of every parameter that has state.

    `ranks` holds the overlap ranks of the parameters. Those that share memory must be stepped one after the other.

    `seed_of` returns the seed of a parameter's block, from the block's index in the parameter.
    """
    entries: dict[Any, list[BatchEntry]] = defaultdict(list)
    seeds: dict[Any, list[int]] = defaultdict(list)
    parts: dict[Any, int] = defaultdict(int)
    for (param, tiles), rank in zip(tiles_of.items(), ranks, strict=True):
        alone = id(param) if group["foreach"] is False else None
        next_block = 0
        for number, tile in enumerate(tiles):
            kind = (tile.block_shape, param.dtype, param.device, alone, rank)
            if _is_full(len(seeds[kind, parts[kind]]), tile):
                parts[kind] += 1
            key = (kind, parts[kind])
            entries[key].append(BatchEntry(param, tile, suffix(number), len(seeds[key])))
            blocks = range(next_block, next_block + tile.num_blocks)
            seeds[key].extend(seed_of(param, block) for block in blocks)
            next_block = blocks.stop
    return [BlockBatch(entries[key], states, group, seeds[key]) for key in entries]


def _is_full(num_blocks: int, tile: Tile) -> bool:
    """Return whether a batch of `num_blocks` cannot take the blocks of one more tile."""
    rows, cols = tile.block_shape
    return num_blocks > 0 and (num_blocks + tile.num_blocks) * rows * cols > MAX_BATCH_ELEMENTS
