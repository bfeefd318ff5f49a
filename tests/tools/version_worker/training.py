"""Train with the optimizers, and record weights and state after every step, and state dicts at the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from diagonal_calls import BF16, FP16, FP32, FP64, ROUNDINGS, laid_out
from digests import Results, digest
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rootfree_kernels import GrowingInterval, IFShampoo, RFAdaGrad, RFRMSProp

OPTIONS = {"lr": 0.01, "batch_size": 4, "damping": 0.05, "weight_decay": 0.1}
OPTIMIZERS = {"RFRMSProp": RFRMSProp, "RFAdaGrad": RFAdaGrad, "IFShampoo": IFShampoo}
SHAPES = ((7, 5), (7, 5), (4, 3, 2, 2), (6,), (), (1, 9), (5, 7), (0, 3))
FEW_SHAPES, TWINS = ((7, 5), (6,)), ((7, 5), (7, 5), (6,))
NUM_STEPS = 6


@dataclass(frozen=True)
class Run:
    """A training run: an optimizer with options, the weights, and an event during training."""

    optimizer: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = FP32
    event: str = ""
    layout: str = "whole"
    shapes: tuple[tuple[int, ...], ...] = SHAPES
    num_steps: int = NUM_STEPS


def seeded(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    """Return a random tensor that depends only on its shape, seed and dtype."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def placed(value: Tensor, layout: str) -> Tensor:
    """Return an equal tensor in a memory layout. "channels last" has an effect only with four axes."""
    if layout == "channels last" and value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    return laid_out(value, layout)


def make_params(run: Run) -> list[nn.Parameter]:
    """Create the weights of a run."""
    values = [seeded(shape, 100 + index, run.dtype) for index, shape in enumerate(run.shapes)]
    return [nn.Parameter(placed(value, run.layout)) for value in values]


def make_optimizer(run: Run, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Create the optimizer of a run. The event may require two groups or named parameters."""
    options = {**OPTIONS, **run.options}
    if run.event == "two groups":
        groups = [{"params": params[:2], "lr": 0.02, "maximize": True}, {"params": params[2:], "batch_size": 8}]
        return OPTIMIZERS[run.optimizer](groups, **options)
    if run.event == "named":
        return OPTIMIZERS[run.optimizer]([(f"name {i}", param) for i, param in enumerate(params)], **options)
    return OPTIMIZERS[run.optimizer](params, **options)


def set_gradients(run: Run, params: list[nn.Parameter], step: int) -> None:
    """Set the gradients of a step."""
    for index, param in enumerate(params):
        grad = seeded(tuple(param.shape), 1000 * (step + 1) + index, run.dtype)
        if run.layout == "negated gradients":
            grad = laid_out(grad, "negated")
        param.grad = grad
        if run.event == "gaps" and (step + index) % 3 == 1:
            param.grad = None


def prepare(run: Run, params: list[nn.Parameter], optimizer: Any, step: int) -> None:
    """Apply the event of a run before a step."""
    if run.event == "nan" and step == 2:
        params[0].grad[0, 0] = torch.nan
        next(param for param in params if param.shape == (6,)).grad[2] = torch.inf
    elif run.event == "amp":
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(float(step == 3))
    elif run.event == "other lr":
        optimizer.param_groups[0]["lr"] = 0.01 / (step + 1)
    elif run.event == "other options" and step == 3:
        optimizer.param_groups[0].update(batch_size=8, beta2=0.05, momentum=0.5, damping=0.2, weight_decay=0.0)
    elif run.event == "written factors" and step == 4:
        optimizer.state[params[0]]["factor_c"].mul_(1.5)


def note(entries: dict[str, str], optimizer: torch.optim.Optimizer, label: str) -> None:
    """Record the digests of all weights and all state."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for index, param in enumerate(params):
        entries[f"{label}, weight {index}"] = digest(param)
        for name, value in optimizer.state.get(param, {}).items():
            entries[f"{label}, {name} {index}"] = digest(value)


def note_state_dict(entries: dict[str, str], optimizer: torch.optim.Optimizer) -> None:
    """Record the names in a state dict, in order, and its options."""
    saved = optimizer.state_dict()
    for index, state in saved["state"].items():
        entries[f"state_dict, state {index}"] = str([*state])
    for index, group in enumerate(saved["param_groups"]):
        entries[f"state_dict, group {index}"] = str(group)


def train(run: Run, params: list[nn.Parameter], optimizer: Any, steps: Iterable[int], entries: dict[str, str]) -> None:
    """Take steps, and record weights and state after each."""
    for step in steps:
        set_gradients(run, params, step)
        prepare(run, params, optimizer, step)
        optimizer.step()
        note(entries, optimizer, f"step {step}")


DIAGONAL: dict[str, dict[str, Any]] = {
    "plain": {},
    "maximize": {"maximize": True},
    "decoupled": {"decoupled_weight_decay": True},
    "one by one": {"foreach": False},
    "foreach": {"foreach": True},
    "not fused": {"fused": False},
    "capturable": {"capturable": True},
    "lr tensor": {"lr": torch.tensor(0.01)},
    "capturable, lr tensor": {"capturable": True, "lr": torch.tensor([0.01])},
    "no decay, momentum or damping": {"weight_decay": 0.0, "momentum": 0.0, "damping": 0.0},
    "fp64 state": {"state_dtype": FP64},
    "bf16 state": {"state_dtype": BF16, "seed": 7},
}
MATRICES: dict[str, dict[str, Any]] = {
    **DIAGONAL,
    "every third": {"precondition_frequency": 3},
    "every third, no products": {"precondition_frequency": 3, "cache_products": False},
    "every third, fp32 factors": {"precondition_frequency": 3, "factor_dtype": FP32, "clip": "none"},
    "growing interval": {"precondition_frequency": GrowingInterval(4)},
    "products": {"cache_products": True},
    "packed": {"packed_momentum": True, "clip": "row_sum"},
    "packed, compensated": {"packed_momentum": True, "rounding": "compensated", "factor_dtype": BF16},
    "tiles of 3": {"max_preconditioner_dim": 3, "precondition_frequency": 3, "factor_dtype": FP32},
    "tiles of 4, packed": {"max_preconditioner_dim": 4, "packed_momentum": True},
    "tiles, one by one": {"max_preconditioner_dim": 4, "foreach": False},
    "whole": {"max_preconditioner_dim": None},
    "elementwise": {"structure": "elementwise"},
    "row sums": {"clip": "row_sum", "factor_dtype": FP32},
    "no clip": {"clip": "none"},
    "fp32 factors": {"factor_dtype": FP32},
    "fp64 factors": {"factor_dtype": FP64},
    "bf16 products": {"matmul_dtype": BF16},
    "fp32 products": {"matmul_dtype": FP32},
    "sum": {"gamma": 0.0},
    "no riemannian momentum": {"riemannian_momentum": 0.0, "damping": 0.0},
}
EVENTS: dict[str, Run] = {
    **{event: Run("", event=event) for event in ("nan", "amp", "gaps", "two groups", "named", "other lr")},
    "other options": Run("", event="other options"),
    "gaps, every third": Run("IFShampoo", {"precondition_frequency": 3}, event="gaps"),
    "gaps, tiles": Run("IFShampoo", {"precondition_frequency": 2, "max_preconditioner_dim": 3}, event="gaps"),
    "nan, every third": Run("IFShampoo", {"precondition_frequency": 3}, event="nan"),
    "nan, tiles, bf16": Run("IFShampoo", {"max_preconditioner_dim": 3, "rounding": "compensated"}, BF16, "nan"),
    "amp, bf16": Run("", {"weight_rounding": "compensated"}, BF16, "amp"),
    "written factors": Run("IFShampoo", {"cache_products": True, "precondition_frequency": 3}, event="written factors"),
    "transposed": Run("", layout="transposed"),
    "transposed, bf16": Run("", {"state_dtype": BF16}, BF16, layout="transposed"),
    "channels last": Run("", layout="channels last"),
    "channels last, compensated": Run("", {"weight_rounding": "compensated"}, BF16, layout="channels last"),
    "every other": Run("", layout="every other"),
    "negated": Run("", layout="negated"),
    "negated gradients": Run("", layout="negated gradients"),
    "large": Run("", shapes=((300, 260), (200, 131), (1000,)), num_steps=2),
    "large tiles": Run("IFShampoo", {"max_preconditioner_dim": 128}, shapes=((300, 260), (129, 140)), num_steps=3),
    "large, fp32 factors": Run(
        "IFShampoo", {"factor_dtype": FP32, "packed_momentum": True}, shapes=((260, 300),) * 5, num_steps=2
    ),
}
SLOWLY = {
    "RFRMSProp": (
        *(
            "plain",
            "capturable",
            "bf16 state",
            "nan",
            "amp",
            "gaps",
            "negated gradients",
            "transposed, bf16",
            "float16",
        ),
        *("fp64 state", "bf16, stochastic, weights stochastic", "bf16, nearest, weights compensated"),
    ),
    "RFAdaGrad": ("plain",),
    "IFShampoo": (
        *("plain", "growing interval", "packed, compensated", "elementwise", "row sums", "nan", "amp"),
        *("tiles of 4, packed", "gaps, every third", "transposed, bf16", "bf16, stochastic, weights stochastic"),
    ),
}
"""Runs for Triton. In its interpreter, a step of a matrix takes a quarter of a second."""


def modes(optimizer: str) -> dict[str, Run]:
    """Return runs with all dtypes of weights and with all rounding modes."""
    every = {str(dtype).removeprefix("torch."): Run(optimizer, dtype=dtype) for dtype in (BF16, FP16, FP64)}
    for rounding, weight_rounding in product(ROUNDINGS, ROUNDINGS):
        options = {"rounding": rounding, "weight_rounding": weight_rounding, "state_dtype": BF16}
        every[f"bf16, {rounding}, weights {weight_rounding}"] = Run(optimizer, options, BF16)
    return every


def runs_of(optimizer: str) -> dict[str, Run]:
    """Return all runs of an optimizer."""
    options = MATRICES if optimizer == "IFShampoo" else DIAGONAL
    every = {name: Run(optimizer, chosen) for name, chosen in options.items()}
    every.update(modes(optimizer))
    for name, run in EVENTS.items():
        if run.optimizer in ("", optimizer):
            every[name] = replace(run, optimizer=optimizer)
    return every


def made_small(name: str, run: Run) -> Run:
    """Return a run with fewer weights, and with fewer steps if weights have factors."""
    num_steps = 2 if "tiles" in name else 4 if run.optimizer == "IFShampoo" else run.num_steps
    return replace(run, shapes=TWINS if run.event == "gaps" else FEW_SHAPES, num_steps=num_steps)


def runs(backend: str) -> dict[str, Run]:
    """Return all runs on a backend by case."""
    every = {(optimizer, name): run for optimizer in OPTIMIZERS for name, run in runs_of(optimizer).items()}
    if backend == "triton":
        every = {key: made_small(key[1], run) for key, run in every.items() if key[1] in SLOWLY[key[0]]}
    return {", ".join(key): run for key, run in every.items()}


class _Seen(TorchDispatchMode):
    """Record the calls of the library's operators that a dispatch mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "rootfree":
            shapes = [[*x.shape] for x in args if isinstance(x, Tensor)]
            self.names.append(f"{func} {shapes} {[x for x in args if isinstance(x, str | bool | float)]}")
        return func(*args, **(kwargs or {}))


def _watched(step: Callable[[], Any]) -> list[str]:
    with _Seen() as seen:
        step()
    return seen.names


def _profiled(step: Callable[[], Any]) -> list[str]:
    """Return the ranges and operators that a profiler sees in a step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    events = sorted(profile.events(), key=lambda event: (event.time_range.start, -event.time_range.end))
    ours = [e.name for e in events if e.is_user_annotation or e.name.startswith("rootfree::")]
    return [name for name in ours if not name.startswith("ProfilerStep")]


def _look_on(entries: dict[str, str], name: str, look: Callable[[Callable[[], Any]], list[str]]) -> None:
    """Take two steps, the second under `look`. Record the events that it returns, and the final weights and state."""
    run = Run(name, shapes=FEW_SHAPES)
    params = make_params(run)
    optimizer = make_optimizer(run, params)
    for step in range(2):
        set_gradients(run, params, step)
        if step == 1:
            entries.update({f"seen {i}": what for i, what in enumerate(look(optimizer.step))})
        else:
            optimizer.step()
    note(entries, optimizer, "end")


def can_run(backend: str) -> str:
    """Return why the backend in ROOTFREE_BACKEND cannot take a step, or an empty string if it can."""
    assert os.environ["ROOTFREE_BACKEND"] == backend
    run = Run("IFShampoo", shapes=((3, 2),))
    params = make_params(run)
    try:
        train(run, params, make_optimizer(run, params), range(1), {})
    except Exception as error:
        return str(error)
    return ""


def run_all(results: Results, backend: str) -> None:
    """Train all runs. Also run two optimizers under a profiler and under a dispatch mode."""
    for name, run in runs(backend).items():
        with results.case(f"training, {name}") as entries:
            params = make_params(run)
            optimizer = make_optimizer(run, params)
            train(run, params, optimizer, range(run.num_steps), entries)
            note_state_dict(entries, optimizer)
    for name in ("RFRMSProp", "IFShampoo"):
        for label, look in (("dispatch mode", _watched), ("profiler", _profiled)):
            with results.case(f"{label}, {name}") as entries:
                _look_on(entries, name, look)
