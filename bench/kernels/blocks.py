"""Blocks of matrices, and the rules by which they are updated and stepped: the paper's and the recipe's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from bench.common import roofline
from bench.common.roofline import Work
from bench.common.tensors import random_tensors
from rootfree_kernels import ops
from rootfree_kernels.arguments import (
    Draws,
    FactorOptions,
    Factors,
    Gathered,
    Preconditioner,
    StepOptions,
    Tiling,
    Weights,
)
from rootfree_kernels.backend import Backend
from rootfree_kernels.blocks import Tile

UPDATE, STEP = "Factor update", "Preconditioned step"

Shape = tuple[int, int, int]  # L, p, d

OPTIONS = FactorOptions(
    batch_size=16.0,
    beta2=0.2,
    riemannian_momentum=0.5,
    damping=1e-4,
    gamma=1.0,
    clip="frobenius",
    rounding="stochastic",
)


class Rule(NamedTuple):
    """Options of updates and steps, and the work of their launches on a block of p × d."""

    suffix: str
    """The end of the names of its cases."""

    factor: FactorOptions
    step: StepOptions
    update_stages: Callable[[int, int], dict[str, Work]]
    step_stages: Callable[[int, int], dict[str, Work]]
    launches: Mapping[str, Mapping[str, str]]
    """By table, the stage of each launch. A launch that is missing is shown by its own name, without a limit."""

    @property
    def is_whitened(self) -> bool:
        return self.factor.direction == "whitened"


PAPER = Rule(
    "",
    OPTIONS,
    StepOptions(0.9, 0.01, False, "stochastic"),
    roofline.update_stages,
    roofline.step_stages,
    {
        UPDATE: {
            "kron_gather_kernel": "gather",
            "bmm": "CᵀG",
            "bmm 2": "·K",
            "kron_momentum_kernel": "momentum",
            "kron_norms_kernel": "norms",
            "kron_factor_kernel": "factor",
            "kron_products_kernel": "products",
        },
        STEP: {"kron_gather_kernel": "gather", "bmm": "P_C·G", "kron_step_kernel": "step"},
    },
)
ROW_SUM = PAPER._replace(
    suffix=", row sums", factor=OPTIONS._replace(clip="row_sum"), update_stages=roofline.row_sum_stages
)
RECIPE = Rule(
    ", recipe",
    FactorOptions(16.0, 0.95, 0.0, 1e-8, 1.0, "row_sum", "stochastic", "whitened", True, "gradient"),
    StepOptions(0.9, 0.01, True, "stochastic", "gradient", True),
    roofline.recipe_update_stages,
    roofline.recipe_step_stages,
    {
        UPDATE: {**PAPER.launches[UPDATE], "kron_start_kernel": "start", "kron_whiten_kernel": "whiten"},
        STEP: {
            "kron_gather_kernel": "gather",
            "kron_average_kernel": "average",
            "bmm": "C·M",
            "bmm 2": "C·M·K",
            "kron_size_kernel": "size",
            "kron_apply_kernel": "apply",
        },
    },
)


class Blocks:
    """L blocks of p × d in BF16, or FP64 as the reference: the factors' state, and a weight and a gradient each."""

    def __init__(self, shape: Shape, device: torch.device, rule: Rule = PAPER, seed: int = 0) -> None:
        count, p, d = shape
        self.rule, self.p, self.d = rule, p, d
        self.weights, self.buffers, self.grads = (
            random_tensors([(p, d)] * count, device, scale=scale, seed=seed + index)
            for index, scale in enumerate((0.02, 0.1, 0.3))
        )
        self.c, self.k = (near_identity(count, n, device, seed + 3 + n, rule.is_whitened) for n in (p, d))
        self.m_c, self.m_k = (_symmetric(count, n, device, 0.01, seed + 4 + n) for n in (p, d))
        self.p_c, self.p_k = torch.bmm(self.c, self.c.mT), torch.bmm(self.k, self.k.mT)
        self.curvature = torch.ones(count, device=device)
        self.norms = torch.full((count,), p**0.5, device=device)
        self.tiles = [*Tile.single(p, d).as_ints] * count
        self.skipped = torch.zeros(count, dtype=torch.int32, device=device)
        self.seeds = torch.arange(count, dtype=torch.int32, device=device)
        self.steps = torch.zeros(count, dtype=torch.int64, device=device)
        self.lr = torch.tensor(1e-4, dtype=torch.float64)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that an update changes, by name."""
        factors = {"C": self.c, "K": self.k, "m_C": self.m_c, "m_K": self.m_k}
        return factors | ({"q": self.curvature} if self.rule.is_whitened else {"P_C": self.p_c, "P_K": self.p_k})

    def gather(self, backend: Backend, factors: list[Tensor]) -> Gathered:
        dtype = torch.float64 if self.c.dtype == torch.float64 else torch.bfloat16
        return ops.kron_gather(self.grads, Tiling(self.tiles, self.p, self.d), factors, None, dtype, False, backend)

    def gather_for_update(self, backend: Backend) -> Gathered:
        return self.gather(backend, [] if self.rule.is_whitened else [self.c, self.k])

    def update(self, backend: Backend) -> Tensor:
        """Gather and update the factors, and their products if the rule has any. Return ok [L]."""
        return self._factor(backend, not self.rule.is_whitened, self.gather_for_update(backend))

    def step(self, backend: Backend) -> None:
        """Gather and step with the matrices that are kept."""
        self._weight(backend, not self.rule.is_whitened, None, self.gather(backend, []))

    def update_and_step(self, backend: Backend) -> None:
        """Take a step at T = 1: gather, update and step. The backend decides whether products are made on the way."""
        products = backend.makes_products and not self.rule.is_whitened
        gathered = self.gather_for_update(backend)
        ok = self._factor(backend, products, gathered)
        self._weight(backend, products, ok, gathered)

    def _factor(self, backend: Backend, with_products: bool, gathered: Gathered) -> Tensor:
        products = (self.p_c, self.p_k) if with_products else (None, None)
        curvature = self.curvature if self.rule.is_whitened else None
        factors = Factors(self.c, self.k, self.m_c, self.m_k, None, None, *products, curvature)
        return ops.kron_factor(factors, gathered, Draws(self.seeds, self.steps), None, self.rule.factor, backend)

    def _weight(self, backend: Backend, with_products: bool, ok: Tensor | None, gathered: Gathered) -> None:
        matrices = (self.p_c, self.p_k) if with_products else (self.c, self.k)
        preconditioner = Preconditioner(*matrices, with_products or self.rule.is_whitened, ok)
        norms = self.norms if self.rule.is_whitened else None
        weights = Weights(self.weights, self.buffers, [], self.tiles, self.skipped, norms)
        draws = Draws(self.seeds, self.steps)
        ops.kron_step(weights, preconditioner, gathered, self.lr, draws, None, self.rule.step, backend)

    def bytes(self) -> int:
        tensors = [*self.weights, *self.buffers, *self.grads, *self.state().values()]
        return sum(x.numel() * x.element_size() for x in tensors)


def near_identity(count: int, n: int, device: torch.device, seed: int, is_symmetric: bool = False) -> Tensor:
    (x,) = random_tensors([(count, n, n)], device, scale=0.1 / n**0.5, seed=seed)
    return ((x + x.mT if is_symmetric else x) + torch.eye(n, device=device)).bfloat16()


def _symmetric(count: int, n: int, device: torch.device, scale: float, seed: int) -> Tensor:
    (x,) = random_tensors([(count, n, n)], device, scale=scale / n**0.5, seed=seed)
    return (x + x.mT).bfloat16()
