"""IF-Shampoo's kernels: against the FP64 reference, and to the bit against eager PyTorch where arithmetic is exact.

Kernels take FP32 factors as well, which shows errors of 1e-5: in Triton's interpreter alone, a GPU would multiply TF32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle, product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
from conftest import same_bits
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from tolerances import RELATIVE_ERROR, relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton_device import DEVICE, kernel_test, needs_gpu

from rootfree_kernels import ops, tables, triton_kernels
from rootfree_kernels.rounding import join_compensated
from rootfree_kernels.triton_kernels import launch as launches

pytestmark = [*kernel_test, pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning:triton")]

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
FACTOR_DTYPES = [BF16] if DEVICE.type == "cuda" else [FP32, BF16]
TOLERANCE = {
    **RELATIVE_ERROR,
    FP32: 1e-5,  # of one step: a few hundred roundings of 6e-8
    FP16: 1e-3,  # one rounding of 5e-4
}
LAYOUTS = ["whole", "offset by 1", "wide rows", "transposed", "every other"]
ROUNDINGS = ["nearest", "stochastic", "compensated"]
FULL = {  # of memory that nobody has written yet
    **dict.fromkeys([FP32, BF16, FP16, torch.float64], torch.nan),
    **{torch.int64: 1 << 60, torch.int32: 1 << 30, torch.int16: 1 << 14, torch.bool: True},
}


def module_of(stem: str) -> Any:
    """The file of a kernel; the package has the function under the same name."""
    return sys.modules[f"{triton_kernels.__name__}.{stem}"]


MODULES = [module_of(stem) for stem in ("kron_gather", "kron_norms", "kron_factor", "kron_step", "products")]


@pytest.fixture(autouse=True, scope="module")
def poisoned_memory() -> Iterator[None]:
    """New memory is full of NaN, so that a number that is read before it is written shows."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            make = getattr(owner, name)

            def poisoned(*args: Any, make: Callable[..., Tensor] = make, **kwargs: Any) -> Tensor:
                made = make(*args, **kwargs)
                return made.fill_(FULL[made.dtype]) if made.device.type != "meta" and made.numel() < 1 << 30 else made

            patch.setattr(owner, name, poisoned)
        yield


# ---- a batch, and its tensors --------------------------------------------------------------------------------------


def laid_out(value: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """(a matrix of the value, all of the memory around it) in some place of a longer tensor full of 77."""
    rows, cols = value.shape
    row_stride, col_stride, offset = {
        "whole": (cols, 1, 0),
        "offset by 1": (cols, 1, 1),
        "wide rows": (cols + 8 + -cols % 8, 1, 8),
        "transposed": (1, rows, 0),
        "every other": (2 * cols + 1, 2, 3),
    }[layout]
    size = offset + rows * row_stride + cols * col_stride + 8
    memory = torch.full((size,), 77, dtype=value.dtype, device=DEVICE)
    return memory.as_strided((rows, cols), (row_stride, col_stride), offset).copy_(value), memory


OPTIONS = {"batch_size": 3.0, "beta2": 0.3, "riemannian_momentum": 0.4, "damping": 0.1, "gamma": 1.0}
DESCENT = {"momentum": 0.9, "weight_decay": 0.02, "decoupled": False}
ONE = ((0, 1, 0, 1),)
"""A tensor that is one block: first row, blocks down, first column, blocks across."""

STATE = ("c", "k", "m_c", "m_k", "lo_c", "lo_k")


class Tensors(SimpleNamespace):
    """Lists `grads`, `params`, `buffers` and `residuals`; a batch's `c`, `k`, `m_c`, `m_k`, `lo_c`, `lo_k` (None where
    factors have no residuals), `p_c`, `p_k`, `skipped`, `seeds`, `steps`; after a run `ok`, `grad` and `squares`."""

    def copies(self) -> dict[str, Tensor]:
        """Every tensor, by readable names."""
        found = {}
        for name, value in vars(self).items():
            for index, x in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(x, Tensor):
                    found[f"{name} {index}"] = x.clone(memory_format=torch.contiguous_format)
        return found

    def factor(self, side: str) -> np.ndarray:
        """C or K in FP64, that of compensated pairs to the bit."""
        value, residual = getattr(self, side), getattr(self, f"lo_{side}")
        return numpy(value if residual is None else join_compensated(value, residual))

    def weights(self) -> list[Tensor]:
        """Likewise."""
        if not self.residuals:
            return self.params
        return [join_compensated(*pair) for pair in zip(self.params, self.residuals, strict=True)]


def numpy(x: Tensor) -> np.ndarray:
    return x.double().cpu().numpy()


def direct(stem: str, *args: Any) -> Any:
    return getattr(triton_kernels, stem)(*args)


def through(backend: str) -> Callable[..., Any]:
    """Calls of the operators."""
    return lambda stem, *args: getattr(ops, stem)(*args, backend)


@dataclass
class Batch:
    """What the operators get. Every tensor is made anew, on the device, for every run."""

    rows: int = 17
    cols: int = 130
    places: tuple = ONE  # of each tensor's blocks, as in ONE
    layouts: list = field(default_factory=lambda: ["whole"])  # of gradients, buffers and weights, in turns
    dtype: torch.dtype = BF16
    grad: torch.dtype = FP32
    param: torch.dtype = FP32
    buffer: torch.dtype = FP32
    rounding: str = "nearest"
    weight_rounding: str = "nearest"
    clip: str = "frobenius"
    maximize: bool = False
    options: dict = field(default_factory=dict)
    descent: dict = field(default_factory=dict)
    lr: Any = 0.05
    grad_scale: float | None = None
    found_inf: float | None = None
    exact: bool = False
    seed: int = 0

    @property
    def numbers(self) -> list[int]:
        return [number for place in self.places for number in place]

    @property
    def all_options(self) -> dict[str, float]:
        return {**OPTIONS, **self.options}

    @property
    def all_descent(self) -> dict[str, float]:
        return {**DESCENT, **self.descent}

    def blocks(self, tensors: list[Tensor]) -> list[Tensor]:
        """The blocks of a list of matrices, tensor by tensor and each row by row."""
        found = []
        for x, (first_row, down, first_col, across) in zip(tensors, self.places, strict=True):
            for i in range(first_row, first_row + down * self.rows, self.rows):
                for j in range(first_col, first_col + across * self.cols, self.cols):
                    found.append(x[i : i + self.rows, j : j + self.cols])
        return found

    def tensors(self) -> Tensors:
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            if self.exact:
                return torch.randint(128, 256, shape, generator=generator) / 128
            return torch.randn(shape, generator=generator) * scale

        t = Tensors(memory={})
        layouts = cycle(self.layouts)
        for name, dtype in (("grads", self.grad), ("buffers", self.buffer), ("params", self.param)):
            places = []
            for first_row, down, first_col, across in self.places:
                shape = (first_row + down * self.rows, first_col + across * self.cols)
                value = torch.zeros(shape) if self.exact and name == "grads" else draw(*shape)
                places.append(laid_out(value.to(dtype), next(layouts)))
            setattr(t, name, [x for x, _ in places])
            t.memory[name] = [around for _, around in places]
        paired = self.param == BF16 and self.weight_rounding == "compensated"
        t.residuals = [self.residual(x.shape, generator) for x in t.params] if paired else []
        num_blocks = len(self.blocks(t.params))
        for side, n in (("c", self.rows), ("k", self.cols)):
            factor, m = draw(num_blocks, n, n, scale=0.3 / n**0.5), draw(num_blocks, n, n, scale=0.2 / n**0.5)
            factor, m = (factor, 0 * m) if self.exact else (factor + torch.eye(n), m + m.mT)
            setattr(t, side, factor.to(DEVICE, self.dtype))
            setattr(t, f"m_{side}", m.to(DEVICE, self.dtype))
            paired = self.dtype == BF16 and self.rounding == "compensated"
            setattr(t, f"lo_{side}", self.residual((num_blocks, n, n), generator) if paired else None)
            setattr(t, f"p_{side}", torch.empty((num_blocks, n, n), dtype=self.dtype, device=DEVICE))
        t.skipped = torch.arange(num_blocks, dtype=torch.int32, device=DEVICE)
        t.seeds = (torch.arange(num_blocks) * 0x1234567 - 3).to(DEVICE, torch.int32)
        t.steps = torch.arange(3.0, 3.0 + num_blocks)
        return t

    def residual(self, shape: Any, generator: torch.Generator) -> Tensor:
        return torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator).to(DEVICE)

    def scalar(self, value: float | None) -> Tensor | None:
        return None if value is None else torch.tensor(value, device=DEVICE)

    def gather(self, t: Tensors, call: Callable[..., Any] = direct) -> tuple[Tensor, Tensor]:
        factors = [t.c, t.k] if self.all_options["damping"] else []
        scale = self.scalar(self.grad_scale)
        return call("kron_gather", t.grads, self.numbers, *self.sides, factors, scale, self.dtype, self.maximize)

    @property
    def sides(self) -> tuple[int, int]:
        return self.rows, self.cols

    def update(self, t: Tensors, call: Callable[..., Any] = direct) -> Tensor:
        t.grad, t.squares = self.gather(t, call)
        arguments = [getattr(t, name) for name in (*STATE, "p_c", "p_k", "grad", "squares", "seeds", "steps")]
        options = (self.scalar(self.found_inf), *map(float, self.all_options.values()), self.clip, self.rounding)
        t.ok = call("kron_factor", *arguments, *options)
        return t.ok

    def step(self, t: Tensors, ok: Tensor | None, cached: bool, call: Callable[..., Any] = direct) -> None:
        """The step of the weights, by the gradient that was gathered last."""
        lr = torch.tensor(self.lr, dtype=torch.float64) if isinstance(self.lr, float) else self.lr
        factors = (t.p_c, t.p_k) if cached else (t.c, t.k)
        numbers = (float(self.all_descent["momentum"]), float(self.all_descent["weight_decay"]))
        call(
            "kron_step",
            *(t.params, t.buffers, t.residuals, self.numbers, t.skipped, *factors, t.grad.clone(), t.squares),
            *(lr, ok, t.seeds, t.steps, self.scalar(self.found_inf), cached),
            *(*numbers, bool(self.all_descent["decoupled"]), self.weight_rounding),
        )

    def run(self, t: Tensors | None = None, call: Callable[..., Any] = direct) -> Tensors:
        """An update and a step."""
        t = t or self.tensors()
        self.step(t, self.update(t, call), True, call)
        return t

    def reference_states(self, t: Tensors) -> list[ref.KronState]:
        sides = (t.factor("c"), t.factor("k"), numpy(t.m_c), numpy(t.m_k))
        buffers = [numpy(x) for x in self.blocks(t.buffers)]
        return [ref.KronState(*state) for state in zip(*sides, buffers, strict=True)]

    def reference_grads(self, t: Tensors) -> list[np.ndarray]:
        factor = (-1 if self.maximize else 1) / (self.grad_scale or 1)
        return [numpy(x) * factor for x in self.blocks(t.grads)]


def assert_near(actual: Tensor | np.ndarray, expected: Any, *dtypes: torch.dtype) -> None:
    """Within the tolerance of the coarsest of these dtypes, block by block."""
    allowed = max(TOLERANCE[dtype] for dtype in dtypes)
    for index, (x, y) in enumerate(zip(actual, expected, strict=True)):
        error = relative_error(x.cpu() if isinstance(x, Tensor) else torch.tensor(x), y)
        assert error <= allowed, f"block {index}: relative error {error:.1e}, allowed {allowed:.0e}"


def assert_same(actual: Tensors, expected: Tensors, *names: str) -> None:
    """Tensors of these names agree to the bit."""
    x, y = actual.copies(), expected.copies()
    compared = [name for name in y if name.split()[0] in names]
    differ = [name for name in compared if not same_bits(x[name], y[name])]
    assert compared and not differ, f"these differ: {differ}"


def assert_memory_around_is_untouched(batch: Batch, t: Tensors) -> None:
    """Beside the numbers of the blocks, everything has the value that it was made with."""
    was = batch.tensors()
    for name, memory in t.memory.items():
        outside = [torch.ones_like(x, dtype=torch.bool) for x in memory]
        views = [
            x.as_strided(view.shape, view.stride(), view.storage_offset())
            for x, view in zip(outside, getattr(t, name), strict=True)
        ]
        for block in batch.blocks(views):
            block.fill_(False)
        for now, before, kept in zip(memory, was.memory[name], outside, strict=True):
            assert same_bits(now[kept], before[kept]), name


# ---- the formulas --------------------------------------------------------------------------------------------------

PLACES = [
    ONE,
    ((0, 2, 0, 1),),
    ((3, 1, 5, 1),),
    ((8, 1, 16, 2), (0, 1, 0, 1)),
    ((0, 1, 0, 1), (1, 1, 0, 1), (0, 1, 8, 1)),
]
SMALL_SIDES = [(1, 1), (1, 9), (5, 4), (8, 16), (13, 31), (13, 24), (64, 24)]
LARGE_SIDES = [(17, 130), (64, 65), (72, 128), (130, 5)]
CUTS = [*product(SMALL_SIDES, PLACES), *product(LARGE_SIDES, [ONE, PLACES[2]])]
DTYPES = st.sampled_from([FP32, BF16, FP16])
BATCHES = st.builds(
    lambda cut, **rest: Batch(*cut[0], cut[1], **rest),
    st.sampled_from(CUTS),
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=5),
    dtype=st.sampled_from(FACTOR_DTYPES),
    grad=DTYPES,
    param=DTYPES,
    buffer=st.sampled_from([FP32, BF16]),
    rounding=st.sampled_from(ROUNDINGS),
    weight_rounding=st.sampled_from(ROUNDINGS),
    clip=st.sampled_from(["frobenius", "row_sum", "none"]),
    maximize=st.booleans(),
    options=st.fixed_dictionaries(
        {
            "batch_size": st.sampled_from([1, 7.5]),
            "beta2": st.sampled_from([0.0, 0.1, 0.9]),
            "riemannian_momentum": st.sampled_from([0, 0.6]),
            "damping": st.sampled_from([0, 0.2]),
            "gamma": st.sampled_from([0, 1]),
        }
    ),
    descent=st.fixed_dictionaries(
        {
            "momentum": st.sampled_from([0, 0.9]),
            "weight_decay": st.sampled_from([0, 0.1]),
            "decoupled": st.booleans(),
        }
    ),
    lr=st.sampled_from([0.0, 0.5]),
    grad_scale=st.sampled_from([None, 8.0]),
    found_inf=st.sampled_from([None, 0.0]),
    seed=st.integers(0, 99),
)
ANY_BATCH = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),  # in Triton's interpreter, to shrink an example takes minutes
)
CALLS = st.sampled_from([direct, through("triton")])
PER_PROGRAM = st.sampled_from([1 << 15, 256])
"""Numbers of a block that one program of the gather squares: the kernels' own, and so few that there are many sums."""

LARGE = Batch(136, 136, PLACES[2], LAYOUTS[:3], grad=BF16, param=BF16, rounding="compensated", clip="row_sum")
ALIGNED = Batch(136, 64, rounding="stochastic", weight_rounding="compensated", param=BF16)
ODD_ROWS = Batch(137, 72, PLACES[1], rounding="compensated", weight_rounding="stochastic", param=BF16, grad=BF16)


@contextmanager
def numbers_per_program(numbers: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module_of("kron_gather"), "NUMBERS_PER_PROGRAM", numbers)
        yield


@given(BATCHES, CALLS, PER_PROGRAM)
@example(LARGE, direct, 256)
@example(ALIGNED, direct, 256)
@example(ODD_ROWS, direct, 256)
@example(Batch(5, 4, ((1, 2, 3, 3), (0, 1, 2, 2))), direct, 256)
@ANY_BATCH
def test_a_gather_is_the_scaled_blocks_to_the_bit_and_their_squared_norms(batch, call, numbers):
    """Scales are powers of two here, so that only the rounding to the dtype of G is left."""
    t = batch.tensors()
    with numbers_per_program(numbers):
        grad, squares = batch.gather(t, call)
    factor = (-1 if batch.maximize else 1) / (batch.grad_scale or 1)
    expected = torch.stack([(x.float() * factor).to(batch.dtype) for x in batch.blocks(t.grads)])
    assert [side % 8 for side in grad.shape[1:]] == [0, 0]
    assert (grad[:, : batch.rows, : batch.cols] == expected).all()
    assert (grad[:, batch.rows :] == 0).all() and (grad[:, :, batch.cols :] == 0).all()
    squared = [np.stack(batch.reference_grads(t)), *([numpy(t.c), numpy(t.k)] if batch.all_options["damping"] else [])]
    sums = numpy(squares).sum(-1)
    np.testing.assert_allclose(sums, [(x**2).sum((1, 2)) for x in squared], rtol=1e-6)
    assert squares.shape[-1] == max(1, min(512, batch.rows * batch.cols // numbers))
    assert_memory_around_is_untouched(batch, t)


@given(BATCHES, CALLS, PER_PROGRAM)
@example(LARGE, direct, 256)
@example(ALIGNED, direct, 1 << 15)
@ANY_BATCH
def test_an_update_of_the_factors_is_the_reference_s(batch, call, numbers):
    t = batch.tensors()
    clip = None if batch.clip == "none" else batch.clip
    expected = [
        ref.kron_update(state, grad, clip=clip, **batch.all_options)
        for state, grad in zip(batch.reference_states(t), batch.reference_grads(t), strict=True)
    ]
    with numbers_per_program(numbers):
        ok = batch.update(t, call)
    assert ok.all() and ok.shape == (len(expected),)
    for side, name in (("c", "C"), ("k", "K")):
        factor, m, product = t.factor(side), getattr(t, f"m_{side}"), getattr(t, f"p_{side}")
        assert_near(factor, [getattr(state, name) for state in expected], batch.dtype)
        assert_near(m, [getattr(state, f"m_{name}") for state in expected], batch.dtype)
        assert_near(product, factor @ factor.swapaxes(1, 2), batch.dtype)
        for symmetric in (m, product):
            assert same_bits(symmetric, symmetric.mT)


@given(BATCHES, CALLS, st.booleans(), st.booleans())
@example(LARGE, direct, True, True)
@example(ALIGNED, direct, True, False)
@example(ODD_ROWS, direct, True, False)
@ANY_BATCH
def test_a_step_of_the_weights_is_the_reference_s_and_leaves_the_rest_of_them_alone(batch, call, cached, with_ok):
    t = batch.tensors()
    t.grad, t.squares = batch.gather(t, call)
    if cached:
        t.p_c, t.p_k = call("kron_products", t.c, t.k, batch.dtype) if call is direct else products(t)
    before = t.copies()
    weights = [numpy(x) for x in batch.blocks(t.weights())]
    states, grads = batch.reference_states(t), batch.reference_grads(t)
    for state, c, k in zip(states, numpy(t.c), numpy(t.k), strict=True):
        state.C, state.K = c, k  # products read the BF16 half of a pair
    expected = [
        ref.kron_step(weight, grad, state, update=False, lr=batch.lr, **batch.all_descent)
        for weight, grad, state in zip(weights, grads, states, strict=True)
    ]
    ok = torch.ones(len(weights), dtype=torch.bool, device=DEVICE) if with_ok else None
    batch.step(t, ok, cached, call)
    stored = FP32 if t.residuals else batch.param
    assert_near([numpy(x) for x in batch.blocks(t.weights())], [x for x, _ in expected], batch.dtype, stored)
    buffers = [numpy(x) for x in batch.blocks(t.buffers)]
    assert_near(buffers, [state.buffer for _, state in expected], batch.dtype, batch.buffer)
    assert_memory_around_is_untouched(batch, t)
    after = t.copies()
    changed = {name for name in before if not same_bits(before[name], after[name])}
    assert {name.split()[0] for name in changed} <= {"params", "buffers", "residuals"}


@pytest.mark.parametrize(
    ("sides", "layout", "aligned"),
    [
        ((13, 16), "whole", True),
        ((13, 16), "wide rows", True),
        ((129, 8), "whole", True),
        ((16, 13), "whole", False),
        ((16, 13), "wide rows", False),
        ((13, 16), "offset by 1", False),
        ((13, 16), "transposed", False),
    ],
)
def test_blocks_of_any_number_of_rows_take_the_aligned_path(sides, layout, aligned, monkeypatch):
    """Like the 865 × 768 at the end of GPT-2's embedding; their columns have to be a multiple of 8."""
    chosen = {}

    def launch(kernel: Any, grid: int, tensors: Any, numbers: Any, constants: tuple[Any, ...], *options: Any) -> None:
        names = kernel.arg_names[len(tensors) + len(numbers) :]
        chosen[kernel.__name__] = dict(zip(names, constants, strict=True)).get("ALIGNED")
        launches.launch(kernel, grid, tensors, numbers, constants, *options)

    for module in (module_of("kron_gather"), module_of("kron_step")):
        monkeypatch.setattr(module, "launch", launch)
    batch = Batch(*sides, PLACES[1], [layout], param=BF16, weight_rounding="compensated")
    t = batch.tensors()
    t.residuals = [laid_out(x, layout)[0] for x in t.residuals]
    t.grad, t.squares = batch.gather(t)
    batch.step(t, None, False)
    assert chosen["kron_gather_kernel"] is chosen["kron_step_kernel"] is aligned
    assert_memory_around_is_untouched(batch, t)


# ---- sums of parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "cols", "number"), [(8, 8, 1), (768, 768, 18), (4096, 4096, 512), (8192, 8192, 512)])
def test_few_large_blocks_are_gathered_by_many_programs(rows, cols, number):
    """Two blocks of 4096 × 4096 by 1024: seven for each of an H100's 132 multiprocessors."""
    assert triton_kernels.num_partial_sums(rows, cols) == number


def test_a_gather_by_many_programs_reads_every_number_once():
    """Of 138 programs, 130 have eight rows of G and 133 a share of C."""
    batch = Batch(1040, 8, grad=BF16)
    t = batch.tensors()
    with numbers_per_program(60):
        grad, squares = batch.gather(t)
    assert same_bits(grad[0], t.grads[0].to(batch.dtype)) and squares.shape[-1] == 138
    assert squares[:, 0].count_nonzero(1).tolist() == [130, 133, 1]
    np.testing.assert_allclose(numpy(squares).sum((1, 2)), [(numpy(x) ** 2).sum() for x in (grad, t.c, t.k)], rtol=1e-6)


@pytest.mark.parametrize("number", [200, 512])
def test_the_last_of_many_partial_sums_is_read(number):
    """All is in the last one: results are those of one sum; and a NaN there leaves the block out of the step."""
    batch = Batch(13, 9, PLACES[1])
    expected, t = batch.tensors(), batch.tensors()
    batch.update(expected)
    batch.step(expected, None, True)

    def in_last(stem: str, *args: Any) -> Any:
        """Call an operator; the partial sums of a gather are moved to the end of so many."""
        found = direct(stem, *args)
        if stem == "kron_gather":
            squares = torch.zeros((3, 2, number), device=DEVICE)
            squares[..., -1:] = found[1]
            return found[0], squares
        return found

    batch.update(t, in_last)
    batch.step(t, None, True)
    assert_same(t, expected, *STATE, "p_c", "p_k", "params", "buffers", "skipped")
    t.squares[0, 1, -1] = torch.nan
    batch.step(t, None, True)
    assert (t.skipped - expected.skipped).tolist() == [0, 1]


@pytest.mark.parametrize(("block", "p", "d"), [(128, 1040, 8), (64, 64, 1088), (128, 72, 136)])
def test_norms_are_the_largest_row_sums_and_infinite_where_one_is_not_finite(block, p, d):
    """Of parts [L, tiles, n]; four blocks: finite, with a NaN, with an infinite part, and 0."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.rand((4, -(-n // block), n), generator=generator) for n in (p, d)]
    for sums in parts:
        sums[1, -1, n := sums.shape[2] // 2] = torch.nan
        sums[2, 0, n] = torch.inf
        sums[3] = 0
    parts = [sums.to(DEVICE) for sums in parts]
    found = []
    for _ in range(2):
        norms = torch.full((4, 2), torch.nan, device=DEVICE)
        module_of("kron_norms").make_norms(*parts, norms, block)
        found.append(norms)
    expected = torch.stack([sums.double().sum(1).amax(1).nan_to_num(torch.inf, torch.inf) for sums in parts], 1)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-6, atol=0)
    assert same_bits(*found)


@pytest.mark.parametrize("side", ["m_c", "m_k"])
def test_a_row_sum_that_is_nan_is_seen(side):
    """Of the last row of a block of several tiles; the other block is updated."""
    batch = Batch(136, 72, PLACES[1], clip="row_sum")
    was, t = batch.tensors(), batch.tensors()
    for each in (was, t):
        getattr(each, side)[0, -1, -1] = torch.nan
    assert batch.update(t).tolist() == [False, True]
    for name in ("c", "k", "m_c", "m_k"):
        assert [same_bits(*pair) for pair in zip(getattr(t, name), getattr(was, name), strict=True)] == [True, False]


def products(t: Tensors) -> list[Tensor]:
    return [torch.bmm(x, x.mT) for x in (t.c, t.k)]


@pytest.mark.parametrize(
    ("clip", "options", "norm"),
    [
        ("frobenius", {}, "above 1"),
        ("row_sum", {}, "above 1"),
        ("none", {}, "above 1"),
        ("frobenius", {"gamma": 0.0, "batch_size": 0.01, "damping": 0.0}, "below 1"),
    ],
)
def test_bf16_moves_the_factors_of_wide_blocks_as_the_reference_does(clip, options, norm):
    """C' − C by itself, of which the FP32 value that a compensated pair keeps shows every step."""
    batch = Batch(136, 70, rounding="compensated", clip=clip, options={"riemannian_momentum": 0.1, **options})
    t = batch.tensors()
    (state,), (grad,) = batch.reference_states(t), batch.reference_grads(t)
    expected = ref.kron_update(state, grad, clip=None if clip == "none" else clip, **batch.all_options)
    batch.update(t)
    for side, name in (("c", "C"), ("k", "K")):
        old, new, m = getattr(state, name), getattr(expected, name), getattr(expected, f"m_{name}")
        assert (np.linalg.norm(m) > 1) == (norm == "above 1")
        assert_near(t.factor(side) - old, [new - old], BF16)


@pytest.mark.parametrize(("rows", "cols"), [(17, 130), (136, 64)])
def test_products_by_themselves_are_those_of_an_update_to_the_bit(rows, cols):
    """So that a resumed run goes on with the same numbers."""
    batch = Batch(rows, cols, rounding="stochastic")
    t = batch.tensors()
    batch.update(t)
    for actual, expected in zip(direct("kron_products", t.c, t.k, BF16), (t.p_c, t.p_k), strict=True):
        assert same_bits(actual, expected)


# ---- bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [replace(LARGE, rows=17), ALIGNED], ids=["ragged", "aligned"])
def test_the_same_call_gives_the_same_bits(batch):
    first, second = batch.run(), batch.run(call=through("triton"))
    assert_same(first, second, *STATE, "p_c", "p_k", "params", "buffers", "residuals", "skipped", "ok")


EXACT = {"batch_size": 1.0, "beta2": 2.0**-6, "riemannian_momentum": 0.5, "damping": 0.0, "gamma": 1.0}
EXACT_DESCENT = {"momentum": 0.5, "weight_decay": 2.0**-7}


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(
    "batch",
    [
        Batch(17, 130, layouts=["every other"], clip="none"),
        Batch(8, 136, clip="none"),
        Batch(17, 136, clip="none"),
        Batch(16, 64, PLACES[1], clip="frobenius", options={"riemannian_momentum": 0.0}),
    ],
    ids=["ragged", "aligned", "odd rows", "clipped"],
)
def test_bf16_is_rounded_as_in_eager_pytorch_to_the_bit(batch, rounding):
    """G and m are 0, so that m' is −γ/4 or −γ/2 times I, and C' = C(1 + 2⁻ⁿ) rounded but once."""
    modes = {"rounding": rounding, "weight_rounding": rounding, "param": BF16, "buffer": BF16, "exact": True}
    modes |= {"options": {**EXACT, **batch.options}, "descent": EXACT_DESCENT, "lr": 2.0**-5}
    batch = replace(batch, **modes)
    before, actual, expected = batch.tensors(), batch.run(), batch.run(call=through("eager"))
    assert_same(actual, expected, *STATE, "params", "buffers", "residuals", "skipped")
    moved = (actual.factor("c") != before.factor("c")).mean()
    assert 0.1 < moved < 0.9 if rounding == "stochastic" else moved > 0
    assert not same_bits(actual.params[0], before.params[0])


def test_random_bits_are_those_of_the_step():
    batch = Batch(17, 13, param=BF16, rounding="stochastic", weight_rounding="stochastic")
    first, later = batch.tensors(), batch.tensors()
    later.steps += 1
    for t in (first, later):
        batch.run(t)
    assert not same_bits(first.c, later.c) and not same_bits(first.params[0], later.params[0])
    assert_same(first, later, "m_c", "m_k")


# ---- numbers that are not finite -----------------------------------------------------------------------------------

KEPT = (*STATE, "params", "buffers", "residuals")


@pytest.mark.parametrize(
    ("bad", "clip", "rounding"),
    [
        (torch.nan, "frobenius", "compensated"),
        (torch.nan, "row_sum", "nearest"),
        (-torch.inf, "none", "stochastic"),
        (1e30, "row_sum", "compensated"),
        (1e15, "frobenius", "stochastic"),
    ],
)
def test_a_block_that_is_not_finite_stays_to_the_bit_and_is_counted(bad, clip, rounding):
    """The square of 1e30 is infinite; that of 1e15 is not, but the norm of its m is. Other blocks step as ever."""
    batch = Batch(13, 9, ((0, 1, 0, 2), (0, 1, 0, 1)), clip=clip, param=BF16)
    batch = replace(batch, rounding=rounding, weight_rounding=rounding)
    was, clean, t = batch.tensors(), batch.run(), batch.tensors()
    t.grads[0][5, 11] = bad  # in the second block
    batch.run(t)
    finite = torch.tensor([True, False, True], device=DEVICE)
    assert torch.equal(t.ok, finite)
    assert torch.equal(t.skipped, was.skipped + ~finite)
    for name in KEPT:
        values = [getattr(x, name) for x in (t, clean, was)]
        if isinstance(values[0], list):
            values = [batch.blocks(x) if x else None for x in values]
        if values[0] is not None:
            for block, (now, stepped, before) in enumerate(zip(*values, strict=True)):
                assert same_bits(now, stepped if finite[block] else before), f"{name} of block {block}"
    for actual, factor in ((t.p_c, t.c), (t.p_k, t.k)):
        assert_near(actual, numpy(factor) @ numpy(factor).swapaxes(1, 2), BF16)


@pytest.mark.parametrize("side", ["m_c", "m_k"])
def test_a_block_whose_momentum_is_not_finite_on_one_side_stays_on_both(side):
    batch = Batch(13, 9, PLACES[1])
    was, t = batch.tensors(), batch.tensors()
    for each in (was, t):
        getattr(each, side)[0, 0, 0] = torch.inf
    batch.run(t)
    assert t.ok.tolist() == [False, True] and t.skipped.tolist() == [1, 1]
    for name in ("c", "k", "m_c", "m_k", "params", "buffers"):
        values = [getattr(x, name) for x in (t, was)]
        blocks = zip(*(batch.blocks(x) if isinstance(x, list) else x for x in values), strict=True)
        assert [same_bits(*pair) for pair in blocks] == [True, False], name


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
def test_found_inf_leaves_everything_as_it_is_and_counts_it(rounding):
    batch = Batch(13, 9, PLACES[1], param=BF16, rounding=rounding, weight_rounding=rounding)
    was, t = batch.tensors(), replace(batch, found_inf=1.0).run()
    assert_same(t, was, *KEPT)
    assert torch.equal(t.skipped, was.skipped + 1) and not t.ok.any()


@pytest.mark.parametrize("reason", ["its factors were skipped", "no update saw its gradient"])
def test_a_block_that_is_left_out_of_a_step_keeps_its_weights_to_the_bit(reason):
    batch = Batch(13, 66, ((0, 1, 0, 3),), param=BF16, weight_rounding="compensated")
    was, t = batch.tensors(), batch.tensors()
    finite, ok = torch.tensor([True, False, True], device=DEVICE), None
    if reason == "its factors were skipped":
        ok = finite
    else:
        t.grads[0][12, 70] = torch.nan
    t.grad, t.squares = batch.gather(t)
    batch.step(t, ok, False)
    assert torch.equal(t.skipped, was.skipped + ~finite)
    for name in ("params", "buffers", "residuals"):
        pairs = zip(batch.blocks(getattr(t, name)), batch.blocks(getattr(was, name)), strict=True)
        assert [same_bits(*pair) for pair in pairs] == [False, True, False], name


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_weight_that_is_not_finite_poisons_nothing_without_weight_decay(decoupled):
    batch = Batch(13, 8, descent={"weight_decay": 0.0, "decoupled": decoupled})
    t = batch.tensors()
    t.params[0][2, 3] = -torch.inf
    batch.run(t)
    assert t.params[0][2, 3] == -torch.inf and t.params[0].isinf().sum() == 1 and t.buffers[0].isfinite().all()


@pytest.mark.parametrize("dtype", FACTOR_DTYPES, ids=str)
def test_a_number_of_u_that_is_not_finite_counts_as_0(dtype):
    batch = Batch(13, 8, dtype=dtype, descent={"momentum": 0.5, "weight_decay": 0.0})
    t = batch.tensors()
    t.grad, t.squares = batch.gather(t)
    t.k[0, 0] = 1e38
    t.grad[0, 1, 0] = 1e10
    buffer = t.buffers[0].clone()
    batch.step(t, None, False)
    assert torch.equal(t.buffers[0][1], buffer[1] * 0.5) and t.skipped.item() == 0


# ---- memory --------------------------------------------------------------------------------------------------------


class OutOfMemory(TorchDispatchMode):
    """The `number`-th operation that asks for new memory fails; kernels, which ask for none, run outside of it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func._schema.returns
        if not self.paused and returned and all(x.alias_info is None for x in returned):
            self.left -= 1
            if self.left == 0:
                raise torch.OutOfMemoryError(f"no memory for {func}")
        return func(*args, **(kwargs or {}))

    @contextmanager
    def around_launches(self) -> Iterator[None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.paused = True
            launches.launch(*args, **kwargs)
            self.paused = False

        with pytest.MonkeyPatch.context() as patch:
            for module in MODULES:
                patch.setattr(module, "launch", launch)
            yield


@pytest.mark.parametrize(("sides", "clip"), [((13, 9), "row_sum"), ((16, 8), "frobenius")], ids=["padded", "aligned"])
@pytest.mark.parametrize("cached", [False, True])
def test_without_memory_for_a_workspace_nothing_changes(sides, clip, cached):
    batch = Batch(*sides, PLACES[1], LAYOUTS, param=BF16, rounding="compensated", weight_rounding="compensated")
    batch = replace(batch, clip=clip, lr=torch.tensor(0.05, device=DEVICE, dtype=torch.float64))
    t = batch.tensors()
    if not cached:
        t.p_c = t.p_k = None
    for action in (lambda: batch.update(t), lambda: batch.step(t, t.ok, cached)):
        was, failures = t.copies(), []
        while True:
            mode = OutOfMemory(1 + len(failures))
            try:
                with mode.around_launches(), mode:
                    action()
                break
            except torch.OutOfMemoryError as error:
                failures.append(str(error))
            now = t.copies()
            assert all(same_bits(now[name], was[name]) for name in was if name.split()[0] in (*KEPT, "skipped"))
        assert len(failures) >= 3


@pytest.fixture
def no_tables(monkeypatch):
    """No table is kept from earlier tests, whose tensors may have lain at the same addresses."""
    for name in ("_tables", "_block_tables", "_tensor_tables"):
        monkeypatch.setattr(tables, name, type(tables._tables)())


def test_a_gradient_s_new_place_is_seen_and_an_old_one_costs_no_copy(no_tables, monkeypatch):
    copied, copy = [], tables._copied
    monkeypatch.setattr(tables, "_copied", lambda *args: copied.append(args) or copy(*args))
    batch = Batch(13, 9, PLACES[4])
    t = batch.tensors()
    batch.gather(t)
    assert len(copied) == 1
    for grad in t.grads:
        grad.mul_(2)
    first, _ = batch.gather(t)
    assert len(copied) == 1
    old, t.grads[1] = t.grads[1], t.grads[1].flip(0).contiguous()
    second, _ = batch.gather(t)
    assert len(copied) == 2
    assert torch.equal(second[1, :13, :9], t.grads[1][1:].to(BF16)) and torch.equal(second[::2], first[::2])
    t.grads[1] = old
    third, _ = batch.gather(t)
    assert len(copied) == 2 and torch.equal(third, first)


def test_tables_do_not_grow_for_ever(no_tables, monkeypatch):
    monkeypatch.setattr(tables, "MAX_TABLES", 3)
    batch = Batch(5, 4)
    kept = [batch.tensors() for _ in range(6)]
    for t in [*kept, *kept]:
        grad, _ = batch.gather(t)
        assert torch.equal(grad[0, :5, :4], t.grads[0].to(BF16))
    assert (len(tables._tables), len(tables._block_tables)) == (3, 3)


@pytest.mark.parametrize(
    ("sides", "place", "layout", "dtype", "aligned"),
    [
        ((16, 8), (0, 2, 0, 2), "whole", BF16, True),
        ((16, 8), (3, 1, 8, 2), "wide rows", BF16, True),
        ((16, 8), (0, 1, 4, 1), "wide rows", FP32, True),
        ((16, 8), (0, 1, 4, 1), "wide rows", BF16, False),
        ((16, 8), (0, 1, 0, 1), "offset by 1", FP32, False),
        ((16, 8), (0, 1, 0, 1), "transposed", FP32, False),
        ((16, 8), (0, 1, 0, 1), "every other", FP32, False),
        ((16, 4), (0, 1, 0, 3), "whole", FP32, False),
        ((16, 8), (0, 1, 0, 1), "far apart", BF16, False),
    ],
)
def test_blocks_are_aligned_where_every_row_of_each_begins_on_16_bytes(sides, place, layout, dtype, aligned):
    """What a kernel takes for granted on a GPU, and the interpreter never needs."""
    batch = Batch(*sides, (place, place), ["whole" if layout == "far apart" else layout], grad=dtype)
    grads = batch.tensors().grads
    if layout == "far apart":  # more than an offset of 32 bits within a tile
        grads[1] = torch.empty_strided(sides, (tables.MAX_STRIDE, 1), dtype=dtype, device=DEVICE)
    numbers = [*batch.numbers]
    device = grads[0].device
    assert tables.block_table((grads,), numbers, sides, device).aligned is aligned
    if not aligned:
        in_reverse = [x for start in range(len(numbers) - 4, -1, -4) for x in numbers[start : start + 4]]
        assert tables.block_table((grads[::-1],), in_reverse, sides, device).aligned is False


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_strides_of_more_than_2_31_are_followed(layout):
    """Rows, or columns, so far apart that only a few pages of the memory between them ever exist."""
    distance = 2**31 + 24
    try:
        memory = torch.empty(distance + 16, dtype=BF16, device=DEVICE)
    except (RuntimeError, torch.OutOfMemoryError):
        pytest.skip("needs 4 GiB of address space, on a GPU of memory")
    batch = Batch(2, 9, grad=BF16, param=BF16, weight_rounding="stochastic")
    if layout == "columns":
        batch = replace(batch, rows=9, cols=2)
    strides = (distance, 1) if layout == "rows" else (1, distance)
    expected, t = batch.run(), batch.tensors()
    for name in ("grads", "params"):
        x = memory.as_strided(batch.sides, strides)
        values = getattr(t, name)[0]
        if name == "grads":
            x.copy_(values)
            t.grads = [x]
            batch.update(t)
        else:
            x.copy_(values)
            t.params = [x]
    batch.step(t, t.ok, True)
    assert same_bits(t.params[0], expected.params[0])
    assert_same(t, expected, *STATE, "buffers")


@pytest.mark.gpu
@needs_gpu
def test_batches_of_more_than_2_31_numbers():
    """The last block of a stack of 2049 factors of 1024² is that of a batch of its own."""
    size, num_blocks = 1024, 2049
    alone = Batch(size, 8, dtype=BF16, grad=BF16).tensors()
    c = torch.zeros(num_blocks, size, size, dtype=BF16, device=DEVICE)
    k = torch.zeros(num_blocks, 8, 8, dtype=BF16, device=DEVICE)
    c[-1], k[-1] = alone.c[0], alone.k[0]
    expected = direct("kron_products", alone.c, alone.k, BF16)
    for actual, wanted in zip(direct("kron_products", c, k, BF16), expected, strict=True):
        assert same_bits(actual[-1], wanted[0]) and not actual[:-1].any()
    grads = list(c.unbind())
    grad, squares = direct("kron_gather", grads, [0, 1, 0, 1] * num_blocks, size, size, [], None, BF16, False)
    assert same_bits(grad, c) and squares[0, -1].sum() > 0 and not squares[0, :-1].any()


# ---- arguments -----------------------------------------------------------------------------------------------------


def test_the_learning_rate_is_a_number_or_a_tensor_on_the_device(monkeypatch):
    batch = Batch(13, 9)
    expected = batch.run()
    for dtype in (FP32, torch.float64):
        lr = torch.tensor(batch.lr, dtype=dtype)
        assert_same(replace(batch, lr=lr).run(), expected, "params", "buffers")
        if DEVICE.type == "cpu":  # where it is read as a number otherwise
            monkeypatch.setattr(module_of("kron_step"), "split_lr", lambda lr, device: (0.0, lr.to(device, FP32)))
        assert_same(replace(batch, lr=lr.to(DEVICE)).run(), expected, "params", "buffers")
        monkeypatch.undo()


@pytest.mark.parametrize("scale", [3.0, 2.0**20])
def test_a_scaled_and_negated_gradient_acts_as_the_gradient(scale):
    batch = Batch(17, 13, PLACES[1])
    t = batch.tensors()
    for grad in t.grads:
        grad.mul_(-scale)
    replace(batch, grad_scale=scale, maximize=True).run(t)
    expected = batch.run()
    for name in ("c", "k", "m_c", "m_k"):
        assert_near(getattr(t, name), numpy(getattr(expected, name)), BF16)
    if scale != 3.0:
        assert_same(t, expected, *STATE, "params", "buffers", "skipped")


def test_gradients_of_several_dtypes_are_served_together():
    batch = Batch(17, 13, PLACES[4])
    for dtypes in ((FP32, BF16, FP16), (torch.float64,) * 3):
        t = batch.tensors()
        mixed = [grad.to(dtype) for grad, dtype in zip(t.grads, dtypes, strict=True)]
        gathered = []
        for t.grads in (mixed, [grad.float() for grad in mixed]):
            gathered.append(batch.gather(t))
        for actual, expected in zip(*gathered, strict=True):
            assert same_bits(actual, expected)


def test_changing_numbers_never_compile_anything():
    batch = Batch(16, 8, param=BF16, rounding="stochastic", weight_rounding="stochastic")
    batch.run()
    before = launches.num_compilations()
    later = batch.tensors()
    later.steps += 100
    batch.run(later)
    options = {"batch_size": 1, "beta2": 0, "riemannian_momentum": 0, "damping": 1e-4, "gamma": 0}
    replace(batch, options=options, descent={"momentum": 0, "weight_decay": 0, "decoupled": True}).run()
    replace(batch, lr=1.0, grad_scale=2.0, found_inf=1.0, maximize=True, clip="none", seed=9).run()
    replace(batch, rows=64, cols=24, places=PLACES[1]).run()
    assert launches.num_compilations() == before


def test_what_changes_says_so_to_autograd():
    batch = Batch(16, 8, PLACES[1], param=BF16, rounding="compensated", weight_rounding="compensated")
    t = batch.tensors()
    named = {
        f"{name} {index}": x
        for name, value in vars(t).items()
        for index, x in enumerate(value if isinstance(value, list) else [value])
        if isinstance(x, Tensor)
    }
    before = {name: x._version for name, x in named.items()}
    batch.run(t)
    changed = {name.split()[0] for name, x in named.items() if x._version > before[name]}
    assert changed == {*KEPT, "p_c", "p_k", "skipped"}
    same = {name for name, x in named.items() if x._version == before[name]}
    assert {name.split()[0] for name in same} == {"grads", "seeds", "steps"}
