"""What all optimizers share: the conventions of torch.optim, and the step, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from rootfree_kernels import ranges
from rootfree_kernels.arguments import Scaling
from rootfree_kernels.backend import is_captured
from rootfree_kernels.optim.checkpoint import (
    check_state_dict,
    restore_callables,
    restore_tensors,
    with_newer_options,
    without_callables,
)
from rootfree_kernels.optim.context import GroupOptions, StepContext, group_options
from rootfree_kernels.optim.options import check_options, check_param
from rootfree_kernels.optim.plan import StepPlan, reserve
from rootfree_kernels.optim.planner import PlannedStep, Planner, check_backends
from rootfree_kernels.optim.state_spec import Group


def lr_scalar(lr: float | Tensor) -> Tensor:
    """Return the learning rate as a 0-d tensor. A float becomes FP64; a Tensor stays on its device, unread."""
    return lr.reshape(()) if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64, device="cpu")


def without_autocast(plan: StepPlan) -> AbstractContextManager[Any]:
    """Return a context in which `torch.autocast` casts nothing on the plan's device."""
    if plan.knows_autocast and torch.is_autocast_enabled(plan.device.type):
        return torch.autocast(plan.device.type, enabled=False)
    return nullcontext()


class RootFreeOptimizer(Optimizer):
    """Base of the optimizers; see `RFRMSProp` and `IFShampoo`.

    State of every parameter: `step`, the number of calls with a gradient (int64, 0-d; on the CPU, or with `capturable`
    on the parameter's device); `momentum_buffer`, of the parameter's shape; `skipped` (int32), how many steps left out
    the parameter, or a part of it, because its gradient or its update was not finite.
    """

    _step_supports_amp_scaling = True  # GradScaler then sets grad_scale and found_inf, which stay on the device

    _newer_options: Mapping[str, Any] = MappingProxyType({})
    """Options that older checkpoints and pickles lack, with the values that they had before they were options."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._planner = Planner()
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._planner = Planner()
        self.defaults = {**self._newer_options, **self.defaults}
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. Options that it does not name take the constructor's values.

        Raises:
            TypeError, ValueError: the group or one of its parameters cannot be served; nothing was changed.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group is a {type(param_group).__name__}: pass a dict, {{'params': [...], ...}}.")
        group = dict(param_group)
        if isinstance(group["params"], Tensor):
            group["params"] = [group["params"]]
        if not isinstance(group["params"], set):  # torch refuses a set, with a message of its own
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
            check_backends(list(seen), options)
        super().add_param_group(group)

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict, as `torch.optim.Optimizer.state_dict`.

        Callables among the options are saved as their names, so that `torch.load(weights_only=True)` reads it. An
        optimizer that loads it keeps its own callables.
        """
        return without_callables(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of the same class and of parameters of the same shapes. Dtypes stay as they were saved.

        Raises:
            ValueError: it belongs to another optimizer or to other shapes; nothing was changed.
        """
        final: dict[str, Any] = {}
        own_groups = [dict(group) for group in self.param_groups]

        def check(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            """Runs as the last hook before the load, and so sees what will be loaded."""
            final.update(with_newer_options(state_dict, self._newer_options))
            check_state_dict(self, final)
            return final

        def restore(optimizer: Optimizer) -> None:
            """Runs as the first hook after the load."""
            restore_tensors(self.param_groups, self.state, final)
            restore_callables(self.param_groups, own_groups)

        handles = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()
            self._planner = Planner()

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
        if torch.compiler.is_compiling() and (number := self._trace_number()) is not None:
            self._step_traced(number)
        else:
            self._step_all()
        return loss

    @torch.compiler.disable(reason="a step is traced if every group has capturable=True and nothing is wrong")
    def _step_all(self) -> None:
        with ranges.step(f"{type(self).__name__}.step"):
            every = self._planner.planned_steps(self.param_groups, self.state)
            self._prepare(every)
            for group, options, plan, grads in every:
                with without_autocast(plan):
                    plan.step(grads, self._context(group, options, plan.device, ranges.listened))
                plan.note_versions()

    def _prepare(self, every: list[PlannedStep]) -> None:
        """Raise what a step can only raise before anything has changed."""
        for group, _, plan, _ in every:
            if is_captured(plan.device) and not group["capturable"]:
                raise RuntimeError(
                    "capturable=False in a step that a CUDA graph captures: its count of steps stays on the host, so "
                    "that every replay would take the same step; pass capturable=True."
                )
        if any(step.plan.workspace for step in every):
            reserve([step.plan for step in every])

    def _context(self, group: Group, options: GroupOptions, device: torch.device, is_profiled: bool) -> StepContext:
        """Return what the batches of a plan share. The scaler's tensors are moved to the plan's device."""
        scaling = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        on_device = Scaling(*[x if x is None else x.to(device, non_blocking=True) for x in scaling])
        return StepContext(options, lr_scalar(group["lr"]), on_device, is_profiled)

    # ---- the compiled step ----------------------------------------------------------------------------------------

    @torch.compiler.assume_constant_result
    def _trace_number(self) -> int | None:
        """Return the number of the plans, in `Planner.traced`, of the step that is being compiled. None means that it
        cannot be traced.

        The compiler runs this instead of tracing it. Here the state is made, and everything is checked and planned. The
        compiled code keeps to these plans as long as its guards hold (see `_init_group`).
        """
        if not all(group["capturable"] for group in self.param_groups):
            return None
        try:
            every = self._planner.planned_steps(self.param_groups, self.state)
        except (RuntimeError, ValueError):  # `_step_all` will raise it again
            return None
        plans = [[step.plan for step in every if step.group is group] for group in self.param_groups]
        traced = self._planner.traced
        for number, known in traced.items():
            if known == plans:
                return number
        traced[len(traced)] = plans
        return len(traced) - 1

    def _step_traced(self, number: int) -> None:
        for index, (group, plans) in enumerate(zip(self.param_groups, self._planner.traced[number], strict=True)):
            guarded: list[Tensor] = []
            self._init_group(group, number, index, guarded)
            options = group_options(group)  # read here, so that the compiler guards on every option
            for plan in plans:
                with without_autocast(plan):
                    grads: list[Any] = [param.grad for param in plan.params]
                    plan.step(grads, self._context(group, options, plan.device, False))

    def _init_group(self, group: Group, number: int, index: int, guarded: list[Tensor]) -> None:
        """List the tensors of a group's state and of its plans.

        The compiler knows this name from PyTorch's optimizers: it runs the method instead of tracing it, and compiles
        again if an option, the presence of a gradient or one of these tensors changes.
        """
        for device_state in self._planner.caches[index].device_states:
            guarded.extend(device_state.tensors())
        for plan in self._planner.traced[number][index]:
            guarded.extend(plan.tensors())
