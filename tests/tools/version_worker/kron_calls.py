"""Call the operators kron_gather, kron_factor and kron_step with flat arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diagonal_calls import BF16, FP16, FP32, FP64, laid_out
from digests import Results, digest, digests
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

ONE = ((0, 1, 0, 1),)
"""One tensor with one block: (first row, blocks down, first column, blocks across)."""


@dataclass(frozen=True)
class Batch:
    """Options of a batch, from which the arguments of the operators are made."""

    rows: int = 7
    cols: int = 5
    tiles: tuple[tuple[int, int, int, int], ...] = ((0, 1, 0, 1), (0, 2, 5, 2))
    dtype: torch.dtype = FP32  # dtype of the factors
    matmul: torch.dtype = FP32
    grad: torch.dtype = FP32
    param: torch.dtype = FP32
    buffer: torch.dtype = FP32
    rounding: str = "nearest"
    weight_rounding: str = "nearest"
    clip: str = "frobenius"
    damping: float = 0.1
    gamma: float = 1.0
    layout: str = "whole"
    packed: bool = False
    products: bool = True
    cached: bool = True
    updates: bool = True
    maximize: bool = False
    decoupled: bool = False
    weight_decay: float = 0.02
    found_inf: float | None = None
    grad_scale: float | None = None
    spoilt: float | None = None

    @property
    def numbers(self) -> list[int]:
        """Return the tiles as a flat list, the format of the operators."""
        return [number for tile in self.tiles for number in tile]

    @property
    def num_blocks(self) -> int:
        """Return the number of blocks of all tiles."""
        return sum(down * across for _, down, _, across in self.tiles)


BATCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16 factors": {"dtype": BF16},
    "bf16 factors and products": {"dtype": BF16, "matmul": BF16},
    "stochastic": {"dtype": BF16, "rounding": "stochastic"},
    "compensated": {"dtype": BF16, "rounding": "compensated", "packed": True},
    "fp64": {"dtype": FP64, "matmul": FP64, "grad": FP64, "param": FP64, "buffer": FP64},
    "bf16 weights": {"param": BF16, "grad": BF16},
    "bf16 weights, stochastic": {"param": BF16, "grad": BF16, "weight_rounding": "stochastic", "buffer": BF16},
    "bf16 weights, compensated": {"param": BF16, "grad": BF16, "weight_rounding": "compensated"},
    "fp16 weights": {"param": FP16, "grad": FP16, "buffer": BF16},
    "row sums": {"clip": "row_sum"},
    "no clip": {"clip": "none", "gamma": 0.0},
    "no damping": {"damping": 0.0, "weight_decay": 0.0},
    "packed": {"packed": True},
    "packed bf16": {"packed": True, "dtype": BF16, "rounding": "stochastic", "clip": "row_sum"},
    "no products": {"products": False, "cached": False},
    "products that are not used": {"cached": False},
    "no update": {"updates": False, "cached": False},
    "maximize": {"maximize": True},
    "decoupled": {"decoupled": True},
    "found_inf 0": {"found_inf": 0.0, "grad_scale": 16.0},
    "found_inf 1": {"found_inf": 1.0, "grad_scale": 16.0},
    "nan": {"spoilt": torch.nan},
    "overflow of squares": {"spoilt": 1e18},
    "transposed": {"layout": "transposed"},
    "every other": {"layout": "every other", "grad": BF16},
    "negated": {"layout": "negated"},
    "wide block": {"rows": 3, "cols": 24, "tiles": ONE},
    "aligned": {"rows": 16, "cols": 8, "tiles": ((0, 2, 0, 2),)},
    "large": {"rows": 260, "cols": 130, "tiles": ((0, 3, 0, 3),)},
    "large, packed": {"rows": 131, "cols": 260, "tiles": ((0, 1, 0, 1), (0, 4, 0, 2)), "packed": True, "dtype": BF16},
}
SLOW = ("fp64", "large", "large, packed", "plain", "bf16 weights, stochastic", "packed", "every other", "wide block")
"""Cases that Triton does not support, that are slow in its interpreter, or that other cases cover."""


def batches(backend: str) -> dict[str, Batch]:
    """Return all batches by case."""
    if not backend.startswith("triton"):
        return {name: Batch(**options) for name, options in BATCHES.items()}
    bf16 = {"dtype": BF16, "matmul": BF16}
    chosen = {name: options for name, options in BATCHES.items() if name not in SLOW}
    if backend == "triton_bmm":
        chosen = {name: chosen[name] for name in ("bf16 factors", "no products")}
    small = Batch(tiles=((0, 1, 5, 1),))
    return {name: replace(small, **{**options, **bf16}) for name, options in chosen.items()}


def _packed_shape(size: int) -> tuple[int, int]:
    return (size, (size + 1) // 2) if size % 2 else (size + 1, size // 2)


def _residual(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(-(2**15), 2**15, like.shape, dtype=torch.int16, generator=generator)


def _sides(batch: Batch, generator: torch.Generator) -> dict[str, Any]:
    """Draw the factors, momenta, residuals and products of a batch."""
    tensors: dict[str, Any] = {}
    for side, n in (("c", batch.rows), ("k", batch.cols)):
        shape = (batch.num_blocks, n, n)
        factor = (torch.eye(n) + torch.randn(shape, generator=generator) * 0.3 / n**0.5).to(batch.dtype)
        packed = (batch.num_blocks, *_packed_shape(n)) if batch.packed else shape
        m = torch.randn(packed, generator=generator) * 0.2 / n**0.5
        tensors[f"factor_{side}"] = factor
        tensors[f"momentum_{side}"] = (m if batch.packed else m + m.mT).to(batch.dtype)
        paired = (batch.dtype, batch.rounding) == (BF16, "compensated")
        tensors[f"residual_{side}"] = _residual(factor, generator) if paired else None
        tensors[f"product_{side}"] = torch.zeros(shape, dtype=batch.matmul) if batch.products else None
    order = ("factor", "momentum", "residual", "product")
    return {f"{name}_{side}": tensors[f"{name}_{side}"] for name in order for side in "ck"}


def _lists(batch: Batch, generator: torch.Generator) -> dict[str, list[Tensor]]:
    """Draw the lists of tensors: gradients, parameters, buffers and residuals."""
    shapes = [(r + down * batch.rows, c + across * batch.cols) for r, down, c, across in batch.tiles]
    lists = {}
    for name in ("grad", "param", "buffer"):
        values = [torch.randn(shape, generator=generator).to(getattr(batch, name)) for shape in shapes]
        layout = batch.layout if batch.layout != "negated" or name == "grad" else "whole"
        lists[f"{name}s"] = [laid_out(x, layout) for x in values]
    paired = (batch.param, batch.weight_rounding) == (BF16, "compensated")
    lists["residuals"] = [_residual(x, generator) for x in lists["params"]] if paired else []
    if batch.spoilt is not None:
        lists["grads"][-1][-1, -1] = batch.spoilt
    return lists


def _shared(batch: Batch) -> dict[str, Any]:
    count = batch.num_blocks
    return {
        "seeds": torch.arange(count, dtype=torch.int32) * 0x12345 - 3,
        "steps": torch.arange(3.0, 3.0 + count),
        "found_inf": None if batch.found_inf is None else torch.tensor(batch.found_inf),
    }


def gather_arguments(batch: Batch, lists: Mapping[str, Any], sides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of kron_gather."""
    return {
        "grads": lists["grads"],
        "tiles": batch.numbers,
        "rows": batch.rows,
        "cols": batch.cols,
        "factors": [sides["factor_c"], sides["factor_k"]] if batch.damping and batch.updates else [],
        "grad_scale": None if batch.grad_scale is None else torch.tensor(batch.grad_scale),
        "dtype": batch.matmul,
        "maximize": batch.maximize,
    }


def factor_arguments(batch: Batch, sides: Mapping[str, Any], gathered: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of kron_factor."""
    numbers = {"batch_size": 3.0, "beta2": 0.3, "riemannian_momentum": 0.4}
    ends = {"damping": batch.damping, "gamma": batch.gamma, "clip": batch.clip, "rounding": batch.rounding}
    return _with_newer("kron_factor", {**sides, **gathered, **_shared(batch), **numbers, **ends})


_NEWER = {
    **{"curvature": None, "direction": "root_free", "relative_damping": False, "factor_init": "identity"},
    **{"update_norms": None, "momentum_on": "update", "nesterov": False},
}
"""Arguments that an older version lacks, with the values of the paper's rule."""


def _with_newer(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Add those arguments of `_NEWER` that the operator's schema has in this version."""
    known = {argument.name for argument in getattr(torch.ops.rootfree, name).default._schema.arguments}
    return {**{newer: value for newer, value in _NEWER.items() if newer in known}, **arguments}


def step_arguments(
    batch: Batch, lists: Mapping[str, Any], sides: Mapping[str, Any], gathered: Mapping[str, Tensor], ok: Tensor | None
) -> dict[str, Any]:
    """Return the arguments of kron_step."""
    source = "product" if batch.cached else "factor"
    arguments = {
        **{name: lists[name] for name in ("params", "buffers", "residuals")},
        "tiles": batch.numbers,
        "skipped": torch.arange(batch.num_blocks, dtype=torch.int32),
        "factor_c": sides[f"{source}_c"],
        "factor_k": sides[f"{source}_k"],
        **gathered,
        "lr": torch.tensor(0.05, dtype=FP64),
        "ok": ok,
        **_shared(batch),
        "cached": batch.cached,
        "momentum": 0.9,
        "weight_decay": batch.weight_decay,
        "decoupled": batch.decoupled,
        "rounding": batch.weight_rounding,
    }
    return _with_newer("kron_step", arguments)


def _run_batch(entries: dict[str, str], batch: Batch, backend: str) -> None:
    """Gather, update and step. Record all tensors after each of these."""
    ops, generator = torch.ops.rootfree, torch.Generator().manual_seed(8)
    lists, sides = _lists(batch, generator), _sides(batch, generator)
    grad, squares = ops.kron_gather(**gather_arguments(batch, lists, sides), backend=backend)
    gathered, ok = {"grad": grad, "squares": squares}, None
    entries.update(digests({f"gather: {name}": x for name, x in gathered.items()}))
    if batch.updates:
        ok = ops.kron_factor(**factor_arguments(batch, sides, gathered), backend=backend)
        entries.update(digests({f"factor: {name}": x for name, x in {**sides, "ok": ok}.items()}))
    arguments = step_arguments(batch, lists, sides, gathered, ok)
    ops.kron_step(**arguments, backend=backend)
    entries.update(digests({f"step: {name}": x for name, x in arguments.items() if name != "grad"}))


def _run_fake(entries: dict[str, str], batch: Batch, backend: str) -> None:
    """Record the dtypes, shapes and strides of the operators' results on fake tensors."""
    ops, generator = torch.ops.rootfree, torch.Generator().manual_seed(8)
    with FakeTensorMode() as mode:
        lists, sides = (tree_map_only(Tensor, mode.from_tensor, f(batch, generator)) for f in (_lists, _sides))
        grad, squares = ops.kron_gather(**gather_arguments(batch, lists, sides), backend=backend)
        gathered = {"grad": grad, "squares": squares}
        ok = ops.kron_factor(**factor_arguments(batch, sides, gathered), backend=backend)
        momenta, deltas = [sides["momentum_c"]], [sides["factor_c"].float()]
        clips = ops.clipped_momentum(momenta, deltas, None, 0.5, "frobenius", backend)
        for name, x in {**gathered, "ok": ok, "clips": clips}.items():
            entries[name] = f"{x.dtype} {[*x.shape]} {[*x.stride()]} {x.device}"


def _run_gather_of_axes(entries: dict[str, str], dtype: torch.dtype, backend: str) -> None:
    """Gather gradients with four axes: contiguous, channels last and transposed."""
    x = torch.randn((4, 3, 2, 2), generator=torch.Generator().manual_seed(9)).to(dtype)
    grads = [x, x.to(memory_format=torch.channels_last), laid_out(x, "transposed")]
    G, squares = torch.ops.rootfree.kron_gather(grads, [*ONE[0]] * 3, 4, 12, [], None, BF16, False, backend)
    entries.update(grad=digest(G), squares=digest(squares))


def run(results: Results, backend: str) -> None:
    """Run all cases of the operators."""
    for number, (name, batch) in enumerate(batches(backend).items()):
        with results.case(f"kron, {backend}, {name}") as entries:
            _run_batch(entries, batch, backend)
        if number < 3:
            with results.case(f"fake, {backend}, {name}") as entries:
                _run_fake(entries, batch, backend)
    for dtype in (FP32, BF16, FP16):
        with results.case(f"kron_gather of four axes, {backend}, {dtype}") as entries:
            _run_gather_of_axes(entries, dtype, backend)
