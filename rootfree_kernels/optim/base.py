"""What both optimizers share: the conventions of torch.optim, the checks before a step, the diagonal step."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from rootfree_kernels import ops
from rootfree_kernels.backends import FactorDtypes, choose
from rootfree_kernels.optim.checkpoint import CheckpointedOptimizer
from rootfree_kernels.optim.layout import (
    LAYOUT_OPTIONS,
    Entry,
    Group,
    difference_of,
    is_pair,
    label_of,
    needs_bits,
    state_dtype,
)
from rootfree_kernels.optim.options import check_options, check_param, grad_problem
from rootfree_kernels.rounding import block_seed


def lr_scalar(lr: float | Tensor) -> Tensor:
    """The learning rate as a 0-d tensor, never read: a Tensor stays on its device, a float becomes FP64."""
    return lr.reshape(()) if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64, device="cpu")


class RootFreeOptimizer(CheckpointedOptimizer):
    """Base of the optimizers; see `RFRMSProp` and `IFShampoo`.

    State of every parameter: `step`, the number of calls with a gradient (FP32, 0-d; on the CPU, or with `capturable`
    on the parameter's device); `momentum_buffer`, of the parameter's shape; `skipped` (int32), how many steps were left
    out, whole or in part, because they were not finite.
    """

    _step_supports_amp_scaling = True  # GradScaler hands over grad_scale and found_inf, which stay on the device

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._forget()
        super().__init__(params, defaults)

    def _forget(self) -> None:
        self._seeds: dict[Tensor, int] = {}
        self._seed_tensors: dict[tuple[Tensor, ...], Tensor] = {}
        self._layout_keys: dict[Tensor, tuple[Any, ...]] = {}  # by the first parameter of a group

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options that it does not name take the constructor's values. Errors leave all as it was."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group is a {type(param_group).__name__}: pass a dict, {{'params': [...], ...}}.")
        group = dict(param_group)
        if isinstance(group["params"], Tensor):
            group["params"] = [group["params"]]
        if not isinstance(group["params"], set):  # refused by torch, with a message of its own
            group["params"] = list(group["params"])
        seen: set[Tensor] = set()
        for index, item in enumerate(group["params"]):
            label, param = item if isinstance(item, tuple) else (f"params[{index}]", item)
            check_param(f"parameter {label!r}", param)
            if param in seen:
                raise ValueError(f"parameter {label!r} stands twice in the group: pass each parameter once.")
            seen.add(param)
        options = {**self.defaults, **group}
        check_options(options)
        if options["fused"]:
            self._check_backends(list(seen), options)
        super().add_param_group(group)

    # ---- the step -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: evaluates the model with gradients enabled and returns the loss, which `step` returns.

        Raises:
            ValueError, RuntimeError: an option or a gradient cannot be served; nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_all()
        return loss

    @torch.compiler.disable(reason="bookkeeping on the host around operators that are opaque to the compiler")
    def _step_all(self) -> None:
        active = [self._checked_params(group) for group in self.param_groups]
        due = [self._due(group, params) for group, params in zip(self.param_groups, active, strict=True)]
        with ExitStack() as stack:
            for device_type in {param.device.type for params in active for param in params}:
                if torch.amp.is_autocast_available(device_type):
                    stack.enter_context(torch.autocast(device_type, enabled=False))
            for group, params, now in zip(self.param_groups, active, due, strict=True):
                if params:
                    self._step_group(group, params, now)

    def _checked_params(self, group: Group) -> list[Tensor]:
        """The group's parameters that have a gradient, after every check of options, gradients and backend."""
        check_options(group)
        params = []
        for index, param in enumerate(group["params"]):
            if param.grad is not None:
                if problem := grad_problem(param, param.grad):
                    raise RuntimeError(f"{label_of(group, index)} {problem}")
                params.append(param)
        self._check_layout(group)
        return params

    def _check_backends(self, params: list[Tensor], group: Group) -> None:
        """Raise where a backend was asked for that cannot serve."""
        for device, dtype, factors in {(p.device, p.dtype, self._factor_dtypes(p, group)) for p in params}:
            choose(device, dtype, group["fused"], factors)

    def _factor_dtypes(self, param: Tensor, group: Group) -> FactorDtypes | None:
        """The dtypes of a parameter's factors, None where it has none."""
        return None

    def _check_layout(self, group: Group) -> None:
        """Raise if the state was made for other options, dtypes or devices; looks only where one of them changed."""
        key = self._layout_key(group)
        if not group["params"] or self._layout_keys.get(group["params"][0]) == key:
            return
        for index, param in enumerate(group["params"]):
            state = self.state.get(param)
            if state and (difference := difference_of(state, self._layout(param, group), param.device)):
                options = ", ".join(f"{name}={group[name]}" for name in LAYOUT_OPTIONS if name in group)
                raise ValueError(
                    f"{label_of(group, index)} of {param.dtype} on {param.device} with {options}: its state was made "
                    f"for others ({difference}). Set them before the first step, or make a new optimizer."
                )
        self._check_backends(group["params"], group)
        self._layout_keys[group["params"][0]] = key
        self._replan(group)

    def _layout_key(self, group: Group) -> tuple[Any, ...]:
        """All that decides what the state looks like, how it is batched and by which backend it is stepped."""
        placement = [(param.dtype, param.device) for param in group["params"]]
        backend = (group["fused"], os.environ.get("ROOTFREE_BACKEND"))
        return (*(group.get(name) for name in LAYOUT_OPTIONS), *backend, *placement)

    def _replan(self, group: Group) -> None:
        """Forget what was derived from the group's options, dtypes and devices."""
        self._seed_tensors.clear()

    def _due(self, group: Group, params: list[Tensor]) -> set[Tensor]:
        """The parameters whose factors are updated in this step; asked of all groups before anything changes."""
        return set()

    def _step_group(self, group: Group, params: list[Tensor], due: set[Tensor]) -> None:
        raise NotImplementedError

    def _diagonal_layout(self, param: Tensor, group: Group) -> dict[str, Entry]:
        shape, kept = tuple(param.shape), state_dtype(param, group)
        layout = {
            "square": Entry(shape, kept, fill=1.0, like_param=True),
            "momentum_buffer": Entry(shape, kept, like_param=True),
            "skipped": Entry((), torch.int32),
        }
        if is_pair(kept, group["rounding"]):
            layout["square_residual"] = Entry(shape, torch.int16)
        if is_pair(param.dtype, group["weight_rounding"]):
            layout["weight_residual"] = Entry(shape, torch.int16)
        return layout

    def _init_state(self, param: Tensor, group: Group) -> None:
        """Make the state of a parameter at its first gradient."""
        state = self.state[param]
        device = param.device if group["capturable"] else "cpu"
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        for name, entry in self._layout(param, group).items():
            if entry.like_param:
                state[name] = torch.full_like(param, entry.fill, dtype=entry.dtype, requires_grad=False)
            else:
                state[name] = param.new_full(entry.shape, entry.fill, dtype=entry.dtype)

    def _count_step(self, params: list[Tensor]) -> None:
        torch._foreach_add_([self.state[param]["step"] for param in params], 1)

    def _seed(self, group: Group, param: Tensor, block_index: int = 0) -> int:
        """The seed of a block: a function of the group's seed and of the parameter's place among all parameters."""
        if param not in self._seeds:
            every = (p for g in self.param_groups for p in g["params"])
            self._seeds = {p: index for index, p in enumerate(every)}
        return block_seed(group["seed"], self._seeds[param], block_index)

    def _tensor_of_seeds(self, group: Group, params: list[Tensor]) -> Tensor:
        """Seeds [n], int32, on the parameters' device, kept so that they are copied there but once."""
        key = tuple(params)
        if key not in self._seed_tensors:
            if len(self._seed_tensors) > 64:  # gradients come and go in ever new constellations
                self._seed_tensors.clear()
            seeds = [self._seed(group, param) for param in params]
            self._seed_tensors[key] = torch.tensor(seeds, dtype=torch.int32, device=params[0].device)
        return self._seed_tensors[key]

    def _amp(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """GradScaler's (grad_scale, found_inf) on `device`, None outside of it."""
        scaling = (getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        grad_scale, found_inf = (x if x is None else x.to(device, non_blocking=True) for x in scaling)
        return grad_scale, found_inf

    def _diagonal_step(self, group: Group, params: list[Tensor]) -> None:
        """RF-RMSProp for every parameter given: one operator for all of a dtype and device."""
        batches: dict[Any, list[Tensor]] = defaultdict(list)
        for param in params:
            if param.numel():
                alone = id(param) if group["foreach"] is False else None
                batches[param.device, param.dtype, param.grad.dtype, alone].append(param)  # type: ignore[union-attr]
        for batch in batches.values():
            self._diagonal_batch(group, batch)

    def _diagonal_batch(self, group: Group, params: list[Tensor]) -> None:
        device, dtype = params[0].device, params[0].dtype
        kept, modes = state_dtype(params[0], group), (group["rounding"], group["weight_rounding"])
        seeds = steps = torch.zeros(0, dtype=torch.int32, device=device)
        if needs_bits(kept, modes[0]) or needs_bits(dtype, modes[1]):
            seeds = self._tensor_of_seeds(group, params)
            steps = torch.stack([self.state[p]["step"] for p in params])
        grad_scale, found_inf = self._amp(device)

        def entries(name: str) -> list[Tensor]:
            return [self.state[p][name] for p in params]

        ops.rf_rmsprop(
            params,
            entries("square"),
            entries("momentum_buffer"),
            entries("skipped"),
            entries("square_residual") if is_pair(kept, modes[0]) else [],
            entries("weight_residual") if is_pair(dtype, modes[1]) else [],
            [p.grad for p in params],
            lr_scalar(group["lr"]),
            seeds,
            steps,
            grad_scale,
            found_inf,
            group["batch_size"],
            group["beta2"],
            group["gamma"],
            group["momentum"],
            group["damping"],
            group["weight_decay"],
            group["decoupled_weight_decay"],
            group["maximize"],
            *modes,
            choose(device, dtype, group["fused"]),
        )
