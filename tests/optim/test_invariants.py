"""Invariances and orders of convergence of the optimizers, in FP64.

tests/reference has the same tests for the reference, and tests for methods that the package does not offer (full
matrices and structured factors).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rootfree_kernels import IFShampoo, RFRMSProp
from tests.calls import reference as ref
from tests.calls.operators import dispatched

EXACT = 1e-12
P, D = 5, 4
PLAIN = {"lr": 0.03, "batch_size": 6.0, "beta2": 0.2, "momentum": 0.8, "riemannian_momentum": 0.4}


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def near_identity(size, seed):
    return torch.eye(size, dtype=torch.float64) + 0.2 * random(size, size, seed=seed)


def orthogonal(size, seed):
    return torch.linalg.qr(random(size, size, seed=seed))[0]


TARGETS, INPUTS = random(8, P, seed=10), random(8, D, seed=11)


def gradient(weight):
    """Return the gradient of the sum of log cosh(W x − y), a smooth loss that is not quadratic."""
    return torch.tanh(INPUTS @ weight.T - TARGETS).T @ INPUTS


def run(weight, grad_of, c=None, k=None, steps=6, **options):
    """Return (weight, state) after some steps with gradients grad_of(weight), starting from the given factors."""
    param = torch.nn.Parameter(weight.clone())
    optimizer = IFShampoo([param], factor_dtype=torch.float64, **{"damping": 0.0, **PLAIN, **options})
    rows, cols = param.shape
    start = {"factor_c": torch.eye(rows) if c is None else c, "factor_k": torch.eye(cols) if k is None else k}
    momenta = {"momentum_c": torch.zeros(rows, rows), "momentum_k": torch.zeros(cols, cols)}
    state = {name: value[None].double() for name, value in {**start, **momenta}.items()}
    state.update(step=torch.zeros(()), skipped=torch.zeros(1, dtype=torch.int32))
    saved = optimizer.state_dict()
    saved["state"] = {0: {**state, "momentum_buffer": torch.zeros_like(weight)}}
    optimizer.load_state_dict(saved)
    for _ in range(steps):
        param.grad = grad_of(param.detach())
        optimizer.step()
    return param.detach(), optimizer.state[param]


def assert_exact(actual, expected):
    error = ((actual - expected).norm() / expected.norm()).item()
    assert error < EXACT, f"relative error {error:.1e}"


def preconditioner(state, side):
    return state[f"factor_{side}"][0] @ state[f"factor_{side}"][0].T


# ---- 1. the scale of the loss


def scaled_loss_runs(same_start):
    """Return final weights for the summed loss with B = 1, and for the averaged loss with B = 9 and matching damping.

    Unless `same_start`, the initial factors match as well.
    """
    b, weight, c, k = 9.0, random(P, D, seed=1), near_identity(P, 2), near_identity(D, 3)
    root = 1.0 if same_start else b**0.25
    summed, _ = run(weight, gradient, c, k, batch_size=1.0, damping=0.3)
    averaged, _ = run(weight, lambda w: gradient(w) / b, root * c, root * k, batch_size=b, damping=0.3 / b)
    return summed, averaged


def test_an_averaged_loss_with_its_batch_size_gives_the_weights_of_the_summed_loss():
    summed, averaged = scaled_loss_runs(same_start=False)
    assert_exact(averaged, summed)


def test_averaged_and_summed_losses_differ_from_the_same_start():
    summed, averaged = scaled_loss_runs(same_start=True)
    assert (summed - averaged).norm() > 1e-3 * summed.norm()


def test_the_diagonal_step_has_the_same_invariance():
    weights = []
    for scale, options in (
        (1.0, {"batch_size": 1, "damping": 0.3}),
        (4.0, {"batch_size": 4, "damping": 0.3 / 4}),
    ):
        param = torch.nn.Parameter(random(7, seed=1))
        optimizer = RFRMSProp([param], lr=0.1, **options)
        for step in range(5):
            param.grad = random(7, seed=20 + step) / scale
            optimizer.step()
            if step == 0:  # s̄ = s/B from here on
                optimizer.state[param]["square"].copy_(torch.full((7,), 2.0) / scale)
                optimizer.state[param]["momentum_buffer"].zero_()
                param.data.copy_(random(7, seed=1))
        weights.append(param.detach())
    assert_exact(weights[1], weights[0])


# ---- 2. affine reparametrization


def reparametrized(e, f, o, c, k, **options):
    """Return M of a run on M, and E N Fᵀ + O of a run on N."""
    inverse_e, inverse_f = torch.linalg.inv(e), torch.linalg.inv(f)
    weight = random(P, D, seed=4)
    original, _ = run(weight, gradient, c, k, **options)
    n, _ = run(
        inverse_e @ (weight - o) @ inverse_f.T,
        lambda n: e.T @ gradient(e @ n @ f.T + o) @ f,
        inverse_e @ c,
        inverse_f @ k,
        **options,
    )
    return original, e @ n @ f.T + o


def test_the_method_is_invariant_under_affine_reparametrization_of_the_weights():
    e, f, o = near_identity(P, 5), near_identity(D, 6), random(P, D, seed=7)
    original, mapped = reparametrized(e, f, o, near_identity(P, 8), near_identity(D, 9))
    assert_exact(mapped, original)


def test_orthogonal_reparametrization_is_exact_from_the_identity_with_damping_decay_and_clip():
    e, f = orthogonal(P, 5), orthogonal(D, 6)
    options = {"damping": 0.2, "weight_decay": 0.1, "beta2": 0.5}
    weight = random(P, D, seed=4)
    original, _ = run(weight, gradient, **options)
    n, _ = run(e.T @ weight @ f, lambda n: e.T @ gradient(e @ n @ f.T) @ f, **options)
    assert_exact(e @ n @ f.T, original)


# ---- 3. structured reparametrization: the diagonal step


def test_the_diagonal_step_is_invariant_under_diagonal_reparametrization():
    scale = random(7, seed=30).exp()
    grads = [random(7, seed=31 + step) for step in range(6)]
    weights = []
    for e in (torch.ones(7, dtype=torch.float64), scale):
        param = torch.nn.Parameter(random(7, seed=1) / e)
        optimizer = RFRMSProp([param], lr=0.1, batch_size=3, damping=0.0)
        param.grad = torch.zeros(7, dtype=torch.float64)
        optimizer.step()
        optimizer.state[param]["square"].copy_(e * e)
        for grad in grads:
            param.grad = e * grad
            optimizer.step()
        weights.append(param.detach() * e)
    assert_exact(weights[1], weights[0])


# ---- 4. the freedom of the factors


def test_moving_a_scalar_from_one_factor_to_the_other_changes_nothing():
    weight, c, k, s = random(P, D, seed=1), near_identity(P, 2), near_identity(D, 3), 3.7
    (w, state), (w_scaled, scaled) = (run(weight, gradient, a, b, damping=0.2) for a, b in ((c, k), (s * c, k / s)))
    assert_exact(w_scaled, w)
    assert_exact(scaled["momentum_c"], state["momentum_c"])
    assert_exact(scaled["momentum_k"], state["momentum_k"])


def test_rotating_a_factor_rotates_its_momentum_and_leaves_the_preconditioner():
    weight, c, k, q = random(P, D, seed=1), near_identity(P, 2), near_identity(D, 3), orthogonal(P, 4)
    (w, state), (w_rotated, rotated) = (run(weight, gradient, a, k, damping=0.2) for a in (c, c @ q))
    assert_exact(w_rotated, w)
    assert_exact(preconditioner(rotated, "c"), preconditioner(state, "c"))
    assert_exact(rotated["momentum_c"][0], q.T @ state["momentum_c"][0] @ q)


# ---- 5. transposition


@pytest.mark.parametrize("clip", ["frobenius", "row_sum"])
def test_the_transposed_problem_takes_the_transposed_steps(clip):
    weight, c, k = random(P, D, seed=1), near_identity(P, 2), near_identity(D, 3)
    original, _ = run(weight, gradient, c, k, damping=0.2, clip=clip)
    transposed, _ = run(weight.T.contiguous(), lambda w: gradient(w.T).T, k, c, damping=0.2, clip=clip)
    assert_exact(transposed.T, original)


def test_the_traces_of_both_sides_balance():
    _, state = run(random(P, D, seed=1), gradient, near_identity(P, 2), near_identity(D, 3), damping=0.2)
    traces = [state[f"momentum_{side}"][0].trace() for side in ("c", "k")]
    assert_exact(D * traces[0], P * traces[1])


# ---- 6. positive definiteness


def step_ratio(clip, beta2, seed, scale=30.0):
    """Return the eigenvalues of C⁻¹C_new after an update with a large gradient."""
    c = near_identity(P, seed)
    _, state = run(random(P, D), lambda w: scale * random(P, D, seed=seed), c, None, steps=1, clip=clip, beta2=beta2)
    return torch.linalg.eigvals(torch.linalg.solve(c, state["factor_c"][0])).real


@pytest.mark.parametrize("clip", ["frobenius", "row_sum"])
@pytest.mark.parametrize("beta2", [0.3, 0.99])
def test_a_clipped_update_keeps_eigenvalues_between_1_minus_beta2_and_1_plus_half_beta2(clip, beta2):
    for seed in range(5):
        ratio = step_ratio(clip, beta2, seed)
        assert ratio.min() >= 1 - beta2 - EXACT and ratio.max() <= 1 + beta2 / 2 + EXACT


def test_without_a_clip_the_eigenvalues_leave_that_range():
    assert step_ratio("none", 0.3, 0).min() < 0


# ---- orders of convergence


def distance_to_root_free_shampoo(beta2, steps):
    """Return ‖CCᵀ − S_C⁻¹‖ after steps with equal gradients, without momentum and clip (Claim 10)."""
    c, k = (torch.eye(n, dtype=torch.float64)[None] for n in (P, D))
    m_c, m_k = torch.zeros_like(c), torch.zeros_like(k)
    s_c, s_k = np.eye(P), np.eye(D)
    for step in range(steps):
        grad = random(1, P, D, seed=100 + step * 64 // steps)  # depends only on the time step·β₂
        dispatched("eager")(
            "kron_factor",
            *(c, k, m_c, m_k, None, None, None, None, None, grad),
            *(torch.zeros(3, 1, 0), torch.zeros(1, dtype=torch.int32), torch.zeros(1), None),
            *(1.0, beta2, 0.0, 0.1, 1.0, "none", "nearest", "root_free", False, "identity"),
        )
        s_c, s_k = ref.root_free_shampoo_update(
            s_c, s_k, grad[0].numpy(), batch_size=1.0, beta2=beta2, damping=0.1, gamma=1.0
        )
    return float(np.linalg.norm((c[0] @ c[0].T).numpy() - np.linalg.inv(s_c)))


def test_the_factors_follow_root_free_shampoo_to_second_order_at_a_fixed_number_of_steps():
    errors = [distance_to_root_free_shampoo(beta2, 4) for beta2 in (1e-4, 5e-5, 2.5e-5)]
    assert np.log2(np.divide(errors[:-1], errors[1:])) == pytest.approx([2.0, 2.0], abs=0.1)


def test_the_factors_follow_root_free_shampoo_to_first_order_at_a_fixed_horizon():
    errors = [distance_to_root_free_shampoo(0.02 / steps, steps) for steps in (64, 128, 256)]
    assert np.log2(np.divide(errors[:-1], errors[1:])) == pytest.approx([1.0, 1.0], abs=0.1)
