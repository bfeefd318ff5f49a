"""The diagonal step in Triton: arguments, launches, large tensors and CUDA graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rootfree_kernels.pointer_tables import rf_rmsprop as diagonal
from tests.calls.device import DEVICE, kernel_test, launches, module_of, needs_gpu
from tests.calls.operators import call as run_operator
from tests.calls.rf_rmsprop import assert_equal, counts
from tests.calls.tensors import BF16, FP16, FP32
from tests.triton.calls import CHUNK, LAYOUTS, SHAPES, triton_call

pytestmark = kernel_test


# ---- arguments -------------------------------------------------------------------------------------------------------


def test_grad_scale_divides_and_maximize_negates():
    call = triton_call([(17, 130), (5,)])
    lists = call.tensors()[0]
    for grad in lists["grad"]:
        grad.mul_(-64)
    scaled = replace(call, grad_scale=64.0, options={"maximize": True}).run(lists)
    assert_equal({**scaled, "grad": []}, {**call.run(), "grad": []})


def test_the_learning_rate_is_a_number_or_a_tensor_on_the_device(monkeypatch):
    call = triton_call([(17, 130), (5,)], lr=0.125)
    expected = call.run()
    monkeypatch.setattr(diagonal, "split_lr", lambda lr, device: (0.0, lr.to(FP32)))  # pass it as a tensor on a CPU too
    for dtype in (FP32, torch.float64):
        assert_equal(replace(call, lr=torch.tensor(0.125, device=DEVICE, dtype=dtype)).run(), expected)


def test_every_list_needs_one_launch(monkeypatch):
    launched = []
    monkeypatch.setattr(module_of("rf_rmsprop"), "launch", lambda *args: launched.append(args[1]))
    sizes = [(n,) for n in range(200)] + [(), (7 * CHUNK + 1,)]
    triton_call(sizes, LAYOUTS, BF16, BF16, rounding="stochastic", weight_rounding="stochastic").run()
    assert launched == [199 + 1 + 8]


def test_an_empty_list_needs_no_launch():
    triton_call([]).run()
    assert counts(triton_call([(0, 3), (0,)]).run()) == [0, 1]


def test_changed_values_do_not_recompile():
    call = triton_call([(5,), (64, 72)])
    call.run()
    before = launches.num_compilations()
    changes = {"batch_size": 1, "beta2": 0, "gamma": 0, "momentum": 0, "damping": 1, "weight_decay": 0}
    for option, value in {**changes, "decoupled": True, "maximize": True}.items():
        replace(call, options={option: value}).run()
    for change in ({"lr": 1}, {"grad_scale": 2.0}, {"found_inf": 1.0}, {"steps": 9}, {"shapes": [(1,), (3, 1), ()]}):
        replace(call, **change).run()
    replace(call, layouts=("offset by 1",)).run()
    assert launches.num_compilations() == before


def test_the_same_call_gives_the_same_bits():
    call = triton_call(SHAPES, LAYOUTS, BF16, BF16, BF16, BF16, "stochastic", "stochastic")
    assert_equal(call.run(), call.run())


def test_a_tensor_at_the_address_of_another_is_noticed():
    """The addresses are equal, but the sizes differ. Cached tables are identified by their content."""
    call = triton_call([(64,)])
    lists = call.run()
    shorter = {name: [x[:40] if x.dim() else x for x in tensors] for name, tensors in lists.items()}
    beyond = lists["param"][0][40:].clone()
    call.run(shorter)
    assert torch.equal(lists["param"][0][40:], beyond)


def test_gradients_may_have_several_dtypes():
    call = triton_call([(5,), (70,), (9,)])
    mixed, wide_ones = call.tensors()[0], call.tensors()[0]
    mixed["grad"] = [grad.to(dtype) for grad, dtype in zip(mixed["grad"], (FP32, BF16, FP16), strict=True)]
    wide_ones["grad"] = [grad.float() for grad in mixed["grad"]]
    call.run(mixed)
    call.run(wide_ones)
    assert_equal({**mixed, "grad": []}, {**wide_ones, "grad": []})


@pytest.mark.parametrize("change", [{"param": torch.float64}, {"square": torch.float64}, {"buffer": FP16}], ids=str)
def test_unsupported_dtypes_are_an_error(change):
    ((name, dtype),) = change.items()
    with pytest.raises(ValueError, match=rf"{name}s of {dtype}: pass tensors of one dtype, torch.float32 or "):
        triton_call(**change).run()


def test_changed_tensors_get_a_new_version():
    call = triton_call(param=BF16, weight_rounding="compensated")
    lists = call.tensors()[0]
    before = {name: [x._version for x in tensors] for name, tensors in lists.items()}
    call.run(lists)
    for name, tensors in lists.items():
        assert all((x._version > old) == (name != "grad") for x, old in zip(tensors, before[name], strict=True)), name


# ---- large tensors, graphs -------------------------------------------------------------------------------------------


def test_offsets_are_64_bits_and_indices_of_random_bits_wrap_around(monkeypatch):
    """Simulate a tensor with 2³² more elements, of which only the last exist: addresses start 2³² elements earlier."""
    call = triton_call([(2 * CHUNK - 5,)], ("whole",), BF16, BF16, BF16, BF16, "stochastic", "stochastic", exact=True)
    expected = call.run()
    tensor_table, table, missing = diagonal.tensor_table, diagonal.table, 2**32

    def longer_tensor_table(*args):
        made = tensor_table(*args)
        change = [-2 * missing] * 3 + [0, 0, 0, missing, -missing // CHUNK]
        return made._replace(rows=made.rows + torch.tensor(change, device=DEVICE))

    monkeypatch.setattr(diagonal, "tensor_table", longer_tensor_table)
    monkeypatch.setattr(diagonal, "table", lambda *args: table(*args) - 2 * missing)
    assert_equal({**call.run(), "skipped": []}, {**expected, "skipped": []})


@pytest.mark.gpu
@needs_gpu
def test_a_tensor_of_more_than_2_31_elements():
    size, end = 2**31 + CHUNK + 3, slice(2**31 - 5, None)
    small = triton_call([(CHUNK + 8,)], ("whole",), BF16, BF16, BF16, BF16, exact=True)
    lists, expected = small.tensors()[0], small.run()
    large = {name: list(tensors) for name, tensors in lists.items()}
    for name in ("param", "square", "buffer", "grad"):
        large[name] = [torch.ones(size, dtype=BF16, device=DEVICE)]
        large[name][0][end] = lists[name][0]
    replace(small, shapes=[(size,)]).run(large)
    for name in ("param", "square", "buffer"):
        assert torch.equal(large[name][0][end], expected[name][0])
        assert (large[name][0][: 2**31 - 5] == large[name][0][0]).all()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("warm", [True, False], ids=["cached tables", "tables created during capture"])
def test_a_cuda_graph_steps_as_often_as_it_is_replayed(warm):
    call = triton_call([(17, 130), (4 * CHUNK + 1,), ()], lr=torch.tensor(0.05, device=DEVICE))
    lists, expected, start = (call.tensors()[0] for _ in range(3))
    for tensors in (lists, expected):
        tensors["grad"][1][0] = torch.nan
    arguments = call.arguments(lists)
    call.run(lists if warm else None)  # compiles
    for name in ("param", "square", "buffer", "skipped"):
        torch._foreach_copy_(lists[name], start[name])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_operator("triton", "rf_rmsprop", *arguments)
    for _ in range(4):
        graph.replay()
        call.run(expected)
    assert_equal({**lists, "grad": []}, {**expected, "grad": []})
    assert counts(lists) == [0, 5, 2]
