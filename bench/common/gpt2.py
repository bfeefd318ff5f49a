"""The tensors of GPT-2 from its architecture alone, and the multiplications and bytes of what is done with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from rootfree_kernels.blocks import tiles

Shape = tuple[int, ...]


@dataclass(frozen=True)
class GPT2:
    """The 124M model, or another one of its architecture; the head is the embedding."""

    depth: int = 12
    width: int = 768
    vocabulary: int = 50257
    context: int = 1024

    def shapes(self) -> dict[str, Shape]:
        """Every parameter by its name; weights are inputs × outputs, as OpenAI stored them."""
        n = self.width
        layer: dict[str, Shape] = {
            "ln_1.weight": (n,),
            "ln_1.bias": (n,),
            "attn.c_attn.weight": (n, 3 * n),
            "attn.c_attn.bias": (3 * n,),
            "attn.c_proj.weight": (n, n),
            "attn.c_proj.bias": (n,),
            "ln_2.weight": (n,),
            "ln_2.bias": (n,),
            "mlp.c_fc.weight": (n, 4 * n),
            "mlp.c_fc.bias": (4 * n,),
            "mlp.c_proj.weight": (4 * n, n),
            "mlp.c_proj.bias": (n,),
        }
        shapes: dict[str, Shape] = {"wte": (self.vocabulary, n), "wpe": (self.context, n)}
        for index in range(self.depth):
            shapes |= {f"h.{index}.{name}": shape for name, shape in layer.items()}
        return {**shapes, "ln_f.weight": (n,), "ln_f.bias": (n,)}

    def num_numbers(self) -> int:
        return sum(prod(shape) for shape in self.shapes().values())

    def blocks(self, max_dim: int | None = 1024) -> Counter[tuple[int, int]]:
        """How many blocks of each shape (p, d) IF-Shampoo cuts the weights into."""
        counts: Counter[tuple[int, int]] = Counter()
        for shape in self.shapes().values():
            for tile in tiles(shape, max_dim):
                counts[tile.block_shape] += tile.num_blocks
        return counts


def random_tensors(
    shapes: Iterable[Shape], device: torch.device, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0
) -> list[Tensor]:
    """Normally distributed numbers times `scale`; no global generator is touched."""
    generator = torch.Generator(device=device).manual_seed(seed)
    options = {"generator": generator, "device": device}
    return [torch.randn(shape, **options).mul_(scale).to(dtype) for shape in shapes]


# ---- work --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Floating-point operations (a multiplication and an addition are two) and bytes to and from memory."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.bytes * times)


@dataclass(frozen=True)
class Ceilings:
    """What this device copies, in bytes read and written a second, and multiplies, in BF16 operations a second."""

    bandwidth: float
    rate: float

    def limit(self, work: Work) -> float:
        """µs below which the work cannot be done: the larger of both times."""
        return max(work.bytes / self.bandwidth, work.flops / self.rate) * 1e6


def total(work: Mapping[str, Work]) -> Work:
    return sum(work.values(), Work())


def diagonal_bytes(param: torch.dtype, grad: torch.dtype, state: torch.dtype) -> int:
    """Bytes a number of RF-RMSProp, and of Adam: four tensors are read and all but the gradient written."""
    return 2 * param.itemsize + grad.itemsize + 4 * state.itemsize


def momentum_bytes(momentum: torch.dtype, passes: int = 1) -> int:
    """Bytes a number of the clipped momentum: m and an FP32 Δ are read in every pass, m is written once. The norm must
    be known before m may change, so that two passes are needed."""
    return passes * (momentum.itemsize + 4) + momentum.itemsize


def update_stages(p: int, d: int, grad_bytes: int = 4, factor_bytes: int = 2) -> dict[str, Work]:
    """The launches of one update of a p × d block with BF16 factors, each reading its inputs and writing its outputs
    once; symmetric products count half. Without the gather 3pd(p+d) + 4(p³+d³) operations, which is 14n³."""
    pd, squares, cubes, size = p * d, p * p + d * d, p**3 + d**3, factor_bytes
    return {
        "gather": Work(0, grad_bytes * pd + size * (pd + squares)),  # ‖C‖ and ‖K‖ are taken on the way
        "CᵀG": Work(2 * p * pd, size * (p * p + 2 * pd)),
        "·K": Work(2 * d * pd, size * (d * d + 2 * pd)),
        "momentum": Work(pd * (p + d) + cubes, size * (pd + 3 * squares)),  # A, C, K, m, new m
        "factor": Work(2 * cubes, 4 * size * squares),  # old and new factor, new m, m
        "products": Work(cubes, 3 * size * squares),  # new factor, product, factor
    }


TILE = 128
"""Rows and columns of a tile of m, of which the kernel leaves one sum a row where the clip is by row sums."""


def row_sum_stages(p: int, d: int) -> dict[str, Work]:
    """Return the launches of an update with clip="row_sum": those of `update_stages`, and one that reads what the tiles
    of m left of FP32 row sums."""
    sums = Work(0, 4 * sum(n * -(-n // TILE) for n in (p, d)))
    stages = update_stages(p, d)
    stages["momentum"] += sums
    last = {name: stages.pop(name) for name in ("factor", "products")}
    return {**stages, "norms": sums, **last}


def step_stages(p: int, d: int, grad_bytes: int = 4, weight_bytes: int = 4, factor_bytes: int = 2) -> dict[str, Work]:
    """The launches of a step of a p × d block whose P_C and P_K are kept, gather included: 2pd(p+d) operations."""
    pd, size = p * d, factor_bytes
    return {
        "gather": Work(0, (grad_bytes + size) * pd),
        "P_C·G": Work(2 * p * pd, size * (p * p + 2 * pd)),
        "step": Work(2 * d * pd, size * (pd + d * d) + 2 * weight_bytes * pd + 8 * pd),  # weight and FP32 momentum
    }


def least_update(p: int, d: int, grad_bytes: int = 4) -> Work:
    """An update by one launch that there is none of: gradient and state read once and written once, nothing between."""
    return Work(total(update_stages(p, d)).flops, grad_bytes * p * d + 10 * (p * p + d * d))


def least_step(p: int, d: int, grad_bytes: int = 4, weight_bytes: int = 4) -> Work:
    """A step by one launch, likewise."""
    bytes_ = (grad_bytes + 2 * weight_bytes + 8) * p * d + 2 * (p * p + d * d)
    return Work(total(step_stages(p, d)).flops, bytes_)


def whole_step(model: GPT2, update: bool, grad_bytes: int = 4) -> Work:
    """A step of IF-Shampoo over all of a model, of BF16 factors and FP32 weights: its blocks, and the diagonal step of
    its vectors. An update's G serves the step as well."""
    work = Work()
    for (p, d), count in model.blocks().items():
        stages = step_stages(p, d, grad_bytes)
        if update:
            stages |= update_stages(p, d, grad_bytes)
        work += total(stages) * count
    vectors = sum(prod(shape) for shape in model.shapes().values() if not tiles(shape, None))
    return work + Work(0, diagonal_bytes(torch.float32, torch.float32, torch.float32) * vectors)
