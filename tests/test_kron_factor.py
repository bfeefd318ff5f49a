"""IF-Shampoo's operators and the whole step against the FP64 reference."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import reference as ref
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close, relative_error

from rootfree_kernels import IFShampoo, ops
from rootfree_kernels.eager.kron_factor import cache_slices, gram

FACTOR = {"batch_size": 3.0, "beta2": 0.3, "riemannian_momentum": 0.4, "damping": 0.1, "gamma": 1.0}
WEIGHT = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.02}


class Batch:
    """L random blocks of p × d with all that the operators take, and the reference's states of the same numbers."""

    def __init__(self, num_blocks: int, rows: int, cols: int, dtype: torch.dtype, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.dtype = dtype

        def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return torch.tensor(rng.normal(size=(num_blocks, *shape)) * scale).to(dtype)

        self.c = torch.eye(rows).to(dtype) + draw(rows, rows, scale=0.1)
        self.k = torch.eye(cols).to(dtype) + draw(cols, cols, scale=0.1)
        self.m_c, self.m_k = draw(rows, rows, scale=0.1), draw(cols, cols, scale=0.1)
        self.m_c, self.m_k = self.m_c + self.m_c.mT, self.m_k + self.m_k.mT
        self.grad, self.weight, self.buffer = draw(rows, cols), draw(rows, cols), draw(rows, cols)
        self.skipped = torch.zeros(num_blocks, dtype=torch.int32)
        self.seeds = torch.arange(num_blocks, dtype=torch.int32)
        self.steps = torch.zeros(num_blocks)
        states = zip(*(x.double().numpy() for x in (self.c, self.k, self.m_c, self.m_k, self.buffer)), strict=True)
        self.states = [ref.KronState(*state) for state in states]

    def update(self, clip: str = "frobenius", rounding: str = "stochastic", **changes: float) -> torch.Tensor:
        options = {**FACTOR, **changes}
        return ops.kron_factor(
            *(self.c, self.k, self.m_c, self.m_k, None, None, None, None),
            *(self.grad, torch.zeros(3, len(self.grad), 0), self.seeds, self.steps, None),
            *(options["batch_size"], options["beta2"], options["riemannian_momentum"]),
            *(options["damping"], options["gamma"], clip, rounding, "eager"),
        )

    def step(self, cached: bool = False, decoupled: bool = False, ok: torch.Tensor | None = None) -> None:
        c, k = (torch.bmm(x, x.mT) if cached else x for x in (self.c, self.k))
        ops.kron_step(
            *(
                list(self.weight.unbind()),
                list(self.buffer.unbind()),
                [],
                [0, 1, 0, 1] * len(self.weight),
                self.skipped,
            ),
            *(
                c,
                k,
                self.grad.clone(),
                torch.zeros(1, len(self.grad), 0),
                torch.tensor(WEIGHT["lr"], dtype=torch.float64),
            ),
            *(ok, self.seeds, self.steps, None, cached),
            *(WEIGHT["momentum"], WEIGHT["weight_decay"], decoupled, "nearest", "eager"),
        )


@pytest.mark.parametrize("clip", ["frobenius", "row_sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@given(
    num_blocks=st.integers(1, 3),
    rows=st.integers(1, 17),
    cols=st.integers(1, 13),
    damping=st.sampled_from([0.0, 0.2]),
    gamma=st.sampled_from([0.0, 1.0]),
    alpha2=st.sampled_from([0.0, 0.6]),
)
@settings(max_examples=15, deadline=None)
def test_an_update_of_the_factors_is_the_reference_s(clip, dtype, num_blocks, rows, cols, damping, gamma, alpha2):
    batch = Batch(num_blocks, rows, cols, dtype)
    changes = {"damping": damping, "gamma": gamma, "riemannian_momentum": alpha2}
    grads = batch.grad.double().numpy()
    expected = [
        ref.kron_update(state, grad, clip=None if clip == "none" else clip, **{**FACTOR, **changes})
        for state, grad in zip(batch.states, grads, strict=True)
    ]
    ok = batch.update(clip, **changes)
    assert ok.all()
    for name, actual in (("C", batch.c), ("K", batch.k), ("m_C", batch.m_c), ("m_K", batch.m_k)):
        assert_close(actual, np.stack([getattr(state, name) for state in expected]), dtype)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_preconditioned_step_is_the_reference_s(cached, decoupled, dtype):
    batch = Batch(3, 7, 5, dtype)
    rows = zip(batch.weight.double().numpy(), batch.grad.double().numpy(), batch.states, strict=True)
    expected = [
        ref.kron_step(weight, grad, state, update=False, decoupled=decoupled, **WEIGHT) for weight, grad, state in rows
    ]
    batch.step(cached, decoupled)
    assert_close(batch.weight, np.stack([weight for weight, _ in expected]), dtype)
    assert_close(batch.buffer, np.stack([state.buffer for _, state in expected]), dtype)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_bf16_factors_and_products_stay_within_bf16_of_the_reference(rounding):
    batch = Batch(4, 48, 32, torch.bfloat16)
    expected = [
        ref.kron_update(state, grad, clip="frobenius", **FACTOR)
        for state, grad in zip(batch.states, batch.grad.double().numpy(), strict=True)
    ]
    batch.update(rounding=rounding)
    for name, actual in (("C", batch.c), ("K", batch.k), ("m_C", batch.m_c), ("m_K", batch.m_k)):
        assert_close(actual, np.stack([getattr(state, name) for state in expected]), torch.bfloat16)


def test_blocks_of_a_batch_are_independent():
    batch, changed = Batch(3, 8, 6, torch.float64), Batch(3, 8, 6, torch.float64)
    changed.grad[1] *= 2.0
    for each in (batch, changed):
        each.step(ok=each.update())
    for name in ("c", "k", "m_c", "m_k", "weight", "buffer"):
        same = [torch.equal(x, y) for x, y in zip(getattr(batch, name), getattr(changed, name), strict=True)]
        assert same == [True, False, True], name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 127, 128, 131])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_gram_matrix_is_the_whole_product(dtype, size, transposed):
    x = torch.randn(2, 50, size, generator=torch.Generator().manual_seed(0)).to(dtype).mT
    x = x if transposed else x.contiguous()
    out = torch.full((2, size, size), torch.nan, dtype=dtype)
    assert gram(x, out=out) is out
    expected = x.double() @ x.double().mT
    for actual in (out, gram(x)):
        assert_close(actual, expected.numpy(), dtype)
        if size >= 128 and dtype != torch.bfloat16:
            assert torch.equal(actual[:, : size // 2, size // 2 :], actual[:, size // 2 :, : size // 2].mT)


def test_a_batch_that_is_worked_through_in_slices_gives_the_same_numbers(monkeypatch):
    whole, sliced = (Batch(5, 9, 7, torch.float64) for _ in range(2))
    oks = [whole.update()]
    whole.step(ok=oks[0])
    monkeypatch.setattr(sys.modules["rootfree_kernels.eager.kron_factor"], "CACHE_NUMBERS", 2 * 9 * 7)
    assert [len(range(5)[part]) for part in cache_slices(*sliced.grad.shape, sliced.grad.device)] == [2, 2, 1]
    oks.append(sliced.update())
    sliced.step(ok=oks[1])
    assert torch.equal(*oks)
    for name in ("c", "k", "m_c", "m_k", "weight", "buffer"):
        assert_close(getattr(sliced, name), getattr(whole, name).numpy(), torch.float64)


def test_wide_matrices_follow_the_reference_too():
    param, expected = train((130, 150), torch.float64, 4)
    assert_close(param, expected, torch.float64)


def train(shape, factor_dtype, steps, frequency=1, **options):
    """(our weight, the reference's) after some steps along the same random gradients."""
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
def test_the_optimizer_follows_the_reference_to_fp64(shape, options):
    param, expected = train(shape, torch.float64, 7, **options)
    assert_close(param, expected, torch.float64)


@pytest.mark.parametrize("frequency", [1, 3])
def test_fp32_factors_follow_the_reference_to_fp32(frequency):
    param, expected = train((33, 20), torch.float32, 10, frequency)
    assert_close(param, expected, torch.float32)


@pytest.mark.parametrize("matmul_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_bf16_factors_follow_the_reference_over_many_steps(rounding, matmul_dtype):
    param, expected = train((48, 40), torch.bfloat16, 50, rounding=rounding, matmul_dtype=matmul_dtype)
    assert relative_error(param, expected) < 0.05  # 50 steps of errors of 4e-3, most of which cancel


@pytest.mark.parametrize("rounding", ["stochastic", "compensated", "nearest"])
def test_only_nearest_leaves_the_diagonal_of_wide_bf16_factors_standing(rounding):
    """A step moves a diagonal entry by β₂/√n = 6e-4, half a BF16 unit below 1 is 2e-3: nearest never moves it."""
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
    assert means["stochastic"] - 1.0 == pytest.approx(moved, rel=0.05)  # 128 entries of relative error 4e-3/√12
