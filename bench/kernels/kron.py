"""The update of the factors and the preconditioned step, whole and launch by launch.

They are compared with the limits of the device and with the eager backend. The launch furthest from its limit has the
most to gain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.common.report import Alternatives, Row, Target
from bench.common.roofline import (
    Work,
    least_step_bytes,
    least_update_bytes,
    recipe_step_stages,
    recipe_update_stages,
    row_sum_stages,
    step_stages,
    total,
    update_stages,
)
from bench.common.tensors import random_tensors
from bench.common.timing import Measured, Timing, num_inputs
from bench.kernels.cases import Case, Context, check, in_double, poisoned_memory, ratio, require
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

UPDATE, STEP, LAUNCHES = "Factor update", "Preconditioned step", "Launches"

NOTES = {
    UPDATE: "Gather and update with P_C and P_K; at T = 1 with the step behind it, for which the eager backend does "
    "without P_C and P_K. With row sums: clipped by the largest row sum instead of the Frobenius norm, which takes one "
    "launch more. Of the recipe: whitened, with symmetric factors and no P_C and P_K. Of roofline: max(bytes / copy "
    "bandwidth, operations / 8192³ rate) over the time, bytes being those of the launches, each reading its inputs and "
    "writing its outputs once; of least bytes: gradient and state alone, nothing between launches.",
    STEP: "Gather and step, P_C and P_K kept, FP32 gradients, weights and momentum buffers. Of the recipe: with "
    "momentum of the gradient and an update of a fixed norm. Columns as above.",
    LAUNCHES: "Each launch between events of its own, which add a microsecond or two. Of limit: the larger of its "
    "bytes over the copy bandwidth and its operations over the 8192³ rate, over its time. Where most µs are above the "
    "limit, there is most to gain.",
}

SMALLEST_WITH_TARGET = 768
"""Side of blocks; smaller ones are measured for dispatch tables."""

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
    """Of the names of cases."""

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
    update_stages,
    step_stages,
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
ROW_SUM = PAPER._replace(suffix=", row sums", factor=OPTIONS._replace(clip="row_sum"), update_stages=row_sum_stages)
RECIPE = Rule(
    ", recipe",
    FactorOptions(16.0, 0.95, 0.0, 1e-8, 1.0, "row_sum", "stochastic", "whitened", True, "gradient"),
    StepOptions(0.9, 0.01, True, "stochastic", "gradient", True),
    recipe_update_stages,
    recipe_step_stages,
    {
        UPDATE: {**PAPER.launches[UPDATE], "kron_start_kernel": "start", "kron_whiten_kernel": "whiten"},
        STEP: {
            "kron_gather_kernel": "gather",
            "kron_average_kernel": "average",
            "bmm": "C·M",
            "bmm 2": "·K",
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
        self.steps = torch.zeros(count, device=device)
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


# ---- checks --------------------------------------------------------------------------------------------------------


def check_update(shape: Shape, context: Context, rule: Rule = PAPER) -> None:
    """Check at most two blocks against FP64, in poisoned memory, and that what is symmetric is so to the bit."""
    blocks = Blocks((min(shape[0], 2), *shape[1:]), context.device, rule)
    expected = in_double(blocks)
    expected.update(context.eager)
    with poisoned_memory():
        ok = blocks.update(context.backend)
    require(bool(ok.all()), "a block was skipped that is finite")
    correct = expected.state()
    for name, x in blocks.state().items():
        check(f"{name} of {shape[1]} × {shape[2]}", [x], [correct[name]])
    factors = [blocks.c, blocks.k] if rule.is_whitened else [blocks.p_c, blocks.p_k]
    check_symmetric([blocks.m_c, blocks.m_k, *factors])


def check_step(shape: Shape, context: Context, rule: Rule = PAPER, method: str = "step") -> None:
    """Check a method of at most two blocks against FP64, with a step as large as the weights."""
    blocks = Blocks((min(shape[0], 2), *shape[1:]), context.device, rule)
    blocks.lr = torch.tensor(0.02 if rule.is_whitened else 1.0, dtype=torch.float64)
    expected = in_double(blocks)
    getattr(expected, method)(context.eager)
    with poisoned_memory():
        getattr(blocks, method)(context.backend)
    for name, x, y in (("W", blocks.weights, expected.weights), ("buffer", blocks.buffers, expected.buffers)):
        check(f"{name} of {shape[1]} × {shape[2]}", x, y, torch.bfloat16)  # FP32, but made of BF16 products
    require(not bool(blocks.skipped.any()), "a block was skipped that is finite")


def check_symmetric(tensors: list[Tensor]) -> None:
    require(all(torch.equal(x, x.mT) for x in tensors), "a symmetric result is not symmetric")


# ---- updates and steps ---------------------------------------------------------------------------------------------


def update_rows(shape: Shape, rule: Rule, context: Context) -> list[Row]:
    """Time an update: whole, against the eager backend, and launch by launch."""
    check_update(shape, context, rule)
    rows = _block_rows(UPDATE, shape, rule, context)
    if rule is PAPER and shape[1] >= SMALLEST_WITH_TARGET:
        rows[0].targets["of roofline"] = Target("≥", 0.7 if shape[1] >= 4096 else 0.6)
    return rows


def step_rows(shape: Shape, rule: Rule, context: Context) -> list[Row]:
    """Time a step, likewise."""
    check_step(shape, context, rule)
    return _block_rows(STEP, shape, rule, context)


def together_rows(shape: Shape, rule: Rule, context: Context) -> list[Row]:
    """Time a step at T = 1 against the eager backend."""
    check_step(shape, context, rule, "update_and_step")
    times = _times("update_and_step", _sets(shape, rule, context), context)
    ours, eagerly = times.values()
    cells = {"µs": ours, "eager µs": eagerly, "eager / ours": ratio(eagerly, ours)}
    name = f"{_name(shape)}{rule.suffix}, T = 1"
    return [Row(UPDATE, name, cells, alternatives=_alternatives(shape, rule, times))]


def _name(shape: Shape) -> str:
    return f"{shape[0]} × {shape[1]}×{shape[2]}"


def _sets(shape: Shape, rule: Rule, context: Context) -> list[Blocks]:
    """Return the same blocks with different numbers, as many as the cache asks for."""
    first = Blocks(shape, context.device, rule)
    sets = num_inputs(first.bytes(), context.device)
    return [first, *(Blocks(shape, context.device, rule, 10 * index) for index in range(1, sets))]


def _times(method: str, every: list[Blocks], context: Context) -> dict[str, Timing]:
    """Return the times of a method by our kernels and by the eager backend, which take turns."""
    backends = context.backend, context.eager
    calls = {backend.name: [partial(getattr(x, method), backend) for x in every] for backend in backends}
    return {name: measured.total for name, measured in context.timer.measure(calls).items()}


def _alternatives(shape: Shape, rule: Rule, times: dict[str, Timing]) -> Alternatives | None:
    """Return the times for dispatch tables, which go by the paper's rule alone."""
    sizes = {"side": max(shape[1:]), "blocks": shape[0]}
    return Alternatives("matrices", sizes, times) if rule is PAPER else None


def _block_rows(table: str, shape: Shape, rule: Rule, context: Context) -> list[Row]:
    """Return the rows of `Blocks.update` or `Blocks.step`: the whole, and every launch."""
    count, sides = shape[0], shape[1:]
    if table == UPDATE:
        method, stages, least = "update", rule.update_stages(*sides), least_update_bytes(*sides, not rule.is_whitened)
    else:
        method, stages, least = "step", rule.step_stages(*sides), least_step_bytes(*sides)
    every, name = _sets(shape, rule, context), f"{_name(shape)}{rule.suffix}"
    times = _times(method, every, context)
    ours, eagerly = times.values()
    done = total(stages) * count
    cells: dict[str, Any] = {
        "µs": ours,
        "of roofline": context.fraction(done, ours),
        "of least bytes": context.fraction(Work(done.flops, least * count), ours),
        "TFLOP/s": done.flops / ours.median / 1e6,
        "eager µs": eagerly,
        "eager / ours": ratio(eagerly, ours),
    }
    row = Row(table, name, cells, alternatives=_alternatives(shape, rule, times))
    calls = [partial(getattr(x, method), context.backend) for x in every]
    measured = context.timer.measure({"ours": calls}, stages=True)["ours"]
    work = {label: each * count for label, each in stages.items()}
    return [row, *_launch_rows(f"{name} {method}", work, rule.launches[table], measured, context)]


def _launch_rows(
    name: str, work: Mapping[str, Work], labels: Mapping[str, str], measured: Measured, context: Context
) -> list[Row]:
    rows = []
    for launch, timing in measured.stages.items():
        label = labels.get(launch, launch)
        cells: dict[str, Any] = {"µs": timing, "share": timing.median / measured.total.median}
        if label in work:
            fraction = context.fraction(work[label], timing)
            cells["of limit"] = fraction
            cells["µs above limit"] = None if fraction is None else timing.median * (1 - fraction)
            cells["MB"], cells["GFLOP"] = work[label].bytes / 1e6, work[label].flops / 1e9
        rows.append(Row(LAUNCHES, f"{name}: {label}", cells))
    return rows


def block_cases(context: Context) -> list[Case]:
    blocks, others = context.sizes.blocks, context.sizes.other_blocks
    kinds = (
        (UPDATE, update_rows, "", PAPER, blocks),
        (STEP, step_rows, "", PAPER, blocks),
        (UPDATE, together_rows, ", T = 1", PAPER, blocks),
        (UPDATE, update_rows, "", RECIPE, others),
        (STEP, step_rows, "", RECIPE, others),
        (UPDATE, together_rows, ", T = 1", RECIPE, others),
        (UPDATE, update_rows, "", ROW_SUM, others),
    )
    return [
        Case(table, f"{_name(shape)}{rule.suffix}{more}", partial(rows, shape, rule, context))
        for table, rows, more, rule, shapes in kinds
        for shape in shapes
    ]
