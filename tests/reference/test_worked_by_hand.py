"""Steps of the reference computed by hand. They test constants that no invariance determines."""

from __future__ import annotations

import numpy as np
import pytest

from tests.calls import reference as ref
from tests.reference.cases import assert_same, by_shape, random_state, update_arguments


@pytest.mark.parametrize(
    ("clip", "norm_C", "norm_K"),
    [("frobenius", 6.125, np.sqrt(153.15625)), ("row_sum", 6.125, 13.875), (None, 1.0, 1.0)],
    ids=["frobenius", "row_sum", "None"],
)
def test_factor_update_worked_by_hand(clip, norm_C, norm_K):
    """C = K = I, G = [3 4], B = 2, lambda = 1/2: Delta_C = (25 + 1/2 - 1)/2, Delta_K = (2 G^T G - I/2)/2."""
    state = ref.kron_update(
        ref.KronState.initial(1, 2),
        np.array([[3.0, 4.0]]),
        batch_size=2,
        beta2=0.1,
        riemannian_momentum=0.5,
        damping=0.5,
        gamma=1.0,
        clip=clip,
    )
    m_C, m_K = np.array([[6.125]]), np.array([[4.375, 6.0], [6.0, 7.875]])
    assert_same(state.m_C, m_C)
    assert_same(state.m_K, m_K)
    assert_same(state.C, 1 - 0.1 * m_C / norm_C)
    assert_same(state.K, np.eye(2) - 0.1 * m_K / norm_K)


def test_riemannian_momentum_keeps_its_share_of_the_old_momentum():
    state = ref.KronState([[1.0]], [[1.0]], [[0.8]], [[-0.8]], [[0.0]])
    new = ref.kron_update(state, np.zeros((1, 1)), **update_arguments(riemannian_momentum=0.75, damping=0))
    assert_same(new.m_C, [[0.75 * 0.8 - 0.25 / 2]])
    assert_same(new.m_K, [[-0.75 * 0.8 - 0.25 / 2]])


@by_shape
def test_the_plain_factor_update_is_the_formula_of_the_paper(shape):
    """B = 1, lambda = 0, alpha2 = 0, no clip: C <- C (I - beta2/2d (C^T G K K^T G^T C - gamma d I))."""
    (p, d), rng = shape, np.random.default_rng(16)
    state, grad = random_state(rng, p, d), rng.standard_normal(shape)
    C, K, beta2 = state.C, state.K, 0.1
    new = ref.kron_update(
        state, grad, batch_size=1, beta2=beta2, riemannian_momentum=0, damping=0, gamma=1.0, clip=None
    )
    assert_same(new.C, C @ (np.eye(p) - beta2 / (2 * d) * (C.T @ grad @ K @ K.T @ grad.T @ C - d * np.eye(p))))
    assert_same(new.K, K @ (np.eye(d) - beta2 / (2 * p) * (K.T @ grad.T @ C @ C.T @ grad @ K - p * np.eye(d))))


@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
@pytest.mark.parametrize("decoupled", [False, True], ids=["coupled", "decoupled"])
def test_two_matrix_steps_of_one_weight_worked_by_hand(decoupled, maximize):
    """C = 2 and K = 3 are fixed, so U = 36 G. G = 1, then 2; lr = 1/10, momentum = 1/2, kappa = 1/5, W = 10."""
    state = ref.KronState([[2.0]], [[3.0]], [[0.0]], [[0.0]], [[0.0]])
    weight, sign = np.array([[10.0]]), -1 if maximize else 1
    for grad in (1.0, 2.0):
        weight, state = ref.kron_step(
            weight,
            sign * np.full((1, 1), grad),
            state,
            update=False,
            lr=0.1,
            momentum=0.5,
            weight_decay=0.2,
            decoupled=decoupled,
            maximize=maximize,
        )
    # coupled: buf = 36 + 2 = 38, W = 6.2; buf = 19 + 72 + 1.24 = 92.24, W = -3.024
    # decoupled: buf = 36, W = 9.8 - 3.6 = 6.2; buf = 18 + 72 = 90, W = 6.076 - 9
    assert_same(state.buffer, [[90.0 if decoupled else 92.24]])
    assert_same(weight, [[-2.924 if decoupled else -3.024]])


@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
@pytest.mark.parametrize("decoupled", [False, True], ids=["coupled", "decoupled"])
@pytest.mark.parametrize(("gamma", "damping", "squares"), [(1.0, 0.3, [2.7, 3.23]), (0.0, 0.2, [2.8, 3.6])])
def test_two_diagonal_steps_worked_by_hand(gamma, damping, squares, decoupled, maximize):
    """beta2 = 1/10, B = 2; G = 3, then 2. s = 0.9 + 1.8, then 0.9 * 2.7 + 0.8; as a sum, 1 + 1.8, then 2.8 + 0.8."""
    state, weight, sign = ref.DiagonalState([1.0], [4.0]), np.array([2.0]), -1 if maximize else 1
    arguments = {
        "lr": 0.2,
        "batch_size": 2,
        "beta2": 0.1,
        "gamma": gamma,
        "momentum": 0.5,
        "damping": damping,
        "weight_decay": 0.1,
        "decoupled": decoupled,
        "maximize": maximize,
    }
    weight, state = ref.diagonal_step(weight, [sign * 3.0], state, **arguments)
    # s + lambda = 3 for both gammas, so U = 1; coupled: buf = 2 + 1 + 0.2; decoupled: buf = 2 + 1
    assert_same(state.square, squares[:1])
    assert_same(state.buffer, [3.0 if decoupled else 3.2])
    assert_same(weight, [1.36])
    _, state = ref.diagonal_step(weight, [sign * 2.0], state, **arguments)
    direction = 2 / (squares[1] + damping)
    assert_same(state.square, squares[1:])
    assert_same(state.buffer, [1.5 + direction if decoupled else 1.6 + direction + 0.136])
