"""Bounds on updates of the reference, and orders of agreement between methods."""

from __future__ import annotations

import numpy as np
import pytest

from tests.calls import reference as ref
from tests.reference.cases import (
    EXACT,
    NUM_STEPS,
    assert_same,
    by_gamma,
    by_shape,
    lower_triangular,
    positive_definite,
    random_state,
    update_arguments,
    well_conditioned,
)

# ---- positive definiteness -------------------------------------------------------------------------------------------


def relative_change(old, new):
    """Return the eigenvalues of C^-1 C_new = I - b m. They are real, because m is symmetric."""
    return np.linalg.eigvals(np.linalg.inv(old) @ new).real


def changes_of_both_factors(clip, beta2, grad_scale):
    """Return the eigenvalues of C^-1 C_new and K^-1 K_new over a few steps with gradients of the given size."""
    rng = np.random.default_rng(10)
    state, changes = ref.KronState.initial(6, 4), []
    for _ in range(NUM_STEPS):
        new = ref.kron_update(
            state, grad_scale * rng.standard_normal((6, 4)), **update_arguments(clip=clip, beta2=beta2)
        )
        changes += [relative_change(state.C, new.C), relative_change(state.K, new.K)]
        state = new
    return np.concatenate(changes)


@pytest.mark.parametrize("grad_scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("beta2", [0.1, 0.9])
@pytest.mark.parametrize("clip", ["frobenius", "row_sum"])
def test_a_clipped_update_shrinks_no_direction_by_more_than_beta2_nor_grows_it_by_more_than_half(
    clip, beta2, grad_scale
):
    changes = changes_of_both_factors(clip, beta2, grad_scale)
    assert 1 - beta2 - EXACT <= changes.min()
    assert changes.max() <= 1 + beta2 / 2 + EXACT


def test_both_bounds_of_a_clipped_update_are_reached():
    """There is one weight. A large gradient is clipped to m = 1, and a zero gradient gives m = -gamma/2."""
    arguments = update_arguments(beta2=0.25, riemannian_momentum=0, damping=0)
    shrunk = ref.kron_update(ref.KronState.initial(1, 1), np.full((1, 1), 100.0), **arguments)
    grown = ref.kron_update(ref.KronState.initial(1, 1), np.zeros((1, 1)), **arguments)
    assert_same(shrunk.C, [[1 - 0.25]])
    assert_same(grown.C, [[1 + 0.25 / 2]])


def test_an_unclipped_update_exceeds_the_bounds_and_can_change_the_sign_of_a_factor():
    assert changes_of_both_factors(None, 0.9, 1.0).min() < 0


def test_an_unclipped_update_can_make_the_preconditioner_singular():
    """C = K = I, beta2 = 1/2 and G = diag(10^.5, 0) give Delta_C = diag(2, -1/2). I - Delta_C/2 is singular."""
    grad = np.diag([np.sqrt(10), 0])
    arguments = update_arguments(batch_size=1, beta2=0.5, riemannian_momentum=0, damping=0)
    unclipped = ref.kron_update(ref.KronState.initial(2, 2), grad, **(arguments | {"clip": None}))
    clipped = ref.kron_update(ref.KronState.initial(2, 2), grad, **arguments)
    assert np.linalg.eigvalsh(unclipped.C @ unclipped.C.T)[0] == pytest.approx(0, abs=EXACT)
    assert np.linalg.eigvalsh(clipped.C @ clipped.C.T)[0] > (1 - 0.5) ** 2 - EXACT


# ---- orders: log2 of the ratio of errors when beta2 is halved --------------------------------------------------------


def observed_order(error, beta2):
    return np.log2(error(beta2) / error(beta2 / 2))


def gradient_path(rng, *shape):
    """Return t -> gradient, a smooth curve. A fixed horizon can then be divided into any number of steps."""
    start, slope = rng.standard_normal(shape), rng.standard_normal(shape)
    return lambda t: start * np.cos(t) + slope * np.sin(t)


def distance_from_inverses(gradient, beta2, num_steps, project=None, random_matrix=well_conditioned, **hyper):
    """Return ||C C^T - S_C^-1|| + ||K K^T - S_K^-1|| after steps from equal preconditioners with equal gradients."""
    rng = np.random.default_rng(11)
    p, d = gradient(0).shape
    state = random_state(rng, p, d, C=random_matrix(rng, p), K=random_matrix(rng, d))
    S_C, S_K = np.linalg.inv(state.C @ state.C.T), np.linalg.inv(state.K @ state.K.T)
    for k in range(num_steps):
        grad = gradient(k * beta2)
        state = ref.kron_update(state, grad, beta2=beta2, riemannian_momentum=0, clip=None, project=project, **hyper)
        S_C, S_K = ref.root_free_shampoo_update(S_C, S_K, grad, beta2=beta2, **hyper)
    return sum(np.linalg.norm(F @ F.T - np.linalg.inv(S)) for F, S in ((state.C, S_C), (state.K, S_K)))


@by_shape
@by_gamma
def test_inverse_free_factors_follow_root_free_shampoo_to_second_order_over_a_fixed_number_of_steps(shape, gamma):
    gradient = gradient_path(np.random.default_rng(12), *shape)
    hyper = {"batch_size": 3, "damping": 0.4, "gamma": gamma}
    order = observed_order(lambda beta2: distance_from_inverses(gradient, beta2, NUM_STEPS, **hyper), 1e-5)
    assert order == pytest.approx(2, abs=0.1)


@by_gamma
def test_inverse_free_factors_follow_root_free_shampoo_to_first_order_over_a_fixed_horizon(gamma):
    gradient = gradient_path(np.random.default_rng(12), 3, 5)
    hyper = {"batch_size": 1, "damping": 0.4, "gamma": gamma}
    order = observed_order(lambda beta2: distance_from_inverses(gradient, beta2, round(0.5 / beta2), **hyper), 0.01)
    assert order == pytest.approx(1, abs=0.1)


def test_triangular_factors_with_a_doubled_triangle_follow_root_free_shampoo_to_second_order():
    gradient = gradient_path(np.random.default_rng(13), 3, 5)
    hyper = {"batch_size": 3, "damping": 0.4, "gamma": 1.0}
    structure = {"project": ref.project_lower_triangular, "random_matrix": lower_triangular}
    order = observed_order(lambda beta2: distance_from_inverses(gradient, beta2, NUM_STEPS, **structure, **hyper), 1e-5)
    assert order == pytest.approx(2, abs=0.1)


def full_matrix_inverses(beta2, gamma):
    """Return S^-1 after a few steps from one S and equal gradients, by inversion, by Eq. 18 and by Eq. 27."""
    rng = np.random.default_rng(14)
    S, hyper = positive_definite(rng, 6), {"batch_size": 3, "beta2": beta2, "gamma": gamma}
    S_inv = np.linalg.inv(S)
    A = np.linalg.cholesky(S_inv)
    for g in rng.standard_normal((NUM_STEPS, 6)):
        S = ref.full_matrix_update(S, g, **hyper)
        S_inv = ref.inverse_free_full_update(S_inv, g, **hyper)
        A = ref.factored_full_update(A, g, **hyper)
    return np.linalg.inv(S), S_inv, A @ A.T


@by_gamma
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [(1, 0, 2), (2, 0, 2), (1, 2, 3)],
    ids=[
        "Eq. 18 follows Eq. 17 to order 2",
        "Eq. 27 follows Eq. 17 to order 2",
        "Eq. 18 follows Eq. 27 to order 3",
    ],
)
def test_full_matrix_methods_agree_to_their_order(gamma, first, second, expected):
    def distance(beta2):
        inverses = full_matrix_inverses(beta2, gamma)
        return np.linalg.norm(inverses[first] - inverses[second])

    assert observed_order(distance, 1e-3) == pytest.approx(expected, abs=0.1)


@by_gamma
@pytest.mark.parametrize("beta2", [0.1, 0.9, 5.0])
def test_the_second_order_term_keeps_the_full_inverse_above_half_the_old_one_at_any_beta2(gamma, beta2):
    """S^-1_new = A (I - x + x^2/2) A^T = A (I + (I - x)^2) A^T / 2, with x = beta2 (A^T H A - gamma I)."""
    rng = np.random.default_rng(15)
    S_inv, g = positive_definite(rng, 4), rng.standard_normal(4)
    new = ref.inverse_free_full_update(S_inv, g, batch_size=3, beta2=beta2, gamma=gamma)
    assert np.linalg.eigvals(np.linalg.solve(S_inv, new)).real.min() >= 0.5 - EXACT


def test_one_weight_makes_the_full_diagonal_and_matrix_preconditioners_agree():
    """For n = p = d = 1, S = s. From S_C = S_K = 1, both factors of root-free Shampoo equal S."""
    hyper = {"batch_size": 3, "beta2": 0.2, "gamma": 1.0}
    S = ref.full_matrix_update(np.array([[1.0]]), np.array([2.0]), **hyper)
    _, state = ref.diagonal_step(
        [0.0], [2.0], ref.DiagonalState.initial(1), lr=1, momentum=0, damping=0, weight_decay=0, **hyper
    )
    S_C, S_K = ref.root_free_shampoo_update(np.eye(1), np.eye(1), np.array([[2.0]]), damping=0, **hyper)
    assert_same(S[0], [0.8 + 0.2 * 12])
    assert_same(state.square, S[0])
    assert_same(S_C, S)
    assert_same(S_K, S)
