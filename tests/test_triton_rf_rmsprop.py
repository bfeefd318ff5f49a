"""The diagonal step in Triton: against the FP64 reference, and to the bit against eager PyTorch where it is exact."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib import import_module

import numpy as np
import pytest
import reference as ref
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tolerances import RELATIVE_ERROR
from triton_device import DEVICE, kernel_test, needs_gpu

from rootfree_kernels import diagonal, eager
from rootfree_kernels.rounding import join_compensated
from rootfree_kernels.triton_kernels.launch import num_compilations
from rootfree_kernels.triton_kernels.rf_rmsprop import CHUNK, rf_rmsprop

triton_rf_rmsprop = import_module(rf_rmsprop.__module__)

pytestmark = [*kernel_test, pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {**RELATIVE_ERROR, BF16: 8e-3, FP16: 1e-3}  # of one step that rounds once

SHAPES = [(), (1,), (0,), (13,), (1031,), (17, 130), (2, 3, 4), (CHUNK,), (3, CHUNK), (64, 72)]
LAYOUTS = ["whole", "offset by 1", "offset by 8", "transposed", "every other"]


# ---- a call, and its tensors -------------------------------------------------------------------------------------


def laid_out(value, layout, fill):
    """(a tensor of the value, all of the memory around it) in some place of a larger tensor full of `fill`."""
    spread, offset = 2 if layout == "every other" else 1, {"offset by 1": 1, "offset by 8": 8}.get(layout, 0)
    memory = torch.full((value.numel() * spread + 16,), fill, dtype=value.dtype, device=DEVICE)
    like = torch.empty(value.shape[::-1]).permute(tuple(range(value.dim()))[::-1]) if layout == "transposed" else value
    return memory.as_strided(value.shape, [spread * stride for stride in like.stride()], offset).copy_(value), memory


OPTIONS = {
    **{"batch_size": 3.0, "beta2": 0.3, "gamma": 1.0, "momentum": 0.8, "damping": 0.2},
    **{"weight_decay": 0.03, "decoupled": False, "maximize": False},
}


@dataclass
class Call:
    """What `rf_rmsprop` gets. Every tensor is made anew, on the device, for every run."""

    shapes: list = field(default_factory=lambda: [(64, 72), (5,)])
    layouts: list = field(default_factory=lambda: ["whole"])
    param: torch.dtype = FP32
    grad: torch.dtype = FP32
    square: torch.dtype = FP32
    buffer: torch.dtype = FP32
    rounding: str = "nearest"
    weight_rounding: str = "nearest"
    options: dict = field(default_factory=dict)
    lr: object = 0.05
    steps: object = 3
    grad_scale: float | None = None
    found_inf: float | None = None
    seed: int = 0

    def draw(self, name, shape, generator):
        """Numbers for μ, g, s and m; s is positive."""
        value = torch.randn(shape, generator=generator)
        return value.abs() + 0.5 if name == "square" else value

    def tensors(self):
        """{"param": [n tensors], …}, and the memory that they lie in."""
        generator = torch.Generator().manual_seed(self.seed)
        lists, memory = {}, []
        for name in ("param", "square", "buffer", "grad"):
            lists[name] = []
            for index, shape in enumerate(self.shapes):
                value = self.draw(name, shape, generator).to(getattr(self, name))
                x, around = laid_out(value, self.layouts[index % len(self.layouts)], 77.0)
                lists[name].append(x)
                memory.append((x, around))
        lists["skipped"] = [torch.full((), i, dtype=torch.int32, device=DEVICE) for i in range(len(self.shapes))]
        for name, like, mode in (("square", "square", self.rounding), ("weight", "param", self.weight_rounding)):
            pairs = getattr(self, like) == BF16 and mode == "compensated"
            lists[f"{name}_residual"] = [self.residual(shape, generator) for shape in self.shapes] if pairs else []
        return lists, memory

    def residual(self, shape, generator):
        return torch.randint(-2000, 2000, shape, dtype=torch.int16, generator=generator).to(DEVICE)

    def arguments(self, lists):
        n = len(self.shapes)
        seeds = (torch.arange(n) * 0x1234567 - 3).to(DEVICE, torch.int32)
        steps = self.steps if isinstance(self.steps, torch.Tensor) else torch.full((n,), float(self.steps))
        scalars = [None if x is None else torch.tensor(x, device=DEVICE) for x in (self.grad_scale, self.found_inf)]
        lr = self.lr if isinstance(self.lr, torch.Tensor) else torch.tensor(self.lr, dtype=torch.float64)
        return (
            *(lists["param"], lists["square"], lists["buffer"], lists["skipped"]),
            *(lists["square_residual"], lists["weight_residual"], lists["grad"]),
            *(lr, seeds, steps, *scalars, *{**OPTIONS, **self.options}.values(), self.rounding, self.weight_rounding),
        )

    def run(self, function=rf_rmsprop, lists=None):
        """The tensors after a step."""
        lists = lists or self.tensors()[0]
        function(*self.arguments(lists))
        return lists


def wide(lists, name):
    """FP64 values on the CPU, those of compensated pairs to the bit."""
    residuals = lists[{"param": "weight_residual", "square": "square_residual"}.get(name, name)]
    values = lists[name]
    if residuals and residuals is not values:
        values = [join_compensated(hi, lo) for hi, lo in zip(values, residuals, strict=True)]
    return [value.double().cpu().numpy() for value in values]


def counts(lists):
    """How often each tensor was skipped."""
    return [x.item() for x in lists["skipped"]]


def assert_same(actual, expected):
    """Two runs agree to the bit; of zeros, either sign."""
    for name in expected:
        for index, (x, y) in enumerate(zip(actual[name], expected[name], strict=True)):
            difference = (x != y).sum().item() if x.is_floating_point() else (x != y).count_nonzero().item()
            assert not difference, f"{name}[{index}] of {tuple(x.shape)} differs in {difference} numbers"


# ---- the formula -------------------------------------------------------------------------------------------------

DTYPES = st.sampled_from([FP32, BF16, FP16])
STATE_DTYPES = st.sampled_from([FP32, BF16])
ROUNDINGS = st.sampled_from(["nearest", "stochastic", "compensated"])
ANY_OPTIONS = st.fixed_dictionaries(
    {
        "batch_size": st.sampled_from([1, 7.5]),
        "beta2": st.sampled_from([0, 0.1, 0.9]),
        "gamma": st.sampled_from([0, 1]),
        "momentum": st.sampled_from([0, 0.9]),
        "damping": st.sampled_from([0, 1e-4, 1]),
        "weight_decay": st.sampled_from([0, 0.1]),
        "decoupled": st.booleans(),
        "maximize": st.booleans(),
    }
)
CALLS = st.builds(
    Call,
    *(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4), st.lists(st.sampled_from(LAYOUTS), min_size=1)),
    *(DTYPES, DTYPES, STATE_DTYPES, STATE_DTYPES, ROUNDINGS, ROUNDINGS, ANY_OPTIONS),
    lr=st.sampled_from([0, 0.05]),
    grad_scale=st.sampled_from([None, 3.0]),
    found_inf=st.sampled_from([None, 0.0]),
    seed=st.integers(0, 99),
)


@given(CALLS)
@example(Call(SHAPES, LAYOUTS))
@example(Call(SHAPES, LAYOUTS, BF16, BF16, BF16, BF16, "stochastic", "stochastic"))
@example(Call(SHAPES, LAYOUTS, BF16, FP32, BF16, FP32, "compensated", "compensated"))
@settings(max_examples=50, deadline=None)
def test_a_step_is_the_reference_s_and_leaves_the_memory_around_alone(call):
    lists, memory = call.tensors()
    before = {name: wide(lists, name) for name in ("param", "square", "buffer", "grad")}
    skipped, grads = counts(lists), [x.clone() for x in lists["grad"]]
    call.run(lists=lists)
    options = {"lr": call.lr, **OPTIONS, **call.options}
    stored = {
        "param": FP32 if lists["weight_residual"] else call.param,
        "square": FP32 if lists["square_residual"] else call.square,
        "buffer": call.buffer,
    }
    for index in range(len(call.shapes)):
        weight, grad = before["param"][index], before["grad"][index] / (call.grad_scale or 1)
        state = ref.DiagonalState(before["square"][index], before["buffer"][index])
        weight, state = ref.diagonal_step(weight, grad, state, **options)
        for name, expected in (("param", weight), ("square", state.square), ("buffer", state.buffer)):
            error, size = np.linalg.norm(wide(lists, name)[index] - expected), np.linalg.norm(expected)
            cancelled = 2e-6 * expected.size**0.5  # roundings of the terms, which are of the order of 1
            assert error <= TOLERANCE[stored[name]] * size + cancelled, f"{name} of {call.shapes[index]}"
    assert counts(lists) == skipped
    assert all(map(torch.equal, lists["grad"], grads))
    for x, around in memory:
        inside = torch.zeros_like(around, dtype=torch.bool)
        inside.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(True)
        assert (around[~inside] == 77).all()


EXACT = {"batch_size": 1.0, "beta2": 2.0**-9, "momentum": 0.5, "damping": 0.0, "weight_decay": 0.0}


@dataclass
class ExactCall(Call):
    """All arithmetic is exact in FP32, in any order and fused or not: rounding alone decides the result."""

    options: dict = field(default_factory=lambda: EXACT)
    lr: object = 2.0**-11

    def draw(self, name, shape, generator):
        if name == "grad":
            return torch.zeros(shape)
        return torch.randint(128, 256, shape, generator=generator) / 128


@pytest.mark.parametrize("steps", [3, 70000, "each its own"], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
def test_bf16_is_rounded_as_in_eager_pytorch_to_the_bit(rounding, steps):
    if steps == "each its own":
        steps = torch.arange(float(len(SHAPES)))
    shapes = [shape if 0 not in shape else (2,) for shape in SHAPES]  # eager PyTorch has no norm of nothing
    call = ExactCall(shapes, ["whole", "offset by 1"], BF16, BF16, BF16, BF16, rounding, rounding, steps=steps)
    actual, expected = call.run(), call.run(eager.rf_rmsprop)
    assert_same(actual, expected)
    if rounding == "stochastic":
        call = replace(call, steps=9)
        assert not torch.equal(call.run()["param"][5], actual["param"][5])


def test_fp16_and_fp32_are_exact_where_the_arithmetic_is():
    for dtype in (FP32, FP16):
        call = ExactCall(SHAPES[3:], ["whole", "offset by 1"], dtype, FP32, FP32, FP32, "stochastic", "stochastic")
        assert_same(call.run(), call.run(eager.rf_rmsprop))


@pytest.mark.parametrize("layout", ["transposed", "every other"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_strides_do_not_change_the_result(layout, rounding):
    """Random bits belong to a row-major index, wherever a number lies."""
    call = Call([(17, 130), (2, 3, 4)], ["whole"], BF16, BF16, BF16, BF16, rounding, rounding)
    assert_same(replace(call, layouts=[layout]).run(), call.run())


def test_tensors_that_lie_alike_are_stepped_where_they_are(monkeypatch):
    copied = []
    monkeypatch.setattr(diagonal, "write_back", lambda old, new: copied.extend(zip(old, new, strict=True)))
    call = Call([(17, 130), (2, 3, 4)], ["transposed"])
    assert_same(call.run(), replace(call, layouts=["whole"]).run())
    assert copied and all(x is y for old, new in copied for x, y in zip(old, new, strict=True))


# ---- numbers that are left out -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_number_that_is_not_finite_is_left_out_and_counted_once_a_step(bad, place):
    """1e30 is finite, its square is not."""
    index = {"first": 0, "middle": CHUNK + 5, "last": 3 * CHUNK + 6}[place]
    call = Call([(40,), (3 * CHUNK + 7,), (9,)], param=BF16, weight_rounding="compensated")
    changed = ("param", "square", "buffer", "weight_residual")
    lists, before, expected = call.tensors()[0], call.tensors()[0], call.run()
    lists["grad"][1][index] = bad
    call.run(lists=lists)
    for name in changed:
        expected[name][1][index] = before[name][1][index]
    assert_same(lists, {name: expected[name] for name in changed})
    assert counts(lists) == [0, 2, 2]  # they started at 0, 1, 2
    call.run(lists=lists)
    assert counts(lists) == [0, 3, 2]


def test_found_inf_leaves_everything_as_it_is_and_counts_it():
    call = Call([(17, 130), (), (CHUNK,)], ["whole", "offset by 1"], found_inf=1.0)
    lists, before = call.run(), call.tensors()[0]
    assert_same(lists, {**before, "skipped": [x + 1 for x in before["skipped"]]})
    assert_same(replace(call, found_inf=0.0).run(), replace(call, found_inf=None).run())


def test_no_damping_and_no_curvature_leaves_a_number_out():
    """0/0, as in eager PyTorch."""
    call = Call([(CHUNK + 3,)], options={"damping": 0.0})
    lists = call.tensors()[0]
    for name in ("grad", "square"):
        lists[name][0][7] = 0.0
    weight = lists["param"][0][7].item()
    call.run(lists=lists)
    assert lists["param"][0][7] == weight and counts(lists) == [1]


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_weight_that_is_not_finite_poisons_nothing_without_weight_decay(decoupled):
    call = Call([(5,)], options={"weight_decay": 0.0, "decoupled": decoupled})
    lists = call.tensors()[0]
    lists["param"][0][2] = -torch.inf
    call.run(lists=lists)
    assert lists["param"][0][2] == -torch.inf and lists["buffer"][0].isfinite().all()


# ---- arguments ---------------------------------------------------------------------------------------------------


def test_grad_scale_divides_and_maximize_negates():
    call = Call([(17, 130), (5,)])
    lists = call.tensors()[0]
    for grad in lists["grad"]:
        grad.mul_(-64)
    scaled = replace(call, grad_scale=64.0, options={"maximize": True}).run(lists=lists)
    assert_same({**scaled, "grad": []}, {**call.run(), "grad": []})


def test_the_learning_rate_is_a_number_or_a_tensor_on_the_device(monkeypatch):
    call = Call([(17, 130), (5,)], lr=0.125)
    expected = call.run()
    monkeypatch.setattr(diagonal, "split_lr", lambda lr, device: (0.0, lr.to(FP32)))  # also on a CPU
    for dtype in (FP32, torch.float64):
        assert_same(replace(call, lr=torch.tensor(0.125, device=DEVICE, dtype=dtype)).run(), expected)


def test_a_call_is_one_launch_whatever_the_list(monkeypatch):
    launches = []
    monkeypatch.setattr(triton_rf_rmsprop, "launch", lambda *args: launches.append(args[1]))
    sizes = [(n,) for n in range(200)] + [(), (7 * CHUNK + 1,)]
    Call(sizes, LAYOUTS, BF16, BF16, rounding="stochastic", weight_rounding="stochastic").run()
    assert launches == [199 + 1 + 8]


def test_nothing_is_launched_for_nothing():
    Call([]).run()
    assert counts(Call([(0, 3), (0,)]).run()) == [0, 1]


def test_changing_numbers_never_compile_anything():
    call = Call([(5,), (64, 72)])
    call.run()
    before = num_compilations()
    changes = {"batch_size": 1, "beta2": 0, "gamma": 0, "momentum": 0, "damping": 1, "weight_decay": 0}
    for option, value in {**changes, "decoupled": True, "maximize": True}.items():
        replace(call, options={option: value}).run()
    for change in ({"lr": 1}, {"grad_scale": 2.0}, {"found_inf": 1.0}, {"steps": 9}, {"shapes": [(1,), (3, 1), ()]}):
        replace(call, **change).run()
    replace(call, layouts=["offset by 1"]).run()
    assert num_compilations() == before


def test_the_same_call_gives_the_same_bits():
    call = Call(SHAPES, LAYOUTS, BF16, BF16, BF16, BF16, "stochastic", "stochastic")
    assert_same(call.run(), call.run())


def test_a_tensor_that_took_the_place_of_another_is_seen():
    """Same addresses, other sizes: what stays on the device is known by its content."""
    call = Call([(64,)])
    lists = call.run()
    shorter = {name: [x[:40] if x.dim() else x for x in tensors] for name, tensors in lists.items()}
    beyond = lists["param"][0][40:].clone()
    call.run(lists=shorter)
    assert torch.equal(lists["param"][0][40:], beyond)


def test_gradients_of_several_dtypes_are_served_together():
    call = Call([(5,), (70,), (9,)])
    mixed, wide_ones = call.tensors()[0], call.tensors()[0]
    mixed["grad"] = [grad.to(dtype) for grad, dtype in zip(mixed["grad"], (FP32, BF16, FP16), strict=True)]
    wide_ones["grad"] = [grad.float() for grad in mixed["grad"]]
    call.run(lists=mixed)
    call.run(lists=wide_ones)
    assert_same({**mixed, "grad": []}, {**wide_ones, "grad": []})


@pytest.mark.parametrize("change", [{"param": torch.float64}, {"square": torch.float64}, {"buffer": FP16}], ids=str)
def test_dtypes_that_no_kernel_serves_are_an_error(change):
    ((name, dtype),) = change.items()
    with pytest.raises(ValueError, match=rf"{name}s of {dtype}: pass tensors of one dtype, torch.float32 or "):
        Call(**change).run()


def test_what_changes_says_so_to_autograd():
    call = Call(param=BF16, weight_rounding="compensated")
    lists = call.tensors()[0]
    before = {name: [x._version for x in tensors] for name, tensors in lists.items()}
    call.run(lists=lists)
    for name, tensors in lists.items():
        assert all((x._version > old) == (name != "grad") for x, old in zip(tensors, before[name], strict=True)), name


# ---- large tensors, graphs ---------------------------------------------------------------------------------------


def test_offsets_are_64_bits_and_indices_of_random_bits_wrap_around(monkeypatch):
    """The end of a tensor, of which only this end exists: its table begins 2³² numbers earlier."""
    call = ExactCall([(2 * CHUNK - 5,)], ["whole"], BF16, BF16, BF16, BF16, "stochastic", "stochastic")
    expected = call.run()
    tensor_table, table, missing = diagonal.tensor_table, diagonal.table, 2**32

    def longer_tensor_table(*args):
        made = tensor_table(*args)
        change = [-2 * missing] * 3 + [0, 0, 0, missing, -missing // CHUNK]
        return made._replace(rows=made.rows + torch.tensor(change, device=DEVICE))

    monkeypatch.setattr(diagonal, "tensor_table", longer_tensor_table)
    monkeypatch.setattr(diagonal, "table", lambda *args: table(*args) - 2 * missing)
    assert_same({**call.run(), "skipped": []}, {**expected, "skipped": []})


@pytest.mark.gpu
@needs_gpu
def test_a_tensor_of_more_than_2_31_numbers():
    size, end = 2**31 + CHUNK + 3, slice(2**31 - 5, None)
    small = ExactCall([(CHUNK + 8,)], ["whole"], BF16, BF16, BF16, BF16)
    lists, expected = small.tensors()[0], small.run()
    large = {name: list(tensors) for name, tensors in lists.items()}
    for name in ("param", "square", "buffer", "grad"):
        large[name] = [torch.ones(size, dtype=BF16, device=DEVICE)]
        large[name][0][end] = lists[name][0]
    replace(small, shapes=[(size,)]).run(lists=large)
    for name in ("param", "square", "buffer"):
        assert torch.equal(large[name][0][end], expected[name][0])
        assert (large[name][0][: 2**31 - 5] == large[name][0][0]).all()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("warm", [True, False], ids=["tables kept", "tables made while capturing"])
def test_a_cuda_graph_steps_as_often_as_it_is_replayed(warm):
    call = Call([(17, 130), (4 * CHUNK + 1,), ()], lr=torch.tensor(0.05, device=DEVICE))
    lists, expected, start = (call.tensors()[0] for _ in range(3))
    for tensors in (lists, expected):
        tensors["grad"][1][0] = torch.nan
    arguments = call.arguments(lists)
    call.run(lists=lists if warm else None)  # compiles
    for name in ("param", "square", "buffer", "skipped"):
        torch._foreach_copy_(lists[name], start[name])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rf_rmsprop(*arguments)
    for _ in range(4):
        graph.replay()
        call.run(lists=expected)
    assert_same({**lists, "grad": []}, {**expected, "grad": []})
    assert counts(lists) == [0, 5, 2]
