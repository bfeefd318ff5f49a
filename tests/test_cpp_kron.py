"""IF-Shampoo's operators in C++: against the FP64 reference and eager PyTorch, and to the bit where arithmetic is
exact."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
from conftest import gradients, same_bits
from cpp_calls import needs_cpp, threads, under_other_instruction_sets
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kron_batch import (
    BF16,
    CLIPS,
    CPP,
    DESCENT,
    FP16,
    FP32,
    FP64,
    KEPT,
    LAYOUTS,
    ONE,
    PLACES,
    ROUNDINGS,
    STATE,
    Batch,
    assert_memory_around_is_untouched,
    assert_near,
    dispatched,
    numpy,
    through,
)
from tolerances import relative_error

pytestmark = needs_cpp


# ---- the formulas --------------------------------------------------------------------------------------------------

SIDES = [(2, 2), (2, 9), (5, 4), (13, 31), (32, 33), (64, 24), (70, 65)]
BATCHES = st.builds(
    lambda sides, dtypes, grad, param, **rest: Batch(
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
    numbers=st.fixed_dictionaries(
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
    keeps_products=st.booleans(),
    seed=st.integers(0, 99),
)
CALLS = st.sampled_from([CPP, dispatched])
SOME = settings(max_examples=40, deadline=None)

HALVED = [  # symmetric products of more than 256 rows in FP32, and of more than 384 in BF16, are taken in halves
    Batch(389, 5, PLACES[1], ("transposed",), clip="row_sum"),
    Batch(3, 521, layouts=("transposed", "every other"), param=BF16, weight_rounding="compensated"),
    Batch(257, 256, numbers={"damping": 0.0}),
    Batch(6, 389, dtype=BF16, matmul=BF16, rounding="compensated", param=BF16),
    Batch(389, 4, dtype=BF16, matmul=BF16, rounding="stochastic", clip="row_sum", keeps_products=False),
]
MANY = Batch(64, 64, ((0, 9, 0, 9),), ("wide rows",), grad=BF16)  # more blocks than are worked on at a time


def with_examples(test: Any) -> Any:
    for batch in (*HALVED, MANY):
        test = example(batch, CPP)(test)
    return SOME(given(BATCHES, CALLS)(test))


@with_examples
def test_a_gather_is_the_scaled_blocks_to_the_bit_and_sums_of_their_squares(batch, call):
    """Scales are powers of two here, so that only the rounding to the dtype of G is left."""
    t = batch.tensors()
    batch.gather(t, call)
    factor = (-1 if batch.maximize else 1) / (batch.grad_scale or 1)
    assert same_bits(t.grad, torch.stack([(x.float() * factor).to(batch.matmul) for x in batch.blocks(t.grads)]))
    squared = [t.grad, *([t.c, t.k] if batch.options()["damping"] else [])]
    assert t.squares.dtype == FP32 and t.squares.shape[2] == -(-max(batch.rows, batch.cols) // 64)
    np.testing.assert_allclose(numpy(t.squares).sum(-1), [(numpy(x) ** 2).sum((1, 2)) for x in squared], rtol=1e-6)
    assert_memory_around_is_untouched(batch, t)


def assert_an_update_is_the_reference_s(batch, call):
    t, dtypes = batch.tensors(), (batch.dtype, batch.matmul)
    states, grads = batch.reference_states(t), batch.reference_grads(t)
    clip = None if batch.clip == "none" else batch.clip
    expected = [ref.kron_update(*pair, clip=clip, **batch.options()) for pair in zip(states, grads, strict=True)]
    batch.update(t, call)
    assert t.ok.all() and t.ok.shape == (len(expected),)
    for side, name in (("c", "C"), ("k", "K")):
        factor, m = t.factor(side), getattr(t, f"m_{side}")
        old, new = ([getattr(state, name) for state in each] for each in (states, expected))
        assert_near(factor, new, *dtypes, terms=[np.linalg.norm(x - y) for x, y in zip(new, old, strict=True)])
        identity = [m.shape[1] ** 0.5 / 2] * len(m)
        assert_near(m, [getattr(state, f"m_{name}") for state in expected], *dtypes, terms=identity)
        assert same_bits(m, m.mT)
        if batch.keeps_products:
            product, half = getattr(t, f"p_{side}"), numpy(getattr(t, side))
            assert_near(product, half @ half.swapaxes(1, 2), batch.matmul)
            assert same_bits(product, product.mT)


@with_examples
def test_an_update_of_the_factors_is_the_reference_s(batch, call):
    assert_an_update_is_the_reference_s(batch, call)


@with_examples
def test_a_step_of_the_weights_is_the_reference_s_and_leaves_the_rest_of_them_alone(batch, call):
    t, cached = batch.tensors(), batch.keeps_products
    batch.gather(t, call)
    if cached:
        t.p_c, t.p_k = call("kron_products", t.c, t.k, batch.matmul)
    before, states, grads = t.bytes(), batch.reference_states(t), batch.reference_grads(t)
    weights = [numpy(x) for x in batch.blocks(t.weights())]
    for state, c, k in zip(states, numpy(t.c), numpy(t.k), strict=True):
        state.C, state.K = c, k  # products read the BF16 half of a pair
    expected = [
        ref.kron_step(weight, grad, state, update=False, lr=batch.lr, **{**DESCENT, **batch.descent})
        for weight, grad, state in zip(weights, grads, states, strict=True)
    ]
    batch.step(t, None if cached else torch.ones(len(weights), dtype=torch.bool), cached, call)
    stored = FP32 if t.residuals else batch.param
    products = (batch.matmul, BF16 if cached and batch.matmul == BF16 else FP32)
    assert_near([numpy(x) for x in batch.blocks(t.weights())], [x for x, _ in expected], stored, *products)
    buffers = [numpy(x) for x in batch.blocks(t.buffers)]
    assert_near(buffers, [state.buffer for _, state in expected], batch.buffer, batch.dtype, *products)
    assert_memory_around_is_untouched(batch, t)
    changed = {name.split()[0] for name, now in t.bytes().items() if now != before[name]}
    assert changed <= {"params", "buffers", "residuals"}


@pytest.mark.parametrize(
    ("clip", "norm"), [("frobenius", "above 1"), ("row_sum", "above 1"), ("none", ""), ("frobenius", "")]
)
@pytest.mark.parametrize("matmul", [FP32, BF16], ids=str)
def test_factors_move_as_the_reference_s_and_as_those_of_eager_pytorch(clip, norm, matmul):
    """C′ − C by itself, of which the FP32 value that a compensated pair keeps shows every step."""
    small = {"gamma": 0.0, "batch_size": 0.01, "damping": 0.0, "riemannian_momentum": 0.1}
    numbers = small if norm == "" and clip == "frobenius" else {"riemannian_momentum": 0.1}
    batch = Batch(136, 70, dtype=BF16, matmul=matmul, rounding="compensated", clip=clip, numbers=numbers)
    t, other = batch.tensors(), batch.run(call=through("eager"))
    (state,), (grad,) = batch.reference_states(t), batch.reference_grads(t)
    expected = ref.kron_update(state, grad, clip=None if clip == "none" else clip, **batch.options())
    batch.run(t)
    for side, name in (("c", "C"), ("k", "K")):
        old, m = getattr(state, name), getattr(expected, f"m_{name}")
        assert clip == "none" or (ref.clipped_beta2(m, 1.0, clip) < 1) == (norm == "above 1")
        assert_near(t.factor(side) - old, [getattr(expected, name) - old], BF16)
        if matmul == FP32:  # m is rounded once, so that few numbers differ from those of eager PyTorch
            assert (getattr(t, f"m_{side}") != getattr(other, f"m_{side}")).float().mean() < 0.01
            assert relative_error(torch.tensor(t.factor(side) - old), other.factor(side) - old) < 1e-3


@pytest.mark.parametrize("batch", [Batch(70, 65), *HALVED[:2], *HALVED[3:], replace(MANY, dtype=BF16)], ids=str)
def test_products_by_themselves_are_those_of_an_update_to_the_bit(batch):
    """So that a resumed run goes on with the same numbers."""
    batch = replace(batch, keeps_products=True)
    t = batch.tensors()
    batch.update(t)
    for actual, expected in zip(CPP("kron_products", t.c, t.k, batch.matmul), (t.p_c, t.p_k), strict=True):
        assert same_bits(actual, expected)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [FP32, FP16, FP64], ids=str)
def test_gradients_of_convolutions_are_gathered_whatever_their_strides(dtype, channels_last):
    grad = gradients([(6, 5, 3, 2)], 0, dtype)[0]
    grad = grad.to(memory_format=torch.channels_last) if channels_last else grad
    both = [
        through(name)("kron_gather", [grad], [0, 2, 0, 3], 3, 10, [], None, FP32, False)[0] for name in ("cpp", "eager")
    ]
    assert same_bits(*both) and both[0].shape == (6, 3, 10)


def test_gradients_of_several_dtypes_are_served_together_and_scaled():
    batch = Batch(17, 13, PLACES[3], LAYOUTS, grad_scale=3.0, maximize=True)
    gathered = []
    for dtypes in ((FP32, BF16, FP64), (FP32,) * 3):
        t = batch.tensors()
        narrow = [x.to(dtype) for x, dtype in zip(t.grads, (FP32, BF16, FP16), strict=True)]
        t.grads = [x.to(dtype) for x, dtype in zip(narrow, dtypes, strict=True)]
        batch.gather(t, CPP)
        gathered.append((t.grad, t.squares))
    assert all(map(same_bits, *gathered))
    assert_near(gathered[0][0], batch.reference_grads(t), FP32)


# ---- bits ----------------------------------------------------------------------------------------------------------

EXACT = [
    Batch(37, 18, PLACES[2], LAYOUTS, *rest, exact=True, numbers={"damping": damping})
    for damping, rest in [
        (0.0, (FP32, FP32, FP32, FP32, FP32)),
        (0.5, (BF16, BF16, BF16, BF16, BF16, "stochastic", "stochastic", "row_sum")),
        (0.5, (BF16, FP32, FP32, BF16, FP32, "compensated", "compensated", "none")),
        (0.5, (BF16, BF16, FP16, FP16, BF16, "nearest", "nearest", "row_sum")),
        (0.5, (FP32, FP32, FP16, FP16, FP32, "nearest", "nearest", "frobenius")),
    ]
]
EXACT += [replace(batch, rows=9, cols=7, places=((0, 5, 0, 3),)) for batch in EXACT]
EXACT += [replace(batch, rows=389, cols=50, places=ONE) for batch in EXACT[:2]]  # for several threads


def steps_of_exact_batches() -> list[dict[str, bytes]]:
    """Of products that are exact: what is left is this library's, and rounded in one order."""
    results = []
    for batch in EXACT:
        t = replace(batch, keeps_products=False).tensors()
        batch.gather(t, CPP)
        batch.step(t, None, False)
        batch.update(t)
        results.append(t.bytes())
    return results


def digest() -> str:
    """Large products are taken here by another library, perhaps, than elsewhere, and must be right there, too."""
    for batch in HALVED:
        assert_an_update_is_the_reference_s(batch, CPP)
    return sha256(repr(steps_of_exact_batches()).encode()).hexdigest()


def test_the_instruction_set_changes_no_bit_where_products_are_exact():
    others = under_other_instruction_sets("test_cpp_kron", "digest()")
    assert set(others.values()) <= {digest()}, others


def test_the_number_of_threads_changes_no_bit_where_products_are_exact():
    runs = []
    for number in (1, 2, 3):
        with threads(number):
            runs.append(steps_of_exact_batches())
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("batch", [*HALVED, MANY], ids=str)
def test_any_number_of_threads_follows_one(batch):
    runs = []
    for number in (1, 2):
        with threads(number):
            runs.append(batch.run())
    for name, value in runs[0].named().items():
        if name.split()[0] in ("m_c", "m_k", "p_c", "p_k", "buffers") or (name == "params 0" and not runs[0].residuals):
            assert_near(runs[1].named()[name], numpy(value), value.dtype, batch.matmul)


@pytest.mark.parametrize("batch", EXACT, ids=str)
def test_weights_are_rounded_as_in_eager_pytorch_to_the_bit(batch):
    """No decay, so that a number is rounded in the same places whatever is fused."""
    batch = replace(batch, descent={"momentum": 0.5, "weight_decay": 0.0}, lr=2.0**-5)
    results = []
    for call in (CPP, through("eager")):
        t = batch.tensors()
        batch.gather(t, call)
        batch.step(t, None, False, call)
        results.append(t.bytes("params", "buffers", "residuals", "skipped"))
    assert results[0] == results[1]


@pytest.mark.parametrize("sides", [(37, 18), (136, 5)], ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_factors_are_rounded_as_in_eager_pytorch_to_the_bit(rounding, sides):
    """G and m are 0, so that m′ is −γ/2 times I, and C′ = C(1 + 2⁻⁹) rounded but once."""
    numbers = {"beta2": 2.0**-8, "riemannian_momentum": 0.0, "damping": 0.0}
    batch = Batch(*sides, PLACES[2], dtype=BF16, matmul=BF16, rounding=rounding, clip="none", numbers=numbers)
    results = []
    for call in (CPP, through("eager")):
        t = batch.tensors()
        for grad in t.grads:
            grad.zero_()
        before = t.factor("c")
        batch.update(t, call)
        results.append(t.bytes(*STATE))
    assert results[0] == results[1]
    moved = (t.factor("c") != before).mean()
    assert moved == 0 if rounding == "nearest" else moved > 0


# ---- blocks that are left out --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "clip", "rounding"),
    [
        (torch.nan, "frobenius", "compensated"),
        (torch.nan, "row_sum", "nearest"),
        (-torch.inf, "none", "stochastic"),
        (1e30, "row_sum", "compensated"),
        (1e15, "frobenius", "stochastic"),
    ],
)
def test_a_block_that_is_not_finite_stays_to_the_bit_and_is_counted(bad, clip, rounding):
    """The square of 1e30 is infinite; that of 1e15 is not, but the norm of its m is. Other blocks step as ever."""
    batch = Batch(13, 9, ((0, 1, 0, 2), (0, 1, 0, 1)), clip=clip, dtype=BF16, matmul=BF16, param=BF16)
    batch = replace(batch, rounding=rounding, weight_rounding=rounding)
    was, clean, t = batch.tensors(), batch.run(), batch.tensors()
    t.grads[0][5, 11] = bad  # in the second block
    batch.run(t)
    finite = torch.tensor([True, False, True])
    assert torch.equal(t.ok, finite) and torch.equal(t.skipped, was.skipped + ~finite)
    for name in KEPT:
        values = [getattr(x, name) for x in (t, clean, was)]
        if isinstance(values[0], list):
            values = [batch.blocks(x) if x else None for x in values]
        for block, (now, stepped, before) in enumerate(zip(*values, strict=True) if values[0] is not None else ()):
            assert same_bits(now, stepped if finite[block] else before), f"{name} of block {block}"
    for product, factor in ((t.p_c, t.c), (t.p_k, t.k)):
        assert_near(product, numpy(factor) @ numpy(factor).swapaxes(1, 2), BF16)


@pytest.mark.parametrize("side", ["m_c", "m_k"])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("clip", CLIPS)
def test_a_block_whose_momentum_is_not_finite_on_one_side_stays_on_both(side, bad, clip):
    batch = Batch(37, 34, ((0, 2, 0, 1),), clip=clip)
    was, t = batch.tensors(), batch.tensors()
    for each in (was, t):
        getattr(each, side)[0, 33, 1] = getattr(each, side)[0, 1, 33] = bad  # apart from the diagonal tiles
    batch.run(t)
    assert t.ok.tolist() == [False, True] and t.skipped.tolist() == [1, 1]
    for name in ("c", "k", "m_c", "m_k", "params", "buffers"):
        blocks = [batch.blocks(x) if isinstance(x, list) else x for x in (getattr(t, name), getattr(was, name))]
        assert [same_bits(*pair) for pair in zip(*blocks, strict=True)] == [True, False], name


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_found_inf_leaves_everything_as_it_is_and_counts_it(rounding):
    batch = Batch(13, 9, PLACES[2], param=BF16, dtype=BF16, rounding=rounding, weight_rounding=rounding)
    for found_inf in (1.0, torch.nan):
        overflow = replace(batch, found_inf=found_inf)
        was, t = batch.tensors(), overflow.run()
        assert not t.ok.any()
        overflow.step(t, None, False)  # between updates
        assert t.bytes(*KEPT) == was.bytes(*KEPT) and torch.equal(t.skipped, was.skipped + 2)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("reason", ["its factors were skipped", "no update saw its gradient"])
def test_a_block_that_is_left_out_of_a_step_keeps_its_weights_to_the_bit(reason, num_threads):
    """Two threads work on the first three and on the last two blocks."""
    batch = Batch(13, 66, ((0, 1, 0, 5),), param=BF16, weight_rounding="compensated")
    was, t = batch.tensors(), batch.tensors()
    finite, ok = torch.tensor([True, False, True, False, True]), None
    if reason == "its factors were skipped":
        ok = finite
    else:
        t.grads[0][12, [70, 202]] = torch.nan
    with threads(num_threads):
        batch.gather(t, CPP)
        batch.step(t, ok, False)
    assert torch.equal(t.skipped, was.skipped + ~finite)
    for name in ("params", "buffers", "residuals"):
        pairs = zip(batch.blocks(getattr(t, name)), batch.blocks(getattr(was, name)), strict=True)
        assert [same_bits(*pair) for pair in pairs] == (~finite).tolist(), name


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_weight_that_is_not_finite_poisons_nothing_without_weight_decay(decoupled):
    batch = Batch(13, 8, descent={"weight_decay": 0.0, "decoupled": decoupled})
    t = batch.tensors()
    t.params[0][2, 3] = -torch.inf
    batch.run(t)
    assert t.params[0][2, 3] == -torch.inf and t.params[0].isinf().sum() == 1 and t.buffers[0].isfinite().all()


def test_a_number_of_u_that_is_not_finite_counts_as_0():
    batch = Batch(13, 8, descent={"momentum": 0.5, "weight_decay": 0.0})
    t = batch.tensors()
    batch.gather(t, CPP)
    t.k[0, 0] = 1e38
    t.grad[0, 1, 0] = 1e10
    buffer = t.buffers[0].clone()
    batch.step(t, None, False)
    assert torch.equal(t.buffers[0][1], buffer[1] * 0.5) and t.skipped.item() == 0


def test_factors_with_gaps_are_an_error():
    """They would be read as if they had none."""
    batch = torch.eye(5).expand(2, 5, 5).contiguous()
    with pytest.raises(ValueError, match="not contiguous: pass a contiguous tensor"):
        torch.ops.rootfree_native.kron_factor(
            *(batch[:, :4, :4], batch, batch, batch, None, None, None, None, torch.ones(2, 4, 5)),
            *(torch.ones(3, 2, 1), torch.zeros(2, dtype=torch.int32), torch.zeros(2), None),
            *(1.0, 0.1, 0.5, 0.1, 1.0, "frobenius", "nearest"),
        )
