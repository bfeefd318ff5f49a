"""What the state of a parameter looks like, under the options of its group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rootfree_kernels.backend import FactorDtypes
from rootfree_kernels.blocks import Tile, matrix_shape, tiles
from rootfree_kernels.optim.recipe import PAPER_RULE
from rootfree_kernels.packing import packed_shape

Group = dict[str, Any]
"""A parameter group: parameters and options."""


class StateSpec(NamedTuple):
    """One tensor of a parameter's state before the first step."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: float = 0.0
    like_param: bool = False  # whether it has the memory format of the parameter
    is_identity: bool = False  # whether the matrices [..., n, n] start as the identity


LAYOUT_OPTIONS = (
    *("structure", "max_preconditioner_dim", "factor_dtype", "packed_momentum", "state_dtype"),
    *("rounding", "weight_rounding", "seed", "foreach"),
    *PAPER_RULE,
)
"""Options that decide about the state or about the batches."""


# ---- the options of a group --------------------------------------------------------------------------------------


def needs_bits(dtype: torch.dtype, rounding: str) -> bool:
    """Return whether a tensor is rounded stochastically."""
    return dtype == torch.bfloat16 and rounding == "stochastic"


def is_pair(dtype: torch.dtype, rounding: str) -> bool:
    """Return whether a tensor is a compensated pair, with a residual beside it."""
    return dtype == torch.bfloat16 and rounding == "compensated"


def real_view(x: Tensor) -> Tensor:
    """Return a complex tensor as real numbers, with a last axis of 2. A real tensor is returned as it is."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def state_dtype(param: Tensor, group: Group) -> torch.dtype:
    """Return the dtype of the momentum buffer and of s."""
    chosen: torch.dtype | None = group["state_dtype"]
    return chosen or torch.promote_types(param.dtype.to_real(), torch.float32)


def arithmetic_dtype(param: Tensor, group: Group) -> torch.dtype:
    """Return the dtype that decides about the backend: FP64 if the parameter or its state is, else the parameter's."""
    return torch.float64 if state_dtype(param, group) == torch.float64 else param.dtype.to_real()


def tiles_of(param: Tensor, group: Group) -> list[Tile]:
    """Return the tiles of a parameter's blocks. There are none if it takes the diagonal step."""
    if group.get("structure", "elementwise") == "elementwise" or not param.numel() or param.is_complex():
        return []
    return tiles(param.shape, group["max_preconditioner_dim"])


def factor_dtypes(group: Group) -> FactorDtypes:
    """Return the dtypes in which a group wants its factors stored and multiplied."""
    return group["factor_dtype"], group["matmul_dtype"]


def caches_products(group: Group) -> bool:
    """Return whether CCᵀ and KKᵀ are kept: as the group says, or else if an update serves more than one step."""
    if group.get("direction") == "whitened":
        return False  # it multiplies by C and K themselves
    chosen: bool | None = group.get("cache_products", False)
    return group["precondition_frequency"] != 1 if chosen is None else chosen


def follows_curvature(group: Group) -> bool:
    """Return whether the state has the mean curvature q of each block."""
    return bool(group.get("relative_damping")) or group.get("factor_init", "identity") == "gradient"


def takes_scaled_step(group: Group) -> bool:
    """Return whether the diagonal step of a group is `scaled_rmsprop` instead of the paper's `rf_rmsprop`."""
    return any(group.get(name, paper) != paper for name, paper in PAPER_RULE.items())


def update_norm(shape: Sequence[int], num_elements: int, group: Group) -> float:
    """Return the norm of the update of a block (or a whole parameter) of `num_elements`, of a parameter of `shape`.

    "muon" is the norm of Muon's update of a p × d matrix, √p, of which a block has its share by area. A parameter that
    is no matrix counts as one column. "rms" is 1 for each element.
    """
    cols = (matrix_shape(shape) or (1, 1))[1] if group["update_norm"] == "muon" else 1
    return float(group["update_scale"] * (num_elements / cols) ** 0.5)


def norms_dtype(param: Tensor, group: Group) -> torch.dtype:
    """Return the dtype of the norms of updates: FP32, or FP64 where parameters or state are FP64."""
    return torch.promote_types(torch.float32, arithmetic_dtype(param, group))


def rule_of(group: Group) -> dict[str, Any]:
    """Return the options that decide what the factors and the momentum buffer mean, whatever their shapes."""
    return {name: group[name] for name in ("direction", "momentum_on") if name in group}


def suffix(tile_number: int) -> str:
    """Return the suffix of a tile's state keys: "", ".1", ".2", …"""
    return f".{tile_number}" if tile_number else ""


# ---- the state ---------------------------------------------------------------------------------------------------


def state_spec(param: Tensor, group: Group) -> dict[str, StateSpec]:
    """Return the state of a parameter, all but `step`."""
    every_tile = tiles_of(param, group)
    return _matrix_spec(param, group, every_tile) if every_tile else _diagonal_spec(param, group)


def _diagonal_spec(param: Tensor, group: Group) -> dict[str, StateSpec]:
    shape, kept = tuple(real_view(param).shape), state_dtype(param, group)
    start = 0.0 if group.get("factor_init") == "gradient" else 1.0
    spec = {
        "square": StateSpec(shape, kept, fill=start, like_param=True),
        "momentum_buffer": StateSpec(shape, kept, like_param=True),
        "skipped": StateSpec((), torch.int32),
    }
    if group.get("relative_damping"):
        spec["curvature"] = StateSpec((), torch.promote_types(kept, torch.float32), fill=start)
    if is_pair(kept, group["rounding"]):
        spec["square_residual"] = StateSpec(shape, torch.int16, like_param=True)
    if is_pair(param.dtype, group["weight_rounding"]):
        spec["weight_residual"] = StateSpec(shape, torch.int16, like_param=True)
    return spec


def _matrix_spec(param: Tensor, group: Group, every_tile: list[Tile]) -> dict[str, StateSpec]:
    spec = {"momentum_buffer": StateSpec(tuple(param.shape), state_dtype(param, group))}
    if is_pair(param.dtype, group["weight_rounding"]):
        spec["weight_residual"] = StateSpec(tuple(param.shape), torch.int16)
    for number, tile in enumerate(every_tile):
        for name, entry in tile_spec(tile, group).items():
            spec[name + suffix(number)] = entry
    return spec


def tile_spec(tile: Tile, group: Group) -> dict[str, StateSpec]:
    """Return the state of the blocks of one tile."""
    dtype, count = group["factor_dtype"], tile.num_blocks
    spec = {"skipped": StateSpec((count,), torch.int32)}
    if follows_curvature(group):
        spec["curvature"] = StateSpec((count,), torch.promote_types(dtype, torch.float32))
    for side, size in zip("ck", tile.block_shape, strict=True):
        shape = (count, size, size)
        packed = (count, *packed_shape(size)) if group["packed_momentum"] else shape
        spec[f"factor_{side}"] = StateSpec(shape, dtype, is_identity=True)
        spec[f"momentum_{side}"] = StateSpec(packed, dtype)
        if is_pair(dtype, group["rounding"]):
            spec[f"residual_{side}"] = StateSpec(shape, torch.int16)
    return spec


def new_state(param: Tensor, group: Group) -> dict[str, Tensor]:
    """Return the state of a parameter before its first step."""
    device = param.device if group["capturable"] else "cpu"
    state = {"step": torch.zeros((), dtype=torch.int64, device=device)}
    like = real_view(param.detach())
    for name, entry in state_spec(param, group).items():
        if entry.like_param:
            state[name] = torch.full_like(like, entry.fill, dtype=entry.dtype)
        else:
            state[name] = like.new_full(entry.shape, entry.fill, dtype=entry.dtype)
        if entry.is_identity:
            state[name].diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return state


# ---- messages ----------------------------------------------------------------------------------------------------


def difference_of(state: Mapping[str, Tensor], spec: Mapping[str, StateSpec], device: torch.device) -> str:
    """Return how a parameter's state differs from its specification in names, shapes, dtypes or device, or ""."""
    kept = {name: (tuple(x.shape), x.dtype, x.device) for name, x in state.items() if name != "step"}
    wanted = {name: (entry.shape, entry.dtype, device) for name, entry in spec.items()}
    for name in sorted(kept.keys() | wanted.keys()):
        if kept.get(name) != wanted.get(name):
            return f"{name} is {kept.get(name)} and should be {wanted.get(name)}"
    return ""


def layout_options(group: Group) -> str:
    """Return the options that decide about a group's state, for messages."""
    return ", ".join(f"{name}={group[name]}" for name in LAYOUT_OPTIONS if name in group)


def label_of(group: Group, index: int) -> str:
    """Return the name of a group's parameter, for messages."""
    name = group["param_names"][index] if "param_names" in group else f"params[{index}]"
    return f"parameter {name!r}"
