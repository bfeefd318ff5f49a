"""Batches: the blocks of one shape of a parameter group, with one storage for the factors of all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rootfree_kernels.backends import FactorDtypes, implementation, matmul_dtype
from rootfree_kernels.blocks import Tile
from rootfree_kernels.dispatch import for_matrices
from rootfree_kernels.optim.layout import Entry, Group, arithmetic_dtype, is_pair
from rootfree_kernels.packing import packed_shape

MAX_BATCH_NUMBERS = 1 << 26
"""Numbers of G in a batch. It bounds a step's temporary memory, which is a few times as large."""


class Member(NamedTuple):
    """One tile of one parameter, and where its blocks lie in the batch."""

    param: Tensor
    tile: Tile
    suffix: str  # of its entries in the parameter's state: "", ".1", …
    first: int

    @property
    def blocks(self) -> slice:
        return slice(self.first, self.first + self.tile.num_blocks)


class FactorBatch:
    """L blocks of p × d of parameters that agree in dtype and device.

    `storage[name]` [L, …] holds an entry of all blocks; the state of each parameter holds views of its part. `products`
    are P_C = CCᵀ and P_K = KKᵀ, derived and so never saved, or nothing. `seeds` [L] are those of the blocks.
    """

    def __init__(self, members: Sequence[Member], states: Any, group: Group, seeds: Sequence[int]) -> None:
        self.members = list(members)
        param = members[0].param
        self.device, self.block_shape = param.device, members[0].tile.block_shape
        kind = (param.device, arithmetic_dtype(param, group), group["fused"], factor_dtypes(group))
        self.backend = for_matrices(*kind, self.block_shape, len(seeds))
        default = matmul_dtype(group["factor_dtype"], param.device, self.backend)
        self.matmul_dtype: torch.dtype = group["matmul_dtype"] or default
        self.packs_momenta: bool = group["packed_momentum"]
        self.storage: dict[str, Tensor] = {}
        self.products: dict[str, Tensor] = {}
        self.seeds = torch.tensor(seeds, dtype=torch.int32, device=self.device)
        for name in tile_layout(Tile.single(1, 1), group):
            self._adopt(states, name)
        if caches_products(group):
            self.products = self._made_products()
        self._every = {**self.storage, **self.products, "seeds": self.seeds}
        self.note_versions()

    def _adopt(self, states: Any, name: str) -> None:
        """Move an entry of all members into one storage and leave views of it in their states."""
        parts = [states[member.param][name + member.suffix] for member in self.members]
        self.storage[name] = torch.cat(parts)
        for member in self.members:
            states[member.param][name + member.suffix] = self.storage[name][member.blocks]

    def note_versions(self) -> None:
        """Remember the factors as they are, so that a change from outside shows."""
        self._versions = self._factor_versions()

    def _factor_versions(self) -> list[int]:
        factors = (self.storage["factor_c"], self.storage["factor_k"])
        return [0 if factor.is_inference() else factor._version for factor in factors]

    def products_hold(self) -> bool:
        """Whether the products still belong to the factors: a user may have written into one."""
        return not self.products or self._versions == self._factor_versions()

    def _made_products(self) -> dict[str, Tensor]:
        """P_C and P_K, derived from the factors as an update makes them: a resumed run has the same ones to the bit."""
        make = implementation(self.backend, "kron_products")
        products = make(self.storage["factor_c"], self.storage["factor_k"], self.matmul_dtype)
        return dict(zip(("product_c", "product_k"), products, strict=True))

    def empty_products(self, factor_c: Tensor, factor_k: Tensor) -> dict[str, Tensor]:
        """Return memory for P_C and P_K of some blocks' factors, for a step that does not keep them."""
        dtype = self.matmul_dtype
        return {
            "product_c": torch.empty_like(factor_c, dtype=dtype),
            "product_k": torch.empty_like(factor_k, dtype=dtype),
        }

    def index(self, members: Sequence[Member]) -> Tensor | None:
        """The numbers of these members' blocks, None where they are all the blocks of the batch."""
        if len(members) == len(self.members):
            return None
        return torch.cat([torch.arange(m.blocks.start, m.blocks.stop, device=self.device) for m in members])

    def part(self, index: Tensor | None) -> dict[str, Tensor]:
        """Storage, products and seeds of some blocks: themselves for all of them (None), else copies."""
        if index is None:
            return self._every
        return {name: tensor[index] for name, tensor in self._every.items()}

    def put_back(self, index: Tensor | None, part: dict[str, Tensor], update: bool) -> None:
        """Write the copies of `part` back; without an update only `skipped` has changed."""
        if index is not None:
            changed = {**self.storage, **self.products} if update else {"skipped": self.storage["skipped"]}
            for name, tensor in changed.items():
                tensor[index] = part[name]


def tile_numbers(members: Sequence[Member]) -> list[int]:
    """The `Tile.numbers` of all members, end to end, as operators take them."""
    return [number for member in members for number in member.tile.numbers]


def make_batches(
    tiles_of: Mapping[Tensor, Sequence[Tile]],
    states: Any,
    group: Group,
    seed_of: Callable[[Tensor, int], int],
) -> list[FactorBatch]:
    """The batches of a group, over the tiles of every parameter that was stepped; `seed_of` a parameter's block."""
    members: dict[Any, list[Member]] = defaultdict(list)
    seeds: dict[Any, list[int]] = defaultdict(list)
    parts: dict[Any, int] = defaultdict(int)
    for param, tiles in tiles_of.items():
        alone = id(param) if group["foreach"] is False else None
        next_block = 0
        for number, tile in enumerate(tiles):
            kind = (tile.block_shape, param.dtype, param.device, alone)
            if _is_full(len(seeds[kind, parts[kind]]), tile):
                parts[kind] += 1
            key = (kind, parts[kind])
            members[key].append(Member(param, tile, suffix(number), len(seeds[key])))
            blocks = range(next_block, next_block + tile.num_blocks)
            seeds[key].extend(seed_of(param, block) for block in blocks)
            next_block = blocks.stop
    return [FactorBatch(members[key], states, group, seeds[key]) for key in members]


def _is_full(num_blocks: int, tile: Tile) -> bool:
    """Whether a batch of `num_blocks` has no room for the blocks of one more tile."""
    rows, cols = tile.block_shape
    return num_blocks > 0 and (num_blocks + tile.num_blocks) * rows * cols > MAX_BATCH_NUMBERS


def caches_products(group: Group) -> bool:
    """Whether CCᵀ and KKᵀ are kept: as the group says, or else where they serve more than one step."""
    chosen: bool | None = group["cache_products"]
    return group["precondition_frequency"] != 1 if chosen is None else chosen


def factor_dtypes(group: Group) -> FactorDtypes:
    """In which dtypes a group wants its factors stored and multiplied."""
    return group["factor_dtype"], group["matmul_dtype"]


def suffix(tile_number: int) -> str:
    """Of the names of a tile's entries in its parameter's state."""
    return f".{tile_number}" if tile_number else ""


def tile_layout(tile: Tile, group: Group) -> dict[str, Entry]:
    """The state of the blocks of one tile."""
    dtype, count = group["factor_dtype"], tile.num_blocks
    layout = {"skipped": Entry((count,), torch.int32)}
    for side, size in zip("ck", tile.block_shape, strict=True):
        shape = (count, size, size)
        layout[f"factor_{side}"] = Entry(shape, dtype)
        layout[f"momentum_{side}"] = Entry((count, *packed_shape(size)) if group["packed_momentum"] else shape, dtype)
        if is_pair(dtype, group["rounding"]):
            layout[f"residual_{side}"] = Entry(shape, torch.int16)
    return layout
