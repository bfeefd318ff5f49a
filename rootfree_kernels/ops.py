"""The operators, `torch.ops.rootfree.*`: one schema and one fake (meta) version each, whatever backend runs them.

    rf_rmsprop         the whole diagonal step of a list of tensors
    clipped_momentum   m ← α₂m + (1−α₂)Δ of a batch, and the clip of its step
    kron_gather        tiles of gradients → G [L, p, d]
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
from torch.autograd import profiler
from torch.library import Library, infer_schema, register_fake

from rootfree_kernels import eager
from rootfree_kernels.backends import implementation
from rootfree_kernels.blocks import tiles_of_numbers

_LIBRARY = Library("rootfree", "FRAGMENT")
_OPERATORS: dict[str, Callable[..., Any]] = {}


def run(stem: str, *args: Any) -> Any:
    """Call an operator as the optimizers do: past the dispatcher, where nobody is there to see the call.

    The dispatcher unpacks and packs every tensor of every list, which takes a large part of the time that a step takes
    on the host (`python -m bench.host_step`). Compilers, dispatch modes and profilers see the operator.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or profiler._is_profiler_enabled:
        return _OPERATORS[stem](*args)
    *arguments, backend = args
    return implementation(backend, stem)(*arguments)


def _define(function: Callable[..., Any], mutates_args: Sequence[str], fake: Callable[..., Any]) -> Callable[..., Any]:
    """The operator with the signature of an eager function, a backend's name behind it, that calls the backend.

    `Library` and not `custom_op`, whose wrapper walks the schema at every call to bump version counters: the in-place
    operations of eager PyTorch bump them anyway. A backend that writes through raw pointers has to call
    `torch.autograd.graph.increment_version` on what it changed.
    """
    stem = function.__name__
    arguments, result = infer_schema(function, mutates_args=mutates_args).rsplit(") -> ", 1)

    def dispatch(*args: Any) -> Any:
        *arguments, backend = args
        return implementation(backend, stem)(*arguments)

    _LIBRARY.define(f"{stem}{arguments}, str backend) -> {result}")
    _LIBRARY.impl(stem, dispatch, "CompositeExplicitAutograd")
    register_fake(f"rootfree::{stem}", fake, lib=_LIBRARY)
    _OPERATORS[stem] = getattr(torch.ops.rootfree, stem).default
    return _OPERATORS[stem]


def _returns_nothing(*args: Any) -> None:
    return None


def _fake_gather(
    grads: list[Tensor],
    tiles: list[int],
    rows: int,
    cols: int,
    factors: list[Tensor],
    grad_scale: Tensor | None,
    dtype: torch.dtype,
    maximize: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    num_blocks = sum(tile.num_blocks for tile in tiles_of_numbers(tiles, rows, cols))
    sums = implementation(backend, "num_partial_sums")(rows, cols)
    shape = (num_blocks, *(implementation(backend, "padded_side")(side) for side in (rows, cols)))
    squares = grads[0].new_empty((1 + len(factors), num_blocks, sums), dtype=torch.float32)
    return grads[0].new_empty(shape, dtype=dtype), squares


def _fake_ok(factor_c: Tensor, *args: Any) -> Tensor:
    return factor_c.new_empty(factor_c.shape[:1], dtype=torch.bool)


def _fake_clips(momenta: list[Tensor], deltas: list[Tensor], *args: Any) -> Tensor:
    return deltas[0].new_empty((len(deltas), deltas[0].shape[0]))


rf_rmsprop = _define(
    eager.rf_rmsprop,
    ("params", "squares", "buffers", "skipped", "square_residuals", "weight_residuals"),
    _returns_nothing,
)
clipped_momentum = _define(eager.clipped_momentum, ("momenta", "deltas"), _fake_clips)
kron_gather = _define(eager.kron_gather, (), _fake_gather)
kron_factor = _define(
    eager.kron_factor,
    (
        *("factor_c", "factor_k", "momentum_c", "momentum_k"),
        *("residual_c", "residual_k", "product_c", "product_k"),
    ),
    _fake_ok,
)
kron_step = _define(eager.kron_step, ("params", "buffers", "residuals", "skipped", "grad"), _returns_nothing)
