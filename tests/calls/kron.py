"""Batches for the operators of IF-Shampoo: tensors on any device, calls, and results of the reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rootfree_kernels.rounding import join_compensated
from tests.calls import recipe_reference as recipe
from tests.calls import reference as ref
from tests.calls.operators import Call, through
from tests.calls.tensors import BF16, FP32, FP64, drawn, drawn_residual, fp64, laid_out, same_bits

LAYOUTS = ("whole", "offset by 1", "wide rows", "transposed", "every other")
OPTIONS = {"batch_size": 3.0, "beta2": 0.3, "riemannian_momentum": 0.4, "damping": 0.1, "gamma": 1.0}
DESCENT = {"momentum": 0.9, "weight_decay": 0.02, "decoupled": False}
ROUNDING_OPTIONS = {"batch_size": 1.0, "beta2": 2.0**-6, "riemannian_momentum": 0.5, "damping": 0.0, "gamma": 1.0}
ROUNDING_DESCENT = {"momentum": 0.5, "weight_decay": 2.0**-7}

ONE = ((0, 1, 0, 1),)
"""One tensor with one block: (first row, blocks down, first column, blocks across)."""
TWO = ((3, 1, 5, 2),)
"""One tensor with two blocks side by side. Its first rows and columns belong to no block."""
FIVE = ((8, 2, 16, 2), (0, 1, 0, 1))
"""One tensor with four blocks, and another with one block."""
THREE = ((0, 1, 0, 1), (1, 1, 0, 1), (0, 1, 8, 1))
"""Three tensors with one block each."""
PLACES = (ONE, TWO, FIVE, THREE)

STATE = ("c", "k", "m_c", "m_k", "lo_c", "lo_k")
KEPT = (*STATE, "curvature", "params", "buffers", "residuals")

RULE = {**recipe.PAPER, "scales": False}
"""The paper's rule. `scales` says whether updates are scaled to given norms."""
WHITENED = {
    "direction": "whitened",
    "relative_damping": True,
    "factor_init": "gradient",
    "momentum_on": "gradient",
    "nesterov": True,
    "scales": True,
}
"""The rule of the recipe."""
ROOT_FREE = {**WHITENED, "direction": "root_free"}
MIXED = (
    {"direction": "whitened"},
    {"direction": "whitened", "scales": True, "factor_init": "gradient"},
    {"relative_damping": True, "momentum_on": "gradient"},
    {"momentum_on": "gradient", "nesterov": True, "scales": True},
)
"""Rules in which only some options differ from the paper's."""


class Tensors(SimpleNamespace):
    """The tensors of a batch, by name.

    `grads`, `params`, `buffers` and `residuals` are lists. `c` and `k` are the factors, `m_c` and `m_k` their momenta,
    `lo_c` and `lo_k` their residuals or None, `p_c` and `p_k` their cached products or None. `skipped`, `seeds` and
    `steps` have one element for each block. A run adds `ok`, `grad` and `squares`. `memory` maps the name of a list to
    the memory that contains its tensors.
    """

    def named(self) -> dict[str, Tensor]:
        lists = {name: value if isinstance(value, list) else [value] for name, value in vars(self).items()}
        return {f"{name} {i}": x for name, xs in lists.items() for i, x in enumerate(xs) if isinstance(x, Tensor)}

    def copies(self) -> dict[str, Tensor]:
        return {name: x.clone(memory_format=torch.contiguous_format) for name, x in self.named().items()}

    def bytes(self, *names: str) -> dict[str, bytes]:
        """Return the bytes of the tensors with these names, or of all tensors."""
        chosen = {name: x for name, x in self.named().items() if not names or name.split()[0] in names}
        return {name: x.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes() for name, x in chosen.items()}

    def factor(self, side: str) -> np.ndarray:
        """Return C or K in FP64. Compensated pairs are joined exactly."""
        value, residual = getattr(self, side), getattr(self, f"lo_{side}")
        return fp64(value if residual is None else join_compensated(value, residual))

    def weights(self) -> list[Tensor]:
        pairs = zip(self.params, self.residuals, strict=True) if self.residuals else ()
        return [join_compensated(*pair) for pair in pairs] or self.params


@dataclass
class Batch:
    """Arguments of IF-Shampoo's operators. Every run creates new tensors."""

    rows: int = 17
    cols: int = 13
    places: tuple = ONE
    """Position of the blocks in each tensor, in the format of ONE."""
    layouts: tuple[str, ...] = ("whole",)
    """Memory layouts (see `laid_out`). Gradients, buffers, weights and residuals use them in rotation."""
    dtype: torch.dtype = FP32
    """The dtype of the factors."""
    matmul: torch.dtype = FP32
    grad: torch.dtype = FP32
    param: torch.dtype = FP32
    buffer: torch.dtype = FP32
    rounding: str = "nearest"
    weight_rounding: str = "nearest"
    clip: str = "frobenius"
    maximize: bool = False
    options: dict = field(default_factory=dict)
    descent: dict = field(default_factory=dict)
    rule: dict = field(default_factory=dict)
    """Changes to RULE."""
    lr: Any = 0.05
    grad_scale: float | None = None
    found_inf: float | None = None
    exact: str = ""
    """With "products", all products are exact: G has small integers, C and K are permutations times powers of two.
    With "rounding", every result is exact before its only rounding: G and the momenta are 0."""
    keeps_products: bool = True
    seed: int = 0
    backend: str = "eager"
    device: Any = "cpu"

    def __str__(self) -> str:
        kinds = [str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.matmul, self.param)]
        return f"{self.rows}x{self.cols}-{'-'.join(kinds)}-{self.rounding}-{self.clip}"

    @property
    def sides(self) -> tuple[int, int]:
        return self.rows, self.cols

    @property
    def tiles(self) -> list[int]:
        return [number for place in self.places for number in place]

    @property
    def all_options(self) -> dict[str, float]:
        return {**(ROUNDING_OPTIONS if self.exact == "rounding" else OPTIONS), **self.options}

    @property
    def all_descent(self) -> dict[str, Any]:
        return {**DESCENT, **(ROUNDING_DESCENT if self.exact == "rounding" else {}), **self.descent}

    @property
    def all_rule(self) -> dict[str, Any]:
        return {**RULE, **self.rule}

    @property
    def is_whitened(self) -> bool:
        return self.all_rule["direction"] == "whitened"

    @property
    def follows_curvature(self) -> bool:
        return self.all_rule["relative_damping"] or self.all_rule["factor_init"] == "gradient"

    @property
    def reference_clip(self) -> str | None:
        return None if self.clip == "none" else self.clip

    def blocks(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return the blocks of a list of matrices: tensor by tensor, and in row-major order in each tensor."""
        found = []
        for x, (row, down, col, across) in zip(tensors, self.places, strict=True):
            for i in range(row, row + down * self.rows, self.rows):
                found += [x[i : i + self.rows, j : j + self.cols] for j in range(col, x.shape[1], self.cols)][:across]
        return found

    # ---- tensors -------------------------------------------------------------------------------------------------

    def draw(self, shape: tuple[int, ...], generator: torch.Generator, scale: float = 1.0) -> Tensor:
        if self.exact == "products":
            return (drawn(shape, generator) * 2).floor()
        if self.exact == "rounding":
            return torch.randint(128, 256, shape, generator=generator) / 128
        return drawn(shape, generator) * (scale * 0.75**0.5)  # standard deviation `scale`

    def tensors(self) -> Tensors:
        generator = torch.Generator().manual_seed(self.seed)
        t, layouts = Tensors(memory={}), cycle(self.layouts)
        shapes = [(row + down * self.rows, col + across * self.cols) for row, down, col, across in self.places]
        for name in ("grads", "buffers", "params"):
            dtype = getattr(self, name[:-1])
            values = [self.draw(shape, generator).to(dtype) for shape in shapes]
            if name == "grads" and self.exact == "rounding":
                values = [torch.zeros_like(x) for x in values]
            self.place(t, name, values, layouts)
        paired = self.param == BF16 and self.weight_rounding == "compensated"
        self.place(t, "residuals", [drawn_residual(shape, generator) for shape in shapes] if paired else [], layouts)
        count = len(self.blocks(t.params))
        for side, size in (("c", self.rows), ("k", self.cols)):
            self.make_side(t, side, (count, size, size), generator)
        t.skipped = torch.arange(count, dtype=torch.int32, device=self.device)
        t.seeds = (torch.arange(count) * 0x1234567 - 3).to(self.device, torch.int32)
        t.steps = torch.arange(3, 3 + count)
        wide = torch.promote_types(self.dtype, FP32)
        known = torch.tensor([(0.0, 0.7, 0.2)[(block + self.seed) % 3] for block in range(count)], dtype=wide)
        t.curvature = known.to(self.device) if self.follows_curvature else None
        wide = FP64 if FP64 in (self.matmul, self.param, self.buffer) else FP32
        norms = 0.5 + torch.arange(count).to(wide) % 4 / 2  # `linspace` rounds differently by instruction set
        t.update_norms = norms.to(self.device) if self.all_rule["scales"] else None
        return t

    def place(self, t: Tensors, name: str, values: list[Tensor], layouts: Iterator[str]) -> None:
        places = [laid_out(x, next(layouts), self.device) for x in values]
        setattr(t, name, [x for x, _ in places])
        t.memory[name] = [around for _, around in places]

    def make_side(self, t: Tensors, side: str, shape: tuple[int, int, int], generator: torch.Generator) -> None:
        """Create a factor with its momentum, residual and cached product."""
        count, size, _ = shape
        factor = self.draw(shape, generator, scale=0.3 / size**0.5)
        m = self.draw(shape, generator, scale=0.2 / size**0.5)
        if self.exact == "products":
            order = torch.stack([torch.randperm(size, generator=generator) for _ in range(count)])
            factor = torch.eye(size)[order] * 2.0 ** -(order % 3)[..., None]
        elif self.exact == "rounding":
            m = torch.zeros(shape)
        else:
            factor = torch.eye(size) + factor
        if self.is_whitened:  # whitened factors are symmetric
            factor = torch.diag_embed(factor.abs().amax(-1)) if self.exact else (factor + factor.mT) / 2
        setattr(t, side, factor.to(self.device, self.dtype))
        setattr(t, f"m_{side}", (m + m.mT).to(self.device, self.dtype))
        paired = self.dtype == BF16 and self.rounding == "compensated"
        residual = drawn_residual(shape, generator) if paired else None
        if residual is not None and self.is_whitened:
            residual = residual.tril() + residual.tril(-1).mT
        setattr(t, f"lo_{side}", None if residual is None else residual.to(self.device))
        product = torch.full(shape, torch.nan, dtype=self.matmul, device=self.device)
        setattr(t, f"p_{side}", product if self.keeps_products and not self.is_whitened else None)

    def scalar(self, value: float | None) -> Tensor | None:
        return None if value is None else torch.tensor(value, device=self.device)

    # ---- calls ---------------------------------------------------------------------------------------------------

    def gather(self, t: Tensors, run: Call | None = None) -> tuple[Tensor, Tensor]:
        """Gather G and its sums of squares, store both in `t` and return them."""
        factors = [t.c, t.k] if self.all_options["damping"] and not self.is_whitened else []
        arguments = (self.tiles, *self.sides, factors, self.scalar(self.grad_scale), self.matmul, self.maximize)
        t.grad, t.squares = (run or through(self.backend))("kron_gather", t.grads, *arguments)
        return t.grad, t.squares

    def update(self, t: Tensors, run: Call | None = None) -> Tensor:
        """Gather the gradients, update the factors and return ok [L]."""
        run = run or through(self.backend)
        self.gather(t, run)
        names = (*STATE, "p_c", "p_k", "curvature", "grad", "squares", "seeds", "steps")
        numbers = map(float, self.all_options.values())
        rule = [self.all_rule[name] for name in ("direction", "relative_damping", "factor_init")]
        options = (self.scalar(self.found_inf), *numbers, self.clip, self.rounding, *rule)
        t.ok = run("kron_factor", *[getattr(t, name) for name in names], *options)
        return t.ok

    def make_products(self, t: Tensors, run: Call | None = None) -> list[Tensor]:
        """Return CCᵀ and KKᵀ from `kron_products`, which a resumed run uses to recompute cached products."""
        return [*(run or through(self.backend))("kron_products", t.c, t.k, self.matmul)]

    def step(self, t: Tensors, ok: Tensor | None, cached: bool, run: Call | None = None) -> None:
        """Step the weights with the last gathered gradient. The whitened direction ignores `cached`."""
        lr = self.lr if isinstance(self.lr, Tensor) else torch.tensor(self.lr, dtype=FP64)
        factors = (t.p_c, t.p_k) if cached and not self.is_whitened else (t.c, t.k)
        descent, rule = self.all_descent, self.all_rule
        (run or through(self.backend))(
            "kron_step",
            *(t.params, t.buffers, t.residuals, self.tiles, t.skipped, t.update_norms),
            *(*factors, t.grad.clone(), t.squares, lr, ok, t.seeds, t.steps, self.scalar(self.found_inf)),
            cached or self.is_whitened,
            *(float(descent["momentum"]), float(descent["weight_decay"]), bool(descent["decoupled"])),
            *(self.weight_rounding, rule["momentum_on"], rule["nesterov"]),
        )

    def run(self, t: Tensors | None = None, run: Call | None = None) -> Tensors:
        """Run an update and a step, and return the tensors."""
        t = t or self.tensors()
        self.update(t, run)
        self.step(t, t.ok, self.keeps_products, run)
        return t

    # ---- the reference -------------------------------------------------------------------------------------------

    def reference_grads(self, t: Tensors) -> list[np.ndarray]:
        factor = (-1 if self.maximize else 1) / (self.grad_scale or 1)
        return [fp64(x) * factor for x in self.blocks(t.grads)]

    def reference_states(self, t: Tensors) -> list[recipe.RecipeState]:
        curvature = np.zeros(len(t.seeds)) if t.curvature is None else fp64(t.curvature)
        sides = (t.factor("c"), t.factor("k"), fp64(t.m_c), fp64(t.m_k), map(fp64, self.blocks(t.buffers)), curvature)
        return [recipe.RecipeState(*state) for state in zip(*sides, strict=True)]

    @property
    def reference_rule(self) -> dict[str, Any]:
        """The options of the rule that affect the update of the factors."""
        return {name: self.all_rule[name] for name in ("direction", "relative_damping", "factor_init")}

    def reference_update(self, t: Tensors) -> list[Any]:
        """Return the states of the reference after an update."""
        pairs = zip(self.reference_states(t), self.reference_grads(t), strict=True)
        if not self.rule:
            return [ref.kron_update(*pair, clip=self.reference_clip, **self.all_options) for pair in pairs]
        options = {"clip": self.reference_clip, **self.all_options, **self.reference_rule}
        return [recipe.recipe_update(*pair, **options) for pair in pairs]

    def reference_step(self, t: Tensors) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return the reference's weights and momentum buffers after a step without an update.

        Products read only the BF16 half of a compensated factor.
        """
        found = []
        weights = map(fp64, self.blocks(t.weights()))
        blocks = zip(weights, self.reference_grads(t), self.reference_states(t), strict=True)
        norms = [None] * len(t.seeds) if t.update_norms is None else fp64(t.update_norms).tolist()
        for (weight, grad, state), c, k, norm in zip(blocks, fp64(t.c), fp64(t.k), norms, strict=True):
            state.C, state.K = c, k
            options = {"update": False, "lr": self.lr, **self.all_descent}
            if self.rule:
                rule = {name: value for name, value in self.all_rule.items() if name != "scales"}
                found.append(recipe.recipe_step(weight, grad, state, norm=norm, **options, **rule))
            else:
                found.append(ref.kron_step(weight, grad, state, **options))
        return [weight for weight, _ in found], [state.buffer for _, state in found]


def assert_same(actual: Tensors, expected: Tensors, *names: str) -> None:
    """Check that the tensors with these names are bitwise equal."""
    x, y = actual.named(), expected.named()
    compared = [name for name in y if name.split()[0] in names]
    differ = [name for name in compared if not same_bits(x[name], y[name])]
    assert compared and not differ, f"these differ: {differ}"


def assert_memory_around_blocks_is_untouched(batch: Batch, t: Tensors) -> None:
    """Check that memory outside the blocks still has its initial values."""
    was = batch.tensors()
    for name, memories in t.memory.items():
        around = [torch.ones_like(x, dtype=torch.bool) for x in memories]
        pairs = zip(around, getattr(was, name), strict=True)
        inside = [x.as_strided(y.shape, y.stride(), y.storage_offset()) for x, y in pairs]
        for block in batch.blocks(inside) if inside else ():
            block.fill_(False)
        for now, before, kept in zip(memories, was.memory[name], around, strict=True):
            assert same_bits(now[kept], before[kept]), name
