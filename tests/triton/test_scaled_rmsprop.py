"""`scaled_rmsprop` in Triton: comparison with the FP64 reference, and with eager PyTorch, bitwise if it is exact."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import triton.language as tl

from rootfree_kernels import rounding as rnd
from tests.calls.device import DEVICE, kernel_test, launches, module_of
from tests.calls.kron import MIXED, ROOT_FREE, WHITENED
from tests.calls.operators import Call, dispatched, through
from tests.calls.rf_rmsprop import assert_equal, bits, copied, counts
from tests.calls.scaled_rmsprop import ScaledCall, assert_matches_reference
from tests.calls.tensors import BF16, FP16, FP32, ROUNDINGS, assert_memory_around_is_untouched
from tests.triton.calls import CHUNK, LAYOUTS

pytestmark = kernel_test

SHAPES: list[Any] = [(), (1031,), (17, 13), (2, CHUNK)]
RULES = (WHITENED, ROOT_FREE, *MIXED)
scaled_call = partial(ScaledCall, backend="triton", device=DEVICE)


def assert_step_matches_reference(call: ScaledCall, run: Call | None = None) -> None:
    lists, memory = call.tensors()
    before = copied(lists)
    call.run(lists, run)
    assert_matches_reference(call, lists, before)
    assert_equal({name: lists[name] for name in ("grad", "skipped")}, {n: before[n] for n in ("grad", "skipped")})
    assert_memory_around_is_untouched(memory)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_steps_of_every_rule_match_the_reference(rule):
    """The first and the last tensor get their first gradient."""
    assert_step_matches_reference(scaled_call(SHAPES, LAYOUTS, grad_scale=3.0, rule=rule), dispatched("triton"))


@pytest.mark.parametrize(
    "dtypes",
    [
        (BF16, BF16, BF16, BF16, "stochastic", "stochastic"),
        (BF16, FP32, BF16, FP32, "compensated", "compensated"),
        (FP16, FP16, FP32, BF16, "nearest", "nearest"),
        (BF16, torch.float64, FP32, FP32, "nearest", "stochastic"),
    ],
    ids=str,
)
def test_steps_match_the_reference_in_every_dtype(dtypes):
    options = {"maximize": True, "gamma": 0.0}
    assert_step_matches_reference(scaled_call(SHAPES, LAYOUTS, *dtypes, options, found_inf=0.0, rule=WHITENED))
    options = {"decoupled": True, "damping": 0.0}
    assert_step_matches_reference(scaled_call(SHAPES[1:], LAYOUTS[1:], *dtypes, options, rule=MIXED[1]))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="changes a constant of kernels, which a GPU may have compiled already")
def test_a_program_may_work_on_several_chunks(monkeypatch):
    """Each tensor has two programs. One tensor has five chunks and a remainder, the other three chunks."""
    module = module_of("scaled_rmsprop")
    monkeypatch.setattr(module, "MAX_SHARES", 2)
    monkeypatch.setattr(module, "_MAX_SHARES", tl.constexpr(2))
    shapes = [(5 * CHUNK + 13,), (3, CHUNK)]
    assert_step_matches_reference(scaled_call(shapes, ("whole", "offset by 1"), BF16, BF16, rule=WHITENED))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_bf16_is_rounded_bitwise_as_in_eager_pytorch(rounding):
    """Gradients are 0, so s decays and the momentum steps the weights. Each result is rounded only once."""
    rule = {"direction": "root_free", "momentum_on": "update"}
    call = scaled_call(SHAPES, ("whole",), *(BF16,) * 4, rounding, rounding, exact=True, rule=rule)
    before, actual, expected = call.tensors()[0], call.run(), call.run(run=through("eager"))
    assert bits(actual) == bits(expected)
    moved = "buffer" if rounding == "nearest" else "square"  # rounding to nearest drops a change of 2^-9 of s
    assert bits(actual)[moved] != bits(before)[moved]


def test_the_same_call_gives_the_same_bits():
    call = scaled_call(SHAPES, LAYOUTS, BF16, BF16, BF16, BF16, "stochastic", "stochastic", rule=WHITENED)
    assert bits(call.run()) == bits(call.run())


# ---- skipped tensors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["compensated", "stochastic"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_only_tensors_with_finite_gradients_step(bad, rounding):
    dtypes = BF16, FP32, BF16, BF16, rounding, rounding
    call = scaled_call([3, CHUNK + 4, 5], ("whole",), *dtypes, rule=WHITENED)
    lists, _ = call.tensors()
    lists["grad"][1][-1] = bad
    before = copied(lists)
    call.run(lists)
    assert [now - was for now, was in zip(counts(lists), counts(before), strict=True)] == [0, 1, 0]
    now, was = bits(lists), bits(before)
    for name in ("param", "square", "buffer", "curvature", *(("square_residual",) if lists["square_residual"] else ())):
        assert now[name][1] == was[name][1] and now[name][0] != was[name][0], name


def test_found_inf_skips_and_counts_every_block():
    call = scaled_call(SHAPES, rule=WHITENED, found_inf=1.0)
    lists, before = call.tensors()[0], call.tensors()[0]
    call.run(lists)
    assert counts(lists) == [n + 1 for n in counts(before)]
    assert {**bits(lists), "skipped": None} == {**bits(before), "skipped": None}


def test_zero_gradient_keeps_the_curvature_and_continues_the_momentum():
    call = scaled_call([4, 4, 7], rule=WHITENED)
    lists, _ = call.tensors()
    for grad in lists["grad"]:
        grad.zero_()
    before = copied(lists)
    call.run(lists)
    assert_matches_reference(call, lists, before)
    assert_equal({n: lists[n] for n in ("square", "curvature")}, {n: before[n] for n in ("square", "curvature")})
    assert counts(lists) == counts(before)


# ---- compilations, versions of tensors and random bits -----------------------------------------------------------


def test_changed_values_do_not_recompile_and_an_empty_list_is_allowed():
    call = scaled_call([CHUNK, 5], ("whole",), BF16, BF16, BF16, BF16, "stochastic", "stochastic", rule=WHITENED)
    call.run()
    before = launches.num_compilations()
    for rule in RULES[1:]:
        scaled_call([3], ("whole",), BF16, BF16, BF16, BF16, "stochastic", "stochastic", lr=0.5, rule=rule).run()
    scaled_call([], ("whole",), BF16, BF16, BF16, BF16, rule=MIXED[2]).run()
    assert launches.num_compilations() == before


def test_changed_tensors_get_a_new_version():
    call = scaled_call([5], ("whole",), BF16, BF16, BF16, BF16, "compensated", "compensated", rule=WHITENED)
    lists, _ = call.tensors()
    before = {name: x._version for name, (x,) in lists.items()}
    call.run(lists)
    assert {name for name, (x,) in lists.items() if x._version == before[name]} == {"grad"}


def test_random_bits_of_s_match_the_documentation():
    """s of one tensor decays, and is rounded with the documented random bits."""
    call = scaled_call(
        [64], ("whole",), *(BF16,) * 4, "stochastic", "nearest", exact=True, rule={"momentum_on": "update"}
    )
    lists, _ = call.tensors()
    old = lists["square"][0].float()
    call.run(lists)
    draws = rnd.BlockBits(torch.tensor([-3], dtype=torch.int32), torch.tensor(3.0), rnd.SLOT_SQUARE, 64)
    expected = rnd.round_stochastic(old.cpu() * (1 - 2.0**-9), draws()[0])
    assert torch.equal(lists["square"][0].cpu(), expected)
