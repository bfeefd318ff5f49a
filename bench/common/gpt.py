"""A GPT in plain PyTorch, which serves every benchmark that needs a model, and the shapes of GPT-2's weights."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rootfree_kernels.blocks import tiles

Shape = tuple[int, ...]


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a model."""

    depth: int
    width: int
    vocabulary: int = 256
    context: int = 128
    head_width: int = 32
    is_gpt2: bool = False
    """Whether to follow GPT-2: LayerNorm in the place of RMSNorm, biases, one matrix for query, key and value, the
    embedding as the head, and 0.02 as the standard deviation of every matrix."""

    @property
    def norm(self) -> type[nn.LayerNorm] | type[nn.RMSNorm]:
        return nn.LayerNorm if self.is_gpt2 else nn.RMSNorm

    def shapes(self) -> dict[str, Shape]:
        """Return the shape of every parameter by its name. GPT-2's are inputs × outputs, as OpenAI stored them."""
        with torch.device("meta"):
            weights = {name: tuple(x.shape) for name, x in GPT(self).named_parameters()}
        kept = ("bytes.weight", "places.weight") if self.is_gpt2 else weights
        return {name: shape if name in kept else shape[::-1] for name, shape in weights.items()}

    def matrices(self) -> tuple[tuple[int, int], ...]:
        """Return the shapes of the blocks' weights, in the order of the model."""
        hidden = (shape for name, shape in self.shapes().items() if name.startswith("blocks."))
        return tuple((shape[0], shape[1]) for shape in hidden if len(shape) == 2)

    def num_numbers(self) -> int:
        """Return the number of parameters, counted as numbers."""
        return sum(map(prod, self.shapes().values()))

    def blocks(self, max_dim: int | None = 1024) -> Counter[tuple[int, int]]:
        """Return how many blocks of each shape (p, d) IF-Shampoo cuts the weights into."""
        counts: Counter[tuple[int, int]] = Counter()
        for shape in self.shapes().values():
            for tile in tiles(shape, max_dim):
                counts[tile.block_shape] += tile.num_blocks
        return counts


@dataclass(frozen=True)
class GPT2(GPTConfig):
    """GPT-2 124M, or another size of its architecture."""

    depth: int = 12
    width: int = 768
    vocabulary: int = 50257
    context: int = 1024
    head_width: int = 64
    is_gpt2: bool = True


class Block(nn.Module):
    """Pre-norm causal attention, then a pre-norm MLP of four times the width."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width, norm, linear = config.width, config.norm, partial(nn.Linear, bias=config.is_gpt2)
        self.heads, self.is_gpt2 = max(1, width // config.head_width), config.is_gpt2
        self.norm1, self.norm2 = norm(width), norm(width)
        if config.is_gpt2:
            self.attention = linear(width, 3 * width)
        else:
            self.query, self.key, self.value = (linear(width, width) for _ in range(3))
        self.mix = linear(width, width)
        self.up, self.down = linear(width, 4 * width), linear(4 * width, width)
        self.gelu = partial(F.gelu, approximate="tanh" if config.is_gpt2 else "none")

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        parts = self.attention(y).chunk(3, dim=-1) if self.is_gpt2 else (self.query(y), self.key(y), self.value(y))
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix(y.transpose(1, 2).flatten(2))
        return x + self.down(self.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Map tokens [batch, length] to logits [batch, length, vocabulary]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.bytes, self.places = nn.Embedding(config.vocabulary, width), nn.Embedding(config.context, width)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.depth)))
        self.norm = config.norm(width)
        self.head = None if config.is_gpt2 else nn.Linear(width, config.vocabulary, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=self._std(name, weight.shape[1]))

    def _std(self, name: str, columns: int) -> float:
        """Return the standard deviation of a weight's initial values."""
        if self.config.is_gpt2 or name in ("bytes.weight", "places.weight"):
            return 0.02
        into_residual = name.endswith(("mix.weight", "down.weight"))
        return columns**-0.5 / (math.sqrt(2 * self.config.depth) if into_residual else 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.blocks(self.bytes(x) + self.places.weight[: x.shape[1]]))
        return F.linear(y, self.bytes.weight) if self.head is None else self.head(y)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of targets [batch, length], in nats per token."""
        return F.cross_entropy(self(inputs).flatten(0, 1), targets.flatten())

    def matrices(self) -> list[nn.Parameter]:
        """Return the weights of the blocks."""
        return [x for name, x in self.named_parameters() if name.startswith("blocks.") and x.ndim == 2]

    def rest(self) -> list[nn.Parameter]:
        """Return everything else: embeddings, head and vectors."""
        matrices = set(self.matrices())
        return [x for x in self.parameters() if x not in matrices]

    @torch.no_grad()
    def sample(self, prompt: str, count: int, seed: int, temperature: float = 0.7) -> str:
        """Return a prompt and `count` bytes after it. The model must be on the CPU, and its tokens bytes."""
        generator = torch.Generator().manual_seed(seed)
        text = torch.tensor([list(prompt.encode())])
        for _ in range(count):
            logits = self(text[:, -self.config.context :])[:, -1] / temperature
            text = torch.cat([text, torch.multinomial(logits.softmax(-1), 1, generator=generator)], 1)
        return bytes(text[0].tolist()).decode(errors="replace")
