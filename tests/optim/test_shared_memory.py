"""Parameters whose elements share memory are refused. Parameters that share memory with others are stepped in turn."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rootfree_kernels.optim import planner
from rootfree_kernels.optim.overlap import has_internal_overlap, overlap_ranks
from tests.calls.cpu import needs_cpp
from tests.calls.optimizers import CASES, Case, gradients, snapshot
from tests.calls.tensors import assert_same_bits, permuted, sliced
from tests.optim.memory_formats import RULES

# ---- one tensor ----------------------------------------------------------------------------------------------------


def number_of_addresses(shape: Iterable[int], strides: Iterable[int]) -> int:
    strides = list(strides)
    indices = product(*map(range, shape))
    return len({sum(i * stride for i, stride in zip(index, strides, strict=True)) for index in indices})


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_internal_overlap_is_found_exactly(device: str) -> None:
    """Addresses of elements are counted one by one for comparison, on strides of every kind."""
    choose = random.Random(0).choice
    memory, found = torch.empty(10_000, device=device), []
    for _ in range(2000):
        shape = [choose((0, 1, 2, 3, 3, 4, 4, 5, 5, 7)) for _ in range(choose((1, 2, 3, 4)))]
        strides = [choose((0, 1, 2, 3, 4, 5, 7, 12, 20, 35, 60)) for _ in shape]
        x = memory.as_strided(shape, strides)
        assert has_internal_overlap(x) == (number_of_addresses(shape, strides) < x.numel()), (shape, strides)
        found.append(has_internal_overlap(x))
    assert 500 < sum(found) < 1500


@pytest.mark.parametrize("arrange", [torch.clone, permuted, sliced, lambda x: x[:0], lambda x: x[0, 0]])
def test_ordinary_tensors_do_not_overlap(arrange: Callable[[Tensor], Tensor]) -> None:
    assert not has_internal_overlap(arrange(torch.zeros(4, 3, 5)))


def test_looking_for_an_overlap_reads_no_values_and_takes_little_memory() -> None:
    """A tensor on the meta device has no values, and this one would have a tebibyte of them."""
    assert has_internal_overlap(torch.empty(2**20, 1, device="meta").expand(2**20, 2**20))
    assert not has_internal_overlap(torch.empty(2**20, 2**20, device="meta").t())


# ---- several tensors -----------------------------------------------------------------------------------------------


def test_tensors_of_one_rank_share_no_memory() -> None:
    memory, other = torch.zeros(40), torch.zeros(40)
    tensors = [
        *(memory[:10], other[:10], memory[5:15].clone(), memory[10:20]),  # apart from each other
        *(memory[5:15], memory[:40:2], other[9:10], memory[:0], memory[19:20], memory[8:9].view(torch.int32)),
    ]
    assert overlap_ranks(tensors) == [0, 0, 0, 0, 1, 2, 1, 0, 3, 3]
    assert overlap_ranks([x.to("meta") for x in tensors]) == [0] * len(tensors)
    assert overlap_ranks([]) == []


def same(memory: Tensor) -> list[Tensor]:
    return [memory[:24].view(6, 4), memory[:24].view(6, 4)]


def three(memory: Tensor) -> list[Tensor]:
    return [memory[:7], memory[:7], memory[:7]]


def neighbours(memory: Tensor) -> list[Tensor]:
    return [memory[:24].view(6, 4), memory[12:36].view(6, 4)]


def transposed(memory: Tensor) -> list[Tensor]:
    return [memory[:36].view(6, 6), memory[:36].view(6, 6).t()]


def other_shapes(memory: Tensor) -> list[Tensor]:
    return [memory[:24].view(2, 3, 4), memory[:24].view(6, 4), memory[:24]]


BACKENDS = ["eager", pytest.param("cpp", marks=needs_cpp)]


@pytest.mark.parametrize("views", [same, three, neighbours, transposed, other_shapes])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_over_one_memory_are_stepped_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, backend: str, rule: str, views: Callable[[Tensor], list[Tensor]]
) -> None:
    """The result is that of an optimizer for each of them. With FP32 factors, nothing draws random bits."""
    monkeypatch.setenv("ROOTFREE_BACKEND", backend)
    optimizer, options = RULES[rule]
    options = options if rule == "rmsprop" else {**options, "factor_dtype": torch.float32}
    results = []
    for apart in (False, True):
        (memory,) = gradients([(40,)], -1, torch.float32)
        params = [nn.Parameter(x) for x in views(memory)]
        # Weight decay depends on the order: that of the list, but the diagonal step comes before that of matrices.
        turns = sorted(params, key=lambda param: rule != "rmsprop" and param.dim() > 1)
        groups = [[param] for param in turns] if apart else [params]
        stepped = [optimizer(group, lr=0.01, batch_size=4, weight_decay=0.1, **options) for group in groups]
        for step in range(2):
            for param, grad in zip(params, gradients([p.shape for p in params], step, torch.float32), strict=True):
                param.grad = grad
            for each in stepped:
                each.step()
        results.append(memory)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_may_begin_and_cease_to_share_memory(
    case: Case, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """The result is bitwise that of a group for each parameter, since groups are stepped one after the other."""
    monkeypatch.setenv("ROOTFREE_BACKEND", backend)
    shots = []
    for apart in (False, True):
        params = [nn.Parameter(x) for x in gradients([(6,), (6,), (7, 5), (7, 5)], -1, case.dtype)]
        optimizer = case.make([{"params": [param]} for param in params] if apart else params)
        for step in range(6):
            for first, second in (params[:2], params[2:]):
                second.data = first.data if step in (2, 3) else second.data.clone()
            for param, grad in zip(params, gradients([p.shape for p in params], step, case.dtype), strict=True):
                param.grad = grad
            optimizer.step()
        shots.append(snapshot(optimizer))
    assert_same_bits(*shots)


def test_parameters_that_move_apart_keep_their_plans(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are made again only when others share memory than before."""
    made: list[Any] = []
    original = planner.GroupCache
    monkeypatch.setattr(planner, "GroupCache", lambda *args: made.append(args) or original(*args))
    params = [nn.Parameter(torch.ones(6)) for _ in range(3)]
    optimizer = case.make(params)

    def step() -> int:
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        return len(made)

    assert step() == 1
    params[0].data = params[0].data.clone()
    assert step() == 1
    params[1].data = params[0].data
    assert step() == 2
    both = torch.ones(6)
    params[0].data = params[1].data = both
    assert step() == 2
    params[2].data = both
    assert step() == 3


COMPILED = [case for case in CASES if case.options.get("precondition_frequency", 1) == 1]


@pytest.mark.parametrize("case", COMPILED, ids=lambda case: case.name)
def test_a_compiled_step_serves_parameters_over_one_memory(case: Case) -> None:
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        (memory,) = gradients([(35,)], -1, case.dtype)
        params = [nn.Parameter(memory.view(7, 5)) for _ in range(2)]
        optimizer = case.make(params, capturable=True, lr=torch.tensor(0.01))
        step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True) if compiled else optimizer.step
        for number in range(2):
            for param, grad in zip(params, gradients([(7, 5)] * 2, number, case.dtype), strict=True):
                param.grad = grad
            step()
        results.append(memory)
    assert torch.equal(*results)


@pytest.mark.parametrize("case", COMPILED, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning")
def test_fake_parameters_are_stepped_as_if_they_shared_no_memory(case: Case) -> None:
    with FakeTensorMode():
        params = [nn.Parameter(torch.ones(7, 5)) for _ in range(2)]
        optimizer = case.make(params)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert {tuple(state["step"].shape) for state in optimizer.state.values()} == {()}
