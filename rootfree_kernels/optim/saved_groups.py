"""The groups of a state dict: written as plain values, and read from older, newer and differently ordered ones."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rootfree_kernels.optim.options import RULES, check_options, normalise, plain
from rootfree_kernels.optim.saved_names import in_own_order
from rootfree_kernels.optim.state_spec import Group

FORMAT_VERSION = 1
"""The version of the format of state dicts. Those of package versions up to 0.2.0 have none."""

CALLABLE = "callable: "
"""What the saved name of a callable begins with."""

KNOWN_EXTRAS = frozenset(
    (
        *("params", "param_names", "differentiable"),
        # what schedulers of PyTorch add
        *("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"),
    )
)
"""Keys of a group that are no options of the optimizers."""

_TO_CALLER = 9
"""Number of frames from a warning here to the call of `load_state_dict`."""


def as_saved(value: Any) -> Any:
    """Return a value of a group as text, number, bool, None or Tensor, which `torch.load(weights_only=True)` reads."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # also of text of NumPy
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if type(value) in (list, tuple):
        return type(value)(map(as_saved, value))
    value = plain(value)
    if callable(value):
        return f"{CALLABLE}{getattr(value, '__qualname__', type(value).__qualname__)}"
    return value


def saved_groups(groups: Sequence[Group]) -> list[Group]:
    """Return the groups of a state dict as they are saved."""
    return [{name: as_saved(value) for name, value in group.items()} for group in groups]


def older_values(groups: Sequence[Mapping[str, Any]], newer: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the options that did not exist when groups were saved, with the values that they had nevertheless.

    Each entry of `newer` has the options of one version. Groups are older if they have none of them.
    """
    known = {name for group in groups for name in group}
    return {name: value for options in newer if not known & options.keys() for name, value in options.items()}


class SavedGroups:
    """Checked groups of a state dict.

    `groups` have values for all options of the optimizer that loads them. `kept` has the options of each group that
    stay what they are in that optimizer, because the saved groups have no values for them.

    Raises:
        ValueError: they belong to another optimizer, or an option cannot be served.
    """

    def __init__(self, optimizer: Any, state_dict: Mapping[str, Any]) -> None:
        own, version = optimizer.param_groups, _version(state_dict)
        _check_class(optimizer, state_dict["param_groups"])
        saved = in_own_order(own, state_dict["param_groups"], _TO_CALLER)
        older = {} if version else older_values(saved, optimizer._newer_options)
        defaults = optimizer.defaults.items()
        self.kept: list[dict[str, Any]] = []
        self.groups: list[Group] = []
        for own_group, group in zip(own, saved, strict=True):
            values = {**older, **group}
            kept = {name: own_group.get(name, default) for name, default in defaults if name not in values}
            kept.update({name: own_group[name] for name in _callables(group) if name in own_group})
            self.kept.append(kept)
            self.groups.append({**values, **kept})
            normalise(self.groups[-1])
            check_options(self.groups[-1])
        _warn_of_callables(saved, self.kept)
        if version > FORMAT_VERSION:
            _warn_of_unknown(saved, version, {*optimizer.defaults, *KNOWN_EXTRAS}.union(*own))

    def to_load(self) -> list[Group]:
        """Return the groups without the options that are kept, which `Optimizer.load_state_dict` would copy."""
        return [{**group, **dict.fromkeys(kept)} for group, kept in zip(self.groups, self.kept, strict=True)]


def _version(state_dict: Mapping[str, Any]) -> int:
    """Return the version of the format of a state dict. It is 0 for those that have none."""
    version = state_dict.get("format_version", 0)
    if not isinstance(version, int):
        raise ValueError(f"state_dict has format_version={version!r}: load one as `state_dict` returned it.")
    return version


def _callables(group: Mapping[str, Any]) -> list[str]:
    """Return the options of a saved group that are callables."""
    return [name for name, value in group.items() if isinstance(value, str) and value.startswith(CALLABLE)]


def _check_class(optimizer: Any, saved: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError if saved groups are those of an optimizer of another class."""
    name = type(optimizer).__name__
    for group in saved:
        if foreign := sorted(RULES.keys() & (group.keys() - optimizer.defaults.keys())):
            raise ValueError(
                f"state_dict has the options {foreign}, which a {name} does not have: load one of a {name}."
            )
        if not group.keys() & optimizer._own_options:
            raise ValueError(f"state_dict has none of the options {optimizer._own_options}: load one of a {name}.")


def _warn_of_callables(saved: Sequence[Mapping[str, Any]], kept: Sequence[Mapping[str, Any]]) -> None:
    for group, own in zip(saved, kept, strict=True):
        for name in _callables(group):
            if name in own and not callable(own[name]):
                message = f"{name} was saved as a {group[name]}; {own[name]!r} is kept."
                warnings.warn(message, stacklevel=_TO_CALLER)


def _warn_of_unknown(saved: Sequence[Mapping[str, Any]], version: int, known: Collection[str]) -> None:
    unknown = sorted({name for group in saved for name in group}.difference(known))
    if unknown:
        warnings.warn(
            f"state_dict has format_version={version}, and this version of rootfree_kernels knows {FORMAT_VERSION}: "
            f"{', '.join(unknown)} stay in the groups and have no effect. Upgrade rootfree_kernels.",
            stacklevel=_TO_CALLER,
        )
