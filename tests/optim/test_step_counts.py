"""Counts of steps are exact beyond 2²⁴, from where on an FP32 count would stand still."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from rootfree_kernels import IFShampoo, RFRMSProp
from tests.calls.cpu import needs_cpp
from tests.calls.optimizers import Case, Model, snapshot, train
from tests.calls.tensors import assert_same_bits, same_bits
from tests.optim.checkpoints import FIRST, SECOND, newcomer, through_file

START = 2**24
LONG = [START - 3, 2**31 - 3, 2**40]


def set_counts(optimizer: Any, count: int) -> None:
    for state in optimizer.state.values():
        state["step"].fill_(count)


def counts(optimizer: Any) -> set[int]:
    return {int(state["step"]) for state in optimizer.state.values()}


@pytest.mark.parametrize("start", LONG)
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("backend", ["eager", pytest.param("cpp", marks=needs_cpp)])
def test_a_count_goes_on(monkeypatch: pytest.MonkeyPatch, backend: str, capturable: bool, start: int) -> None:
    monkeypatch.setenv("ROOTFREE_BACKEND", backend)
    for case in (Case("", RFRMSProp), Case("", IFShampoo)):
        model, optimizer = case.start(capturable=capturable)
        train(model, optimizer, range(1))
        set_counts(optimizer, start)
        train(model, optimizer, range(6))
        assert counts(optimizer) == {start + 6}


@pytest.mark.parametrize("start", LONG)
def test_factors_are_updated_at_every_other_step(start: int) -> None:
    model, optimizer = Case("", IFShampoo).start(precondition_frequency=2)
    train(model, optimizer, range(1))
    set_counts(optimizer, start)
    for step in range(8):
        before = optimizer.state[model.weight]["factor_c"].clone()
        train(model, optimizer, [step])
        changed = not same_bits(optimizer.state[model.weight]["factor_c"], before)
        assert changed == ((start + step) % 2 == 0)


@pytest.mark.parametrize("capturable", [False, True])
def test_a_checkpoint_keeps_a_long_count(case: Case, capturable: bool) -> None:
    """`Optimizer.load_state_dict` would make it FP32 if the optimizer is capturable."""
    every_step = {"precondition_frequency": 1} if case.is_shampoo else {}  # as capturable=True requires
    model, optimizer = case.start(capturable=capturable, **every_step)
    train(model, optimizer, FIRST)
    set_counts(optimizer, START + 1)
    loaded = newcomer(case)[1]
    loaded.load_state_dict(through_file(optimizer.state_dict()))
    assert counts(loaded) == {START + 1}


def with_fp32_counts(optimizer: Any) -> Any:
    """Return the state dict of an optimizer as older versions saved it."""
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = state["step"].float()
    return saved


def test_an_older_checkpoint_with_fp32_counts_resumes_bitwise(case: Case) -> None:
    finals = []
    for make_older in (False, True):
        model, optimizer = case.start()
        train(model, optimizer, FIRST)
        if make_older:
            saved = through_file([model.state_dict(), with_fp32_counts(optimizer)])
            model, optimizer = newcomer(case)
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        train(model, optimizer, SECOND)
        finals.append(snapshot(optimizer))
    assert_same_bits(*finals)


def test_an_older_pickle_with_fp32_counts_resumes_bitwise(case: Case) -> None:
    finals = []
    for make_older in (False, True):
        model: Model
        model, optimizer = case.start()
        train(model, optimizer, FIRST)
        for state in optimizer.state.values() if make_older else ():
            state["step"] = state["step"].float()
        model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
        train(model, optimizer, SECOND)
        finals.append(snapshot(optimizer))
    assert_same_bits(*finals)
