"""The reference against the mathematics: exact invariances, orders of convergence, worked examples.

Exact identities are asked to hold to 1e-12 of the largest entry: fp64 keeps 1e-16 a product, and a few steps
of products with well-conditioned matrices lose less than four digits of it.
"""

from dataclasses import fields

import numpy as np
import pytest
import reference as ref
import torch

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
    beta2 = 0.3 if clip else 0.03  # without a clip large steps diverge and leave no digits to compare
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
    """Any state a few steps could have led to: symmetric momentum, factors far from I."""
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
    """W -> the gradient of sum log cosh(P W R - Y), which couples every weight with every other."""
    left, right, target = well_conditioned(rng, p), well_conditioned(rng, d), rng.standard_normal((p, d))
    return lambda weight: left.T @ np.tanh(left @ weight @ right - target) @ right.T


def trajectory(weight, gradient, state, **changes):
    """The weights after each of a few IF-Shampoo steps, and the last state."""
    weights = []
    for _ in range(NUM_STEPS):
        weight, state = ref.kron_step(weight, gradient(weight), state, **step_arguments(**changes))
        weights.append(weight)
    return np.array(weights), state


# 1. The scale of the loss


def scaled_loss_trajectories(shape, C, K, C_mean, K_mean, **changes):
    """Weights under the summed loss with batch size 1, and under the loss over B with batch size B."""
    rng = np.random.default_rng(1)
    B, weight, gradient = 16, rng.standard_normal(shape), smooth_loss_gradient(rng, *shape)
    zeros = {"m_C": 0 * C, "m_K": 0 * K, "buffer": np.zeros(shape)}
    summed, _ = trajectory(weight, gradient, ref.KronState(C, K, **zeros), batch_size=1, damping=0.08, **changes)
    mean, _ = trajectory(
        weight,
        lambda w: gradient(w) / B,
        ref.KronState(C_mean, K_mean, **zeros),
        batch_size=B,
        damping=0.08 / B,
        **changes,
    )
    return summed, mean


@by_shape
@by_clip
def test_weights_do_not_depend_on_averaging_the_loss_when_each_factor_starts_B_to_the_quarter_larger(shape, clip):
    rng = np.random.default_rng(0)
    C, K = well_conditioned(rng, shape[0]), well_conditioned(rng, shape[1])
    summed, mean = scaled_loss_trajectories(shape, C, K, 16**0.25 * C, 16**0.25 * K, clip=clip)
    assert_same(mean, summed)


def test_weights_do_depend_on_averaging_the_loss_when_both_start_from_the_identity():
    summed, mean = scaled_loss_trajectories((3, 5), np.eye(3), np.eye(5), np.eye(3), np.eye(5))
    assert_different(mean, summed)


@by_gamma
def test_diagonal_weights_do_not_depend_on_averaging_the_loss_when_s_starts_B_times_smaller(gamma):
    rng = np.random.default_rng(2)
    B, gradient = 16, smooth_loss_gradient(rng, 3, 5)
    summed = mean = rng.standard_normal((3, 5))
    state = ref.DiagonalState.initial((3, 5))
    mean_state = ref.DiagonalState(state.square / B, state.buffer)
    shared = {"lr": 0.05, "beta2": 0.3, "gamma": gamma, "momentum": 0.8, "weight_decay": 0.02}
    for _ in range(NUM_STEPS):
        summed, state = ref.diagonal_step(summed, gradient(summed), state, batch_size=1, damping=0.08, **shared)
        mean, mean_state = ref.diagonal_step(
            mean, gradient(mean) / B, mean_state, batch_size=B, damping=0.08 / B, **shared
        )
        assert_same(mean, summed)


# 2 and 3. Affine reparametrisation M = E N F^T + O


def reparametrised_trajectories(rng, E, F, offset, state, rep_state, **changes):
    """E N F^T + O after each step on N, and M after each step on M; then both last states."""
    shape = offset.shape
    weight, gradient = rng.standard_normal(shape), smooth_loss_gradient(rng, *shape)
    M, state = trajectory(weight, gradient, state, **changes)
    N, rep_state = trajectory(
        np.linalg.inv(E) @ (weight - offset) @ np.linalg.inv(F).T,
        lambda N: E.T @ gradient(E @ N @ F.T + offset) @ F,
        rep_state,
        **changes,
    )
    return E @ N @ F.T + offset, M, rep_state, state


def corresponding_states(rng, E, F, random_matrix):
    p, d = len(E), len(F)
    zeros = {"m_C": np.zeros((p, p)), "m_K": np.zeros((d, d)), "buffer": np.zeros((p, d))}
    C, K = random_matrix(rng, p), random_matrix(rng, d)
    return ref.KronState(C, K, **zeros), ref.KronState(np.linalg.inv(E) @ C, np.linalg.inv(F) @ K, **zeros)


@by_shape
@by_clip
def test_affine_reparametrisation_gives_the_same_weights_from_corresponding_factors(shape, clip):
    rng = np.random.default_rng(3)
    E, F = well_conditioned(rng, shape[0]), well_conditioned(rng, shape[1])
    offset = rng.standard_normal(shape)
    states = corresponding_states(rng, E, F, well_conditioned)
    actual, expected, *_ = reparametrised_trajectories(rng, E, F, offset, *states, damping=0, weight_decay=0, clip=clip)
    assert_same(actual, expected)


def identity_start_trajectories(shape, random_matrix, clip):
    rng = np.random.default_rng(4)
    E, F = random_matrix(rng, shape[0]), random_matrix(rng, shape[1])
    states = ref.KronState.initial(*shape), ref.KronState.initial(*shape)
    return reparametrised_trajectories(rng, E, F, np.zeros(shape), *states, clip=clip)


@by_shape
@pytest.mark.parametrize("clip", ["frobenius", None], ids=str)
def test_rotated_weights_take_the_rotated_path_from_the_identity_with_damping_and_decay(shape, clip):
    actual, expected, *_ = identity_start_trajectories(shape, orthogonal, clip)
    assert_same(actual, expected)


@by_shape
@by_clip
def test_permuted_and_sign_flipped_weights_take_the_same_path_from_the_identity_under_every_clip(shape, clip):
    actual, expected, *_ = identity_start_trajectories(shape, signed_permutation, clip)
    assert_same(actual, expected)


def test_rotated_weights_take_another_path_under_the_row_sum_clip_whose_norm_depends_on_the_basis():
    actual, expected, *_ = identity_start_trajectories((6, 4), orthogonal, "row_sum")
    assert_different(actual, expected)


@by_shape
@pytest.mark.parametrize(
    ("random_matrix", "project"),
    [(diagonal, ref.project_diagonal), (lower_triangular, ref.project_lower_triangular)],
    ids=["diagonal", "lower triangular"],
)
def test_reparametrisation_inside_a_structure_gives_the_same_weights_and_keeps_the_structure(
    shape, random_matrix, project
):
    rng = np.random.default_rng(5)
    E, F, offset = random_matrix(rng, shape[0]), random_matrix(rng, shape[1]), rng.standard_normal(shape)
    states = corresponding_states(rng, E, F, random_matrix)
    actual, expected, *last = reparametrised_trajectories(
        rng, E, F, offset, *states, damping=0, weight_decay=0, project=project
    )
    assert_same(actual, expected)
    is_kept = project(np.ones((max(shape), max(shape)))) != 0
    for factor in [factor for state in last for factor in (state.C, state.K)]:
        outside = ~is_kept[: len(factor), : len(factor)]
        assert np.abs(factor[outside]).max(initial=0) <= EXACT * np.abs(factor).max()


# 4. Other factors of the same preconditioner


@by_shape
@by_clip
def test_scaling_one_factor_and_unscaling_the_other_changes_neither_momentum_nor_direction(shape, clip):
    rng = np.random.default_rng(6)
    s, state, grad = 1.7, random_state(rng, *shape), rng.standard_normal(shape)
    scaled = ref.KronState(s * state.C, state.K / s, state.m_C, state.m_K, state.buffer)
    for _ in range(NUM_STEPS):
        state, scaled = (ref.kron_update(one, grad, **update_arguments(clip=clip)) for one in (state, scaled))
        assert_same(scaled.m_C, state.m_C)
        assert_same(scaled.m_K, state.m_K)
        assert_same(ref.kron_precondition(scaled, grad), ref.kron_precondition(state, grad))


@by_shape
@pytest.mark.parametrize("clip", ["frobenius", None], ids=str)
def test_rotating_the_columns_of_a_factor_rotates_its_momentum_and_keeps_the_preconditioner(shape, clip):
    rng = np.random.default_rng(7)
    state, grad = random_state(rng, *shape), rng.standard_normal(shape)
    Q, R = orthogonal(rng, shape[0]), orthogonal(rng, shape[1])
    rotated = ref.KronState(state.C @ Q, state.K @ R, Q.T @ state.m_C @ Q, R.T @ state.m_K @ R, state.buffer)
    for _ in range(NUM_STEPS):
        state, rotated = (ref.kron_update(one, grad, **update_arguments(clip=clip)) for one in (state, rotated))
        assert_same(rotated.m_C, Q.T @ state.m_C @ Q)
        assert_same(rotated.m_K, R.T @ state.m_K @ R)
        assert_same(rotated.C @ rotated.C.T, state.C @ state.C.T)
        assert_same(rotated.K @ rotated.K.T, state.K @ state.K.T)


# 5. The two sides


@by_shape
@by_clip
def test_transposed_gradient_with_swapped_factors_gives_the_transposed_step(shape, clip):
    rng = np.random.default_rng(8)
    state, weight, grad = random_state(rng, *shape), rng.standard_normal(shape), rng.standard_normal(shape)
    swapped = ref.KronState(state.K, state.C, state.m_K, state.m_C, state.buffer.T)
    swapped_weight = weight.T
    for _ in range(NUM_STEPS):
        weight, state = ref.kron_step(weight, grad, state, **step_arguments(clip=clip))
        swapped_weight, swapped = ref.kron_step(swapped_weight, grad.T, swapped, **step_arguments(clip=clip))
        assert_same(swapped_weight, weight.T)
        assert_same(swapped.C, state.K)
        assert_same(swapped.K, state.C)


@by_shape
@by_gamma
def test_d_times_the_trace_of_one_side_is_p_times_the_trace_of_the_other(shape, gamma):
    (p, d), rng = shape, np.random.default_rng(9)
    delta_C, delta_K = ref.kron_curvature(
        well_conditioned(rng, p),
        well_conditioned(rng, d),
        rng.standard_normal(shape),
        batch_size=4,
        damping=0.3,
        gamma=gamma,
    )
    assert_same(d * np.trace(delta_C), p * np.trace(delta_K))


# 6. Positive definiteness


def relative_change(old, new):
    """The eigenvalues of C^-1 C_new; real, as they are those of I minus a multiple of the symmetric m."""
    return np.linalg.eigvals(np.linalg.inv(old) @ new).real


def changes_of_both_factors(clip, beta2, grad_scale):
    """Eigenvalues of C^-1 C_new and K^-1 K_new over a few steps with gradients of the given size."""
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
    """With one weight, a large gradient makes m its own norm, and a zero gradient leaves m = -gamma/2."""
    arguments = update_arguments(beta2=0.25, riemannian_momentum=0, damping=0)
    shrunk = ref.kron_update(ref.KronState.initial(1, 1), np.full((1, 1), 100.0), **arguments)
    grown = ref.kron_update(ref.KronState.initial(1, 1), np.zeros((1, 1)), **arguments)
    assert_same(shrunk.C, [[1 - 0.25]])
    assert_same(grown.C, [[1 + 0.25 / 2]])


def test_an_unclipped_update_leaves_the_bounds_and_can_turn_a_factor_over():
    assert changes_of_both_factors(None, 0.9, 1.0).min() < 0


def test_an_unclipped_update_can_make_the_preconditioner_singular():
    """C = K = I, beta2 = 1/2, G = diag(10^.5, 0): Delta_C = diag(2, -1/2), I - Delta_C/2 is singular."""
    grad = np.diag([np.sqrt(10), 0])
    arguments = update_arguments(batch_size=1, beta2=0.5, riemannian_momentum=0, damping=0)
    unclipped = ref.kron_update(ref.KronState.initial(2, 2), grad, **(arguments | {"clip": None}))
    clipped = ref.kron_update(ref.KronState.initial(2, 2), grad, **arguments)
    assert np.linalg.eigvalsh(unclipped.C @ unclipped.C.T)[0] == pytest.approx(0, abs=EXACT)
    assert np.linalg.eigvalsh(clipped.C @ clipped.C.T)[0] > (1 - 0.5) ** 2 - EXACT


# Rates: the order is log2 of the ratio of errors as beta2 is halved


def observed_order(error, beta2):
    return np.log2(error(beta2) / error(beta2 / 2))


def gradient_path(rng, *shape):
    """t -> a smooth curve of gradients, so that a horizon can be cut into ever more steps."""
    start, slope = rng.standard_normal(shape), rng.standard_normal(shape)
    return lambda t: start * np.cos(t) + slope * np.sin(t)


def distance_from_inverses(gradient, beta2, num_steps, project=None, random_matrix=well_conditioned, **hyper):
    """||C C^T - S_C^-1|| + ||K K^T - S_K^-1||, both fed gradient(k beta2) from one preconditioner."""
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
    """S^-1 after a few steps from one S and the same gradients: by inversion, by Eq. 18 and by Eq. 27."""
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
    """n = p = d = 1: S = s, and from S_C = S_K = 1 both of root-free Shampoo's are the same number."""
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


# Worked by hand, which pins the constants that every invariance above leaves free


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
    """C = 2, K = 3 held fixed, so that U = 36 G; G = 1 then 2, lr 1/10, momentum 1/2, kappa 1/5, W = 10."""
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
    """beta2 = 1/10, B = 2, G = 3 then 2: s = 0.9 + 1.8, 0.9 * 2.7 + 0.8; as a sum, 1 + 1.8, 2.8 + 0.8."""
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
    # s + lambda = 3 either way, so U = 1; coupled: buf = 2 + 1 + 0.2; decoupled: buf = 2 + 1
    assert_same(state.square, squares[:1])
    assert_same(state.buffer, [3.0 if decoupled else 3.2])
    assert_same(weight, [1.36])
    _, state = ref.diagonal_step(weight, [sign * 2.0], state, **arguments)
    direction = 2 / (squares[1] + damping)
    assert_same(state.square, squares[1:])
    assert_same(state.buffer, [1.5 + direction if decoupled else 1.6 + direction + 0.136])


def test_states_start_from_one_the_identity_and_zero():
    diagonal_state, state = ref.DiagonalState.initial((2, 3)), ref.KronState.initial(2, 3)
    assert_same(diagonal_state.square, np.ones((2, 3)))
    assert_same(state.C, np.eye(2))
    assert_same(state.K, np.eye(3))
    assert not any(field.any() for field in (diagonal_state.buffer, state.m_C, state.m_K, state.buffer))
    assert (state.m_C.shape, state.m_K.shape, state.buffer.shape) == ((2, 2), (3, 3), (2, 3))


def test_a_state_is_a_float64_copy_of_the_arrays_it_is_made_from():
    for source in (np.ones((2, 2), dtype=np.float32), np.ones((2, 2))):
        for state in (ref.KronState(*[source] * 5), ref.DiagonalState(source, source)):
            arrays = [getattr(state, field.name) for field in fields(state)]
            assert all(array.dtype == np.float64 and not np.shares_memory(array, source) for array in arrays)


# Steps


def test_new_factors_precondition_the_gradient_they_were_made_from():
    rng = np.random.default_rng(17)
    state, weight, grad = random_state(rng, 3, 5), rng.standard_normal((3, 5)), rng.standard_normal((3, 5))
    actual, new = ref.kron_step(weight, grad, state, **step_arguments(weight_decay=0))
    updated = ref.kron_update(state, grad, **update_arguments())
    assert_same(new.buffer, 0.8 * state.buffer + updated.C @ updated.C.T @ grad @ updated.K @ updated.K.T)
    assert_same(weight - actual, 0.05 * new.buffer)
    assert_same(new.C, updated.C)


def test_a_step_without_an_update_leaves_the_factors_and_their_momentum():
    rng = np.random.default_rng(18)
    state, weight, grad = random_state(rng, 3, 5), rng.standard_normal((3, 5)), rng.standard_normal((3, 5))
    actual, new = ref.kron_step(weight, grad, state, **step_arguments(update=False, momentum=0, weight_decay=0))
    for name in ("C", "K", "m_C", "m_K"):
        assert (getattr(new, name) == getattr(state, name)).all()
    assert_same(weight - actual, 0.05 * state.C @ state.C.T @ grad @ state.K @ state.K.T)


def test_a_step_changes_none_of_its_arguments():
    """Arrays that refuse to be written, so that a change in place raises."""
    rng = np.random.default_rng(19)
    weight, grad = rng.standard_normal((3, 5)), rng.standard_normal((3, 5))
    kron, diagonal_state = random_state(rng, 3, 5), ref.DiagonalState.initial((3, 5))
    blocked = ref.initial_blocked_states((3, 5), max_dim=2)
    states = [kron, diagonal_state, *blocked.values()]
    arrays = [weight, grad] + [getattr(state, field.name) for state in states for field in fields(state)]
    for array in arrays:
        array.setflags(write=False)
    old_states = dict(blocked)
    ref.kron_step(weight, grad, kron, **step_arguments())
    ref.diagonal_step(
        weight,
        grad,
        diagonal_state,
        lr=0.1,
        batch_size=2,
        beta2=0.1,
        gamma=1,
        momentum=0.9,
        damping=0.1,
        weight_decay=0.1,
        maximize=True,
    )
    ref.blocked_kron_step(weight, grad, blocked, max_dim=2, **step_arguments())
    assert all(blocked[index] is old_states[index] for index in old_states)


# Blocks


@pytest.mark.parametrize(
    ("size", "max_dim", "lengths"),
    [(7, 8, [7]), (8, 8, [8]), (9, 8, [5, 4]), (10, 4, [4, 3, 3]), (11, 4, [4, 4, 3]), (3, 1, [1, 1, 1])],
)
def test_a_long_side_is_cut_into_the_fewest_nearly_equal_blocks_the_longer_first(size, max_dim, lengths):
    slices = ref.block_slices(size, max_dim)
    assert [block.stop - block.start for block in slices] == lengths
    assert [i for block in slices for i in range(block.start, block.stop)] == list(range(size))


def test_every_block_of_a_convolution_weight_steps_by_itself():
    """A 5 x 3 x 2 x 1 weight is a 5 x 6 matrix, cut at 4 into rows of 3 and 2 by columns of 3 and 3."""
    rng = np.random.default_rng(20)
    weight, states = rng.standard_normal((5, 3, 2, 1)), ref.initial_blocked_states((5, 3, 2, 1), max_dim=4)
    cuts = {(0, 0): np.s_[:3, :3], (0, 1): np.s_[:3, 3:], (1, 0): np.s_[3:, :3], (1, 1): np.s_[3:, 3:]}
    expected = {index: weight.reshape(5, 6)[cut] for index, cut in cuts.items()}
    expected_states = {index: ref.KronState.initial(*block.shape) for index, block in expected.items()}
    for _ in range(3):
        grad = rng.standard_normal((5, 3, 2, 1))
        weight, states = ref.blocked_kron_step(weight, grad, states, max_dim=4, **step_arguments())
        for index, cut in cuts.items():
            expected[index], expected_states[index] = ref.kron_step(
                expected[index], grad.reshape(5, 6)[cut], expected_states[index], **step_arguments()
            )
    assert states.keys() == cuts.keys()
    assert weight.shape == (5, 3, 2, 1)
    for index, cut in cuts.items():
        assert_same(weight.reshape(5, 6)[cut], expected[index])
        assert_same(states[index].C, expected_states[index].C)
        assert_same(states[index].buffer, expected_states[index].buffer)


# The growing interval


def test_growing_interval_is_the_floor_of_the_logarithm_to_base_four_within_its_limits():
    def interval(step, max_interval):
        floor_log4 = next(k for k in range(99) if 4 ** (k + 1) > step + 1)
        return min(max(floor_log4, 1), max_interval)

    for max_interval in (1, 3, 10):
        for step in [*range(1100), *(4**k + shift for k in range(6, 20) for shift in (-2, -1, 0))]:
            expected = step % interval(step, max_interval) == 0
            assert ref.growing_interval_updates(step, max_interval) == expected, (step, max_interval)


def test_growing_interval_starts_at_every_step_and_reaches_two_at_step_fifteen():
    assert [step for step in range(22) if ref.growing_interval_updates(step, 10)] == [*range(15), 16, 18, 20]


# BF16


def all_patterns_near_ties():
    """fp32 bit patterns around every tie between BF16 numbers, infinities and NaNs among them."""
    upper = np.arange(0, 1 << 16, dtype=np.uint32)[:, None] << np.uint32(16)
    return (upper + np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)).ravel()


def test_round_nearest_is_torchs_conversion_on_every_tie_infinity_and_nan():
    x = all_patterns_near_ties()
    expected = torch.from_numpy(x.view(np.float32)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    is_nan = np.isnan(x.view(np.float32))
    np.testing.assert_array_equal(ref.round_nearest(x)[~is_nan], expected[~is_nan])
    assert np.isnan(ref.bfloat16_value(ref.round_nearest(x)[is_nan])).all()


@pytest.mark.parametrize("value", [1.0, 1.001, -0.0123, 3e-39, 0.0, -(2.0**100)])
def test_round_stochastic_over_all_its_bits_averages_to_the_number_itself(value):
    x, bits = ref.float32_bits([value]), np.arange(1 << 16)
    rounded = ref.bfloat16_value(ref.round_stochastic(x, bits)).astype(np.float64)
    assert len(np.unique(rounded)) == (1 if x[0] % (1 << 16) == 0 else 2)
    assert rounded.mean() == np.float64(np.float32(value))


def test_round_stochastic_rounds_up_for_the_largest_bits_and_keeps_infinities_and_nans():
    x = ref.float32_bits([1.001, 1.001, np.inf, -np.inf])
    low = 0x10000 - int(x[0] & 0xFFFF)
    rounded = ref.bfloat16_value(ref.round_stochastic(x, [low, low - 1, 0xFFFF, 0xFFFF]))
    np.testing.assert_array_equal(rounded, np.float32([1 + 2**-7, 1, np.inf, -np.inf]))
    nans = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF], dtype=np.uint32)
    assert np.isnan(ref.bfloat16_value(ref.round_stochastic(nans, [0, 0xFFFF, 1]))).all()


def test_compensated_pair_is_the_fp32_number_bit_for_bit():
    x = all_patterns_near_ties()
    hi, lo = ref.compensated_split(x)
    assert (hi.dtype, lo.dtype) == (np.uint16, np.int16)
    np.testing.assert_array_equal(ref.compensated_join(hi, lo), x)


def test_compensated_hi_is_the_nearest_bf16_with_ties_away_from_zero():
    x = all_patterns_near_ties()
    x = x[np.isfinite(x.view(np.float32))]
    hi, is_tie = ref.compensated_split(x)[0], x & 0xFFFF == 0x8000
    np.testing.assert_array_equal(hi[~is_tie], ref.round_nearest(x)[~is_tie])
    np.testing.assert_array_equal(hi[is_tie], (x[is_tie] >> 16) + 1)
