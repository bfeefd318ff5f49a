"""A run that is saved and resumed is, bit for bit, the run that never stopped."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import CASES, OPTIONS, Case, Model, assert_same_bits, same_bits, snapshot, train
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim.lr_scheduler import OneCycleLR

from rootfree_kernels import GrowingInterval, IFShampoo, RFRMSProp

FIRST, SECOND = range(5), range(5, 10)


def every_fourth(step: int) -> bool:
    return step % 4 == 0


bf16 = torch.bfloat16
RESUMED = [
    *CASES,
    Case("IFShampoo-growing-interval", IFShampoo, {"precondition_frequency": GrowingInterval(3)}),
    Case("IFShampoo-callable", IFShampoo, {"precondition_frequency": every_fourth}),
    Case("IFShampoo-stochastic-bf16-weights", IFShampoo, {}, bf16),
    Case("IFShampoo-bf16-state", IFShampoo, {"state_dtype": bf16, "rounding": "nearest"}),
    Case("IFShampoo-packed", IFShampoo, {"packed_momentum": True, "state_dtype": bf16, "cache_products": False}),
    Case("IFShampoo-fp64-factors", IFShampoo, {"factor_dtype": torch.float64}),
    Case("IFShampoo-capturable", IFShampoo, {"capturable": True}),
    Case("RFRMSProp-stochastic-bf16-state", RFRMSProp, {"state_dtype": bf16}, bf16),
    Case(
        "RFRMSProp-compensated-bf16-state",
        RFRMSProp,
        {"state_dtype": bf16, "rounding": "compensated", "weight_rounding": "compensated"},
        bf16,
    ),
]
resumed = pytest.mark.parametrize("case", RESUMED, ids=lambda case: case.name)


def through_file(saved: Any) -> Any:
    """Saved and loaded in the way that runs no code from the file."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def newcomer(case: Case) -> tuple[Model, torch.optim.Optimizer]:
    """Another model and an optimizer of the same class that knows nothing of the options, but for callables, which are
    the one thing that a checkpoint cannot hold."""
    model = Model(case.dtype, seed=-2)
    callables = {name: value for name, value in case.options.items() if callable(value)}
    return model, case.optimizer(model.parameters(), batch_size=1, **callables)


def uninterrupted(case: Case) -> dict[str, torch.Tensor]:
    model, optimizer = case.start()
    train(model, optimizer, [*FIRST, *SECOND])
    return snapshot(optimizer)


@resumed
def test_a_resumed_run_is_the_uninterrupted_one(case: Case) -> None:
    model, optimizer = case.start()
    train(model, optimizer, FIRST)
    saved = through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    at_save = snapshot(optimizer)
    model, optimizer = newcomer(case)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert_same_bits(snapshot(optimizer), at_save)  # dtypes included
    train(model, optimizer, SECOND)
    assert_same_bits(snapshot(optimizer), uninterrupted(case))


@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
def test_a_resumed_run_with_a_schedule_is_the_uninterrupted_one(case: Case, as_tensor: bool) -> None:
    """The schedule moves both lr and momentum."""

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
    """Their count is part of the state."""
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
    """Where `Optimizer.load_state_dict` would cast floating state to the parameter's dtype."""
    model, optimizer = case.start()
    train(model, optimizer, FIRST)
    model, loaded = newcomer(case)
    loaded.load_state_dict(through_file(optimizer.state_dict()))
    wide = case.options.get("state_dtype", torch.float32)
    factors = case.options.get("factor_dtype", bf16)
    expected = {
        "step": torch.float32,
        "momentum_buffer": wide,
        "square": wide,
        "factor": factors,
        "momentum": factors,
        "residual": torch.int16,
        "skipped": torch.int32,
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
    """Nothing that it derived from its old state lives on."""
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
    """As when training goes back to its best checkpoint."""
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


def test_the_callable_of_the_loading_optimizer_counts() -> None:
    """A checkpoint names a callable and no more, so a changed one is the user's choice."""
    model = Model()
    optimizer = IFShampoo(model.parameters(), **OPTIONS, precondition_frequency=every_fourth)
    train(model, optimizer, FIRST)
    saved = through_file(optimizer.state_dict())
    assert "every_fourth" in saved["param_groups"][0]["precondition_frequency"]
    own = GrowingInterval(2)
    loaded = IFShampoo(Model().parameters(), **OPTIONS, precondition_frequency=own)
    loaded.load_state_dict(saved)
    assert loaded.param_groups[0]["precondition_frequency"] is own


def test_a_group_without_a_callable_keeps_its_own_number_and_warns_where_one_was_saved() -> None:
    def make(frequency: Any) -> IFShampoo:
        params = list(Model().parameters())
        group = {"params": params[:2], "precondition_frequency": frequency}
        return IFShampoo([group, {"params": params[2:]}], **OPTIONS)

    loaded = make(5)
    with pytest.warns(UserWarning, match=r"saved as a callable: every_fourth; 5 is kept"):
        loaded.load_state_dict(make(every_fourth).state_dict())
    assert [group["precondition_frequency"] for group in loaded.param_groups] == [5, 1]


# ---- state tensors that users put in place -------------------------------------------------------------------------


def replace(state: dict[str, Any], name: str, value: torch.Tensor) -> None:
    state[name] = value


def write(state: dict[str, Any], name: str, value: torch.Tensor) -> None:
    state[name].copy_(value)


@pytest.mark.parametrize("put", [replace, write])
@pytest.mark.parametrize("steps_before", [3, 4], ids=["update-next", "no-update-next"])
def test_a_state_tensor_put_in_place_by_hand_takes_effect(case: Case, put: Any, steps_before: int) -> None:
    """A new tensor or new numbers in the old one: the run goes on as one that was loaded with them."""
    model, optimizer = case.start()
    train(model, optimizer, range(steps_before))
    name = "factor_c" if case.is_shampoo else "square"
    value = optimizer.state[model.weight][name] * 2

    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    saved[1]["state"][0][name] = value.clone()
    loaded_model, loaded = case.start()
    loaded_model.load_state_dict(saved[0])
    loaded.load_state_dict(saved[1])

    put(optimizer.state[model.weight], name, value.clone())
    steps = range(steps_before, steps_before + 4)
    train(model, optimizer, steps)
    train(loaded_model, loaded, steps)
    assert_same_bits(snapshot(optimizer), snapshot(loaded))


def test_state_that_is_deleted_starts_anew(case: Case) -> None:
    """`optimizer.state.clear()` and `del optimizer.state[p]` are ways to reset an optimizer."""
    model, optimizer = case.start()
    start = copy.deepcopy(model.state_dict())
    train(model, optimizer, FIRST)
    optimizer.state.clear()
    model.load_state_dict(start)
    train(model, optimizer, [*FIRST, *SECOND])
    assert_same_bits(snapshot(optimizer), uninterrupted(case))


# ---- hooks ---------------------------------------------------------------------------------------------------------


def test_state_dict_hooks_see_and_may_change_what_is_saved(case: Case) -> None:
    model, optimizer = case.start()
    train(model, optimizer, FIRST)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append(opt))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "note": "kept"})
    assert optimizer.state_dict()["note"] == "kept"
    assert seen == [optimizer]


def test_a_load_pre_hook_sees_and_may_change_what_is_loaded(case: Case) -> None:
    model, optimizer = case.start()
    train(model, optimizer, FIRST)
    saved = optimizer.state_dict()
    halved = saved["state"][0]["momentum_buffer"] / 2

    def halve(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = {**state_dict["state"], 0: {**state_dict["state"][0], "momentum_buffer": halved}}
        return {**state_dict, "state": state}

    model, loaded = newcomer(case)
    loaded.register_load_state_dict_pre_hook(halve)
    loaded.load_state_dict(saved)
    assert same_bits(loaded.state[model.weight]["momentum_buffer"], halved)


def test_a_load_post_hook_sees_the_loaded_state_and_may_change_it(case: Case) -> None:
    model, optimizer = case.start()
    train(model, optimizer, FIRST)
    saved, at_save = optimizer.state_dict(), snapshot(optimizer)
    model, loaded = newcomer(case)
    seen = {}

    def hook(opt: torch.optim.Optimizer) -> None:
        seen.update({name: x for name, x in snapshot(opt).items() if not name.endswith(" weight")})
        opt.state[model.weight]["momentum_buffer"].zero_()
        opt.state[model.bias]["square"] = torch.full_like(opt.state[model.bias]["square"], 2.0)

    loaded.register_load_state_dict_post_hook(hook)
    loaded.load_state_dict(saved)
    assert_same_bits(seen, {name: x for name, x in at_save.items() if not name.endswith(" weight")})
    assert not loaded.state[model.weight]["momentum_buffer"].any()
    assert (loaded.state[model.bias]["square"] == 2).all()


# ---- torch.distributed.checkpoint ----------------------------------------------------------------------------------


def dcp_parts(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}


@resumed
@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")  # no process group: one process, as is meant
def test_a_distributed_checkpoint_resumes(case: Case, tmp_path: Path) -> None:
    model, optimizer = case.start()
    train(model, optimizer, FIRST)
    dcp.save(dcp_parts(model, optimizer), checkpoint_id=tmp_path, no_dist=True)

    model = Model(case.dtype, seed=-2)
    optimizer = case.make(model.parameters(), lr=1.0)
    loaded = dcp_parts(model, optimizer)
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    model.load_state_dict(loaded["model"])
    set_optimizer_state_dict(model, optimizer, loaded["optimizer"])
    train(model, optimizer, SECOND)
    assert_same_bits(snapshot(optimizer), uninterrupted(case))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_products_kept_between_updates_are_made_anew_bit_for_bit(dtype: torch.dtype) -> None:
    """They are no part of a checkpoint; sizes and number of the blocks are such that a CPU slices the batch."""

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
