"""What both optimizers share: the conventions of torch.optim, the step, eager and compiled, the diagonal step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from rootfree_kernels import ops, ranges
from rootfree_kernels.backends import is_captured
from rootfree_kernels.optim.layout import Entry, Group, is_pair, state_dtype
from rootfree_kernels.optim.options import check_options, check_param
from rootfree_kernels.optim.plan import Diagonal, Matrices, Plan
from rootfree_kernels.optim.planned import PlannedOptimizer
from rootfree_kernels.optim.workspace import reserve


def lr_scalar(lr: float | Tensor) -> Tensor:
    """The learning rate as a 0-d tensor, never read: a Tensor stays on its device, a float becomes FP64."""
    return lr.reshape(()) if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64, device="cpu")


def without_autocast(plan: Plan) -> AbstractContextManager[Any]:
    """No casts by `torch.autocast` in a step on the plan's device."""
    if plan.knows_autocast and torch.is_autocast_enabled(plan.device.type):
        return torch.autocast(plan.device.type, enabled=False)
    return nullcontext()


class Shared(NamedTuple):
    """What the operators of a group's step on one device have in common."""

    lr: Tensor
    grad_scale: Tensor | None
    found_inf: Tensor | None
    marked: bool
    """Whether a profiler wants to know where phases begin."""


class RootFreeOptimizer(PlannedOptimizer):
    """Base of the optimizers; see `RFRMSProp` and `IFShampoo`.

    State of every parameter: `step`, the number of calls with a gradient (FP32, 0-d; on the CPU, or with `capturable`
    on the parameter's device); `momentum_buffer`, of the parameter's shape; `skipped` (int32), how many steps were left
    out, whole or in part, because they were not finite.
    """

    _step_supports_amp_scaling = True  # GradScaler hands over grad_scale and found_inf, which stay on the device

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._forget()
        super().__init__(params, defaults)

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
        if torch.compiler.is_compiling() and (number := self._trace_number()) is not None:
            self._step_traced(number)
        else:
            self._step_all()
        return loss

    @torch.compiler.disable(reason="a step is traced where every group has capturable=True and nothing is amiss")
    def _step_all(self) -> None:
        with ranges.step(f"{type(self).__name__}.step"):
            every = self._ready()
            if any(is_captured(plan.device) and not group["capturable"] for group, plan, _ in every):
                raise RuntimeError(
                    "capturable=False in a step that a CUDA graph captures: its count of steps stays on the host, so "
                    "that every replay would take the same step; pass capturable=True."
                )
            reserve(ready.plan for ready in every)
            for group, plan, grads in every:
                with without_autocast(plan):
                    self._step_plan(group, plan, grads)
                plan.note_versions()

    @torch.compiler.assume_constant_result
    def _trace_number(self) -> int | None:
        """Where in `_traced` the plans of the step stand that is being compiled; None where it cannot be traced.

        The compiler runs this instead of tracing it. The state is made, everything is checked and planned here, and
        what is compiled goes by the plans for as long as its guards hold (see `_init_group`).
        """
        if not all(group["capturable"] for group in self.param_groups):
            return None
        try:
            every = self._ready()
        except (RuntimeError, ValueError):  # `_step_all` raises it again, in its time
            return None
        plans = [[ready.plan for ready in every if ready.group is group] for group in self.param_groups]
        for number, known in self._traced.items():
            if known == plans:
                return number
        self._traced[len(self._traced)] = plans
        return len(self._traced) - 1

    def _step_traced(self, number: int) -> None:
        for index, (group, plans) in enumerate(zip(self.param_groups, self._traced[number], strict=True)):
            guarded: list[Tensor] = []
            self._init_group(group, number, index, guarded)
            for plan in plans:
                with without_autocast(plan):
                    self._step_plan(group, plan, [param.grad for param in plan.params])  # type: ignore[misc]

    def _init_group(self, group: Group, number: int, index: int, guarded: list[Tensor]) -> None:
        """List the tensors of a group's state and of its plans.

        The name is one that the compiler knows from PyTorch's optimizers: it runs this instead of tracing it, and
        compiles anew where an option, the presence of a gradient or one of these tensors is another one than now.
        """
        for device_state in self._bases[index].device_states:
            guarded.extend(device_state.tensors())
        for plan in self._traced[number][index]:
            guarded.extend(plan.tensors())

    def _step_plan(self, group: Group, plan: Plan, grads: list[Tensor]) -> None:
        """Step the parameters of a plan. This, in essence, is what `torch.compile` traces."""
        marked = not torch.compiler.is_compiling() and ranges.listened
        shared = Shared(lr_scalar(group["lr"]), *self._amp(plan.device), marked)
        for part, where, steps in zip(plan.parts, plan.slices, plan.steps(), strict=True):
            if marked:
                ranges.batch(part.label)
            if isinstance(part, Diagonal):
                self._step_diagonal(group, part, grads[where], steps, shared)
            else:
                self._step_matrices(group, part, grads[where], steps, shared)
        if marked:
            ranges.end_batch()
        plan.count_step()

    def _diagonal_layout(self, param: Tensor, group: Group) -> dict[str, Entry]:
        shape, kept = tuple(param.shape), state_dtype(param, group)
        layout = {
            "square": Entry(shape, kept, fill=1.0, like_param=True),
            "momentum_buffer": Entry(shape, kept, like_param=True),
            "skipped": Entry((), torch.int32),
        }
        if is_pair(kept, group["rounding"]):
            layout["square_residual"] = Entry(shape, torch.int16, like_param=True)
        if is_pair(param.dtype, group["weight_rounding"]):
            layout["weight_residual"] = Entry(shape, torch.int16, like_param=True)
        return layout

    def _amp(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """GradScaler's (grad_scale, found_inf) on `device`, None outside of it."""
        scaling = (getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        grad_scale, found_inf = (x if x is None else x.to(device, non_blocking=True) for x in scaling)
        return grad_scale, found_inf

    def _step_diagonal(self, group: Group, part: Diagonal, grads: list[Tensor], steps: Tensor, shared: Shared) -> None:
        if shared.marked:
            ranges.phase("apply")
        ops.run(
            "rf_rmsprop",
            part.params,
            part.squares,
            part.buffers,
            part.skipped,
            part.square_residuals,
            part.weight_residuals,
            grads,
            shared.lr,
            part.seeds,
            steps,
            shared.grad_scale,
            shared.found_inf,
            group["batch_size"],
            group["beta2"],
            group["gamma"],
            group["momentum"],
            group["damping"],
            group["weight_decay"],
            group["decoupled_weight_decay"],
            group["maximize"],
            group["rounding"],
            group["weight_rounding"],
            part.backend,
        )

    def _step_matrices(self, group: Group, part: Matrices, grads: list[Tensor], steps: Tensor, shared: Shared) -> None:
        raise NotImplementedError
