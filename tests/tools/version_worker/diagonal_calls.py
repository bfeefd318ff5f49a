"""Call the operators rf_rmsprop and clipped_momentum with flat arguments."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from digests import Results, digests
from torch import Tensor

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SHAPES = ((6,), (), (7, 5), (3, 2, 2, 2))
LONG = ((700_000,), (400_000,), (3,))
"""Shapes with more elements than are processed at once."""

KINDS = {
    "fp32": {},
    "bf16": {"param": BF16, "grad": BF16},
    "bf16, bf16 state": {"param": BF16, "grad": BF16, "square": BF16, "buffer": BF16},
    "fp32, bf16 state": {"square": BF16, "buffer": BF16},
    "fp16, fp32 gradients": {"param": FP16},
    "fp64": {"param": FP64, "grad": FP64, "square": FP64, "buffer": FP64},
}
CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "maximize": {"maximize": True},
    "decoupled": {"decoupled": True},
    "sum": {"gamma": 0.0, "beta2": 1.0},
    "no decay, momentum or damping": {"weight_decay": 0.0, "momentum": 0.0, "damping": 0.0},
    "found_inf 0": {"found_inf": 0.0, "grad_scale": 8.0},
    "found_inf 1": {"found_inf": 1.0, "grad_scale": 8.0},
    "not finite": {"spoilt": True},
    "fp64 gradients": {"grad": FP64},
    "transposed": {"layout": "transposed"},
    "every other": {"layout": "every other"},
    "negated": {"layout": "negated"},
    "lr fp32": {"lr": torch.tensor([0.05])},
}
FEW = ("plain", "maximize", "found_inf 1", "not finite", "negated")
"""Changes for slow backends."""

NUMBERS = {"batch_size": 3.0, "beta2": 0.3, "gamma": 1.0, "momentum": 0.9, "damping": 0.1, "weight_decay": 0.02}
FLAGS = {"decoupled": False, "maximize": False}
ROUNDINGS = ("nearest", "stochastic", "compensated")


def laid_out(value: Tensor, layout: str) -> Tensor:
    """Return an equal tensor with another memory layout. Only FP32 can be "negated"."""
    order = tuple(reversed(range(value.dim())))
    if layout == "transposed" and order:
        return value.permute(order).contiguous().permute(order)
    if layout == "every other":
        return torch.stack([value, value], -1)[..., 0]
    if layout == "negated" and value.dtype == FP32:
        return torch.complex(value, -value).conj().imag
    return value


def _residuals(tensors: list[Tensor], mode: str, generator: torch.Generator) -> list[Tensor]:
    if mode != "compensated" or tensors[0].dtype != BF16:
        return []
    return [torch.randint(-(2**15), 2**15, x.shape, dtype=torch.int16, generator=generator) for x in tensors]


def _scalar(value: float | None) -> Tensor | None:
    return None if value is None else torch.tensor([value])


def diagonal_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Return new arguments of rf_rmsprop."""
    generator = torch.Generator().manual_seed(5)
    shapes, layout = options.get("shapes", SHAPES), options.get("layout", "whole")

    def draw(name: str) -> list[Tensor]:
        values = [torch.randn(shape, generator=generator) for shape in shapes]
        values = [x.abs() + 0.5 for x in values] if name == "square" else values
        values = [x.to(options.get(name, FP32)) for x in values]
        return [laid_out(x, layout if layout != "negated" or name == "grad" else "whole") for x in values]

    params, squares, buffers, grads = map(draw, ("param", "square", "buffer", "grad"))
    if options.get("spoilt"):
        grads[0][2], grads[2][1, 1] = torch.nan, torch.inf
    modes = {name: options.get(name, "nearest") for name in ("rounding", "weight_rounding")}
    return {
        "params": params,
        "squares": squares,
        "buffers": buffers,
        "skipped": [torch.tensor(i, dtype=torch.int32) for i in range(len(shapes))],
        "square_residuals": _residuals(squares, modes["rounding"], generator),
        "weight_residuals": _residuals(params, modes["weight_rounding"], generator),
        "grads": grads,
        "lr": options.get("lr", torch.tensor(0.05, dtype=FP64)),
        "seeds": torch.arange(len(shapes), dtype=torch.int32) * 77777 - 3,
        "steps": torch.arange(3.0, 3.0 + len(shapes)),
        "grad_scale": _scalar(options.get("grad_scale")),
        "found_inf": _scalar(options.get("found_inf")),
        **{name: options.get(name, value) for name, value in {**NUMBERS, **FLAGS}.items()},
        **modes,
    }


def diagonal_options(backend: str) -> dict[str, dict[str, Any]]:
    """Return the options of all calls of rf_rmsprop by case."""
    quick = backend != "triton"
    every = {}
    for (kind, dtypes), (change, more) in product(KINDS.items(), CHANGES.items()):
        if quick or change == "plain" or (kind == "bf16, bf16 state" and change in FEW):
            every[f"{kind}, {change}"] = {**dtypes, **more}
    for mode, weight_mode in product(ROUNDINGS, ROUNDINGS):
        for kind in ("bf16, bf16 state", "bf16") if quick else ("bf16, bf16 state",):
            every[f"{kind}, {mode}, weights {weight_mode}"] = {
                **KINDS[kind],
                "rounding": mode,
                "weight_rounding": weight_mode,
                "spoilt": mode == weight_mode,
            }
    if quick:
        every["long"] = {"shapes": LONG}
        every["long bf16"] = {"shapes": LONG, **KINDS["bf16, bf16 state"], "rounding": "stochastic"}
    return every


def momentum_options(backend: str) -> dict[str, dict[str, Any]]:
    """Return the options of all calls of clipped_momentum by case."""
    quick = backend != "triton"
    every: dict[str, dict[str, Any]] = {}
    for dtype, clip in product((FP32, BF16, FP64) if quick else (FP32, BF16), ("frobenius", "row_sum", "none")):
        every[f"{dtype} {clip}"] = {"dtypes": (dtype, dtype), "clip": clip, "spoilt": clip != "none"}
    every["mixed dtypes"] = {"dtypes": (FP32, BF16)}
    every["diagonals"] = {"dtypes": (FP32,), "diagonals": True}
    every["found_inf 0"] = {"found_inf": 0.0}
    every["found_inf 1"] = {"found_inf": 1.0}
    every["large deltas"] = {"scale": 40.0}
    every["transposed"] = {"layout": "transposed", "clip": "row_sum"}
    every["no blocks"] = {"blocks": 0}
    if quick:
        every["many shares"] = {"blocks": 2, "sides": (200, 130), "clip": "row_sum"}
    return every


def momentum_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Return new arguments of clipped_momentum."""
    generator = torch.Generator().manual_seed(6)
    dtypes, count = options.get("dtypes", (FP32, FP32)), options.get("blocks", 3)
    momenta, deltas = [], []
    for dtype, side in zip(dtypes, options.get("sides", (7, 4)), strict=False):
        shape = (count, side) if options.get("diagonals") else (count, side, side)
        m, delta = (torch.randn(shape, generator=generator) * options.get("scale", 0.1) for _ in range(2))
        momenta.append(laid_out(m.to(dtype), options.get("layout", "whole")))
        deltas.append(delta.double() if dtype == FP64 else delta)
    if options.get("spoilt"):
        deltas[0][1, 0, 0] = torch.nan
    found_inf = _scalar(options.get("found_inf"))
    return {
        "momenta": momenta,
        "deltas": deltas,
        "found_inf": found_inf,
        "riemannian_momentum": 0.4,
        "clip": options.get("clip", "frobenius"),
    }


def run(results: Results, backend: str) -> None:
    """Run all cases of both operators."""
    for name, options in diagonal_options(backend).items():
        with results.case(f"rf_rmsprop, {name}") as entries:
            arguments = diagonal_arguments(options)
            torch.ops.rootfree.rf_rmsprop(**arguments, backend=backend)
            entries.update(digests(arguments))
    for name, options in momentum_options(backend).items():
        with results.case(f"clipped_momentum, {name}") as entries:
            arguments = momentum_arguments(options)
            arguments["clips"] = torch.ops.rootfree.clipped_momentum(**arguments, backend=backend)
            entries.update(digests(arguments))
