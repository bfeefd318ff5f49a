"""Batches for the operators of IF-Shampoo in C++."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.calls import recipe_reference as recipe
from tests.calls.kron import LAYOUTS, MIXED, ONE, PLACES, ROOT_FREE, WHITENED, Batch, Tensors
from tests.calls.operators import Call, dispatched, through
from tests.calls.tensors import BF16, CLIPS, FP16, FP32, FP64, ROUNDINGS, fp64, same_bits
from tests.calls.tolerances import assert_near, one_step
from tests.cpp.calls import cpp_batch

SIDES = [(2, 2), (2, 9), (5, 4), (13, 31), (32, 33), (64, 24), (70, 65)]
ANY_RULE = st.fixed_dictionaries(
    {
        "direction": st.sampled_from(["root_free", "whitened"]),
        "relative_damping": st.booleans(),
        "factor_init": st.sampled_from(["identity", "gradient"]),
        "momentum_on": st.sampled_from(["update", "gradient"]),
        "nesterov": st.booleans(),
        "scales": st.booleans(),
    }
).map(lambda rule: {**rule, "nesterov": rule["nesterov"] and rule["momentum_on"] == "gradient"})
BATCHES = st.builds(
    lambda sides, dtypes, grad, param, **rest: cpp_batch(
        *sides, dtype=dtypes[0], matmul=dtypes[1], grad=grad or param, param=param, **rest
    ),
    st.sampled_from(SIDES),
    st.sampled_from([(FP32, FP32), (BF16, BF16), (BF16, FP32), (FP32, BF16)]),
    grad=st.sampled_from([None, FP32, FP64]),
    param=st.sampled_from([FP32, BF16, FP16]),
    places=st.sampled_from(PLACES),
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=5).map(tuple),
    buffer=st.sampled_from([FP32, BF16]),
    rounding=st.sampled_from(ROUNDINGS),
    weight_rounding=st.sampled_from(ROUNDINGS),
    clip=st.sampled_from(CLIPS),
    maximize=st.booleans(),
    options=st.fixed_dictionaries(
        {
            "batch_size": st.sampled_from([1, 7.5]),
            "beta2": st.sampled_from([0.0, 0.1, 0.9]),
            "riemannian_momentum": st.sampled_from([0, 0.6]),
            "damping": st.sampled_from([0, 0.2]),
            "gamma": st.sampled_from([0, 1]),
        }
    ),
    descent=st.fixed_dictionaries(
        {"momentum": st.sampled_from([0, 0.9]), "weight_decay": st.sampled_from([0, 0.1]), "decoupled": st.booleans()}
    ),
    lr=st.sampled_from([0.0, 0.5]),
    grad_scale=st.sampled_from([None, 8.0]),
    found_inf=st.sampled_from([None, 0.0]),
    rule=st.one_of(st.just({}), st.sampled_from([WHITENED, ROOT_FREE]), ANY_RULE),
    keeps_products=st.booleans(),
    seed=st.integers(0, 99),
)
CALLS = st.sampled_from([through("cpp"), dispatched("cpp")])
SOME = settings(max_examples=60, deadline=None)

HALVED = [  # symmetric products with more than 256 rows in FP32, or 384 in BF16, are computed in two halves
    cpp_batch(389, 5, PLACES[1], ("transposed",), clip="row_sum"),
    cpp_batch(3, 521, layouts=("transposed", "every other"), param=BF16, weight_rounding="compensated"),
    cpp_batch(257, 256, options={"damping": 0.0}),
    cpp_batch(6, 389, dtype=BF16, matmul=BF16, rounding="compensated", param=BF16),
    cpp_batch(389, 4, dtype=BF16, matmul=BF16, rounding="stochastic", clip="row_sum", keeps_products=False),
    cpp_batch(389, 50, PLACES[1], ("transposed",), clip="row_sum", rule=WHITENED),
    cpp_batch(7, 389, dtype=BF16, matmul=FP32, rounding="compensated", rule=WHITENED),
    cpp_batch(257, 70, dtype=BF16, matmul=BF16, rounding="stochastic", rule=ROOT_FREE),
]
MANY = cpp_batch(64, 64, ((0, 9, 0, 9),), ("wide rows",), grad=BF16)  # more blocks than are processed at once


def with_examples(test: Any) -> Any:
    for batch in (*HALVED, MANY):
        test = example(batch, through("cpp"))(test)
    return SOME(given(BATCHES, CALLS)(test))


EXACT = [
    cpp_batch(37, 18, PLACES[2], LAYOUTS, *rest, exact="products", options={"damping": damping})
    for damping, rest in [
        (0.0, (FP32, FP32, FP32, FP32, FP32)),
        (0.5, (BF16, BF16, BF16, BF16, BF16, "stochastic", "stochastic", "row_sum")),
        (0.5, (BF16, FP32, FP32, BF16, FP32, "compensated", "compensated", "none")),
        (0.5, (BF16, BF16, FP16, FP16, BF16, "nearest", "nearest", "row_sum")),
        (0.5, (FP32, FP32, FP16, FP16, FP32, "nearest", "nearest", "frobenius")),
    ]
]
EXACT += [replace(batch, rule=rule) for rule in MIXED[::2] for batch in EXACT[:4]]
EXACT += [
    replace(batch, rule={**rule, "factor_init": "identity"}, descent={"momentum": 0.5})
    for rule in (WHITENED, ROOT_FREE)
    for batch in EXACT[:4]
]
EXACT += [replace(batch, rows=9, cols=7, places=((0, 5, 0, 3),)) for batch in EXACT]
EXACT += [replace(batch, rows=389, cols=50, places=ONE) for batch in (*EXACT[:2], *EXACT[13:15])]  # for several threads


def steps_of_exact_batches() -> list[dict[str, bytes]]:
    """Return the bytes of all tensors after steps with exact products, whose order of summation has no effect."""
    results = []
    for batch in EXACT:
        t = replace(batch, keeps_products=False).tensors()
        batch.gather(t)
        batch.step(t, None, False)
        batch.update(t)
        results.append(t.bytes())
    return results


def reference_of_products(batch: Batch, t: Tensors) -> list[recipe.RecipeState]:
    """Return the reference's states after an update that starts from the factors that products read.

    Products read the BF16 halves of compensated pairs, and initial factors after they were rounded for storage.
    """
    states = batch.reference_states(Tensors(**{**vars(t), "lo_c": None, "lo_k": None}))
    options, grads = {"clip": batch.reference_clip, **batch.all_options}, batch.reference_grads(t)
    for state, grad in zip(states, grads, strict=True):
        if batch.all_rule["factor_init"] == "gradient" and state.curvature == 0:
            state.curvature = options["batch_size"] * np.mean(grad**2)
            start = torch.tensor((state.curvature * (1 + options["damping"])) ** -0.25, dtype=FP32)
            state.C, state.K = (float(start.to(batch.dtype)) * np.eye(size) for size in batch.sides)
    pairs = zip(states, grads, strict=True)
    return [recipe.recipe_update(*pair, **options, **batch.reference_rule) for pair in pairs]


def assert_update_matches_reference(batch: Batch, run: Call) -> None:
    """Check an update of a new batch against the reference."""
    t, allowed = batch.tensors(), one_step(batch.dtype, products=batch.matmul)
    states, expected = batch.reference_states(t), batch.reference_update(t)
    of_products = reference_of_products(batch, t)
    batch.update(t, run)
    assert t.ok.all() and t.ok.shape == (len(expected),)
    if batch.follows_curvature:
        assert_near(fp64(t.curvature), [state.curvature for state in expected], one_step(products=batch.matmul))
    for side, name in (("c", "C"), ("k", "K")):
        factor, m = t.factor(side), getattr(t, f"m_{side}")
        old, new = ([getattr(state, name) for state in each] for each in (states, expected))
        assert_near(factor, new, allowed, [np.linalg.norm(x - y) for x, y in zip(new, old, strict=True)])
        identity = [m.shape[1] ** 0.5 / 2] * len(m)
        assert_near(m, [getattr(state, f"m_{name}") for state in of_products], allowed, identity)
        assert same_bits(m, m.mT)
        for x in (getattr(t, side), getattr(t, f"lo_{side}")):
            assert not batch.is_whitened or x is None or same_bits(x, x.mT)
        if getattr(t, f"p_{side}") is not None:
            product, half = getattr(t, f"p_{side}"), fp64(getattr(t, side))
            assert_near(product, half @ half.swapaxes(1, 2), one_step(products=batch.matmul))
            assert same_bits(product, product.mT)
