"""States, losses and comparisons for tests of the reference.

Exact identities must hold within 1e-12 of the largest entry. FP64 has a relative precision of 1e-16, and a few steps
with well-conditioned matrices lose fewer than four digits.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.calls import reference as ref

EXACT = 1e-12
SHAPES = [(3, 5), (6, 4), (1, 7)]
CLIPS = ["frobenius", "row_sum", None]
NUM_STEPS = 5

by_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
by_clip = pytest.mark.parametrize("clip", CLIPS, ids=str)
by_gamma = pytest.mark.parametrize("gamma", [0.0, 1.0])


def assert_same(actual, expected, tolerance=EXACT):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def assert_different(actual, expected):
    assert np.abs(actual - expected).max() > 1e-3 * np.abs(expected).max()


def update_arguments(clip="frobenius", **changes):
    beta2 = 0.3 if clip else 0.03  # without clipping, large steps diverge and lose all digits
    return {
        "batch_size": 4,
        "beta2": beta2,
        "riemannian_momentum": 0.4,
        "damping": 0.05,
        "gamma": 1.0,
        "clip": clip,
    } | changes


def step_arguments(**changes):
    return {"update": True, "lr": 0.05, "momentum": 0.8, "weight_decay": 0.02} | update_arguments(**changes)


def orthogonal(rng, n):
    return np.linalg.qr(rng.standard_normal((n, n)))[0]


def well_conditioned(rng, n):
    return orthogonal(rng, n) @ np.diag(rng.uniform(0.5, 2, n)) @ orthogonal(rng, n)


def positive_definite(rng, n):
    factor = well_conditioned(rng, n)
    return factor @ factor.T


def diagonal(rng, n):
    return np.diag(rng.uniform(0.5, 2, n))


def lower_triangular(rng, n):
    return diagonal(rng, n) + 0.3 * np.tril(rng.standard_normal((n, n)), -1)


def signed_permutation(rng, n):
    return np.eye(n)[rng.permutation(n)] * rng.choice([-1.0, 1.0], n)


def random_state(rng, p, d, **factors):
    """Return a state as after a few steps: momenta are symmetric and factors are far from I."""
    m_C, m_K = rng.standard_normal((p, p)), rng.standard_normal((d, d))
    state = {
        "C": well_conditioned(rng, p),
        "K": well_conditioned(rng, d),
        "m_C": m_C + m_C.T,
        "m_K": m_K + m_K.T,
        "buffer": rng.standard_normal((p, d)),
    }
    return ref.KronState(**(state | factors))


def smooth_loss_gradient(rng, p, d):
    """Return W -> gradient of sum log cosh(P W R - Y), a loss that couples all weights."""
    left, right, target = well_conditioned(rng, p), well_conditioned(rng, d), rng.standard_normal((p, d))
    return lambda weight: left.T @ np.tanh(left @ weight @ right - target) @ right.T


def trajectory(weight, gradient, state, **changes):
    """Return the weights after each of NUM_STEPS IF-Shampoo steps, and the last state."""
    weights = []
    for _ in range(NUM_STEPS):
        weight, state = ref.kron_step(weight, gradient(weight), state, **step_arguments(**changes))
        weights.append(weight)
    return np.array(weights), state
