"""The rules of options, parameters and gradients. Every error names the argument, its value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import required

from rootfree_kernels.blocks import matrix_shape
from rootfree_kernels.ops.backends import DTYPES
from rootfree_kernels.optim.overlap import has_internal_overlap
from rootfree_kernels.rounding import ROUNDINGS

CLIPS = ("frobenius", "row_sum", "none")
DIRECTIONS = ("root_free", "whitened")
STRUCTURES = ("dense", "elementwise")
FACTOR_DTYPES = (torch.bfloat16, torch.float32, torch.float64)
COMPLEX_DTYPES = (torch.complex64, torch.complex128)
"""Complex dtypes of parameters that take the diagonal step, as pairs of real numbers."""

DTYPE_OPTIONS = ("factor_dtype", "matmul_dtype", "state_dtype")


class Rule(NamedTuple):
    """A value is allowed, or an error says `remedy`."""

    allows: Callable[[Any], bool]
    remedy: str


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_lr(value: Any) -> bool:
    if isinstance(value, Tensor):  # its value is not read, since that would wait for the device
        return value.numel() == 1 and value.is_floating_point()
    return _is_number(value) and value >= 0


def _one_of(choices: Iterable[Any], also: str = "") -> Rule:
    allowed = tuple(choices)
    return Rule(lambda value: value in allowed, f"choose one of {', '.join(map(str, allowed))}{also}")


def _none_or(rule: Rule, meaning: str) -> Rule:
    return Rule(lambda value: value is None or rule.allows(value), f"{rule.remedy}, or None {meaning}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


_NON_NEGATIVE = Rule(lambda value: _is_number(value) and value >= 0, "pass a finite number, 0 or more")
_FRACTION = Rule(lambda value: _is_number(value) and 0 <= value < 1, "pass a number in [0, 1)")
_FLAG = Rule(lambda value: isinstance(value, bool), "pass True or False")
_MAYBE_FLAG = _none_or(_FLAG, "to leave the choice to the library")

_BATCH_SIZE = Rule(
    lambda value: _is_number(value) and value > 0,
    "pass the number of terms that the loss averages over, a Python number (1 for a summed loss; times the world size "
    "if gradients are averaged over ranks)",
)

RULES: dict[str, Rule] = {
    "lr": Rule(_is_lr, "pass a finite number, 0 or more, or a floating-point Tensor with one element"),
    "batch_size": Rule(lambda value: value is None or _BATCH_SIZE.allows(value), _BATCH_SIZE.remedy),
    "direction": _one_of(DIRECTIONS),
    "momentum_on": _one_of(("update", "gradient")),
    "nesterov": _FLAG,
    "update_norm": _none_or(_one_of(("muon", "rms")), "to leave the update as it is"),
    "update_scale": Rule(lambda value: _is_number(value) and value > 0, "pass a finite number above 0"),
    "relative_damping": _FLAG,
    "factor_init": _one_of(("identity", "gradient")),
    "beta2": _NON_NEGATIVE,
    "momentum": _FRACTION,
    "riemannian_momentum": _FRACTION,
    "damping": _NON_NEGATIVE,
    "weight_decay": _NON_NEGATIVE,
    "gamma": _one_of((0, 1), " (0 sums the curvature as AdaGrad does, 1 averages it as RMSProp does)"),
    "precondition_frequency": Rule(
        lambda value: _is_count(value) or callable(value),
        "pass a whole number of steps, 1 or more, or a callable from the step (0, 1, …) to whether to update",
    ),
    "clip": _one_of(CLIPS),
    "structure": _one_of(STRUCTURES),
    "max_preconditioner_dim": _none_or(
        Rule(_is_count, "pass the longest side of a block, 1 or more"), "to leave matrices whole"
    ),
    "cache_products": _MAYBE_FLAG,
    "packed_momentum": _FLAG,
    "factor_dtype": _one_of(FACTOR_DTYPES),
    "matmul_dtype": _none_or(_one_of(FACTOR_DTYPES), "for the faster one on the device"),
    "state_dtype": _none_or(_one_of(FACTOR_DTYPES), "for FP32 (FP64 for FP64 parameters)"),
    "rounding": _one_of(ROUNDINGS),
    "weight_rounding": _one_of(ROUNDINGS),
    "seed": Rule(lambda value: isinstance(value, int), "pass a whole number"),
    "decoupled_weight_decay": _FLAG,
    "maximize": _FLAG,
    "capturable": _FLAG,
    "foreach": _MAYBE_FLAG,
    "fused": _MAYBE_FLAG,
}


def batch_size_cancels(options: Mapping[str, Any]) -> bool:
    """Return whether steps are the same for every batch size B, and for every constant factor on the loss.

    The start and the damping are then relative to the gradients, and the update has a fixed size.
    """
    relative = options.get("relative_damping") and options.get("factor_init") == "gradient"
    return bool(relative and options.get("update_norm"))


def dtype_of_text(text: str) -> torch.dtype | None:
    """Return the dtype of a name, "bfloat16" or "torch.bfloat16", or None if there is none."""
    dtype = getattr(torch, text.removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else None


def plain(value: Any) -> Any:
    """Return NumPy's scalars, and whatever else converts itself to a number, as Python numbers.

    Other values, text among them, are returned as they are.
    """
    if value is None or isinstance(value, str | bytes | complex | torch.dtype) or type(value) in (bool, int, float):
        return value
    if getattr(value, "ndim", 0):  # an array
        return value
    if getattr(getattr(value, "dtype", None), "kind", "") == "b":  # numpy.bool
        return bool(value)
    for convert, method in ((index, "__index__"), (float, "__float__")):
        if hasattr(type(value), method):
            with suppress(TypeError, ValueError, RuntimeError, OverflowError):
                return convert(value)
    return value


def normalise(options: dict[str, Any]) -> None:
    """Replace numbers of other libraries by Python's, and names of dtypes by the dtypes, in place.

    A Tensor stays what it is only as the learning rate, which the host must not read.
    """
    for name in RULES.keys() & options.keys():
        value = options[name]
        if name in DTYPE_OPTIONS and isinstance(value, str):
            options[name] = dtype_of_text(value) or value
        elif not (name == "lr" and isinstance(value, Tensor)):
            options[name] = plain(value)


def _refusal(name: str, value: Any) -> str:
    """Return the message for an option that breaks its rule. Some have words of PyTorch's optimizers as well."""
    is_long = name == "lr" and isinstance(value, Tensor) and value.numel() != 1
    return f"{name}={value!r}: {'Tensor lr must be 1-element; ' * is_long}{RULES[name].remedy}."


def check_lr(options: dict[str, Any]) -> None:
    """Raise ValueError if the learning rate breaks its rule. Schedules change it at every step, so it is cheap."""
    if type(options["lr"]) is not float and not isinstance(options["lr"], Tensor):
        options["lr"] = plain(options["lr"])
    if not _is_lr(options["lr"]):
        raise ValueError(_refusal("lr", options["lr"]))


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError for the first option that breaks its rule, or that another option forbids."""
    for name, rule in RULES.items():
        if name in options:
            value = options[name]
            if value is required or not rule.allows(value):
                raise ValueError(_refusal(name, value))
    if options.get("batch_size", 1) is None and not batch_size_cancels(options):
        raise ValueError(
            f"batch_size=None: {_BATCH_SIZE.remedy}. It cancels only with factor_init='gradient', "
            "relative_damping=True and an update_norm, as in RECIPE."
        )
    if options.get("nesterov") and options["momentum_on"] == "update":
        raise ValueError(
            "nesterov=True with momentum_on='update': Nesterov's average is one of gradients; pass "
            "momentum_on='gradient', or nesterov=False."
        )
    if options.get("update_norm", "") is None and options["update_scale"] != 1:
        raise ValueError(
            f"update_scale={options['update_scale']!r} with update_norm=None: it scales updates of a fixed norm; pass "
            "an update_norm, or scale lr."
        )
    if options.get("direction") == "whitened" and options["cache_products"]:
        raise ValueError(
            "cache_products=True with direction='whitened': it multiplies by C and K themselves, and has no products "
            "to keep; pass cache_products=None."
        )
    if options.get("beta2", 0) >= 1 and (options.get("gamma") or "clip" in options):
        raise ValueError(f"beta2={options['beta2']!r}: pass a number below 1 (1 minus what Adam calls beta2).")
    if options.get("foreach") and options.get("fused"):
        raise ValueError("foreach=True and fused=True: choose one of them.")
    if options.get("capturable") and options.get("precondition_frequency", 1) != 1:
        raise ValueError(
            f"precondition_frequency={options['precondition_frequency']!r} with capturable=True: the step count lives "
            "on the device, where the host cannot decide by it; pass precondition_frequency=1, or capturable=False."
        )


def is_served(param: Tensor) -> bool:
    """Return whether a parameter has a dtype that can be stepped."""
    return param.dtype in DTYPES or param.dtype in COMPLEX_DTYPES


def _param_problem(param: Tensor) -> str | None:
    """Return why a parameter cannot be stepped, and the remedy, or None."""
    if not is_served(param):
        names = ", ".join(map(str, (*DTYPES, *COMPLEX_DTYPES)))
        return f"has dtype {param.dtype}: pass parameters of {names}, or freeze it with requires_grad_(False)."
    if is_lazy(param):
        return None  # it has no memory yet
    if param.is_neg() or param.is_conj():
        return (
            "is a view that PyTorch negates or conjugates when it is read, and kernels step the memory itself: pass "
            "param.resolve_conj().resolve_neg()."
        )
    if has_internal_overlap(param):
        return (
            f"has shape {tuple(param.shape)} and strides {param.stride()}, with which several elements share memory: "
            "pass a tensor of its own memory (param.clone(memory_format=torch.contiguous_format))."
        )
    return None


def check_param(name: str, param: Any, options: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError unless `param` is a dense, local tensor that can be stepped, or is frozen.

    Frozen parameters may have any dtype, as quantised weights do. They are carried along.
    """
    if not isinstance(param, Tensor):
        raise TypeError(f"{name} is a {type(param).__name__}: optimizers take Tensors.")
    if param.layout != torch.strided:
        raise ValueError(f"{name} has layout {param.layout}: pass a dense parameter (param.to_dense()).")
    if hasattr(param, "device_mesh"):
        raise ValueError(f"{name} is a DTensor: sharded parameters are not served yet; pass local tensors.")
    if param.requires_grad and (problem := _param_problem(param)):
        raise ValueError(f"{name} {problem}")
    if param.requires_grad and param.is_complex() and _takes_factors(param, options):
        raise ValueError(
            f"{name} is a matrix of {param.dtype}: Kronecker factors are real; pass structure='elementwise' in its "
            "group, or torch.view_as_real of it."
        )


def _takes_factors(param: Tensor, options: Mapping[str, Any]) -> bool:
    return options.get("structure") == "dense" and matrix_shape(param.shape) is not None


def grad_problem(param: Tensor, grad: Tensor) -> str | None:
    """Return what is wrong with a gradient, and the remedy. None if it is dense and matches its parameter."""
    if problem := _param_problem(param):
        return problem
    if grad.layout != torch.strided:
        return f"has a gradient of layout {grad.layout}: make it dense (nn.Embedding(sparse=False))."
    if grad.shape != param.shape:
        return f"of shape {tuple(param.shape)} has a gradient of shape {tuple(grad.shape)}: they must agree."
    if grad.device != param.device:
        return f"on {param.device} has a gradient on {grad.device}: move it with grad.to({str(param.device)!r})."
    allowed = COMPLEX_DTYPES if param.is_complex() else DTYPES
    if grad.dtype not in allowed:
        return f"has a gradient of dtype {grad.dtype}: pass one of {', '.join(map(str, allowed))}."
    return None
