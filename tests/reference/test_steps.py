"""Steps of the reference: states, arguments, blocks, and the growing interval."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from tests.calls import reference as ref
from tests.reference.cases import assert_same, random_state, step_arguments, update_arguments


def test_states_start_from_one_the_identity_and_zero():
    diagonal_state, state = ref.DiagonalState.initial((2, 3)), ref.KronState.initial(2, 3)
    assert_same(diagonal_state.square, np.ones((2, 3)))
    assert_same(state.C, np.eye(2))
    assert_same(state.K, np.eye(3))
    assert not any(field.any() for field in (diagonal_state.buffer, state.m_C, state.m_K, state.buffer))
    assert (state.m_C.shape, state.m_K.shape, state.buffer.shape) == ((2, 2), (3, 3), (2, 3))


def test_a_state_is_a_float64_copy_of_its_arrays():
    for source in (np.ones((2, 2), dtype=np.float32), np.ones((2, 2))):
        for state in (ref.KronState(*[source] * 5), ref.DiagonalState(source, source)):
            arrays = [getattr(state, field.name) for field in fields(state)]
            assert all(array.dtype == np.float64 and not np.shares_memory(array, source) for array in arrays)


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
    """All arrays are read-only, so a change in place raises."""
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


# ---- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "max_dim", "lengths"),
    [(7, 8, [7]), (8, 8, [8]), (9, 8, [5, 4]), (10, 4, [4, 3, 3]), (11, 4, [4, 4, 3]), (3, 1, [1, 1, 1])],
)
def test_a_long_side_is_split_into_the_fewest_blocks_of_nearly_equal_length(size, max_dim, lengths):
    slices = ref.block_slices(size, max_dim)
    assert [block.stop - block.start for block in slices] == lengths
    assert [i for block in slices for i in range(block.start, block.stop)] == list(range(size))


def test_every_block_of_a_convolution_weight_steps_by_itself():
    """A 5 x 3 x 2 x 1 weight is a 5 x 6 matrix. With max_dim 4, blocks have 3 or 2 rows, and 3 columns."""
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


# ---- the growing interval --------------------------------------------------------------------------------------------


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
