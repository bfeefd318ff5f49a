"""The functions of `torch.distributed.checkpoint` save and load the optimizers, in all of their modes."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from tests.calls.optimizers import Case, Model, snapshot, train
from tests.calls.tensors import assert_same_bits
from tests.optim.checkpoints import FIRST, SECOND, flat, resumed, through_file, uninterrupted

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="this PyTorch was built without torch.distributed"),
    # PyTorch warns that there is no process group, that FSDP1 is for GPUs, and of functions that PyTorch itself calls.
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

FLAGS = ("full_state_dict", "cpu_offload", "flatten_optimizer_state_dict", "strict")
MODES = [dict(zip(FLAGS, values, strict=True)) for values in itertools.product((False, True), repeat=len(FLAGS))]
each_mode = pytest.mark.parametrize(
    "mode", MODES, ids=lambda mode: "+".join(name for name in FLAGS if mode[name]) or "plain"
)

some_modes = pytest.mark.parametrize("mode", [MODES[1], MODES[3], MODES[-3]], ids=["strict", "flat", "full"])


def loading(mode: dict[str, bool], **others: bool) -> StateDictOptions:
    """Return the options for a load. PyTorch loads a full flattened state dict only as one that is not full."""
    is_full = mode["full_state_dict"] and not mode["flatten_optimizer_state_dict"]
    return StateDictOptions(**{**mode, **others, "full_state_dict": is_full})


def trained(case: Case, **changes: Any) -> tuple[Model, torch.optim.Optimizer]:
    model, optimizer = case.start(**changes)
    train(model, optimizer, FIRST)
    return model, optimizer


def fresh(case: Case) -> tuple[Model, torch.optim.Optimizer]:
    """Return another model with other weights, and an optimizer with another learning rate."""
    model = Model(case.dtype, seed=-2)
    return model, case.make(model.parameters(), lr=1.0)


def assert_goes_on(case: Case, model: Model, optimizer: torch.optim.Optimizer) -> None:
    """Check that a resumed run is bitwise equal to an uninterrupted run."""
    train(model, optimizer, SECOND)
    assert_same_bits(snapshot(optimizer), uninterrupted(case))


@each_mode
def test_a_run_resumes_from_an_optimizer_state_dict(case: Case, mode: dict[str, bool]) -> None:
    model, optimizer = trained(case)
    state_dict = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**mode))
    saved = through_file([model.state_dict(), state_dict])
    model, optimizer = fresh(case)
    model.load_state_dict(saved[0])
    set_optimizer_state_dict(model, optimizer, saved[1], options=loading(mode))
    assert_goes_on(case, model, optimizer)


@some_modes
def test_a_run_resumes_from_the_state_dicts_of_model_and_optimizer(case: Case, mode: dict[str, bool]) -> None:
    saved = through_file(list(get_state_dict(*trained(case), options=StateDictOptions(**mode))))
    model, optimizer = fresh(case)
    set_state_dict(model, optimizer, model_state_dict=saved[0], optim_state_dict=saved[1], options=loading(mode))
    assert_goes_on(case, model, optimizer)


@resumed
@some_modes
def test_a_run_resumes_from_a_distributed_checkpoint(case: Case, mode: dict[str, bool], tmp_path: Path) -> None:
    def parts(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        state_dict = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**mode))
        return {"model": model.state_dict(), "optimizer": state_dict}

    dcp.save(parts(*trained(case)), checkpoint_id=tmp_path, no_dist=True)
    model, optimizer = fresh(case)
    loaded = parts(model, optimizer)
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    model.load_state_dict(loaded["model"])
    set_optimizer_state_dict(model, optimizer, loaded["optimizer"], options=loading(mode))
    assert_goes_on(case, model, optimizer)


def test_a_run_resumes_from_a_distributed_checkpoint_of_the_plain_state_dict(case: Case, tmp_path: Path) -> None:
    model, optimizer = trained(case)
    dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    model, optimizer = fresh(case)
    train(model, optimizer, [77])  # makes the state into which the checkpoint is read
    loaded = {"model": model.state_dict(), "optimizer": copy.deepcopy(optimizer.state_dict())}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    assert_goes_on(case, model, optimizer)


@each_mode
def test_frozen_parameters_can_be_left_out(case: Case, mode: dict[str, bool]) -> None:
    finals = []
    for interrupted in (False, True):
        model, optimizer = case.start()
        model.twin.requires_grad_(False)
        model.bias.requires_grad_(False)
        train(model, optimizer, FIRST)
        if interrupted:
            options = StateDictOptions(**mode, ignore_frozen_params=True)
            saved = through_file(get_optimizer_state_dict(model, optimizer, options=options))
            weights = model.state_dict()
            model, optimizer = fresh(case)
            model.load_state_dict(weights)
            model.twin.requires_grad_(False)
            model.bias.requires_grad_(False)
            options = loading(mode, ignore_frozen_params=True)
            set_optimizer_state_dict(model, optimizer, saved, options=options)
        train(model, optimizer, SECOND)
        finals.append(snapshot(optimizer))
    assert_same_bits(*finals)


class Pair(nn.Module):
    """Two models of the tests, the second with names that begin like those of the first."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.part, self.part_two = Model(dtype), Model(dtype, seed=-3)

    def forward(self, step: int) -> torch.Tensor:
        return self.part(step) + self.part_two(step + 100)


@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
@each_mode
def test_groups_and_submodules_resume(case: Case, named: bool, mode: dict[str, bool]) -> None:
    def start() -> tuple[Pair, torch.optim.Optimizer]:
        pair = Pair(case.dtype)
        params = [list(part.named_parameters(prefix=name)) for name, part in pair.named_children()]
        if not named:
            params = [[param for _, param in part] for part in params]
        return pair, case.make([{"params": params[0]}, {"params": params[1], "momentum": 0.5}])

    options = StateDictOptions(**mode)
    pair, optimizer = start()
    train(pair, optimizer, FIRST)
    if not mode["flatten_optimizer_state_dict"]:  # a flattened state dict has no names of submodules
        part = get_optimizer_state_dict(pair, optimizer, submodules={pair.part}, options=options)
        assert {f"part.{name}" for name, _ in pair.part.named_parameters()} <= part["state"].keys()
    saved = through_file(list(get_state_dict(pair, optimizer, options=options)))
    train(pair, optimizer, SECOND)
    resumed_pair, again = start()
    options = loading(mode)
    set_state_dict(resumed_pair, again, model_state_dict=saved[0], optim_state_dict=saved[1], options=options)
    train(resumed_pair, again, SECOND)
    assert_same_bits(snapshot(again), snapshot(optimizer))


# ---- before the first step, and without gradients --------------------------------------------------------------------

BEFORE_TRAINING = {
    "plain": {},
    "decoupled weight decay": {"decoupled_weight_decay": True},
    "tensor lr": {"lr": torch.tensor(0.01)},
    "capturable": {"capturable": True, "lr": torch.tensor(0.01)},
    "bf16 state": {"state_dtype": torch.bfloat16},
}


@pytest.mark.parametrize("changes", BEFORE_TRAINING.values(), ids=BEFORE_TRAINING)
def test_asking_for_the_state_dict_before_training_changes_nothing(case: Case, changes: dict[str, Any]) -> None:
    if changes.get("capturable") and case.options.get("precondition_frequency", 1) != 1:
        changes = {**changes, "precondition_frequency": 1}
    plain_model, plain = case.start(**changes)
    model, optimizer = case.start(**changes)
    weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    saved = get_optimizer_state_dict(model, optimizer)
    assert_same_bits(dict(model.named_parameters()), weights)
    assert all(state["step"] == 0 for state in saved["state"].values())
    get_optimizer_state_dict(model, optimizer)
    train(model, optimizer, FIRST)
    train(plain_model, plain, FIRST)
    assert_same_bits(snapshot(optimizer), snapshot(plain))


def test_a_run_resumes_from_a_checkpoint_before_the_first_step(case: Case) -> None:
    model, optimizer = case.start()
    saved = through_file([model.state_dict(), get_optimizer_state_dict(model, optimizer)])
    model, optimizer = fresh(case)
    model.load_state_dict(saved[0])
    set_optimizer_state_dict(model, optimizer, saved[1])
    train(model, optimizer, FIRST)
    assert_goes_on(case, model, optimizer)


UNUSED = ("twin", "bias")
"""A matrix whose shape another parameter shares, and a vector."""


def train_partly(model: Model, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Take steps in which the unused parameters have no gradients."""
    for step in steps:
        optimizer.zero_grad()
        model(step).backward()
        for name in UNUSED:
            getattr(model, name).grad = None
        optimizer.step()


def run_with_unused(case: Case) -> dict[str, torch.Tensor]:
    """Return the results of a run in which the unused parameters have gradients only at the end."""
    model, optimizer = case.start()
    train_partly(model, optimizer, range(6))
    train(model, optimizer, SECOND)
    return snapshot(optimizer)


@resumed
@pytest.mark.parametrize("again", [False, True], ids=["new", "stepped"])
@some_modes
def test_a_run_with_unused_parameters_resumes_from_a_distributed_checkpoint(
    case: Case, mode: dict[str, bool], again: bool, tmp_path: Path
) -> None:
    """The load is strict, and its plan refuses checkpoints that lack an entry."""

    def parts(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        state_dict = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**{**mode, "strict": True}))
        return {"model": model.state_dict(), "optimizer": state_dict}

    model, optimizer = case.start()
    train_partly(model, optimizer, range(3))
    dcp.save(parts(model, optimizer), checkpoint_id=tmp_path, no_dist=True)
    model, optimizer = fresh(case)
    if again:
        train_partly(model, optimizer, range(20, 22))
    loaded = parts(model, optimizer)
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    model.load_state_dict(loaded["model"])
    optimizer.zero_grad()
    set_optimizer_state_dict(model, optimizer, loaded["optimizer"], options=loading(mode, strict=True))
    train_partly(model, optimizer, range(3, 6))
    train(model, optimizer, SECOND)
    assert_same_bits(snapshot(optimizer), run_with_unused(case))


@resumed
def test_a_run_with_unused_parameters_resumes_from_a_plain_state_dict(case: Case) -> None:
    model, optimizer = case.start()
    train_partly(model, optimizer, range(3))
    before = {param: dict(state) for param, state in optimizer.state.items()}
    saved = through_file([model.state_dict(), optimizer.state_dict()])
    assert {param: dict(state) for param, state in optimizer.state.items()}.keys() == before.keys()
    model, optimizer = fresh(case)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert_same_bits(flat(optimizer.state_dict()["state"]), flat(saved[1]["state"]))
    train_partly(model, optimizer, range(3, 6))
    train(model, optimizer, SECOND)
    assert_same_bits(snapshot(optimizer), run_with_unused(case))


def test_the_state_dict_of_an_optimizer_without_state_has_none(case: Case) -> None:
    model, optimizer = case.start()
    assert optimizer.state_dict()["state"] == {} and not optimizer.state
    model.requires_grad_(False)
    model.weight.requires_grad_(True)
    train(model, optimizer, FIRST)
    assert list(optimizer.state_dict()["state"]) == [0]  # frozen parameters have none


def test_a_hook_of_the_state_dict_sees_the_state_of_unused_parameters_and_may_drop_it(case: Case) -> None:
    model, optimizer = case.start()
    train_partly(model, optimizer, range(3))
    seen = []

    def without_untouched(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.extend(state_dict["state"])
        return {**state_dict, "state": {i: state for i, state in state_dict["state"].items() if state["step"] > 0}}

    optimizer.register_state_dict_post_hook(without_untouched)
    assert len(optimizer.state_dict()["state"]) == len(seen) - len(UNUSED)
