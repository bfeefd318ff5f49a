"""Names of parameters in a state dict: parameters that are in another order than those of the optimizer are matched."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from rootfree_kernels.optim.state_spec import Group

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of names that come from `torch.compile`, FSDP and activation checkpointing."""

Names = list[list[str]]
"""The names of the parameters of each group."""


def bare(name: str) -> str:
    """Return the name of a parameter without what wrappers of its model have added, such as "module." of DDP."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts.pop(0)
    return ".".join(parts)


def in_own_order(own: Sequence[Group], saved: Sequence[Mapping[str, Any]], stacklevel: int) -> list[Group]:
    """Return saved groups with their parameters in the order of the groups that load them.

    Parameters are matched by their names, if both have them. Names that only one side knows leave a group in its order,
    as in PyTorch, with a warning.

    Raises:
        ValueError: names are the same, but in other groups.
    """
    groups = [_with_names_of_ids(group) for group in saved]
    own_names, saved_names = _names(own), _names(groups)
    if own_names is None or saved_names is None or own_names == saved_names:
        return groups
    wanted, given = _comparable(own_names, saved_names)
    if _all(wanted) == _all(given):
        _check_groups(wanted, given)
    elif wanted != given and (differing := sorted({*_all(wanted)} ^ {*_all(given)})):
        warnings.warn(
            f"state_dict has other names of parameters than the optimizer ({', '.join(differing[:4])}"
            f"{', …' if len(differing) > 4 else ''}): parameters with other names are matched by their order.",
            stacklevel=stacklevel,
        )
    return [_reordered(*each) for each in zip(groups, wanted, given, strict=True)]


def _with_names_of_ids(group: Mapping[str, Any]) -> Group:
    """Return a group whose names are in the order of its parameters.

    `torch.distributed.checkpoint` names parameters by their ids, and puts these in another order than the names.
    """
    ids = group["params"]
    if "param_names" in group and all(isinstance(index, str) for index in ids):
        return {**group, "param_names": list(ids)}
    return dict(group)


def _names(groups: Sequence[Mapping[str, Any]]) -> Names | None:
    """Return the names of all parameters, or None if some have none."""
    names = [list(group.get("param_names", ())) for group in groups]
    has_all = all(len(each) == len(group["params"]) for each, group in zip(names, groups, strict=True))
    return names if has_all else None


def _comparable(own: Names, saved: Names) -> tuple[Names, Names]:
    """Return names without what wrappers have added, unless they agree with it, or are not unique without it."""
    without = [[list(map(bare, names)) for names in each] for each in (own, saved)]
    is_unique = all(len(set(_all(names))) == len(_all(names)) for names in without)
    return (without[0], without[1]) if is_unique and _all(own) != _all(saved) else (own, saved)


def _all(names: Names) -> list[str]:
    """Return the names of all groups, in order of the alphabet."""
    return sorted(name for group in names for name in group)


def _check_groups(own: Names, saved: Names) -> None:
    """Raise ValueError if a parameter is in another group."""
    number_of = {name: number for number, names in enumerate(own) for name in names}
    for number, names in enumerate(saved):
        for name in names:
            if number_of[name] != number:
                raise ValueError(
                    f"state_dict has parameter {name!r} in group {number}, and the optimizer has it in group "
                    f"{number_of[name]}: build the groups in the same way."
                )


def _reordered(group: Group, own: list[str], saved: list[str]) -> Group:
    """Return a group with the order of `own` names, if `saved` has the same."""
    if own == saved or sorted(own) != sorted(saved) or len(set(own)) != len(own):
        return group
    position = {name: index for index, name in enumerate(saved)}
    order = [position[name] for name in own]
    return {**group, **{key: [group[key][index] for index in order] for key in ("params", "param_names")}}
