"""Batches for the operators of IF-Shampoo on a CPU: what they get, and what must come of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import cycle, repeat
from types import SimpleNamespace
from typing import Any

import numpy as np
import reference as ref
import torch
from conftest import same_bits
from tolerances import RELATIVE_ERROR, relative_error
from torch import Tensor

from rootfree_kernels import backends, ops
from rootfree_kernels.rounding import join_compensated

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
TOLERANCE = {**RELATIVE_ERROR, FP16: 1e-3}  # one rounding of 5e-4
LAYOUTS = ("whole", "offset by 1", "wide rows", "transposed", "every other")
ROUNDINGS = ("nearest", "stochastic", "compensated")
CLIPS = ("frobenius", "row_sum", "none")
NUMBERS = {"batch_size": 3.0, "beta2": 0.3, "riemannian_momentum": 0.4, "damping": 0.1, "gamma": 1.0}
DESCENT = {"momentum": 0.9, "weight_decay": 0.02, "decoupled": False}
ONE = ((0, 1, 0, 1),)
"""A tensor that is one block: first row, blocks down, first column, blocks across."""
PLACES = [ONE, ((3, 1, 5, 2),), ((8, 2, 16, 2), (0, 1, 0, 1)), ((0, 1, 0, 1), (1, 1, 0, 1), (0, 1, 8, 1))]
STATE = ("c", "k", "m_c", "m_k", "lo_c", "lo_k")
KEPT = (*STATE, "params", "buffers", "residuals")

Call = Callable[..., Any]
"""A function (stem, *arguments) that runs an operator."""


def through(backend: str) -> Call:
    return lambda stem, *args: backends.implementation(backend, stem)(*args)


def dispatched(stem: str, *args: Any) -> Any:
    """As a public operator, where there is one."""
    return getattr(ops, stem)(*args, "cpp") if hasattr(ops, stem) else through("cpp")(stem, *args)


CPP = through("cpp")


# ---- a batch, and its tensors --------------------------------------------------------------------------------------


def laid_out(value: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """(a matrix of the value, all of the memory around it) in some place of a longer tensor full of 77."""
    rows, cols = value.shape
    row_stride, col_stride, offset = {
        "whole": (cols, 1, 0),
        "offset by 1": (cols, 1, 1),
        "wide rows": (cols + 5, 1, 8),
        "transposed": (1, rows, 0),
        "every other": (2 * cols + 1, 2, 3),
    }[layout]
    memory = torch.full((offset + rows * row_stride + cols * col_stride + 8,), 77, dtype=value.dtype)
    return memory.as_strided((rows, cols), (row_stride, col_stride), offset).copy_(value), memory


def numpy(x: Tensor) -> np.ndarray:
    return x.double().numpy()


class Tensors(SimpleNamespace):
    """Lists `grads`, `params`, `buffers`, `residuals`; a batch's C, K, m_C, m_K, remainders (`lo_c`, `lo_k`, or None),
    products `p_c`, `p_k`, `skipped`, `seeds`, `steps`; after a run `ok`, `grad` and `squares`."""

    def named(self) -> dict[str, Tensor]:
        lists = {name: value if isinstance(value, list) else [value] for name, value in vars(self).items()}
        return {f"{name} {i}": x for name, xs in lists.items() for i, x in enumerate(xs) if isinstance(x, Tensor)}

    def bytes(self, *names: str) -> dict[str, bytes]:
        chosen = {name: x for name, x in self.named().items() if not names or name.split()[0] in names}
        return {name: x.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, x in chosen.items()}

    def factor(self, side: str) -> np.ndarray:
        """C or K in FP64, that of compensated pairs to the bit."""
        value, residual = getattr(self, side), getattr(self, f"lo_{side}")
        return numpy(value if residual is None else join_compensated(value, residual))

    def weights(self) -> list[Tensor]:
        pairs = zip(self.params, self.residuals, strict=True) if self.residuals else ()
        return [join_compensated(*pair) for pair in pairs] or self.params


@dataclass
class Batch:
    """What the operators get. Every tensor is made anew for every run."""

    rows: int = 17
    cols: int = 13
    places: tuple = ONE  # of each tensor's blocks, as in ONE
    layouts: tuple = ("whole",)  # of gradients, buffers, weights and remainders, in turns
    dtype: torch.dtype = FP32  # of factors
    matmul: torch.dtype = FP32
    grad: torch.dtype = FP32
    param: torch.dtype = FP32
    buffer: torch.dtype = FP32
    rounding: str = "nearest"
    weight_rounding: str = "nearest"
    clip: str = "frobenius"
    maximize: bool = False
    numbers: dict = field(default_factory=dict)
    descent: dict = field(default_factory=dict)
    lr: float = 0.05
    grad_scale: float | None = None
    found_inf: float | None = None
    exact: bool = False  # G of small whole numbers, C and K permutations times powers of two: all products are exact
    keeps_products: bool = True
    seed: int = 0

    def __str__(self) -> str:
        kinds = [str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.matmul, self.param)]
        return f"{self.rows}x{self.cols}-{'-'.join(kinds)}-{self.rounding}-{self.clip}"

    @property
    def tiles(self) -> list[int]:
        return [number for place in self.places for number in place]

    def options(self) -> dict[str, float]:
        return {**NUMBERS, **self.numbers}

    def blocks(self, tensors: list[Tensor]) -> list[Tensor]:
        """The blocks of a list of matrices, tensor by tensor and each row by row."""
        found = []
        for x, (row, down, col, across) in zip(tensors, self.places, strict=True):
            for i in range(row, row + down * self.rows, self.rows):
                found += [x[i : i + self.rows, j : j + self.cols] for j in range(col, x.shape[1], self.cols)][:across]
        return found

    def tensors(self) -> Tensors:
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            x = torch.randint(-255, 256, shape, generator=generator).float()
            return x // 64 if self.exact else x * scale / 147  # 147: of deviation 1

        def residual(*shape: int) -> Tensor:
            return torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator)

        t, layouts = Tensors(memory={}), cycle(self.layouts)
        shapes = [(row + down * self.rows, col + across * self.cols) for row, down, col, across in self.places]
        for name, dtype in (("grads", self.grad), ("buffers", self.buffer), ("params", self.param)):
            places = [laid_out(draw(*shape).to(dtype), next(layouts)) for shape in shapes]
            setattr(t, name, [x for x, _ in places])
            t.memory[name] = [around for _, around in places]
        paired = self.param == BF16 and self.weight_rounding == "compensated"
        places = [laid_out(residual(*shape), next(layouts)) for shape in shapes] if paired else []
        t.residuals = [x for x, _ in places]
        t.memory["residuals"] = [around for _, around in places]
        count = len(self.blocks(t.params))
        for side, n in (("c", self.rows), ("k", self.cols)):
            factor, m = torch.eye(n) + draw(count, n, n, scale=0.3 / n**0.5), draw(count, n, n, scale=0.2 / n**0.5)
            if self.exact:
                order = torch.stack([torch.randperm(n, generator=generator) for _ in range(count)])
                factor = torch.eye(n)[order] * 2.0 ** -(order % 3)[..., None]
            setattr(t, side, factor.to(self.dtype))
            setattr(t, f"m_{side}", (m + m.mT).to(self.dtype))
            paired = self.dtype == BF16 and self.rounding == "compensated"
            setattr(t, f"lo_{side}", residual(count, n, n) if paired else None)
            product = torch.full((count, n, n), torch.nan, dtype=self.matmul) if self.keeps_products else None
            setattr(t, f"p_{side}", product)
        t.skipped = torch.arange(count, dtype=torch.int32)
        t.seeds = (torch.arange(count) * 0x1234567 - 3).to(torch.int32)
        t.steps = torch.arange(3.0, 3.0 + count)
        return t

    def gather(self, t: Tensors, call: Call) -> None:
        factors = [t.c, t.k] if self.options()["damping"] else []
        scale = None if self.grad_scale is None else torch.tensor(self.grad_scale)
        arguments = (self.tiles, self.rows, self.cols, factors, scale, self.matmul, self.maximize)
        t.grad, t.squares = call("kron_gather", t.grads, *arguments)

    def overflow(self) -> Tensor | None:
        return None if self.found_inf is None else torch.tensor(self.found_inf)

    def update(self, t: Tensors, call: Call = CPP) -> None:
        self.gather(t, call)
        tensors = [getattr(t, name) for name in (*STATE, "p_c", "p_k", "grad", "squares", "seeds", "steps")]
        numbers = map(float, self.options().values())
        t.ok = call("kron_factor", *tensors, self.overflow(), *numbers, self.clip, self.rounding)

    def step(self, t: Tensors, ok: Tensor | None, cached: bool, call: Call = CPP) -> None:
        """The step of the weights, by the gradient that was gathered last."""
        factors = (t.p_c, t.p_k) if cached else (t.c, t.k)
        descent = {**DESCENT, **self.descent}
        call(
            "kron_step",
            *(t.params, t.buffers, t.residuals, self.tiles, t.skipped, *factors, t.grad.clone(), t.squares),
            *(torch.tensor(self.lr, dtype=FP64), ok, t.seeds, t.steps, self.overflow(), cached),
            *(*map(float, (descent["momentum"], descent["weight_decay"])), bool(descent["decoupled"])),
            self.weight_rounding,
        )

    def run(self, t: Tensors | None = None, call: Call = CPP) -> Tensors:
        """An update and a step."""
        t = t or self.tensors()
        self.update(t, call)
        self.step(t, t.ok, self.keeps_products, call)
        return t

    def reference_grads(self, t: Tensors) -> list[np.ndarray]:
        factor = (-1 if self.maximize else 1) / (self.grad_scale or 1)
        return [numpy(x) * factor for x in self.blocks(t.grads)]

    def reference_states(self, t: Tensors) -> list[ref.KronState]:
        sides = (t.factor("c"), t.factor("k"), numpy(t.m_c), numpy(t.m_k), map(numpy, self.blocks(t.buffers)))
        return [ref.KronState(*state) for state in zip(*sides, strict=True)]


def assert_near(
    actual: Iterable[Any], expected: Iterable[np.ndarray], *dtypes: torch.dtype, terms: Iterable[float] = ()
) -> None:
    """Within the tolerance of the coarsest of these dtypes, block by block, relative to the block and to `terms`: the
    norms of what it is a difference of, where that may all but cancel."""
    allowed = max(TOLERANCE[dtype] for dtype in dtypes)
    pairs = zip(actual, expected, strict=True)
    for index, ((x, y), term) in enumerate(zip(pairs, terms or repeat(0.0), strict=False)):
        norm = np.linalg.norm(y)
        error = relative_error(torch.as_tensor(x), y) * norm / max(norm + term, 1e-300)
        assert error <= allowed, f"block {index}: relative error {error:.1e}, allowed {allowed:.0e}"


def assert_memory_around_is_untouched(batch: Batch, t: Tensors) -> None:
    """Beside the numbers of the blocks, everything has the value that it was made with."""
    was = batch.tensors()
    for name, memories in t.memory.items():
        outside = [torch.ones(x.shape, dtype=torch.bool) for x in memories]
        pairs = zip(outside, getattr(t, name), strict=True)
        inside = [x.as_strided(y.shape, y.stride(), y.storage_offset()) for x, y in pairs]
        for block in batch.blocks(inside) if inside else ():
            block.fill_(False)
        for now, before, kept in zip(memories, was.memory[name], outside, strict=True):
            assert same_bits(now[kept], before[kept]), name
