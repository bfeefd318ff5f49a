"""What a step needs beside gradients and options. It is made once and kept from step to step while it is valid.

    GroupCache    of a group: its parameters, what they looked like, and its options
    DeviceState   the state of a group on one device: batches of blocks, and all counts of steps in one tensor
    StepPlan      the batches of one step, for the parameters that have gradients and the factors that are due

Every step asks whether they are still valid. The checks are passes over lists that run in C, since they are a large
part of a step's time on the host (`python -m bench.steps.host`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, chain, pairwise
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from rootfree_kernels import ranges
from rootfree_kernels.blocks import Tile
from rootfree_kernels.optim.block_batch import make_batches, own_storage
from rootfree_kernels.optim.block_step import BlockBatchStep, block_steps
from rootfree_kernels.optim.context import GroupOptions, StepContext, group_options
from rootfree_kernels.optim.elementwise_batch import ElementwiseBatch, elementwise_batches
from rootfree_kernels.optim.overlap import has_memory, overlap_ranks
from rootfree_kernels.optim.state_spec import Group

MAX_PLANS = 64
"""The most plans kept for a group on a device, where parameters have gradients in some steps only."""

RESERVING_DEVICES = ("cuda",)
"""Types of devices whose allocator keeps memory at hand that was given back."""

SeedOf = Callable[[Tensor, int], int]
"""Returns the seed of a parameter's block, from the index of the block."""

_grad, _dtype = attrgetter("grad"), attrgetter("dtype")
_LOOKS = (_dtype, *map(attrgetter, ("device", "shape", "layout")))


def kinds(tensors: Sequence[Tensor]) -> list[list[Any]]:
    """Return dtypes, devices, shapes and layouts: one list of each, which is faster than a tuple for each tensor."""
    return [list(map(look, tensors)) for look in _LOOKS]


def _places(tensors: Sequence[Tensor]) -> list[list[Any]]:
    """Return addresses and dtypes."""
    return [list(map(Tensor.data_ptr, tensors)), list(map(_dtype, tensors))]


def _are_same(left: Iterable[Any], right: Sequence[Any]) -> bool:
    """Return whether both hold the same objects in the same order."""
    objects = list(left)
    return len(objects) == len(right) and all(map(is_, objects, right))


def read_counts(counts: Sequence[Tensor]) -> list[int]:
    """Return the numbers of several tensors. Fake tensors have none: every step is planned as the first then."""
    if any(type(x) is not Tensor for x in counts):
        return [0] * sum(map(Tensor.numel, counts))
    return [number for x in counts for number in x.reshape(-1).tolist()]


def as_tensor(number: Any) -> Tensor:
    """Return a number as a tensor, whatever the default device is."""
    return number.detach() if isinstance(number, Tensor) else torch.tensor(number, device="cpu")


class DeviceState:
    """The state of those parameters of a group that are on one device and have been stepped.

    `counts` [number of parameters], int64, holds their counts of steps. Their states hold 0-d parts of it. `ranks`
    holds their overlap ranks, which decide who may be stepped together.
    """

    def __init__(self, tiles_of: Mapping[Tensor, Sequence[Tile]], states: Any, group: Group, seed_of: SeedOf) -> None:
        self.params = list(tiles_of)
        self.device, self.ranks = self.params[0].device, overlap_ranks(self.params)
        self.counts = self._packed_counts(states, self.device if group["capturable"] else torch.device("cpu"))
        self.batches = make_batches(tiles_of, self.ranks, states, group, seed_of)
        self.cached_batches = [batch for batch in self.batches if batch.products]
        self.plans: dict[Any, StepPlan] = {}
        self._states = [states[param] for param in self.params]
        self._entries = list(self._held())

    def _packed_counts(self, states: Any, device: torch.device) -> Tensor:
        steps = [states[param]["step"] for param in self.params]
        counts = torch.stack([as_tensor(step).to(device, torch.int64) for step in steps])
        for row, param in enumerate(self.params):
            states[param]["step"] = own_storage(counts[row])
        return counts

    def read_counts(self) -> list[int]:
        """Return the counts of steps on the host."""
        counts: list[int] = self.counts.tolist() if type(self.counts) is Tensor else read_counts([self.counts])
        return counts

    def _held(self) -> Iterable[Any]:
        return chain.from_iterable(map(dict.values, self._states))

    def tensors(self) -> list[Tensor]:
        """Return all tensors of the states."""
        return [entry for entry in self._entries if isinstance(entry, Tensor)]

    def is_valid(self, states: Any) -> bool:
        """Return whether the states still hold the same tensors: a user may have replaced some."""
        return (
            _are_same(map(states.get, self.params), self._states)
            and _are_same(self._held(), self._entries)
            and all(batch.products_are_valid() for batch in self.cached_batches)
        )

    def ranks_are_valid(self) -> bool:
        """Return whether the same parameters share memory as before: their addresses may have changed."""
        return overlap_ranks(self.params) == self.ranks

    def gradients(self) -> tuple[list[Tensor | None], tuple[bool, ...]]:
        """Return the gradients of all parameters, and for each parameter whether it has one."""
        grads = list(map(_grad, self.params))
        return grads, tuple([grad is not None for grad in grads])

    def keep(self, key: Any, plan: StepPlan) -> None:
        """Cache a plan."""
        if len(self.plans) >= MAX_PLANS:
            self.plans.clear()
        self.plans[key] = plan


class GroupCache:
    """What is kept for a group, and what it depends on."""

    def __init__(
        self,
        group: Group,
        key: Any,
        option_values: Any,
        states: Any,
        device_states: list[DeviceState],
        environment: tuple[str | None, str | None],
    ) -> None:
        self.key, self.option_values, self.environment = key, option_values, environment
        self.options: GroupOptions = group_options(group)
        self.device_states = device_states
        self._params = list(group["params"])
        self._kinds, self._have_memory = kinds(self._params), all(map(has_memory, self._params))
        self._places = _places(self._params) if self._have_memory else []
        stepped = {param for device_state in device_states for param in device_state.params}
        self._waiting = [param for param in self._params if param not in stepped]

    def is_valid(self, params: Sequence[Tensor], states: Any) -> bool:
        """Return whether parameters and state are the same, and no parameter has its first gradient."""
        return (
            _are_same(params, self._params)
            and self._are_unchanged(params)
            and not any(param.grad is not None for param in self._waiting)
            and all(device_state.is_valid(states) for device_state in self.device_states)
        )

    def _are_unchanged(self, params: Sequence[Tensor]) -> bool:
        """Return whether the parameters look as before. Unchanged addresses imply unchanged parameters: a cheap test
        comes first."""
        if not self._have_memory:
            return kinds(params) == self._kinds
        if (places := _places(params)) != self._places:
            if kinds(params) != self._kinds or not all(state.ranks_are_valid() for state in self.device_states):
                return False
            self._places = places
        return True


class StepPlan:
    """How the parameters of a group on one device are stepped: `batches`, and their parameters one after the other."""

    def __init__(
        self,
        state: DeviceState,
        states: Any,
        group: Group,
        grads: Sequence[Tensor | None],
        due: bool | Sequence[bool],
        seed_of: SeedOf,
    ) -> None:
        self.device, self._cached_batches = state.device, state.cached_batches
        self.knows_autocast = torch.amp.is_autocast_available(self.device.type)
        rows = {param: row for row, param in enumerate(state.params) if grads[row] is not None}
        is_due = {param: due if isinstance(due, bool) else due[row] for param, row in rows.items()}
        matrices = block_steps(state.batches, rows, is_due, states, group)
        excluded = {param for step in matrices for param in step.params}
        others = elementwise_batches(rows, state.ranks, excluded, states, group, seed_of)
        self.batches: list[ElementwiseBatch | BlockBatchStep] = [*others, *matrices]
        self.params = [param for batch in self.batches for param in batch.params]
        bounds = [0, *accumulate(len(batch.params) for batch in self.batches)]
        self.slices = [slice(*pair) for pair in pairwise(bounds)]
        self._rows = [rows[param] for param in self.params]
        self._kinds = kinds(self._ordered(grads))
        self.workspace = max((step.workspace() for step in matrices), key=sum, default=[])

        self._counts = state.counts
        self._sizes = [len(batch.owners) for batch in self.batches]
        owners = [row for batch in self.batches for row in batch.owners]
        self._owners = torch.tensor(owners, dtype=torch.int64, device=self._counts.device)
        self._no_steps = None if owners else [self._counts[:0]] * len(self.batches)
        steps = [int(grad is not None) for grad in grads]
        self._increment = torch.tensor(steps, dtype=torch.int64, device=self._counts.device)

    def _ordered(self, grads: Sequence[Tensor | None]) -> list[Any]:
        return [grads[row] for row in self._rows]

    @property
    def grad_dtypes(self) -> list[torch.dtype]:
        """The dtypes of the gradients of `params` that the plan was made for."""
        return self._kinds[0]

    def served(self, grads: Sequence[Tensor | None]) -> list[Tensor] | None:
        """Return the gradients of `params`, or None if the plan was made for gradients of another kind."""
        ordered = self._ordered(grads)
        return ordered if kinds(ordered) == self._kinds else None

    def step(self, grads: list[Tensor], context: StepContext) -> None:
        """Step all batches along the gradients of `params`. In essence this is what `torch.compile` traces."""
        for batch, where, steps in zip(self.batches, self.slices, self._steps(), strict=True):
            if context.is_profiled:
                ranges.batch(batch.label)
            batch.step(grads[where], steps, context)
        if context.is_profiled:
            ranges.end_batch()
        self._counts.add_(self._increment)

    def _steps(self) -> list[Tensor]:
        """Return for each batch the counts of steps that its random bits depend on, on the device of the counts. A
        kernel on a GPU is passed a number if all counts are equal."""
        if self._no_steps is not None:
            return self._no_steps
        return list(self._counts.index_select(0, self._owners).split(self._sizes))

    def note_versions(self) -> None:
        """Note that factors and products belong together."""
        for batch in self._cached_batches:
            batch.note_versions()

    def tensors(self) -> list[Tensor]:
        """Return all tensors that the plan keeps and no state holds."""
        own = [self._counts, self._owners, self._increment, *(self._no_steps or ())]
        for batch in self.batches:
            if isinstance(batch, ElementwiseBatch):
                own.extend(batch.own_tensors())
            else:
                own.extend(batch.batch.tensors())
                own.extend(x for x in (batch.blocks, batch.weights.update_norms) if x is not None)
        return own


def reserve(plans: Sequence[StepPlan]) -> None:
    """Take the memory of each device's largest batch, piece by piece, and give it back.

    A step for which there is not enough memory then fails before anything changes, whichever batch would have failed.

    Raises:
        torch.OutOfMemoryError: there is not enough memory.
    """
    largest: dict[torch.device, StepPlan] = {}
    for plan in plans:
        if plan.workspace and plan.device.type in RESERVING_DEVICES:
            before = largest.setdefault(plan.device, plan)
            if sum(plan.workspace) > sum(before.workspace):
                largest[plan.device] = plan
    for plan in largest.values():
        new_empty = plan.params[0].new_empty  # takes a third of the time of torch.empty
        pieces = [new_empty(size, dtype=torch.uint8) for size in plan.workspace]
        del pieces
