"""The operators, `torch.ops.rootfree.*`: one schema and one fake (meta) version each, for all backends.

    rf_rmsprop         the whole diagonal step of a list of tensors, the paper's
    scaled_rmsprop     the same with gradient momentum, relative damping or updates of a fixed size
    clipped_momentum   m ← α₂m + (1−α₂)Δ of a batch, and the clip of its step
    kron_gather        tiles of gradients → G [L, p, d]
    kron_factor        C, K, m_C, m_K of a batch ← one update
    kron_step          weights and momentum of a batch ← one preconditioned step

The functions of this file are what the optimizers call: their arguments are those of `rootfree_kernels.eager`, followed
by the backend. They call the backend directly, because PyTorch's dispatcher unpacks and packs every tensor of every
list, which takes a large part of a step's time on the host (`python -m bench.steps.host`). Only compilers, dispatch
modes and profilers need to see an operator: for them the call goes through `torch.ops.rootfree`.

Schemas are flat: the fields of the named tuples one after the other (those of `Preconditioner` in three places), and
the backend's name last. Every tensor that an operator changes is declared, so that `torch.compile` can capture it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.library import Library, register_fake

from rootfree_kernels.arguments import (
    DiagonalOptions,
    DiagonalState,
    Draws,
    FactorOptions,
    Factors,
    Gathered,
    Preconditioner,
    ScaledOptions,
    ScaledState,
    Scaling,
    StepOptions,
    Tiling,
    Weights,
)
from rootfree_kernels.backend import Backend
from rootfree_kernels.blocks import tiles_from_ints
from rootfree_kernels.ops.backends import named

_LIBRARY = Library("rootfree", "FRAGMENT")
_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}

# `Library` instead of `torch.library.custom_op`: the wrapper of the latter walks the schema at every call to bump the
# version counters of changed tensors. The in-place operations of eager PyTorch bump them anyway. A backend that writes
# through raw pointers has to call `torch.autograd.graph.increment_version`.


def _define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register an operator and return it. `implementation` takes the flat arguments of the schema."""
    name = schema.partition("(")[0]
    _IMPLEMENTATIONS[name] = implementation
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    register_fake(f"rootfree::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.rootfree, name).default


def run_flat(name: str, *flat: Any) -> Any:
    """Run an operator on the flat arguments of its schema, without PyTorch's dispatcher."""
    return _IMPLEMENTATIONS[name](*flat)


def _is_observed() -> bool:
    """Return whether a compiler, a dispatch mode or a profiler has to see the operators."""
    is_traced = torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack()
    return bool(is_traced or profiler._is_profiler_enabled)


# ---- rf_rmsprop --------------------------------------------------------------------------------------------------


def rf_rmsprop(
    params: list[Tensor],  # n tensors of any shapes and strides
    state: DiagonalState,
    grads: list[Tensor],
    lr: Tensor,  # one element
    draws: Draws,
    scaling: Scaling,
    options: DiagonalOptions,
    backend: Backend,
) -> None:
    """Step n tensors in place. See `rootfree_kernels.eager.rf_rmsprop`."""
    if _is_observed():
        _rf_rmsprop(params, *state, grads, lr, *draws, *scaling, *options, backend.name)
    else:
        backend.operators.rf_rmsprop(params, state, grads, lr, draws, scaling, options)


def _run_rf_rmsprop(params: list[Tensor], *flat: Any) -> None:
    state, (grads, lr), draws, scaling, options = flat[:5], flat[5:7], flat[7:9], flat[9:11], flat[11:21]
    named(flat[21]).operators.rf_rmsprop(
        params, DiagonalState(*state), grads, lr, Draws(*draws), Scaling(*scaling), DiagonalOptions(*options)
    )


def _returns_nothing(*args: Any) -> None:
    return None


_rf_rmsprop = _define(
    "rf_rmsprop(Tensor(a0!)[] params, Tensor(a1!)[] squares, Tensor(a2!)[] buffers, Tensor(a3!)[] skipped, "
    "Tensor(a4!)[] square_residuals, Tensor(a5!)[] weight_residuals, Tensor[] grads, Tensor lr, Tensor seeds, "
    "Tensor steps, Tensor? grad_scale, Tensor? found_inf, float batch_size, float beta2, float gamma, float momentum, "
    "float damping, float weight_decay, bool decoupled, bool maximize, str rounding, str weight_rounding, "
    "str backend) -> ()",
    _run_rf_rmsprop,
    _returns_nothing,
)

# ---- scaled_rmsprop ----------------------------------------------------------------------------------------------


def scaled_rmsprop(
    params: list[Tensor],  # n tensors of any shapes and strides
    state: ScaledState,
    grads: list[Tensor],
    lr: Tensor,  # one element
    draws: Draws,
    scaling: Scaling,
    options: ScaledOptions,
    backend: Backend,
) -> None:
    """Step n tensors in place. See `rootfree_kernels.eager.scaled_rmsprop`."""
    if _is_observed():
        _scaled_rmsprop(params, *state, grads, lr, *draws, *scaling, *options, backend.name)
    else:
        backend.operators.scaled_rmsprop(params, state, grads, lr, draws, scaling, options)


def _run_scaled_rmsprop(params: list[Tensor], *flat: Any) -> None:
    state, (grads, lr), draws, scaling, options = flat[:7], flat[7:9], flat[9:11], flat[11:13], flat[13:27]
    named(flat[27]).operators.scaled_rmsprop(
        params, ScaledState(*state), grads, lr, Draws(*draws), Scaling(*scaling), ScaledOptions(*options)
    )


_scaled_rmsprop = _define(
    "scaled_rmsprop(Tensor(a0!)[] params, Tensor(a1!)[] squares, Tensor(a2!)[] buffers, Tensor(a3!)[] skipped, "
    "Tensor(a4!)[] curvatures, Tensor(a5!)[] square_residuals, Tensor(a6!)[] weight_residuals, "
    "Tensor? update_norms, Tensor[] grads, Tensor lr, Tensor seeds, Tensor steps, Tensor? grad_scale, "
    "Tensor? found_inf, float batch_size, float beta2, float gamma, float momentum, float damping, "
    "float weight_decay, bool decoupled, bool maximize, str rounding, str weight_rounding, str direction, "
    "bool relative_damping, str momentum_on, bool nesterov, str backend) -> ()",
    _run_scaled_rmsprop,
    _returns_nothing,
)

# ---- clipped_momentum --------------------------------------------------------------------------------------------


def clipped_momentum(
    momenta: list[Tensor],  # a side each: [L, ...]
    deltas: list[Tensor],
    found_inf: Tensor | None,  # one element
    riemannian_momentum: float,
    clip: str,
    backend: Backend,
) -> Tensor:
    """Update the momenta in place and return the clip factors [sides, L]. See
    `rootfree_kernels.eager.clipped_momentum`."""
    if _is_observed():
        clips: Tensor = _clipped_momentum(momenta, deltas, found_inf, riemannian_momentum, clip, backend.name)
        return clips
    return backend.operators.clipped_momentum(momenta, deltas, found_inf, riemannian_momentum, clip)


def _run_clipped_momentum(*flat: Any) -> Tensor:
    return named(flat[5]).operators.clipped_momentum(*flat[:5])


def _fake_clips(momenta: list[Tensor], deltas: list[Tensor], *flat: Any) -> Tensor:
    return deltas[0].new_empty((len(deltas), deltas[0].shape[0]))


_clipped_momentum = _define(
    "clipped_momentum(Tensor(a0!)[] momenta, Tensor(a1!)[] deltas, Tensor? found_inf, float riemannian_momentum, "
    "str clip, str backend) -> Tensor",
    _run_clipped_momentum,
    _fake_clips,
)

# ---- kron_gather -------------------------------------------------------------------------------------------------


def kron_gather(
    grads: list[Tensor],  # each [rows of its parameter, columns], or with more axes
    tiling: Tiling,
    factors: list[Tensor],  # C [L, p, p] and K [L, d, d], or empty
    grad_scale: Tensor | None,  # one element
    dtype: torch.dtype,
    maximize: bool,
    backend: Backend,
) -> Gathered:
    """Return the gradients of a batch of blocks, G [L, p, d]. See `rootfree_kernels.eager.kron_gather`."""
    if _is_observed():
        return Gathered(*_kron_gather(grads, *tiling, factors, grad_scale, dtype, maximize, backend.name))
    return backend.operators.kron_gather(grads, tiling, factors, grad_scale, dtype, maximize)


def _run_kron_gather(grads: list[Tensor], *flat: Any) -> tuple[Tensor, Tensor]:
    grad, squares = named(flat[7]).operators.kron_gather(grads, Tiling(*flat[:3]), *flat[3:7])
    return grad, squares


def _fake_gathered(grads: list[Tensor], *flat: Any) -> tuple[Tensor, Tensor]:
    tiles, rows, cols, factors, _, dtype, _, backend = flat
    operators = named(backend).operators
    num_blocks = sum(tile.num_blocks for tile in tiles_from_ints(tiles, rows, cols))
    grad = grads[0].new_empty((num_blocks, operators.padded_side(rows), operators.padded_side(cols)), dtype=dtype)
    sums = operators.num_partial_sums(rows, cols)
    return grad, grads[0].new_empty((1 + len(factors), num_blocks, sums), dtype=torch.float32)


_kron_gather = _define(
    "kron_gather(Tensor[] grads, SymInt[] tiles, SymInt rows, SymInt cols, Tensor[] factors, Tensor? grad_scale, "
    "ScalarType dtype, bool maximize, str backend) -> (Tensor, Tensor)",
    _run_kron_gather,
    _fake_gathered,
)

# ---- kron_factor -------------------------------------------------------------------------------------------------


def kron_factor(
    factors: Factors,
    gathered: Gathered,
    draws: Draws,
    found_inf: Tensor | None,  # one element
    options: FactorOptions,
    backend: Backend,
) -> Tensor:
    """Update C, K, m_C and m_K of a batch in place and return ok [L]. See `rootfree_kernels.eager.kron_factor`."""
    if _is_observed():
        ok: Tensor = _kron_factor(*factors, *gathered, *draws, found_inf, *options, backend.name)
        return ok
    return backend.operators.kron_factor(factors, gathered, draws, found_inf, options)


def _run_kron_factor(*flat: Any) -> Tensor:
    factors, gathered, draws, found_inf, options = flat[:9], flat[9:11], flat[11:13], flat[13], flat[14:24]
    return named(flat[24]).operators.kron_factor(
        Factors(*factors), Gathered(*gathered), Draws(*draws), found_inf, FactorOptions(*options)
    )


def _fake_ok(factor_c: Tensor, *flat: Any) -> Tensor:
    return factor_c.new_empty(factor_c.shape[:1], dtype=torch.bool)


_kron_factor = _define(
    "kron_factor(Tensor(a0!) factor_c, Tensor(a1!) factor_k, Tensor(a2!) momentum_c, Tensor(a3!) momentum_k, "
    "Tensor(a4!)? residual_c, Tensor(a5!)? residual_k, Tensor(a6!)? product_c, Tensor(a7!)? product_k, "
    "Tensor(a8!)? curvature, Tensor grad, Tensor squares, Tensor seeds, Tensor steps, Tensor? found_inf, "
    "float batch_size, float beta2, float riemannian_momentum, float damping, float gamma, str clip, str rounding, "
    "str direction, bool relative_damping, str factor_init, str backend) -> Tensor",
    _run_kron_factor,
    _fake_ok,
)

# ---- kron_step ---------------------------------------------------------------------------------------------------


def kron_step(
    weights: Weights,
    preconditioner: Preconditioner,
    gathered: Gathered,
    lr: Tensor,  # one element
    draws: Draws,
    found_inf: Tensor | None,  # one element
    options: StepOptions,
    backend: Backend,
) -> None:
    """Step the weights of a batch in place along preconditioned gradients. See `rootfree_kernels.eager.kron_step`."""
    if _is_observed():
        factor_c, factor_k, cached, ok = preconditioner
        last = *draws, found_inf, cached, *options, backend.name
        _kron_step(*weights, factor_c, factor_k, *gathered, lr, ok, *last)
    else:
        backend.operators.kron_step(weights, preconditioner, gathered, lr, draws, found_inf, options)


def _run_kron_step(*flat: Any) -> None:
    (factor_c, factor_k), gathered, (lr, ok), draws = flat[6:8], flat[8:10], flat[10:12], flat[12:14]
    found_inf, cached, options = flat[14], flat[15], flat[16:22]
    preconditioner = Preconditioner(factor_c, factor_k, cached, ok)
    named(flat[22]).operators.kron_step(
        Weights(*flat[:6]), preconditioner, Gathered(*gathered), lr, Draws(*draws), found_inf, StepOptions(*options)
    )


_kron_step = _define(
    "kron_step(Tensor(a0!)[] params, Tensor(a1!)[] buffers, Tensor(a2!)[] residuals, SymInt[] tiles, "
    "Tensor(a4!) skipped, Tensor? update_norms, Tensor factor_c, Tensor factor_k, Tensor(a8!) grad, Tensor squares, "
    "Tensor lr, Tensor? ok, Tensor seeds, Tensor steps, Tensor? found_inf, bool cached, float momentum, "
    "float weight_decay, bool decoupled, str rounding, str momentum_on, bool nesterov, str backend) -> ()",
    _run_kron_step,
    _returns_nothing,
)
