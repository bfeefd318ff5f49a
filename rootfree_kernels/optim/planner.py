"""Checks before a step, and building of state and plans."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from rootfree_kernels.backend import is_captured
from rootfree_kernels.blocks import Tile
from rootfree_kernels.ops import dispatch
from rootfree_kernels.ops.backends import choose
from rootfree_kernels.optim.context import GroupOptions, group_options
from rootfree_kernels.optim.options import RULES, check_lr, check_options, grad_problem, is_served, normalise
from rootfree_kernels.optim.plan import DeviceState, GroupCache, StepPlan, as_tensor, kinds, read_counts
from rootfree_kernels.optim.schedules import Answers, updates_due
from rootfree_kernels.optim.state_spec import (
    LAYOUT_OPTIONS,
    Group,
    arithmetic_dtype,
    caches_products,
    difference_of,
    factor_dtypes,
    label_of,
    layout_options,
    new_state,
    rule_of,
    state_spec,
    tiles_of,
)
from rootfree_kernels.rounding import block_seed

_OPTIONS = tuple(name for name in RULES if name != "lr")
_PLAN_OPTIONS = (*LAYOUT_OPTIONS, "fused", "capturable", "matmul_dtype")

States = Any
"""An optimizer's `state`: a dictionary of tensors by name, for each parameter."""


def _environment() -> tuple[str | None, str | None]:
    """Return the environment variables that decide about backends."""
    return os.environ.get("ROOTFREE_BACKEND"), os.environ.get("ROOTFREE_DISPATCH")


class PlannedStep(NamedTuple):
    """A plan that is valid for this step, and what it is run with."""

    group: Group
    options: GroupOptions
    plan: StepPlan
    grads: list[Tensor]  # of `plan.params`


class Planner:
    """Keeps the plans of an optimizer from step to step.

    `caches` holds what is kept for a group, by the number of the group. `traced` holds the plans of every group, by the
    number of a trace of `torch.compile`.
    """

    def __init__(self) -> None:
        self.caches: dict[int, GroupCache] = {}
        self.traced: dict[int, list[list[StepPlan]]] = {}
        self._checked: dict[int, Any] = {}  # the options and parameters for which a group's state was checked
        self._rules: Any = WeakTensorKeyDictionary()  # by which rule the state of a parameter was made
        self._answers = Answers()

    def planned_steps(self, groups: Sequence[Group], states: States) -> list[PlannedStep]:
        """Return what this step has to do. All checks of all groups come first, then what has to be made.

        Raises:
            ValueError, RuntimeError: an option or a gradient cannot be served; nothing was changed.
        """
        if len(self.caches) > len(groups):
            self._forget_groups_from(len(groups))
        cached = [self._cached(number, group, states) for number, group in enumerate(groups)]
        stale = [number for number, steps in enumerate(cached) if steps is None]
        for number in stale:
            self._check(number, groups[number], states)
        if stale:
            make_states([groups[number] for number in stale], states)
        every = []
        for number, steps in enumerate(cached):
            every += self._new(number, groups, states) if steps is None else steps
        return every

    def finish_step(self) -> None:
        """Note that the planned steps have been taken."""
        self._answers.forget()

    def forget_plans(self) -> None:
        """Drop all plans. State that the last step has made may belong to parameters that the next one leaves out."""
        self.caches.clear()
        self.traced.clear()

    def _forget_groups_from(self, number: int) -> None:
        """Drop what is kept for groups that were removed, so that their parameters and state can be freed."""
        self.traced.clear()
        for kept in (self.caches, self._checked):
            for old in [key for key in kept if key >= number]:
                del kept[old]

    def _cached(self, number: int, group: Group, states: States) -> list[PlannedStep] | None:
        """Return the cached steps of a group, or None if they are stale."""
        cache = self.caches.get(number)
        if cache is None or not self._options_are_valid(cache, group) or not cache.is_valid(group["params"], states):
            self.caches.pop(number, None)
            self.traced.clear()
            return None
        every = []
        for device_state in cache.device_states:
            grads, present = device_state.gradients()
            plan = device_state.plans.get((present, self._due(group, device_state.read_counts, present)))
            ordered = None if plan is None else plan.served(grads)
            if plan is None or ordered is None:
                return None
            every.append(PlannedStep(group, cache.options, plan, ordered))
        return every

    def _new(self, number: int, groups: Sequence[Group], states: States) -> list[PlannedStep]:
        """Return new steps for a group."""
        group = groups[number]
        seed_of = partial(self._seed, self._index_of(groups), group)
        for param in group["params"]:
            if states.get(param):
                self._rules.setdefault(param, rule_of(group))
        if number not in self.caches:
            self.caches[number] = self._new_cache(group, states, seed_of)
        cache, every = self.caches[number], []
        for device_state in cache.device_states:
            grads, present = device_state.gradients()
            due = self._due(group, device_state.read_counts, present)
            plan = StepPlan(device_state, states, group, grads, due, seed_of)
            device_state.keep((present, due), plan)
            every.append(PlannedStep(group, cache.options, plan, plan.served(grads) or []))
        return every

    def _new_cache(self, group: Group, states: States, seed_of: Callable[[Tensor, int], int]) -> GroupCache:
        tiles_on: dict[torch.device, dict[Tensor, list[Tile]]] = defaultdict(dict)
        for param in group["params"]:
            if states.get(param) and takes_part(param, states[param]):
                tiles_on[param.device][param] = tiles_of(param, group)
        device_states = [DeviceState(tiles, states, group, seed_of) for tiles in tiles_on.values()]
        key, values = self._plan_key(group), self._option_values(group)
        return GroupCache(group, key, values, states, device_states, _environment())

    # ---- options --------------------------------------------------------------------------------------------------

    def _options_are_valid(self, cache: GroupCache, group: Group) -> bool:
        """Return whether the options still ask for the same state and plans. Check them again if one has changed."""
        check_lr(group)
        if self._option_values(group) != cache.option_values:
            normalise(group)
            check_options(group)
            cache.option_values, cache.options = self._option_values(group), group_options(group)
            if self._plan_key(group) != cache.key:
                return False
        return cache.environment == _environment()

    def _option_values(self, group: Group) -> tuple[list[type], list[Any]]:
        """Return all options but lr. Their types come first: only values of one type are compared then, and never a
        Tensor with a number."""
        values = list(map(group.get, _OPTIONS))
        return list(map(type, values)), values

    def _plan_key(self, group: Group) -> Any:
        """Return everything that decides about the state, about the batches and about their backend."""
        caches = "structure" in group and caches_products(group)
        return *map(group.get, _PLAN_OPTIONS), caches, *_environment()

    def _due(
        self, group: Group, read_counts: Callable[[], list[int]], present: Sequence[bool]
    ) -> bool | tuple[bool, ...]:
        """Return whether factors are updated in this step: one answer for all parameters, or else one for each."""
        frequency = group.get("precondition_frequency", 1)
        return True if frequency == 1 else updates_due(frequency, read_counts(), present, self._answers)

    # ---- checks ---------------------------------------------------------------------------------------------------

    def _check(self, number: int, group: Group, states: States) -> None:
        """Raise if an option, a gradient, the state or the backend cannot be served."""
        normalise(group)
        check_options(group)
        rule = rule_of(group)
        for param in group["params"]:
            if states.get(param) and (made_by := self._rules.get(param, rule)) != rule:
                raise ValueError(
                    f"{rule} in a group whose state was made with {made_by}: set them before the first step, or make a "
                    "new optimizer."
                )
        for index, param in enumerate(group["params"]):
            if param.grad is not None and (problem := grad_problem(param, param.grad)):
                raise RuntimeError(f"{label_of(group, index)} {problem}")
        key = (self._plan_key(group), kinds(group["params"]))
        if self._checked.get(number) != key:
            _check_state(group, states)
            check_backends(group["params"], group)
            self._checked[number] = key
        if any(is_captured(param.device) for param in group["params"] if param.grad is not None):
            raise RuntimeError(
                "a step that a CUDA graph captures needs state and plans that were made before: take a step with the "
                "same options and gradients first."
            )
        taking_part = [param for param in group["params"] if param.grad is not None]
        self._due(group, partial(_counts_of, taking_part, states), [True] * len(taking_part))  # a callable may raise

    # ---- seeds ----------------------------------------------------------------------------------------------------

    def _index_of(self, groups: Sequence[Group]) -> Callable[[Tensor], int]:
        """Return a function from a parameter to its index among all. It looks at the groups when it is first called."""

        @cache
        def indices() -> dict[Tensor, int]:
            return {param: index for index, param in enumerate(p for g in groups for p in g["params"])}

        return lambda param: indices()[param]

    def _seed(self, index_of: Callable[[Tensor], int], group: Group, param: Tensor, block_index: int) -> int:
        """Return the seed of a block: a function of the group's seed and of the parameter's index among all."""
        return block_seed(group["seed"], index_of(param), block_index)


def make_states(groups: Sequence[Group], states: States) -> None:
    """Make the state of all parameters with their first gradient. An error while it is made changes nothing."""
    made = {
        param: new_state(param, group)
        for group in groups
        for param in group["params"]
        if param.grad is not None and not states.get(param)
    }
    states.update(made)


def takes_part(param: Tensor, state: Mapping[str, Any]) -> bool:
    """Return whether a parameter has a gradient or had one before.

    Others may have state too, for example from a checkpoint. Without them, their batches step as a whole.
    """
    return param.grad is not None or any(read_counts([as_tensor(state["step"])]))


def _counts_of(params: Sequence[Tensor], states: States) -> list[int]:
    """Return the counts of steps of parameters. They are 0 before the first step."""
    return read_counts([states[param]["step"] for param in params if states.get(param)]) + [
        0 for param in params if not states.get(param)
    ]


def _check_state(group: Group, states: States) -> None:
    """Raise if the state was made for other options, dtypes or devices."""
    for index, param in enumerate(group["params"]):
        state = states.get(param)
        if state and (difference := difference_of(state, state_spec(param, group), param.device)):
            raise ValueError(
                f"{label_of(group, index)} of {param.dtype} on {param.device} with {layout_options(group)}: its "
                f"state was made for others ({difference}). Set them before the first step, or make a new optimizer."
            )


def check_backends(params: Sequence[Tensor], group: Group) -> None:
    """Raise if a backend was asked for that cannot serve, or if a dispatch table cannot be read."""
    served = set()
    for param in filter(is_served, params):
        factors = factor_dtypes(group) if tiles_of(param, group) else None
        served.add((param.device, arithmetic_dtype(param, group), factors))
    for device, dtype, factors in served:
        choose(device, dtype, group["fused"], factors)
        dispatch.check(device, group["fused"])
