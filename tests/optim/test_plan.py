"""Valid plans are reused, and a step that runs out of memory changes nothing.

The tests of groups, steps and checkpoints show that stale plans are replaced.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from rootfree_kernels import RECIPE, IFShampoo, RFRMSProp
from rootfree_kernels.ops import operators
from rootfree_kernels.optim import base, block_batch, plan, planner
from tests.calls.backends import functions_of, idle_functions, stand_in
from tests.calls.operators import STEMS
from tests.calls.optimizers import CASES, OPTIONS, Case, snapshot, train
from tests.calls.tensors import assert_same_bits
from tests.optim.runs import set_gradients

SHAMPOO = Case("IFShampoo", IFShampoo)


# ---- plans ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the classes whose constructors were called, in order."""
    names: list[str] = []
    for module, name in ((planner, "GroupCache"), (planner, "StepPlan"), (block_batch, "BlockBatch")):
        original = getattr(module, name)

        def make(*args: Any, original: Any = original, name: str = name) -> Any:
            names.append(name)
            return original(*args)

        monkeypatch.setattr(module, name, make)
    return names


def test_plans_are_made_once(case: Case, made: list[str]) -> None:
    """At T = 3 there is one plan for updates and one for other steps. Some options may change without a new plan."""
    model, optimizer = case.start()
    train(model, optimizer, range(4))
    first = list(made)
    assert first.count("GroupCache") == 1
    assert first.count("StepPlan") == (2 if case.options.get("precondition_frequency") == 3 else 1)
    for step in range(4, 12):
        optimizer.param_groups[0].update(lr=0.01 / step, batch_size=step, momentum=0.5 + step / 100)
        train(model, optimizer, [step])
    assert made == first


def test_each_set_of_gradients_has_its_own_plan(case: Case, made: list[str]) -> None:
    model, optimizer = case.start()
    train(model, optimizer, range(3))

    def take(steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            model(step).backward()
            if step % 2:
                model.twin.grad = model.bias.grad = None
            optimizer.step()

    take(range(3, 15))
    first = list(made)
    assert first.count("GroupCache") == 1
    take(range(15, 27))
    assert made == first


def test_parameters_that_move_in_memory_keep_their_plans(case: Case, made: list[str]) -> None:
    model, optimizer = case.start()
    train(model, optimizer, range(4))
    first = list(made)
    for param in model.parameters():
        param.data = param.data.clone()
    train(model, optimizer, range(4, 7))
    assert made == first
    other_model, other = case.start()
    train(other_model, other, range(7))
    assert_same_bits(snapshot(optimizer), snapshot(other))


def test_counts_of_steps_are_one_tensor(case: Case) -> None:
    model, optimizer = case.start()
    train(model, optimizer, range(2))
    steps = [state["step"] for state in optimizer.state.values()]
    size = steps[0].element_size()
    assert [step.data_ptr() - steps[0].data_ptr() for step in steps] == [size * row for row in range(len(steps))]
    steps[0].fill_(7)  # a value set by the user
    train(model, optimizer, range(2, 3))
    assert [step.item() for step in steps] == [8, *[3] * (len(steps) - 1)]


class Count(TorchDispatchMode):
    """Count the operations that reach the dispatcher."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", [RFRMSProp, IFShampoo])
def test_the_number_of_operations_does_not_grow_with_that_of_parameters(
    optimizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operations inside operators do not count: operators are replaced by functions that do nothing."""
    stand_in(monkeypatch, "eager", **idle_functions())

    def operations(num_layers: int) -> int:
        params = [nn.Parameter(torch.zeros(shape)) for shape in [(7, 5), (6,)] * num_layers]
        for param in params:
            param.grad = torch.zeros_like(param)
        opt = optimizer(params, **OPTIONS)
        opt.step()
        with Count() as count:
            opt.step()
        return count.calls

    assert operations(2) == operations(50) < 15


def test_operators_bypass_the_dispatcher_unless_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = SHAMPOO.start()
    train(model, optimizer, range(1))
    seen: list[str] = []
    for stem in STEMS:
        registered = getattr(operators, f"_{stem}")
        noted = partial(lambda stem, op, *args: (seen.append(stem), op(*args))[1], stem, registered)
        monkeypatch.setattr(operators, f"_{stem}", noted)
    train(model, optimizer, range(1, 2))
    assert not seen
    with Count():
        optimizer.step()
    assert set(seen) == {"rf_rmsprop", "kron_gather", "kron_factor", "kron_step"}
    seen.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        optimizer.step()
    assert seen


# ---- CUDA graphs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.name)
def test_a_capture_that_cannot_be_replayed_is_refused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (base, planner):
        monkeypatch.setattr(module, "is_captured", lambda device: True)
    for capturable, steps, message in ((True, 0, "take a step"), (False, 1, "pass capturable=True")):
        monkeypatch.setattr(planner, "is_captured", lambda device: False)
        monkeypatch.setattr(base, "is_captured", lambda device: False)
        model, optimizer = case.start(capturable=capturable)
        train(model, optimizer, range(steps))
        optimizer.zero_grad()
        model(steps).backward()
        before = snapshot(optimizer)
        for module in (base, planner):
            monkeypatch.setattr(module, "is_captured", lambda device: True)
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        assert_same_bits(snapshot(optimizer), before)


# ---- workspace -----------------------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """Measure the peak memory of storages that are created while this mode is active."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {storage.data_ptr() for storage in storages(args)}
        result = func(*args, **(kwargs or {}))
        self._held = {address: held for address, held in self._held.items() if not held[0].expired()}
        for storage in storages(result):
            if storage.data_ptr() not in known:
                self._held[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.bytes = max(self.bytes, sum(size for _, size in self._held.values()))
        return result


def storages(x: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(x) if isinstance(leaf, Tensor)]


@contextmanager
def peak_of_triton() -> Iterator[Peak]:
    """Measure the peak memory of a step with Triton.

    A mode around a step does not see inside operators, so the mode is also enabled there. Memory of Triton's
    interpreter does not count.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    peak, run_kernel = Peak(), interpreter.GridExecutor.__call__

    def watched(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            with peak:
                return function(*args, **options)

        return call

    def unwatched(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return run_kernel(*args, **kwargs)

    functions = functions_of("triton", "kron_gather", "kron_factor", "kron_step")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", unwatched)
        stand_in(patch, "triton", **{name: watched(function) for name, function in functions.items()})
        with peak:
            yield peak


interpreted = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is used only without a GPU"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning:triton"),
]

TAKEN = [
    ((48, 32), {}, False),
    ((45, 31), {"clip": "row_sum", "rounding": "compensated"}, False),
    ((48, 32), {"precondition_frequency": 2}, True),
    ((16, 3, 2, 2), {"precondition_frequency": 2, "cache_products": False}, False),
    ((16, 3, 2, 2), {"cache_products": True}, True),
    ((48, 32), {"packed_momentum": True}, False),
    ((45, 31), {"packed_momentum": True}, False),
    ((16, 3, 2, 2), {"packed_momentum": True}, True),
    ((48, 32), {**RECIPE}, False),
    ((45, 31), {**RECIPE, "rounding": "compensated"}, True),
    ((45, 31), {**RECIPE, "direction": "root_free"}, False),
]


@pytest.mark.parametrize(("shape", "options", "partly"), [pytest.param(*case, marks=interpreted) for case in TAKEN])
def test_reserved_memory_suffices_for_the_kernels(
    shape: tuple[int, ...], options: dict[str, Any], partly: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is at most 1.5 times the peak memory, even if some parameters of a batch have no gradient."""
    monkeypatch.setenv("ROOTFREE_BACKEND", "triton")
    params = [nn.Parameter(torch.ones(shape)) for _ in range(3)]
    optimizer = IFShampoo(params, **{**OPTIONS, **options})
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    params[0].grad = None if partly else params[0].grad
    for _ in range(2):
        (ready,) = optimizer._planner.planned_steps(optimizer.param_groups, optimizer.state)
        with peak_of_triton() as peak:
            optimizer.step()
        assert peak.bytes <= sum(ready.plan.workspace) <= 1.5 * peak.bytes


class Memory:
    """A replacement of `Tensor.new_empty` that raises if workspaces exceed a number of bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.new_empty = limit, Tensor.new_empty

    def __get__(self, tensor: Tensor, owner: Any = None) -> Any:
        return partial(self, tensor)

    def __call__(self, tensor: Tensor, *size: Any, **options: Any) -> Tensor:
        x = self.new_empty(tensor, *size, **options)
        if options.get("dtype") == torch.uint8:
            self.limit -= x.numel()
            if self.limit < 0:
                raise torch.OutOfMemoryError("no memory")
        return x


@pytest.mark.parametrize("group", [pytest.param(group, marks=interpreted) for group in (0, 1)])
def test_a_step_without_memory_for_its_largest_batch_changes_nothing(
    group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest batch may be in any group."""
    monkeypatch.setenv("ROOTFREE_BACKEND", "triton")
    monkeypatch.setattr(plan, "RESERVING_DEVICES", ("cpu",))
    params = [nn.Parameter(torch.ones(size, size)) for size in ((24, 8), (8, 24))[group]]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = IFShampoo([{"params": [param]} for param in params], **OPTIONS)
    optimizer.step()
    steps = optimizer._planner.planned_steps(optimizer.param_groups, optimizer.state)
    needed = [sum(step.plan.workspace) for step in steps]
    assert needed[group] > needed[1 - group]
    before = snapshot(optimizer)
    for limit in (max(needed) - 1, max(needed)):
        assert_same_bits(snapshot(optimizer), before)
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "new_empty", Memory(limit))
            if limit < max(needed):
                with pytest.raises(torch.OutOfMemoryError):
                    optimizer.step()
            else:
                optimizer.step()
    assert not torch.equal(params[0], before["0 weight"])


@pytest.mark.parametrize("dropped", ["a group", "a parameter"])
def test_what_was_dropped_is_freed(case: Case, dropped: str) -> None:
    layers = [nn.Linear(5, 7), nn.Linear(5, 7)]
    optimizer = case.make([{"params": list(layer.parameters())} for layer in layers])

    def step() -> None:
        for group in optimizer.param_groups:
            set_gradients(group["params"], 0)
        optimizer.step()

    step()
    old = weakref.ref(layers[1].weight)
    if dropped == "a group":
        for param in optimizer.param_groups.pop()["params"]:
            del optimizer.state[param]
        layers.pop()
    else:
        del optimizer.state[layers[1].weight]
        layers[1].weight = nn.Parameter(torch.ones(7, 5))
        optimizer.param_groups[1]["params"][0] = layers[1].weight
    param = None
    step()
    gc.collect()
    assert old() is None


def test_a_group_takes_the_place_of_another_that_was_made_by_another_rule() -> None:
    params = [nn.Parameter(torch.ones(7, 5)) for _ in range(2)]
    optimizer = IFShampoo([{"params": params[:1], **RECIPE}, {"params": params[1:]}], **OPTIONS)
    for number in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        if number == 0:
            for param in optimizer.param_groups.pop(0)["params"]:
                del optimizer.state[param]
    assert optimizer.state[params[1]]["step"] == 2


def test_parameters_that_wait_for_their_first_gradient_do_not_split_batches(case: Case, made: list[str]) -> None:
    """They have state, from a checkpoint or because the state dict was asked for. They take part when they can."""
    params = [nn.Parameter(torch.ones(7, 5)) for _ in range(3)]
    optimizer = case.make(params)
    set_gradients(params, 0)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for param in params:
        param.grad.zero_()
    optimizer.step()  # makes state only
    assert all(state["step"] == 0 for state in optimizer.state.values())
    optimizer.param_groups[0]["lr"] = 0.01
    params[2].grad = None
    for step in range(2):
        set_gradients(params[:2], step)
        optimizer.step()
    (device_state,) = optimizer._planner.caches[0].device_states
    assert device_state.params == params[:2]
    set_gradients(params, 2)
    optimizer.step()
    assert [int(state["step"]) for state in optimizer.state.values()] == [3, 3, 1]
