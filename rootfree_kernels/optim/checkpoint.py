"""State dicts: checked before anything changes, with exact dtypes, and without callables."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from rootfree_kernels.optim.options import RULES
from rootfree_kernels.optim.state_spec import Group, layout_options, state_spec

CALLABLE = "callable: "
"""What the saved name of a callable begins with."""


def without_callables(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Replace callables among the options by their names, in place, so that `torch.load(weights_only=True)` works."""
    for group in state_dict["param_groups"]:
        for name, value in group.items():
            if callable(value):
                group[name] = f"{CALLABLE}{getattr(value, '__qualname__', type(value).__qualname__)}"
    return state_dict


def restore_callables(groups: Sequence[Group], before: Sequence[Group]) -> None:
    """Give groups the callables that they had before a load: a state dict has only their names."""
    for group, own in zip(groups, before, strict=True):
        for name, value in group.items():
            if isinstance(value, str) and value.startswith(CALLABLE):
                group[name] = own[name]
                if not callable(own[name]):
                    warnings.warn(f"{name} was saved as a {value}; {own[name]!r} is kept.", stacklevel=4)


def with_newer_options(state_dict: Mapping[str, Any], newer: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict whose groups have the `newer` options that did not exist when it was saved."""
    if "param_groups" not in state_dict:
        return dict(state_dict)
    return {**state_dict, "param_groups": [{**newer, **group} for group in state_dict["param_groups"]]}


def _saved_states(
    groups: Sequence[Group], state_dict: Mapping[str, Any]
) -> Iterable[tuple[Tensor, Group, dict[str, Any]]]:
    """Yield (parameter, its saved group, its saved state) for every parameter with a saved state."""
    for group, saved in zip(groups, state_dict["param_groups"], strict=True):
        for param, index in zip(group["params"], saved["params"], strict=True):
            if state_dict["state"].get(index):
                yield param, saved, state_dict["state"][index]


def check_state_dict(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Raise ValueError if a state dict belongs to another optimizer or to other shapes."""
    name = type(optimizer).__name__
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(f"state_dict has no 'state' and 'param_groups': load one of a {name}, not of a model.")
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != [len(group["params"]) for group in state_dict["param_groups"]]:
        raise ValueError(f"state_dict has other groups than this {name}: build the groups in the same way.")
    for group in state_dict["param_groups"]:
        if foreign := sorted(RULES.keys() & (group.keys() ^ optimizer.defaults.keys())):
            raise ValueError(f"state_dict lacks or adds the options {foreign}: load one of a {name}.")
    for param, group, state in _saved_states(optimizer.param_groups, state_dict):
        _check_shapes(name, param, group, state)


def _check_shapes(name: str, param: Tensor, group: Group, state: Mapping[str, Any]) -> None:
    """Raise ValueError if a saved state has other tensors than the parameter's state under the saved options."""
    spec = state_spec(param, group)
    if set(state) != {"step", *spec}:
        kept = sorted({"step", *spec})
        raise ValueError(f"state_dict has {sorted(state)} for {kept}: load one of a {name} with these options.")
    for key, entry in spec.items():
        shape = tuple(state[key].shape)
        if shape != entry.shape:
            raise ValueError(
                f"state_dict has {key} {shape} for {entry.shape}: load one of the same model, whose state belongs to "
                f"its options ({layout_options(group)})."
            )


def restore_tensors(groups: Sequence[Group], states: Any, state_dict: Mapping[str, Any]) -> None:
    """Undo the casts of `Optimizer.load_state_dict`, which converts all state to the parameter's dtype."""
    for param, group, saved in _saved_states(groups, state_dict):
        state = states[param]
        for name, entry in state_spec(param, group).items():
            state[name] = saved[name].detach().to(param.device, entry.dtype, copy=True)
        device = param.device if group["capturable"] else "cpu"
        state["step"] = torch.as_tensor(saved["step"]).detach().to(device, torch.int64, copy=True)
