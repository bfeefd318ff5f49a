"""Batches: the blocks of one shape of a parameter group, with one storage for the factors of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rootfree_kernels.blocks import Tile, block_views, matrix_view


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

    def __init__(self, members: Sequence[Member], states: Any, names: Iterable[str], seeds: Sequence[int]) -> None:
        self.members = list(members)
        self.storage: dict[str, Tensor] = {}
        self.products: dict[str, Tensor] = {}
        self._views: dict[Tensor, list[tuple[str, Tensor]]] = {}
        self.seeds = torch.tensor(seeds, dtype=torch.int32, device=self.device)
        for name in names:
            self._adopt(states, name)

    @property
    def device(self) -> torch.device:
        return self.members[0].param.device

    def _adopt(self, states: Any, name: str) -> None:
        """Move an entry of all members into one storage and leave views of it in their states."""
        parts = [states[member.param][name + member.suffix] for member in self.members]
        self.storage[name] = torch.cat(parts)
        for member in self.members:
            view = self.storage[name][member.blocks]
            states[member.param][name + member.suffix] = view
            self._views.setdefault(member.param, []).append((name + member.suffix, view))

    def holds(self, states: Any) -> bool:
        """Whether the states still hold the views: a user may have put other tensors in their place."""
        for param, views in self._views.items():
            state = states[param]
            if not all(state.get(name) is view for name, view in views):
                return False
        return True

    def make_products(self, dtype: torch.dtype) -> None:
        """Derive P_C and P_K from the factors, in `dtype`."""
        for side in ("c", "k"):
            factor = self.storage[f"factor_{side}"].to(dtype)
            self.products[f"product_{side}"] = torch.bmm(factor, factor.mT)

    def index(self, members: Sequence[Member]) -> Tensor | None:
        """The numbers of these members' blocks, None where they are all the blocks of the batch."""
        if len(members) == len(self.members):
            return None
        return torch.cat([torch.arange(m.blocks.start, m.blocks.stop, device=self.device) for m in members])

    def part(self, index: Tensor | None) -> dict[str, Tensor]:
        """Storage, products and seeds of some blocks: themselves for all of them (None), else copies."""
        every = {**self.storage, **self.products, "seeds": self.seeds}
        return every if index is None else {name: tensor[index] for name, tensor in every.items()}

    def put_back(self, index: Tensor | None, part: dict[str, Tensor]) -> None:
        """Write the copies of `part` back."""
        if index is not None:
            for name, tensor in {**self.storage, **self.products}.items():
                tensor[index] = part[name]


def blocks_of(members: Sequence[Member], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The block views [p, d] of all members, in the order of the batch, of one tensor for each member's parameter."""
    return [
        block
        for member, tensor in zip(members, tensors, strict=True)
        for block in block_views(matrix_view(tensor), member.tile)
    ]
