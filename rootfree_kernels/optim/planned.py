"""What comes before a step: every check, and state, bases and plans where they are missing or no longer hold."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rootfree_kernels import dispatch
from rootfree_kernels.backends import FactorDtypes, choose, is_captured
from rootfree_kernels.blocks import Tile
from rootfree_kernels.optim.checkpoint import CheckpointedOptimizer
from rootfree_kernels.optim.layout import (
    LAYOUT_OPTIONS,
    Group,
    arithmetic_dtype,
    difference_of,
    label_of,
    layout_options,
)
from rootfree_kernels.optim.options import RULES, check_lr, check_options, grad_problem
from rootfree_kernels.optim.plan import Basis, DeviceState, Plan, kinds
from rootfree_kernels.rounding import block_seed

_OPTIONS = tuple(name for name in RULES if name != "lr")


class Ready(NamedTuple):
    """A plan that serves, and the gradients of its parameters."""

    group: Group
    plan: Plan
    grads: list[Tensor]


class PlannedOptimizer(CheckpointedOptimizer):
    """An optimizer that keeps plans of its steps; see `RootFreeOptimizer`."""

    def _forget(self) -> None:
        self._seeds: dict[Tensor, int] = {}
        self._bases: dict[int, Basis] = {}  # by the number of a group
        self._checked: dict[int, Any] = {}  # for what options and parameters the state of a group was checked
        self._traced: dict[int, list[list[Plan]]] = {}  # the plans of every group, by the number of a trace

    def _ready(self) -> list[Ready]:
        """What is to be stepped. All checks of all groups come first, then what has to be made."""
        groups = list(enumerate(self.param_groups))
        kept = [self._kept(number, group) for number, group in groups]
        for number, group in groups:
            if kept[number] is None:
                self._check(number, group)
        every = []
        for number, group in groups:
            ready = kept[number]
            every += self._made(number, group) if ready is None else ready
        return every

    def _kept(self, number: int, group: Group) -> list[Ready] | None:
        """What is to be stepped of a group, None where something has changed since it was planned."""
        basis = self._bases.get(number)
        if basis is None or not self._keeps_options(basis, group) or not basis.holds(group["params"], self.state):
            self._bases.pop(number, None)
            self._traced.clear()
            return None
        every = []
        for device_state in basis.device_states:
            grads, present = device_state.gradients()
            plan = device_state.plans.get((present, self._due(group, device_state.counts.tolist)))
            ordered = None if plan is None else plan.served(grads)
            if plan is None or ordered is None:
                return None
            every.append(Ready(group, plan, ordered))
        return every

    def _made(self, number: int, group: Group) -> list[Ready]:
        """What is to be stepped of a group, all of it planned anew."""
        for param in group["params"]:
            if param.grad is not None and not self.state[param]:
                self._init_state(param, group)
        seed_of = partial(self._seed, group)
        if number not in self._bases:
            tiles_of: dict[torch.device, dict[Tensor, list[Tile]]] = defaultdict(dict)
            for param in group["params"]:
                if self.state.get(param):
                    tiles_of[param.device][param] = self._tiles(param, group)
            device_states = [DeviceState(tiles, self.state, group, seed_of) for tiles in tiles_of.values()]
            self._bases[number] = Basis(group, self._layout_key(group), self._options(group), self.state, device_states)
        every = []
        for device_state in self._bases[number].device_states:
            grads, present = device_state.gradients()
            due = self._due(group, device_state.counts.tolist)
            plan = Plan(device_state, self.state, group, grads, due, seed_of)
            device_state.keep((present, due), plan)
            every.append(Ready(group, plan, plan.served(grads) or []))
        return every

    # ---- checks ---------------------------------------------------------------------------------------------------

    def _keeps_options(self, basis: Basis, group: Group) -> bool:
        """Whether options still ask for the same state and plans. They are checked again where one has changed."""
        check_lr(group)
        options = self._options(group)
        if options != basis.options:
            check_options(group)
            basis.options = options
        return self._layout_key(group) == basis.key

    def _options(self, group: Group) -> tuple[list[type], list[Any]]:
        """All options but lr. Their types are compared first, so that only values of one type are: no Tensor with a
        number."""
        values = list(map(group.get, _OPTIONS))
        return list(map(type, values)), values

    def _check(self, number: int, group: Group) -> None:
        """Raise where an option, a gradient, the state or the backend cannot be served."""
        check_options(group)
        for index, param in enumerate(group["params"]):
            if param.grad is not None and (problem := grad_problem(param, param.grad)):
                raise RuntimeError(f"{label_of(group, index)} {problem}")
        key = (self._layout_key(group), kinds(group["params"]))
        if self._checked.get(number) != key:
            self._check_layout(group)
            self._check_backends(group["params"], group)
            self._checked[number] = key
        if any(is_captured(param.device) for param in group["params"] if param.grad is not None):
            raise RuntimeError(
                "a step that a CUDA graph captures needs state and plans that were made before: take a step with the "
                "same options and gradients first."
            )
        counts = (self.state[param]["step"] if self.state.get(param) else 0 for param in group["params"])
        self._due(group, lambda: list(map(float, counts)))  # a user's callable may raise

    def _check_layout(self, group: Group) -> None:
        """Raise if the state was made for other options, dtypes or devices."""
        for index, param in enumerate(group["params"]):
            state = self.state.get(param)
            if state and (difference := difference_of(state, self._layout(param, group), param.device)):
                raise ValueError(
                    f"{label_of(group, index)} of {param.dtype} on {param.device} with {layout_options(group)}: its "
                    f"state was made for others ({difference}). Set them before the first step, or make a new "
                    "optimizer."
                )

    def _check_backends(self, params: list[Tensor], group: Group) -> None:
        """Raise where a backend was asked for that cannot serve, or a dispatch table cannot be read."""
        kinds = {(p.device, arithmetic_dtype(p, group), self._factor_dtypes(p, group)) for p in params}
        for device, dtype, factors in kinds:
            choose(device, dtype, group["fused"], factors)
            dispatch.check(device, group["fused"])

    # ---- what differs between optimizers --------------------------------------------------------------------------

    def _layout_key(self, group: Group) -> Any:
        """All options that decide what the state looks like, how it is batched and by which backend it is stepped."""
        options = map(group.get, (*LAYOUT_OPTIONS, "fused", "capturable", "matmul_dtype"))
        return *options, os.environ.get("ROOTFREE_BACKEND"), os.environ.get("ROOTFREE_DISPATCH")

    def _tiles(self, param: Tensor, group: Group) -> list[Tile]:
        """The blocks of a parameter, none where it takes the diagonal step."""
        return []

    def _factor_dtypes(self, param: Tensor, group: Group) -> FactorDtypes | None:
        """The dtypes of a parameter's factors, None where it has none."""
        return None

    def _due(self, group: Group, read_counts: Callable[[], list[float]]) -> bool | tuple[bool, ...]:
        """Whether factors are updated in this step: all of them or none, or else for every count that is read."""
        return True

    # ---- state ----------------------------------------------------------------------------------------------------

    def _init_state(self, param: Tensor, group: Group) -> None:
        """Make the state of a parameter at its first gradient."""
        state = self.state[param]
        device = param.device if group["capturable"] else "cpu"
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        for name, entry in self._layout(param, group).items():
            if entry.like_param:
                state[name] = torch.full_like(param, entry.fill, dtype=entry.dtype, requires_grad=False)
            else:
                state[name] = param.new_full(entry.shape, entry.fill, dtype=entry.dtype)

    def _seed(self, group: Group, param: Tensor, block_index: int) -> int:
        """The seed of a block: a function of the group's seed and of the parameter's place among all parameters."""
        if param not in self._seeds:
            every = (p for g in self.param_groups for p in g["params"])
            self._seeds = {p: index for index, p in enumerate(every)}
        return block_seed(group["seed"], self._seeds[param], block_index)
