"""A resumed run is bitwise equal to an uninterrupted run."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from rootfree_kernels import GrowingInterval, IFShampoo
from tests.calls.optimizers import OPTIONS, Case, Model, snapshot, train
from tests.calls.tensors import assert_same_bits
from tests.optim.checkpoints import FIRST, SECOND, bf16, every_fourth, newcomer, resumed, through_file, uninterrupted


@resumed
def test_a_resumed_run_matches_an_uninterrupted_run(case: Case) -> None:
    model, optimizer = case.start()
    train(model, optimizer, FIRST)
    saved = through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    at_save = snapshot(optimizer)
    model, optimizer = newcomer(case)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert_same_bits(snapshot(optimizer), at_save)  # including dtypes
    train(model, optimizer, SECOND)
    assert_same_bits(snapshot(optimizer), uninterrupted(case))


@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
def test_a_resumed_run_with_a_schedule_matches_an_uninterrupted_run(case: Case, as_tensor: bool) -> None:
    """The schedule changes both lr and momentum."""

    def start() -> tuple[Model, torch.optim.Optimizer, OneCycleLR]:
        model, optimizer = case.start(lr=torch.tensor(0.01) if as_tensor else 0.01)
        return model, optimizer, OneCycleLR(optimizer, max_lr=0.05, total_steps=11)

    def run(steps: range, model: Model, optimizer: torch.optim.Optimizer, schedule: OneCycleLR) -> None:
        for step in steps:
            train(model, optimizer, [step])
            schedule.step()

    whole = start()
    run(range(10), *whole)
    first = start()
    run(FIRST, *first)
    saved = through_file([part.state_dict() for part in first])
    second = start()
    for part, state in zip(second, saved, strict=True):
        part.load_state_dict(state)
    run(SECOND, *second)
    assert_same_bits(snapshot(second[1]), snapshot(whole[1]))
    assert second[1].param_groups[0]["lr"] == whole[1].param_groups[0]["lr"]


def test_a_run_with_skipped_steps_resumes(case: Case) -> None:
    """The number of skipped steps is part of the state."""
    finals = []
    for interrupted in (True, False):
        model, optimizer = case.start()
        train(model, optimizer, FIRST)
        model.weight.grad[0, 0] = torch.nan
        optimizer.step()
        if interrupted:
            saved = through_file([model.state_dict(), optimizer.state_dict()])
            model, optimizer = newcomer(case)
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        train(model, optimizer, SECOND)
        finals.append(snapshot(optimizer))
    assert_same_bits(*finals)
    assert sum(int(value.sum()) for name, value in finals[0].items() if "skipped" in name) == 1


def test_a_run_that_was_saved_before_some_parameters_had_gradients_resumes(case: Case) -> None:
    finals = []
    for interrupted in (True, False):
        model, optimizer = case.start()
        model.twin.requires_grad_(False)
        model.bias.requires_grad_(False)
        train(model, optimizer, FIRST)
        if interrupted:
            saved = through_file([model.state_dict(), optimizer.state_dict()])
            model, optimizer = newcomer(case)
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        model.requires_grad_(True)
        train(model, optimizer, SECOND)
        finals.append(snapshot(optimizer))
    assert_same_bits(*finals)
    assert (finals[0]["0 step"], finals[0]["1 step"]) == (10, 5)


@resumed
def test_loading_keeps_every_dtype(case: Case) -> None:
    """`Optimizer.load_state_dict` would cast floating state to the dtype of the parameter."""
    model, optimizer = case.start()
    train(model, optimizer, FIRST)
    model, loaded = newcomer(case)
    loaded.load_state_dict(through_file(optimizer.state_dict()))
    wide = case.options.get("state_dtype", torch.float32)
    factors = case.options.get("factor_dtype", bf16)
    expected = {
        "step": torch.int64,
        "momentum_buffer": wide,
        "square": wide,
        "factor": factors,
        "momentum": factors,
        "residual": torch.int16,
        "skipped": torch.int32,
        "curvature": torch.float32,
    }
    for state in loaded.state.values():
        for name, value in state.items():
            kind = "residual" if "residual" in name else name if name in expected else name.split("_")[0]
            assert value.dtype == expected[kind.split(".")[0]], name


def test_a_loaded_state_shares_no_memory_with_the_state_dict(case: Case) -> None:
    model, optimizer = case.start()
    train(model, optimizer, FIRST)
    saved = copy.deepcopy(optimizer.state_dict())
    untouched = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    train(model, optimizer, SECOND)
    for index, state in saved["state"].items():
        assert_same_bits(state, untouched["state"][index])


def test_loading_into_an_optimizer_that_has_stepped_takes_effect(case: Case) -> None:
    """Plans and cached products of the old state are replaced."""
    model, optimizer = case.start()
    train(model, optimizer, FIRST)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    train(model, optimizer, range(20, 22))
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(model, optimizer, SECOND)
    assert_same_bits(snapshot(optimizer), uninterrupted(case))


@pytest.mark.parametrize("restored", ["loaded", "deepcopied", "unpickled"])
def test_a_checkpoint_loads_into_an_optimizer_that_was_restored_before(case: Case, restored: str) -> None:
    """This happens when training goes back to its best checkpoint."""
    model, optimizer = case.start()
    train(model, optimizer, FIRST)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    if restored == "loaded":
        optimizer.load_state_dict(saved[1])
    elif restored == "deepcopied":
        model, optimizer = copy.deepcopy((model, optimizer))
    else:
        model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    train(model, optimizer, range(20, 22))
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(model, optimizer, SECOND)
    assert_same_bits(snapshot(optimizer), uninterrupted(case))


def test_loading_keeps_the_callable_of_the_optimizer() -> None:
    """A checkpoint contains only the name of a callable, so the user may change it."""
    model = Model()
    optimizer = IFShampoo(model.parameters(), **OPTIONS, precondition_frequency=every_fourth)
    train(model, optimizer, FIRST)
    saved = through_file(optimizer.state_dict())
    assert "every_fourth" in saved["param_groups"][0]["precondition_frequency"]
    own = GrowingInterval(2)
    loaded = IFShampoo(Model().parameters(), **OPTIONS, precondition_frequency=own)
    loaded.load_state_dict(saved)
    assert loaded.param_groups[0]["precondition_frequency"] is own


def test_loading_warns_if_a_saved_callable_is_missing() -> None:
    def make(frequency: Any) -> IFShampoo:
        params = list(Model().parameters())
        group = {"params": params[:2], "precondition_frequency": frequency}
        return IFShampoo([group, {"params": params[2:]}], **OPTIONS)

    loaded = make(5)
    with pytest.warns(UserWarning, match=r"saved as a callable: every_fourth; 5 is kept"):
        loaded.load_state_dict(make(every_fourth).state_dict())
    assert [group["precondition_frequency"] for group in loaded.param_groups] == [5, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_cached_products_are_recomputed_bitwise(dtype: torch.dtype) -> None:
    """Checkpoints do not contain products. The batch is so large that eager PyTorch on a CPU processes it in slices."""

    def start() -> tuple[list[torch.nn.Parameter], IFShampoo]:
        params = [torch.nn.Parameter(torch.zeros(300, 262)) for _ in range(5)]
        return params, IFShampoo(params, **{**OPTIONS, "factor_dtype": dtype, "precondition_frequency": 4})

    def run(params: list[torch.nn.Parameter], optimizer: IFShampoo, steps: range) -> None:
        for step in steps:
            for index, param in enumerate(params):
                generator = torch.Generator().manual_seed(100 * step + index)
                param.grad = torch.randn(param.shape, generator=generator)
            optimizer.step()

    params, optimizer = start()
    run(params, optimizer, range(2))
    resumed, loaded = start()
    for param, source in zip(resumed, params, strict=True):
        param.data.copy_(source.data)
    loaded.load_state_dict(optimizer.state_dict())
    run(params, optimizer, range(2, 4))
    run(resumed, loaded, range(2, 4))
    assert all(torch.equal(x, y) for x, y in zip(params, resumed, strict=True))
