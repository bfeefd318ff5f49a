"""Calls of `scaled_rmsprop`: calls of `rf_rmsprop` with a rule, mean curvatures and norms of updates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.calls import recipe_reference as recipe
from tests.calls.kron import RULE
from tests.calls.operators import Call as Run
from tests.calls.operators import through
from tests.calls.rf_rmsprop import Call, Lists, values
from tests.calls.tensors import BF16, FP32, FP64, fp64
from tests.calls.tolerances import tolerance


@dataclass
class ScaledCall(Call):
    """A call of `scaled_rmsprop`. Every run creates new tensors."""

    rule: dict[str, Any] = field(default_factory=dict)
    """Changes to `tests.calls.kron.RULE`."""

    @property
    def all_rule(self) -> dict[str, Any]:
        return {**RULE, **self.rule}

    @property
    def follows_curvature(self) -> bool:
        return self.all_rule["relative_damping"]

    def tensors(self) -> tuple[Lists, list[tuple[Tensor, Tensor]]]:
        lists, memory = super().tensors()
        wide = torch.promote_types(self.square, FP32)
        known = [(0.0, 0.7, 0.2)[(index + self.seed) % 3] for index in range(len(self.shapes))]
        curvatures = [torch.tensor(q, dtype=wide, device=self.device) for q in known]
        lists["curvature"] = curvatures if self.follows_curvature else []
        return lists, memory

    @property
    def norms(self) -> Tensor | None:
        if not self.all_rule["scales"]:
            return None
        dtype = FP64 if FP64 in (self.param, self.square, self.buffer) else FP32
        norms = 0.5 + torch.arange(len(self.shapes)).to(dtype) % 4 / 2  # `linspace` depends on the instruction set
        return norms.to(self.device)

    def arguments(self, lists: Lists) -> tuple[Any, ...]:
        params, squares, buffers, skipped, *rest = super().arguments(lists)
        rule = [value for name, value in self.all_rule.items() if name not in ("scales", "factor_init")]
        return params, squares, buffers, skipped, lists["curvature"], *rest[:2], self.norms, *rest[2:], *rule

    def run(self, lists: Lists | None = None, run: Run | None = None) -> Lists:
        lists = lists or self.tensors()[0]
        (run or through(self.backend))("scaled_rmsprop", *self.arguments(lists))
        return lists


def assert_matches_reference(call: ScaledCall, lists: Lists, before: Lists, allowed: float | None = None) -> None:
    """Check `lists` after a step from `before` against the reference.

    Errors are relative to the norm of a tensor. The default of `allowed` is the tolerance of the stored dtypes.
    """
    rule = {name: value for name, value in call.all_rule.items() if name != "scales"}
    options = {"lr": call.rate, **call.all_options, **rule}
    stored = {
        "param": FP32 if lists["weight_residual"] else call.param,
        "square": FP32 if lists["square_residual"] else call.square,
        "buffer": call.buffer,
    }
    old, new = ({name: values(x, name) for name in (*stored, "grad", "curvature")} for x in (before, lists))
    norms = [None] * len(call.shapes) if call.norms is None else fp64(call.norms).tolist()
    coarse = max(tolerance("one step", dtype) for dtype in stored.values())
    for index in range(len(call.shapes)):
        q = float(old["curvature"][index]) if call.follows_curvature else 0.0
        state = recipe.ScaledState(old["square"][index], old["buffer"][index], q)
        grad = old["grad"][index] / (call.grad_scale or 1)
        step = recipe.scaled_diagonal_step(old["param"][index], grad, state, norm=norms[index], **options)
        expected = {"param": step[0], "square": step[1].square, "buffer": step[1].buffer}
        if call.follows_curvature:
            expected["curvature"] = step[1].curvature
        for name, value in expected.items():
            norm, size = np.linalg.norm(value), np.size(value)
            bound = (coarse if allowed is None else allowed) * norm
            # The terms have magnitude 1. Where they cancel, their errors remain, as u's from an s that was rounded.
            remains = tolerance("one step", BF16) if stored["square"] == BF16 else 2e-6
            cancelled = (remains if allowed is None else allowed) * size**0.5
            error = np.linalg.norm(new[name][index] - value)
            assert error <= bound + cancelled, f"{name}[{index}] of {size} elements: {error:.1e}"
