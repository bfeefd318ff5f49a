"""Invariances of the reference."""

from __future__ import annotations

import numpy as np
import pytest

from tests.calls import reference as ref
from tests.reference.cases import (
    EXACT,
    NUM_STEPS,
    assert_different,
    assert_same,
    by_clip,
    by_gamma,
    by_shape,
    diagonal,
    lower_triangular,
    orthogonal,
    random_state,
    signed_permutation,
    smooth_loss_gradient,
    step_arguments,
    trajectory,
    update_arguments,
    well_conditioned,
)

# ---- the scale of the loss -------------------------------------------------------------------------------------------


def scaled_loss_trajectories(shape, C, K, C_mean, K_mean, **changes):
    """Return the weights for the summed loss with batch size 1, and for the mean loss with batch size B."""
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


# ---- affine reparametrization M = E N Fᵀ + O -------------------------------------------------------------------------


def reparametrized_trajectories(rng, E, F, offset, state, rep_state, **changes):
    """Return E N F^T + O after each step on N, M after each step on M, and both last states."""
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
def test_affine_reparametrization_gives_the_same_weights_from_corresponding_factors(shape, clip):
    rng = np.random.default_rng(3)
    E, F = well_conditioned(rng, shape[0]), well_conditioned(rng, shape[1])
    offset = rng.standard_normal(shape)
    states = corresponding_states(rng, E, F, well_conditioned)
    actual, expected, *_ = reparametrized_trajectories(rng, E, F, offset, *states, damping=0, weight_decay=0, clip=clip)
    assert_same(actual, expected)


def identity_start_trajectories(shape, random_matrix, clip):
    rng = np.random.default_rng(4)
    E, F = random_matrix(rng, shape[0]), random_matrix(rng, shape[1])
    states = ref.KronState.initial(*shape), ref.KronState.initial(*shape)
    return reparametrized_trajectories(rng, E, F, np.zeros(shape), *states, clip=clip)


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
def test_structured_reparametrization_gives_the_same_weights_and_keeps_the_structure(shape, random_matrix, project):
    rng = np.random.default_rng(5)
    E, F, offset = random_matrix(rng, shape[0]), random_matrix(rng, shape[1]), rng.standard_normal(shape)
    states = corresponding_states(rng, E, F, random_matrix)
    actual, expected, *last = reparametrized_trajectories(
        rng, E, F, offset, *states, damping=0, weight_decay=0, project=project
    )
    assert_same(actual, expected)
    is_kept = project(np.ones((max(shape), max(shape)))) != 0
    for factor in [factor for state in last for factor in (state.C, state.K)]:
        outside = ~is_kept[: len(factor), : len(factor)]
        assert np.abs(factor[outside]).max(initial=0) <= EXACT * np.abs(factor).max()


# ---- different factors of one preconditioner -------------------------------------------------------------------------


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


# ---- the two sides ---------------------------------------------------------------------------------------------------


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
