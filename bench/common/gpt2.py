"""The shapes of GPT-2's parameters."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod

from bench.common.tensors import Shape
from rootfree_kernels.blocks import tiles


@dataclass(frozen=True)
class GPT2:
    """GPT-2 124M, or another model of its architecture. The head is the embedding."""

    depth: int = 12
    width: int = 768
    vocabulary: int = 50257
    context: int = 1024

    def shapes(self) -> dict[str, Shape]:
        """Return the shape of every parameter by its name. Weights are inputs × outputs, as OpenAI stored them."""
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
        """Return how many blocks of each shape (p, d) IF-Shampoo cuts the weights into."""
        counts: Counter[tuple[int, int]] = Counter()
        for shape in self.shapes().values():
            for tile in tiles(shape, max_dim):
                counts[tile.block_shape] += tile.num_blocks
        return counts
