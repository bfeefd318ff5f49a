"""`torch.compile` of a step with `capturable=True`: it is one graph of operators, and results are bitwise equal."""

from __future__ import annotations

import copy
import gc
import re
import shutil
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import setuptools  # noqa: F401  imported early, so that TorchInductor gets the distutils of setuptools
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from rootfree_kernels import IFShampoo, RFRMSProp
from tests.calls.optimizers import CASES, OPTIONS, Case, Model, snapshot, train
from tests.calls.tensors import assert_same_bits

BACKEND = "aot_eager"  # traces and functionalizes a graph, and runs it without code generation
bf16 = torch.bfloat16

TRACED = [
    *(case for case in CASES if case.options.get("precondition_frequency", 1) == 1),
    Case("IFShampoo-fp32-factors-tiles", IFShampoo, {"factor_dtype": torch.float32, "max_preconditioner_dim": 3}),
    Case("IFShampoo-bf16-weights", IFShampoo, {}, bf16),
    Case("IFShampoo-cached-products", IFShampoo, {"cache_products": True}),
    Case("IFShampoo-packed", IFShampoo, {"packed_momentum": True}),
    Case("IFShampoo-packed-tiles", IFShampoo, {"packed_momentum": True, "max_preconditioner_dim": 3}),
    Case("IFShampoo-one-by-one", IFShampoo, {"foreach": False}),
    Case("RFRMSProp-bf16-state", RFRMSProp, {"state_dtype": bf16}, bf16),
]
FEW = [case for case in TRACED if case.name in ("RFRMSProp", "IFShampoo")]
few = pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


class Twins:
    """Two equal runs. One steps eagerly, the other with `torch.compile(step, fullgraph=True)`."""

    def __init__(self, case: Case, backend: str = BACKEND, **changes: Any) -> None:
        self.counter = CompileCounterWithBackend(backend)
        self.runs = [case.start(capturable=True, lr=torch.tensor(0.01), **changes) for _ in range(2)]
        self.model, self.optimizer = self.runs[1]
        self.compiled = torch.compile(self.optimizer.step, backend=self.counter, fullgraph=True)

    def take(self, steps: Iterable[int], without: Iterable[str] = ()) -> None:
        """Take steps with different learning rates. Parameters in `without` have no gradient."""
        for step in steps:
            for (model, optimizer), stepped in zip(self.runs, (self.runs[0][1].step, self.compiled), strict=True):
                optimizer.param_groups[0]["lr"].fill_(0.01 / (1 + step))
                optimizer.zero_grad()
                model(step).backward()
                for name in without:
                    getattr(model, name).grad = None
                stepped()
        assert_same_bits(*(snapshot(optimizer) for _, optimizer in self.runs))

    def both(self, change: Callable[[Model, torch.optim.Optimizer], Any]) -> None:
        for model, optimizer in self.runs:
            change(model, optimizer)

    def compilations(self) -> int:
        return self.counter.frame_count


@pytest.mark.parametrize("case", TRACED, ids=lambda case: case.name)
def test_a_step_is_one_graph_that_is_compiled_once(case: Case) -> None:
    """The first step creates the state and is compiled too. Step counts and learning rates are inputs of the graph."""
    twins = Twins(case)
    twins.take(range(6))
    assert twins.compilations() == 1
    called = {str(node.target) for node in twins.counter.graphs[0].graph.nodes if "rootfree" in str(node.target)}
    kron = {f"rootfree.{stem}.default" for stem in ("kron_gather", "kron_factor", "kron_step")}
    diagonal = "scaled_rmsprop" if case.is_recipe else "rf_rmsprop"
    assert called == ({f"rootfree.{diagonal}.default"} | (kron if case.is_shampoo else set()))


@pytest.mark.skipif(shutil.which("g++") is None, reason="TorchInductor needs a C++ compiler")
@pytest.mark.slow
def test_inductor_compiles_a_step() -> None:
    """The compiled code writes to the tensors of parameters and state without copies."""
    from torch._inductor.utils import run_and_get_code

    twins = Twins(Case("IFShampoo", IFShampoo), "inductor")
    _, (code,) = run_and_get_code(lambda: twins.take(range(1)))
    twins.take(range(1, 4))
    assert twins.compilations() == 1
    calls = re.findall(r"^ *(?:buf\d+ = )?torch\.ops\.rootfree\.(\w+)", code, re.MULTILINE)
    assert calls == ["rf_rmsprop", *("kron_gather", "kron_factor", "kron_step") * 2]
    assert "clone" not in code


@few
def test_eager_and_compiled_steps_may_take_turns(case: Case) -> None:
    twins = Twins(case)
    for start in range(0, 9, 3):
        twins.take(range(start, start + 2))
        twins.both(lambda model, optimizer, step=start + 2: train(model, optimizer, [step]))
    assert twins.compilations() == 1


@few
def test_every_set_of_gradients_is_compiled_once(case: Case) -> None:
    twins = Twins(case)
    for start in range(0, 8, 4):
        twins.take([start])
        twins.take([start + 1], without=["twin", "bias"])
        twins.take([start + 2, start + 3])
    assert twins.compilations() == 2


def halve_state(model: Model, optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        for name in ("momentum_buffer", "factor_c"):
            if name in state:
                state[name] = state[name] / 2


def reload(model: Model, optimizer: torch.optim.Optimizer) -> None:
    lr = optimizer.param_groups[0]["lr"]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.param_groups[0]["lr"] = lr


def change_options(model: Model, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0].update(batch_size=9, momentum=0.5, maximize=True)


def clear_state(model: Model, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state.clear()


def replace_lr(model: Model, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor(0.01)


@few
@pytest.mark.parametrize("change", [halve_state, reload, change_options, clear_state, replace_lr])
def test_changes_by_the_user_take_effect(case: Case, change: Any) -> None:
    twins = Twins(case)
    twins.take(range(2))
    twins.both(change)
    twins.take(range(2, 4))
    # The compiler first treats changed floats as inputs. Operators need constants, so it compiles once more.
    assert twins.compilations() == {replace_lr: 1, change_options: 3}.get(change, 2)


@few
def test_a_group_that_is_added_is_compiled_too(case: Case) -> None:
    def start(model: Model) -> torch.optim.Optimizer:
        return case.make(list(model.parameters())[:3], capturable=True, lr=torch.tensor(0.01))

    twins = Twins(case)
    twins.runs = [(model, start(model)) for model in (Model(), Model())]
    twins.compiled = torch.compile(twins.runs[1][1].step, backend=twins.counter, fullgraph=True)
    twins.take(range(2))
    twins.both(lambda model, optimizer: optimizer.add_param_group({"params": list(model.parameters())[3:]}))
    twins.take(range(2, 4))
    assert twins.compilations() == 2


@few
def test_the_scale_of_grad_scaler_is_an_input_of_the_graph(case: Case) -> None:
    twins = Twins(case)

    def set_scale(scale: float, found_inf: float) -> Any:
        def change(model: Model, optimizer: Any) -> None:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(found_inf)

        return change

    for step, scaling in enumerate([(8.0, 0.0), (4.0, 1.0), (2.0, 0.0)]):
        twins.both(set_scale(*scaling))
        twins.take([step])
    assert twins.compilations() == 1
    assert all(state["skipped"].eq(1).all() for state in twins.optimizer.state.values())


@few
def test_a_training_step_is_compiled_as_a_whole(case: Case) -> None:
    """Only the backward pass breaks the graph. The second call compiles again, because it starts with gradients."""

    def fit(model: torch.nn.Module, optimizer: torch.optim.Optimizer, data: Tensor) -> None:
        optimizer.zero_grad()
        (model(data) - data).square().mean().backward()
        optimizer.step()

    counter = CompileCounterWithBackend(BACKEND)
    compiled = torch.compile(fit, backend=counter)
    runs, frames = [], []
    for _ in range(2):
        model = torch.nn.Linear(5, 5)
        torch.nn.init.eye_(model.weight), torch.nn.init.ones_(model.bias)
        lr = torch.tensor(0.01)
        runs.append((model, case.make(model.parameters(), capturable=True, lr=lr), torch.eye(5)))
    for step in range(5):
        for run, function in zip(runs, (compiled, fit), strict=True):
            run[1].param_groups[0]["lr"].fill_(0.01 / (1 + step))
            function(*run)
        frames.append(counter.frame_count)
    assert_same_bits(*(snapshot(optimizer) for _, optimizer, _ in runs))
    assert frames[1:] == [frames[1]] * 4
    assert any("rootfree" in str(node.target) for graph in counter.graphs for node in graph.graph.nodes)


def test_autocast_around_a_compiled_step_does_not_change_it() -> None:
    case = Case("IFShampoo", IFShampoo, {"factor_dtype": torch.float32})
    twins = Twins(case)
    plain = twins.compiled

    def autocast() -> None:
        with torch.autocast("cpu", bf16):
            plain()

    twins.compiled = autocast
    twins.take(range(3))
    assert twins.compilations() == 1


# ---- errors and memory ---------------------------------------------------------------------------------------------


@few
def test_without_capturable_the_compiler_says_what_to_pass(case: Case) -> None:
    model, optimizer = case.start()
    model(0).backward()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="capturable=True"):
        torch.compile(optimizer.step, backend=BACKEND, fullgraph=True)()


@few
def test_a_bad_gradient_is_refused_before_anything_changes(case: Case) -> None:
    model, optimizer = case.start(capturable=True)
    compiled = torch.compile(optimizer.step, backend=BACKEND)
    for steps in ((), (0, 1)):  # without state and with it
        for step in steps:
            optimizer.zero_grad()
            model(step).backward()
            compiled()
        before = snapshot(optimizer)
        model.bias.grad = torch.ones_like(model.bias).to_sparse()
        with pytest.raises(RuntimeError, match=r"make it dense"):
            compiled()
        assert_same_bits(snapshot(optimizer), before)


def test_a_deleted_optimizer_is_freed() -> None:
    """The compiled graph refers to its tensors, but does not keep it alive."""
    twins = Twins(Case("IFShampoo", IFShampoo, OPTIONS))
    twins.take(range(2))
    kept = [weakref.ref(batch) for state in twins.optimizer._planner.caches[0].device_states for batch in state.batches]
    assert kept and all(ref() is not None for ref in kept)
    del twins
    gc.collect()
    assert all(ref() is None for ref in kept)
