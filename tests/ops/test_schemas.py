"""Schemas of the operators do not change, because exported and saved graphs depend on them."""

from __future__ import annotations

import pytest

import rootfree_kernels  # noqa: F401  registers the operators
from tests.calls.operators import STEMS, operator

SCHEMAS = {
    "rf_rmsprop": (
        "rf_rmsprop(Tensor(a0!)[] params, Tensor(a1!)[] squares, Tensor(a2!)[] buffers, Tensor(a3!)[] skipped, "
        "Tensor(a4!)[] square_residuals, Tensor(a5!)[] weight_residuals, Tensor[] grads, Tensor lr, Tensor seeds,"
        " Tensor steps, Tensor? grad_scale, Tensor? found_inf, float batch_size, float beta2, float gamma, float "
        "momentum, float damping, float weight_decay, bool decoupled, bool maximize, str rounding, str "
        "weight_rounding, str backend) -> ()"
    ),
    "scaled_rmsprop": (
        "scaled_rmsprop(Tensor(a0!)[] params, Tensor(a1!)[] squares, Tensor(a2!)[] buffers, Tensor(a3!)[] "
        "skipped, Tensor(a4!)[] curvatures, Tensor(a5!)[] square_residuals, Tensor(a6!)[] weight_residuals, "
        "Tensor? update_norms, Tensor[] grads, Tensor lr, Tensor seeds, Tensor steps, Tensor? grad_scale, Tensor? "
        "found_inf, float batch_size, float beta2, float gamma, float momentum, float damping, float "
        "weight_decay, bool decoupled, bool maximize, str rounding, str weight_rounding, str direction, bool "
        "relative_damping, str momentum_on, bool nesterov, str backend) -> ()"
    ),
    "clipped_momentum": (
        "clipped_momentum(Tensor(a0!)[] momenta, Tensor(a1!)[] deltas, Tensor? found_inf, float "
        "riemannian_momentum, str clip, str backend) -> Tensor"
    ),
    "kron_gather": (
        "kron_gather(Tensor[] grads, SymInt[] tiles, SymInt rows, SymInt cols, Tensor[] factors, Tensor? "
        "grad_scale, ScalarType dtype, bool maximize, str backend) -> (Tensor, Tensor)"
    ),
    "kron_factor": (
        "kron_factor(Tensor(a0!) factor_c, Tensor(a1!) factor_k, Tensor(a2!) momentum_c, Tensor(a3!) momentum_k, "
        "Tensor(a4!)? residual_c, Tensor(a5!)? residual_k, Tensor(a6!)? product_c, Tensor(a7!)? product_k, Tensor"
        "(a8!)? curvature, Tensor grad, Tensor squares, Tensor seeds, Tensor steps, Tensor? found_inf, float "
        "batch_size, float beta2, float riemannian_momentum, float damping, float gamma, str clip, str rounding, "
        "str direction, bool relative_damping, str factor_init, str backend) -> Tensor"
    ),
    "kron_step": (
        "kron_step(Tensor(a0!)[] params, Tensor(a1!)[] buffers, Tensor(a2!)[] residuals, SymInt[] tiles, "
        "Tensor(a4!) skipped, Tensor? update_norms, Tensor factor_c, Tensor factor_k, Tensor(a8!) grad, Tensor "
        "squares, Tensor lr, Tensor? ok, Tensor seeds, Tensor steps, Tensor? found_inf, bool cached, float "
        "momentum, float weight_decay, bool decoupled, str rounding, str momentum_on, bool nesterov, str backend)"
        " -> ()"
    ),
}


@pytest.mark.parametrize("stem", STEMS)
def test_schema_is_unchanged(stem: str) -> None:
    assert str(operator(stem)._schema) == f"rootfree::{SCHEMAS[stem]}"
