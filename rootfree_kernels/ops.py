"""The operators, `torch.ops.rootfree.*`: one schema and one fake (meta) version each, whatever backend runs them.

    rf_rmsprop         the whole diagonal step of a list of tensors
    clipped_momentum   m ← α₂m + (1−α₂)Δ of a batch, and the clip of its step
    kron_gather        gradient blocks → G [L, p, d]
    kron_factor        C, K, m_C, m_K of a batch ← one update
    kron_step          weights and momentum of a batch ← one preconditioned step

Arguments, shapes and formulas are those of the functions of `rootfree_kernels.eager`, with the name of the backend (see
`rootfree_kernels.backends`) as one more argument, `backend`, at the end. Every tensor that an operator changes is
declared, so that `torch.compile` can capture it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op, infer_schema

from rootfree_kernels import eager
from rootfree_kernels.backends import implementation


def _define(function: Callable[..., Any], mutates_args: Sequence[str] = ()) -> CustomOpDef:
    """The operator with the signature of an eager function, a backend's name behind it, that calls the backend."""
    stem = function.__name__
    arguments, result = infer_schema(function, mutates_args=mutates_args).rsplit(") -> ", 1)

    def dispatch(*args: Any) -> Any:
        *arguments, backend = args
        return implementation(backend, stem)(*arguments)

    schema = f"{arguments}, str backend) -> {result}"
    return custom_op(f"rootfree::{stem}", dispatch, mutates_args=mutates_args, schema=schema)


rf_rmsprop = _define(
    eager.rf_rmsprop,
    ("params", "squares", "buffers", "skipped", "square_residuals", "weight_residuals"),
)
clipped_momentum = _define(eager.clipped_momentum, ("momenta",))
kron_gather = _define(eager.kron_gather)
kron_factor = _define(
    eager.kron_factor,
    (
        *("factor_c", "factor_k", "momentum_c", "momentum_k"),
        *("residual_c", "residual_k", "product_c", "product_k"),
    ),
)
kron_step = _define(eager.kron_step, ("params", "buffers", "residuals", "skipped"))


@rf_rmsprop.register_fake
def _(*args: Any) -> None:
    return None


@clipped_momentum.register_fake
def _(momenta: Sequence[Tensor], *args: Any) -> list[Tensor]:
    return [m.new_empty(m.shape[:1], dtype=torch.promote_types(m.dtype, torch.float32)) for m in momenta]


@kron_gather.register_fake
def _(grads: Sequence[Tensor], grad_scale: Tensor | None, dtype: torch.dtype, *args: Any) -> Tensor:
    return grads[0].new_empty((len(grads), *grads[0].shape), dtype=dtype)


@kron_factor.register_fake
def _(factor_c: Tensor, *args: Any) -> Tensor:
    return factor_c.new_empty(factor_c.shape[:1], dtype=torch.bool)


@kron_step.register_fake
def _(*args: Any) -> None:
    return None
