"""Whole runs of IF-Shampoo, compared with the FP64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rootfree_kernels import IFShampoo
from tests.calls import reference as ref
from tests.calls.tensors import BF16, FP32, FP64
from tests.calls.tolerances import assert_close, relative_error, tolerance

FACTOR = {"batch_size": 3.0, "beta2": 0.3, "riemannian_momentum": 0.4, "damping": 0.1, "gamma": 1.0}
WEIGHT = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.02}


def test_wide_matrices_match_the_reference():
    param, expected = train((130, 150), torch.float64, 4)
    assert_close(param, expected, FP64, "a chain")


def train(shape, factor_dtype, steps, frequency=1, **options):
    """Return the optimizer's weight and the reference's weight after some steps with equal random gradients."""
    rng = np.random.default_rng(1)
    weight = rng.normal(size=shape)
    param = torch.nn.Parameter(torch.tensor(weight).to(torch.promote_types(factor_dtype, torch.float32)))
    optimizer = IFShampoo(
        [param], **FACTOR, **WEIGHT, factor_dtype=factor_dtype, precondition_frequency=frequency, **options
    )
    max_dim = options.get("max_preconditioner_dim", 1024)
    states = ref.initial_blocked_states(shape, max_dim=max_dim)
    decoupled, maximize = options.get("decoupled_weight_decay", False), options.get("maximize", False)
    for step in range(steps):
        grad = rng.normal(size=shape)
        param.grad = torch.tensor(grad).to(param.dtype)
        optimizer.step()
        due = frequency(step) if callable(frequency) else step % frequency == 0
        weight, states = ref.blocked_kron_step(
            *(weight, grad, states),
            **{**FACTOR, **WEIGHT, "update": due, "decoupled": decoupled, "maximize": maximize},
            max_dim=max_dim,
            clip=options.get("clip", "frobenius"),
        )
    return param, weight


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip": "row_sum"},
        {"frequency": 3},
        {"frequency": 3, "cache_products": False},
        {"frequency": 1, "cache_products": True},
        {"frequency": lambda step: ref.growing_interval_updates(step, 4)},
        {"max_preconditioner_dim": 4},
        {"max_preconditioner_dim": 4, "frequency": 2, "foreach": False},
        {"decoupled_weight_decay": True},
        {"maximize": True},
    ],
    ids=lambda options: ", ".join(f"{k}={getattr(v, '__name__', v)}" for k, v in options.items()) or "default",
)
@pytest.mark.parametrize("shape", [(9, 7), (6, 3, 2, 2)], ids=str)
def test_optimizer_matches_the_reference_in_fp64(shape, options):
    param, expected = train(shape, torch.float64, 7, **options)
    assert_close(param, expected, FP64, "a chain")


@pytest.mark.parametrize("frequency", [1, 3])
def test_fp32_factors_match_the_reference(frequency):
    param, expected = train((33, 20), torch.float32, 10, frequency)
    assert_close(param, expected, FP32, "a chain")


@pytest.mark.parametrize("matmul_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_bf16_factors_match_the_reference_over_many_steps(rounding, matmul_dtype):
    param, expected = train((48, 40), torch.bfloat16, 50, rounding=rounding, matmul_dtype=matmul_dtype)
    assert relative_error(param, expected) < tolerance("a long chain", BF16)


@pytest.mark.parametrize("rounding", ["stochastic", "compensated", "nearest"])
def test_only_nearest_rounding_stalls_the_diagonal_of_wide_bf16_factors(rounding):
    """A step changes a diagonal element by β₂/√n = 6e-4. Half a BF16 unit below 1 is 2e-3, so the change is lost."""
    param = torch.nn.Parameter(torch.zeros(256, 256))
    optimizer = IFShampoo([param], batch_size=1, beta2=0.01, rounding=rounding, lr=0.0)
    for step in range(20):
        param.grad = torch.randn(256, 256, generator=torch.Generator().manual_seed(step)) * 1e-3
        optimizer.step()
    diagonal = optimizer.state[param]["factor_c"][0].diagonal().float()
    if rounding == "compensated":
        residual = optimizer.state[param]["residual_c"][0].diagonal()
        assert (residual != 0).any()
    assert torch.equal(diagonal, torch.ones(256)) is (rounding == "nearest")


def test_stochastic_rounding_is_right_on_average_over_the_training_of_a_factor():
    means = {}
    for rounding in ("stochastic", "compensated"):
        param = torch.nn.Parameter(torch.zeros(128, 96))
        optimizer = IFShampoo([param], batch_size=1, beta2=0.05, rounding=rounding, lr=0.0)
        for step in range(40):
            param.grad = torch.randn(128, 96, generator=torch.Generator().manual_seed(step)) * 1e-3
            optimizer.step()
        means[rounding] = optimizer.state[param]["factor_c"][0].diagonal().double().mean().item()
    moved = means["compensated"] - 1.0
    assert moved > 0.05
    assert means["stochastic"] - 1.0 == pytest.approx(moved, rel=0.05)  # 128 elements with relative errors of 4e-3/√12
