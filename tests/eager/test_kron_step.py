"""`kron_step` in eager PyTorch, compared with the FP64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.calls.kron import MIXED, ROOT_FREE, WHITENED, Batch
from tests.calls.operators import dispatched
from tests.calls.tensors import BF16, FP32, FP64, fp64
from tests.calls.tolerances import assert_near, one_step
from tests.eager.batches import wide_batch


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("dtype", [FP64, FP32], ids=str)
def test_preconditioned_step_matches_the_reference(cached, decoupled, dtype):
    batch = wide_batch(3, 7, 5, dtype, descent={"decoupled": decoupled})
    t = batch.tensors()
    batch.gather(t)
    t.p_c, t.p_k = batch.make_products(t)
    weights, buffers = batch.reference_step(t)
    batch.step(t, None, cached, dispatched("eager"))
    assert_near(map(fp64, batch.blocks(t.params)), weights, one_step(products=dtype))
    assert_near(map(fp64, batch.blocks(t.buffers)), buffers, one_step(products=dtype))


# ---- the recipe --------------------------------------------------------------------------------------------------

RULES = st.fixed_dictionaries(
    {
        "direction": st.sampled_from(["root_free", "whitened"]),
        "momentum_on": st.sampled_from(["update", "gradient"]),
        "nesterov": st.booleans(),
        "scales": st.booleans(),
    }
).map(lambda rule: {**rule, "nesterov": rule["nesterov"] and rule["momentum_on"] == "gradient"})


@given(
    rule=RULES,
    seed=st.integers(0, 1000),
    num_blocks=st.integers(1, 3),
    rows=st.integers(1, 17),
    cols=st.integers(1, 13),
    cached=st.booleans(),
    descent=st.fixed_dictionaries(
        {
            "momentum": st.sampled_from([0.0, 0.9]),
            "weight_decay": st.sampled_from([0.0, 0.3]),
            "decoupled": st.booleans(),
        }
    ),
)
@settings(max_examples=1000, deadline=None)
def test_fp64_steps_match_the_reference_to_twelve_digits(rule, seed, num_blocks, rows, cols, cached, descent):
    batch = wide_batch(num_blocks, rows, cols, FP64, seed=seed, rule=rule, descent=descent)
    t = batch.tensors()
    batch.gather(t)
    if not batch.is_whitened:
        t.p_c, t.p_k = batch.make_products(t)
    weights, buffers = batch.reference_step(t)
    batch.step(t, None, cached)
    assert_near(map(fp64, batch.blocks(t.params)), weights, 1e-12)
    assert_near(map(fp64, batch.blocks(t.buffers)), buffers, 1e-12)


@pytest.mark.parametrize("rule", [WHITENED, ROOT_FREE, *MIXED], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_steps_match_the_reference_within_the_tolerance_of_their_dtype(dtype, rule):
    batch = Batch(48, 32, ((0, 3, 0, 1),), dtype=dtype, matmul=dtype, param=dtype, buffer=dtype, rule=rule)
    t = batch.tensors()
    batch.gather(t)
    weights, buffers = batch.reference_step(t)
    batch.step(t, None, False, dispatched("eager"))
    allowed = one_step(dtype, products=dtype)
    assert_near(map(fp64, batch.blocks(t.params)), weights, allowed)
    assert_near(map(fp64, batch.blocks(t.buffers)), buffers, allowed)


@pytest.mark.parametrize("rule", [WHITENED, *MIXED], ids=str)
def test_a_block_that_is_not_finite_keeps_its_weights_and_its_momentum(rule):
    batch = wide_batch(3, 6, 5, FP32, rule=rule)
    t = batch.tensors()
    batch.blocks(t.grads)[1][2, 3] = torch.nan
    before = t.copies()
    batch.gather(t)
    batch.step(t, torch.tensor([True, True, False]), False)
    assert (t.skipped - before["skipped 0"]).tolist() == [0, 1, 1]
    for name in ("params", "buffers"):
        pairs = zip(batch.blocks(getattr(t, name)), batch.blocks([before[f"{name} 0"]]), strict=True)
        assert [torch.equal(x, y) for x, y in pairs] == [False, True, True], name


def test_an_update_of_zero_stays_zero():
    batch = wide_batch(2, 6, 5, FP64, rule=WHITENED, descent={"weight_decay": 0.0})
    t = batch.tensors()
    t.grads[0].zero_()
    t.buffers[0].zero_()
    before = t.copies()
    batch.gather(t)
    batch.step(t, None, False)
    assert torch.equal(t.params[0], before["params 0"])
