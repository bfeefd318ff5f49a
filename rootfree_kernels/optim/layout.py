"""What a parameter's state looks like, and how to say where it differs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Group = dict[str, Any]


class Entry(NamedTuple):
    """One tensor of a parameter's state, as it is before the first step."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: float = 0.0
    like_param: bool = False  # take over the parameter's memory format


LAYOUT_OPTIONS = (
    *("structure", "max_preconditioner_dim", "factor_dtype", "packed_momentum", "state_dtype"),
    *("rounding", "weight_rounding", "seed", "foreach"),
)


def difference_of(state: Mapping[str, Tensor], layout: Mapping[str, Entry], device: torch.device) -> str:
    """How a parameter's state differs from `layout` in names, shapes, dtypes or device; empty where it does not."""
    kept = {name: (tuple(x.shape), x.dtype, x.device) for name, x in state.items() if name != "step"}
    wanted = {name: (entry.shape, entry.dtype, device) for name, entry in layout.items()}
    for name in sorted(kept.keys() | wanted.keys()):
        if kept.get(name) != wanted.get(name):
            return f"{name} is {kept.get(name)} and should be {wanted.get(name)}"
    return ""


def layout_options(group: Group) -> str:
    """The options in messages that a group's state is made for."""
    return ", ".join(f"{name}={group[name]}" for name in LAYOUT_OPTIONS if name in group)


def label_of(group: Group, index: int) -> str:
    """The name of a group's parameter in messages."""
    name = group["param_names"][index] if "param_names" in group else f"params[{index}]"
    return f"parameter {name!r}"


def needs_bits(dtype: torch.dtype, rounding: str) -> bool:
    return dtype == torch.bfloat16 and rounding == "stochastic"


def is_pair(dtype: torch.dtype, rounding: str) -> bool:
    return dtype == torch.bfloat16 and rounding == "compensated"


def state_dtype(param: Tensor, group: Group) -> torch.dtype:
    chosen: torch.dtype | None = group["state_dtype"]
    return chosen or torch.promote_types(param.dtype, torch.float32)


def arithmetic_dtype(param: Tensor, group: Group) -> torch.dtype:
    """What a backend is chosen by: FP64 where the parameter or its state is of it, else the parameter's dtype."""
    return torch.float64 if state_dtype(param, group) == torch.float64 else param.dtype
