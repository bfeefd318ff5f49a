"""What all optimizers share: the conventions of torch.optim, and the step, eager and compiled."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from rootfree_kernels import ranges
from rootfree_kernels.arguments import Scaling
from rootfree_kernels.backend import is_captured
from rootfree_kernels.batch_size import BatchSizeCounter
from rootfree_kernels.optim.checkpoint import Load, add_untouched, finished
from rootfree_kernels.optim.context import GroupOptions, StepContext, group_options
from rootfree_kernels.optim.options import check_options, check_param, normalise
from rootfree_kernels.optim.plan import StepPlan, reserve
from rootfree_kernels.optim.planner import PlannedStep, Planner, check_backends
from rootfree_kernels.optim.saved_groups import older_values
from rootfree_kernels.optim.state_spec import Group


def lr_scalar(lr: float | Tensor) -> Tensor:
    """Return the learning rate as a 0-d tensor. A float becomes FP64; a Tensor stays on its device, unread."""
    return lr.reshape(()) if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64, device="cpu")


def changes_nothing(groups: Sequence[Group], own_lr: Any) -> bool:
    """Return whether every lr and every gradient is 0.

    `torch.distributed.checkpoint` takes such a step of an optimizer without state, to have its state made. It puts an
    lr of its own into the groups, so that a Tensor that was passed as `own_lr` need not be read.
    """
    grads = [param.grad for group in groups for param in group["params"] if param.grad is not None]
    if not grads or any(type(grad) is not Tensor for grad in grads):
        return False
    for lr in (group["lr"] for group in groups):
        if (isinstance(lr, Tensor) and lr is own_lr) or lr:
            return False
    return not any(grad.any() for grad in grads)


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

    _newer_options: Sequence[Mapping[str, Any]] = ()
    """Options that state dicts without a format version and pickles may lack, with the values that they had before they
    were options: one mapping for each version that added some."""

    _own_options: tuple[str, ...] = ("batch_size", "beta2", "damping", "gamma")
    """Options that every state dict has some of, and those of other optimizers do not."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._planner = Planner()
        self._counters: list[BatchSizeCounter] = []
        normalise(defaults)
        super().__init__(params, defaults)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether the caller is a GradScaler. It then sets `grad_scale` and `found_inf`, which stay on the device.

        Lightning reads the same attribute without a scaler. It refuses to clip gradients if the attribute is True,
        because it takes it to mean that gradients are still scaled.
        """
        return isinstance(sys._getframe(1).f_locals.get("self"), torch.amp.GradScaler)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_counters": self._counters}

    def __setstate__(self, state: dict[str, Any]) -> None:
        known = set(state.get("defaults", self.__dict__.get("defaults", {})))
        super().__setstate__(state)
        if "differentiable" not in known:  # Optimizer adds it, and no optimizer here has this option
            self.defaults.pop("differentiable", None)
        self._planner = Planner()
        self._counters = list(self.__dict__.get("_counters", ()))  # older pickles have none
        for counter in state.get("_counters", ()):  # a copy; `load_state_dict` calls this without them
            counter._attach(self)
        if "defaults" in state:  # it was copied or pickled, maybe by an older version
            older = older_values([*self.param_groups, self.defaults], self._newer_options)
            for options in (self.defaults, *self.param_groups):
                options.update(older)

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
        normalise(group)
        options = {**self.defaults, **group}
        seen: set[Tensor] = set()
        for index, item in enumerate(group["params"]):
            label, param = item if isinstance(item, tuple) else (f"params[{index}]", item)
            check_param(f"parameter {label!r}", param, options)
            seen.add(param)  # Optimizer warns of duplicates, which are stepped once
        check_options(options)
        if options["fused"]:
            check_backends(list(seen), options)
        super().add_param_group(group)

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict, as `torch.optim.Optimizer.state_dict`.

        It holds nothing but numbers, text, bools, None and Tensors, so that `torch.load(weights_only=True)` and
        `torch.distributed.checkpoint` accept it. Dtypes are saved as text, such as "bfloat16". Callables among the
        options are saved as their names, and an optimizer that loads them keeps its own callables.

        Once the optimizer has state, trainable parameters that never had a gradient are saved with the state that they
        will start from. It is made for the state dict, and takes memory as long as that is kept.
        """
        handle = self.register_state_dict_post_hook(add_untouched, prepend=True)
        try:
            return finished(super().state_dict())
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of the same class and of parameters of the same shapes. Dtypes stay as they were saved.

        An option that was not saved keeps the value of this optimizer. If loading fails, for example because there is
        not enough memory, nothing was changed.

        Raises:
            ValueError: it belongs to another optimizer or to other shapes.
        """
        loads: list[Load] = []

        def prepare(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            """Runs as the last hook before the load, and so sees what will be loaded."""
            loads.append(Load(self, state_dict))
            return loads[0].remainder

        def finish(optimizer: Optimizer) -> None:
            """Runs as the first hook after the load."""
            loads[0].finish(self)

        handles = [
            self.register_load_state_dict_pre_hook(prepare),
            self.register_load_state_dict_post_hook(finish, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

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
            is_first = not self.state
            every = self._planner.planned_steps(self.param_groups, self.state)
            self._prepare(every)
            if is_first and changes_nothing(self.param_groups, self.defaults["lr"]):
                self._planner.forget_plans()
                return
            for group, options, plan, grads in every:
                with without_autocast(plan):
                    plan.step(grads, self._context(group, options, plan.device, ranges.listened))
                plan.note_versions()
            self._planner.finish_step()

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
