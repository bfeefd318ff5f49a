"""What a step needs beside gradients and options, made once and kept from step to step while it holds.

    Basis         of a group: its parameters, what they are, and the options that the rest depends on
    DeviceState   its state on one device, packed: batches of factors, and the counts of steps in one tensor
    Plan          the operators' lists of tensors, for the parameters that have gradients and those that are due

Whether they still hold is asked at every step, and so in passes over lists that run in C (`bench.host_step`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, chain, pairwise
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rootfree_kernels.blocks import Tile
from rootfree_kernels.dispatch import for_diagonal
from rootfree_kernels.optim.factor_batch import FactorBatch, make_batches, tile_numbers
from rootfree_kernels.optim.layout import Group, arithmetic_dtype, is_pair, needs_bits, state_dtype
from rootfree_kernels.optim.workspace import workspace

MAX_PLANS = 64
"""Kept for a group on a device, where gradients come and go."""

SeedOf = Callable[[Tensor, int], int]
"""From a parameter and the number of one of its blocks."""

_grad, _dtype = attrgetter("grad"), attrgetter("dtype")
_LOOKS = (_dtype, *map(attrgetter, ("device", "shape", "layout")))


def kinds(tensors: Sequence[Tensor]) -> list[list[Any]]:
    """Dtypes, devices, shapes and layouts: a list of each, which is quicker than a tuple for each tensor."""
    return [list(map(look, tensors)) for look in _LOOKS]


def _places(tensors: Sequence[Tensor]) -> list[list[Any]]:
    return [list(map(Tensor.data_ptr, tensors)), list(map(_dtype, tensors))]


def _same(left: Iterable[Any], right: Sequence[Any]) -> bool:
    """Whether both hold the same objects."""
    objects = list(left)
    return len(objects) == len(right) and all(map(is_, objects, right))


class Diagonal(NamedTuple):
    """Parameters of one dtype, with gradients of one dtype, that one `rf_rmsprop` steps."""

    params: list[Tensor]
    squares: list[Tensor]
    buffers: list[Tensor]
    skipped: list[Tensor]
    square_residuals: list[Tensor]
    weight_residuals: list[Tensor]
    seeds: Tensor
    backend: str
    owners: list[int]  # for each tensor its parameter's row in the counts; none where no random bits are drawn

    @property
    def label(self) -> str:
        """What profilers call it."""
        return f"diagonal step of {len(self.params)} tensor{'s' * (len(self.params) != 1)}"


class Matrices(NamedTuple):
    """Members of a batch of blocks that are stepped together: all with, or all without an update of their factors."""

    params: list[Tensor]
    buffers: list[Tensor]
    residuals: list[Tensor]
    tiles: list[int]
    batch: FactorBatch
    blocks: Tensor | None  # their numbers in the batch, None for all
    update: bool
    flat: bool  # whether all parameters have two axes
    owners: list[int]  # as above, for each block

    @property
    def label(self) -> str:
        """What profilers call it."""
        rows, cols = self.batch.block_shape
        num_blocks = sum(down * across for down, across in zip(self.tiles[1::4], self.tiles[3::4], strict=True))
        return f"{num_blocks} block{'s' * (num_blocks != 1)} of {rows}x{cols}"


class DeviceState:
    """The state of those parameters of a group that lie on one device and have been stepped.

    `counts` [number of parameters] are their steps, of which the states hold 0-d views.
    """

    def __init__(self, tiles_of: Mapping[Tensor, Sequence[Tile]], states: Any, group: Group, seed_of: SeedOf) -> None:
        self.params = list(tiles_of)
        self.device = self.params[0].device
        self.counts = self._packed_counts(states, self.device if group["capturable"] else torch.device("cpu"))
        self.batches = make_batches(tiles_of, states, group, seed_of)
        self.plans: dict[Any, Plan] = {}
        self._states = [states[param] for param in self.params]
        self._entries = list(self._held())

    def _packed_counts(self, states: Any, device: torch.device) -> Tensor:
        steps = [states[param]["step"] for param in self.params]
        counts = torch.stack([torch.as_tensor(step, dtype=torch.float32, device=device) for step in steps])
        for row, param in enumerate(self.params):
            states[param]["step"] = counts[row]
        return counts

    def _held(self) -> Iterable[Any]:
        return chain.from_iterable(map(dict.values, self._states))

    def tensors(self) -> list[Tensor]:
        """All that the states hold."""
        return [entry for entry in self._entries if isinstance(entry, Tensor)]

    def holds(self, states: Any) -> bool:
        """Whether the states still hold the same tensors: a user may have put others in their place."""
        return (
            _same(map(states.get, self.params), self._states)
            and _same(self._held(), self._entries)
            and all(batch.products_hold() for batch in self.batches)
        )

    def gradients(self) -> tuple[list[Tensor | None], tuple[bool, ...]]:
        """Of all parameters, and for each whether there is one."""
        grads = list(map(_grad, self.params))
        return grads, tuple([grad is not None for grad in grads])

    def keep(self, key: Any, plan: Plan) -> None:
        if len(self.plans) >= MAX_PLANS:
            self.plans.clear()
        self.plans[key] = plan


class Basis:
    """What all that is kept for a group rests on. `key` stands for the options that decide over state and plans."""

    def __init__(self, group: Group, key: Any, options: Any, states: Any, device_states: list[DeviceState]) -> None:
        self.key, self.options = key, options
        self.device_states = device_states
        self._params = list(group["params"])
        self._kinds, self._places = kinds(self._params), _places(self._params)
        self._stateless = [param for param in self._params if not states.get(param)]

    def holds(self, params: Sequence[Tensor], states: Any) -> bool:
        """Whether parameters and state are the same, and no parameter joins the others by its first gradient."""
        return (
            _same(params, self._params)
            and self._are_alike(params)
            and not any(param.grad is not None for param in self._stateless)
            and all(device_state.holds(states) for device_state in self.device_states)
        )

    def _are_alike(self, params: Sequence[Tensor]) -> bool:
        """Whether the parameters are what they were: no question of it while they lie where they lay."""
        if (places := _places(params)) != self._places:
            if kinds(params) != self._kinds:
                return False
            self._places = places
        return True


class Plan:
    """How parameters on one device are stepped: `parts`, and their parameters and gradients laid end to end."""

    def __init__(
        self,
        state: DeviceState,
        states: Any,
        group: Group,
        grads: Sequence[Tensor | None],
        due: bool | Sequence[bool],
        seed_of: SeedOf,
    ) -> None:
        self.device, self.batches = state.device, state.batches
        self.knows_autocast = torch.amp.is_autocast_available(self.device.type)
        rows = {param: row for row, param in enumerate(state.params) if grads[row] is not None}
        is_due = {param: due if isinstance(due, bool) else due[row] for param, row in rows.items()}
        matrices = _matrices(state.batches, rows, is_due, states, group)
        diagonals = _diagonals(rows, {p for part in matrices for p in part.params}, states, group, seed_of)
        self.parts: list[Diagonal | Matrices] = [*diagonals, *matrices]
        self.params = [param for part in self.parts for param in part.params]
        bounds = [0, *accumulate(len(part.params) for part in self.parts)]
        self.slices = [slice(*pair) for pair in pairwise(bounds)]
        self._rows = [rows[param] for param in self.params]
        self._kinds = kinds(self._ordered(grads))
        self.workspace = max(map(workspace, matrices), key=sum, default=[])

        self._counts = state.counts
        self._sizes = [len(part.owners) for part in self.parts]
        owners = [row for part in self.parts for row in part.owners]
        self._owners = torch.tensor(owners, dtype=torch.int64, device=self._counts.device)
        self._no_steps = None if owners else [self._counts[:0]] * len(self.parts)
        steps = [float(grad is not None) for grad in grads]
        self._increment = torch.tensor(steps, dtype=torch.float32, device=self._counts.device)

    def _ordered(self, grads: Sequence[Tensor | None]) -> list[Any]:
        return [grads[row] for row in self._rows]

    def served(self, grads: Sequence[Tensor | None]) -> list[Tensor] | None:
        """The gradients of `params`, None where one of them is not of the kind that the plan was made for."""
        ordered = self._ordered(grads)
        return ordered if kinds(ordered) == self._kinds else None

    def steps(self) -> list[Tensor]:
        """Return for each part the counts of steps that its random bits depend on, where the counts are kept: kernels
        on a GPU are told one that all have in common as a number."""
        if self._no_steps is not None:
            return self._no_steps
        return list(self._counts.index_select(0, self._owners).split(self._sizes))

    def count_step(self) -> None:
        self._counts.add_(self._increment)

    def note_versions(self) -> None:
        """Note that factors and products belong together."""
        for batch in self.batches:
            if batch.products:
                batch.note_versions()

    def tensors(self) -> list[Tensor]:
        """All that the plan keeps and no state holds."""
        own = [self._counts, self._owners, self._increment, *(self._no_steps or ())]
        for part in self.parts:
            if isinstance(part, Diagonal):
                own.append(part.seeds)
            else:
                own.extend(part.batch.part(None).values())
                own.extend([] if part.blocks is None else [part.blocks])
        return own


def _diagonals(
    rows: Mapping[Tensor, int], matrices: set[Tensor], states: Any, group: Group, seed_of: SeedOf
) -> list[Diagonal]:
    batches: dict[Any, list[Tensor]] = defaultdict(list)
    for param in rows:
        if param.numel() and param not in matrices:
            alone = id(param) if group["foreach"] is False else None
            batches[param.dtype, param.grad.dtype, alone].append(param)  # type: ignore[union-attr]
    return [_diagonal(batch, rows, states, group, seed_of) for batch in batches.values()]


def _diagonal(params: list[Tensor], rows: Mapping[Tensor, int], states: Any, group: Group, seed_of: SeedOf) -> Diagonal:
    def entries(name: str) -> list[Tensor]:
        return [states[param][name] for param in params]

    first = params[0]
    stored = (state_dtype(first, group), group["rounding"]), (first.dtype, group["weight_rounding"])
    return Diagonal(
        params,
        entries("square"),
        entries("momentum_buffer"),
        entries("skipped"),
        entries("square_residual") if is_pair(*stored[0]) else [],
        entries("weight_residual") if is_pair(*stored[1]) else [],
        torch.tensor([seed_of(param, 0) for param in params], dtype=torch.int32, device=first.device),
        for_diagonal(params, arithmetic_dtype(first, group), group["fused"]),
        [rows[param] for param in params] if any(needs_bits(*kind) for kind in stored) else [],
    )


def _matrices(
    batches: Iterable[FactorBatch],
    rows: Mapping[Tensor, int],
    is_due: Mapping[Tensor, bool],
    states: Any,
    group: Group,
) -> list[Matrices]:
    parts = []
    for batch in batches:
        for update in (True, False):
            members = [member for member in batch.members if is_due.get(member.param) is update]
            if members:
                params = [member.param for member in members]
                stored = (group["factor_dtype"], group["rounding"]), (params[0].dtype, group["weight_rounding"])
                owners = [rows[member.param] for member in members for _ in range(member.tile.num_blocks)]
                part = Matrices(
                    params,
                    [states[param]["momentum_buffer"] for param in params],
                    [states[param]["weight_residual"] for param in params] if is_pair(*stored[1]) else [],
                    tile_numbers(members),
                    batch,
                    batch.index(members),
                    update,
                    all(param.dim() == 2 for param in params),
                    owners if any(needs_bits(*kind) for kind in stored) else [],
                )
                parts.append(part)
    return parts
