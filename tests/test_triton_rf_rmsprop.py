"""The diagonal step in Triton: against the FP64 reference, and to the bit against eager PyTorch where it is exact."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import reference as ref
import torch
from conftest import same_bits
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tolerances import RELATIVE_ERROR
from triton_device import DEVICE, kernel_test, needs_gpu

from rootfree_kernels import eager
from rootfree_kernels.rounding import join_compensated
from rootfree_kernels.triton_kernels import launch as launching
from rootfree_kernels.triton_kernels import rf_rmsprop as triton_rf_rmsprop
from rootfree_kernels.triton_kernels.launch import num_compilations
from rootfree_kernels.triton_kernels.rf_rmsprop import CHUNK, rf_rmsprop

pytestmark = kernel_test

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {**RELATIVE_ERROR, BF16: 8e-3, FP16: 1e-3}  # of one step that rounds once

SHAPES = [(), (1,), (0,), (13,), (1031,), (17, 130), (2, 3, 4), (CHUNK,), (3, CHUNK), (64, 72)]
LAYOUTS = ["whole", "offset by 1", "offset by 8", "transposed", "every other"]


# ---- a call, and its tensors -------------------------------------------------------------------------------------


def laid_out(value, layout, fill):
    """(a tensor of the value, all of the memory around it) in some place of a larger tensor full of `fill`."""
    steps, offset = (2, 0) if layout == "every other" else (1, {"offset by 1": 1, "offset by 8": 8}.get(layout, 0))
    memory = torch.full((value.numel() * steps + 16,), fill, dtype=value.dtype, device=DEVICE)
    place = memory[offset : offset + value.numel() * steps : steps]
    axes = range(value.dim())
    if layout == "transposed":
        x = place.view(value.shape[::-1]).permute(*reversed(axes))
    else:
        x = place.view(value.shape) if steps == 1 else memory.as_strided(value.shape, [2 * s for s in value.stride()])
    return x.copy_(value), memory


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

    OPTIONS = {  # noqa: RUF012
        **{"batch_size": 3.0, "beta2": 0.3, "gamma": 1.0, "momentum": 0.8, "damping": 0.2},
        **{"weight_decay": 0.03, "decoupled": False, "maximize": False},
    }

    def all_options(self):
        return {**self.OPTIONS, **self.options}

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

    def run(self, function=rf_rmsprop, lists=None):
        """The tensors after a step."""
        if lists is None:
            lists, _ = self.tensors()
        n = len(self.shapes)
        seeds = (torch.arange(n) * 0x1234567 - 3).to(DEVICE, torch.int32)
        steps = self.steps if isinstance(self.steps, torch.Tensor) else torch.full((n,), float(self.steps))
        scalars = [None if x is None else torch.tensor(x, device=DEVICE) for x in (self.grad_scale, self.found_inf)]
        lr = self.lr if isinstance(self.lr, torch.Tensor) else torch.tensor(self.lr, dtype=torch.float64)
        function(
            *(lists["param"], lists["square"], lists["buffer"], lists["skipped"]),
            *(lists["square_residual"], lists["weight_residual"], lists["grad"]),
            *(lr, seeds, steps, *scalars, *self.all_options().values(), self.rounding, self.weight_rounding),
        )
        return lists


def wide(lists, name):
    """FP64 values on the CPU, those of compensated pairs to the bit."""
    residuals = lists[{"param": "weight_residual", "square": "square_residual"}.get(name, name)]
    values = lists[name]
    if residuals and residuals is not values:
        values = [join_compensated(hi, lo) for hi, lo in zip(values, residuals, strict=True)]
    return [value.double().cpu().numpy() for value in values]


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
OPTIONS = st.fixed_dictionaries(
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
    *(DTYPES, DTYPES, STATE_DTYPES, STATE_DTYPES, ROUNDINGS, ROUNDINGS, OPTIONS),
    lr=st.sampled_from([0, 0.05]),
    grad_scale=st.sampled_from([None, 3.0]),
    found_inf=st.sampled_from([None, 0.0]),
    seed=st.integers(0, 99),
)


@given(CALLS)
@example(Call(SHAPES, LAYOUTS))
@example(Call(SHAPES, LAYOUTS, BF16, BF16, BF16, BF16, "stochastic", "stochastic"))
@example(Call(SHAPES, LAYOUTS, BF16, FP32, BF16, FP32, "compensated", "compensated"))
@settings(max_examples=25, deadline=None)
def test_a_step_is_the_reference_s_and_leaves_the_memory_around_alone(call):
    lists, memory = call.tensors()
    before = {name: wide(lists, name) for name in ("param", "square", "buffer", "grad")}
    skipped, grads = [x.item() for x in lists["skipped"]], [x.clone() for x in lists["grad"]]
    call.run(lists=lists)
    options = {"lr": call.lr, **call.all_options()}
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
            error = np.linalg.norm(wide(lists, name)[index] - expected)
            assert error <= TOLERANCE[stored[name]] * np.linalg.norm(expected), f"{name} of {call.shapes[index]}"
    assert [x.item() for x in lists["skipped"]] == skipped
    assert all(map(same_bits, lists["grad"], grads))
    for x, around in memory:
        inside = torch.zeros_like(around, dtype=torch.bool)
        inside.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(True)
        assert (around[~inside] == 77).all()


@dataclass
class ExactCall(Call):
    """All arithmetic is exact in FP32, in any order and fused or not: rounding alone decides the result."""

    OPTIONS = {  # noqa: RUF012
        **{"batch_size": 1.0, "beta2": 2.0**-9, "gamma": 1.0, "momentum": 0.5, "damping": 0.0},
        **{"weight_decay": 0.0, "decoupled": False, "maximize": False},
    }
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
    monkeypatch.setattr(triton_rf_rmsprop, "write_back", lambda old, new: copied.extend(zip(old, new, strict=True)))
    call = Call([(17, 130), (2, 3, 4)], ["transposed"])
    assert_same(call.run(), replace(call, layouts=["whole"]).run())
    assert copied and all(x is y for old, new in copied for x, y in zip(old, new, strict=True))


# ---- numbers that are left out -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_number_that_is_not_finite_is_left_out_and_counted_once_a_step(bad, place):
    """1e30 is finite, its square is not."""
    call = Call([(40,), (3 * CHUNK + 7,), (9,)], rounding="compensated", param=BF16, weight_rounding="compensated")
    index = {"first": 0, "middle": CHUNK + 5, "last": 3 * CHUNK + 6}[place]
    lists, clean = call.tensors()[0], call.run()
    lists["grad"][1][index] = bad
    before = {name: [x.clone() for x in tensors] for name, tensors in lists.items()}
    call.run(lists=lists)
    assert [x.item() for x in lists["skipped"]] == [0, 2, 2]  # they started at 0, 1, 2
    for name in ("param", "square", "buffer", "weight_residual"):
        assert same_bits(lists[name][1][index], before[name][1][index])
        lists[name][1][index] = clean[name][1][index]
    assert_same({k: lists[k] for k in ("param", "square", "buffer", "weight_residual")}, clean | {"skipped": []}) if (
        clean.pop("skipped") and clean.pop("grad") and not clean.pop("square_residual")
    ) else None
    call.run(lists=lists)
    assert [x.item() for x in lists["skipped"]] == [0, 3, 2]
