"""The workloads that optimizers step: single weights, and the hidden matrices of real models.

Embeddings, heads and vectors are left out, since Shampoo, SOAP and Muon leave them to AdamW or to a diagonal step. A
convolution [o, i, h, w] is a matrix o × i·h·w, as all of these optimizers see it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from bench.common.gpt import GPT2, GPTConfig
from rootfree_kernels.blocks import tiles

Matrix = tuple[int, int]


@dataclass(frozen=True)
class Workload:
    """A list of weights that are stepped together."""

    name: str
    shapes: tuple[Matrix, ...]
    on_cpu: bool = False
    """Whether a machine without a GPU measures it."""

    @property
    def num_weights(self) -> int:
        return sum(map(prod, self.shapes))

    @property
    def longest_side(self) -> int:
        return max(map(max, self.shapes))

    def blocks(self, max_dim: int | None) -> tuple[Matrix, ...]:
        """Return the shapes of the blocks, cut evenly with sides of at most `max_dim` as IFShampoo does."""
        return tuple(
            tile.block_shape for shape in self.shapes for tile in tiles(shape, max_dim) for _ in range(tile.num_blocks)
        )


def vit_matrices(depth: int = 12, width: int = 768, patch: int = 16) -> tuple[Matrix, ...]:
    """Return the matrices of torchvision's ViT-B/16, whose patch embedding is a convolution of 16 × 16."""
    layer = ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))
    return ((width, 3 * patch * patch), *(layer * depth))


def resnet50_matrices() -> tuple[Matrix, ...]:
    """Return the convolutions of torchvision's ResNet-50."""
    shapes: list[Matrix] = [(64, 3 * 49)]
    inputs = 64
    for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for index in range(depth):
            shapes += [(width, inputs), (width, 9 * width), (4 * width, width)]
            if index == 0:
                shapes.append((4 * width, inputs))
            inputs = 4 * width
    return tuple(shapes)


def llama_matrices(width: int = 4096, hidden: int = 11008) -> tuple[Matrix, ...]:
    """Return one layer of Llama 7B."""
    return *((width, width),) * 4, (hidden, width), (hidden, width), (width, hidden)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("512²", ((512, 512),), on_cpu=True),
        Workload("1024²", ((1024, 1024),), on_cpu=True),
        Workload("small GPT", GPTConfig(5, 128).matrices(), on_cpu=True),
        Workload("1024×4096", ((1024, 4096),), on_cpu=True),
        Workload("4096²", ((4096, 4096),)),
        Workload("GPT-2 124M", GPT2().matrices()),
        Workload("GPT-2 350M", GPT2(depth=24, width=1024).matrices()),
        Workload("ViT-B/16", vit_matrices()),
        Workload("ResNet-50", resnet50_matrices()),
        Workload("Llama-7B layer", llama_matrices()),
    )
}
