"""The task of the demo: Python sources as bytes, batches of them, a small GPT, and the schedule of its training.

`bench.demo.language` trains the same model at larger sizes. Nothing here needs more than PyTorch.
"""

from __future__ import annotations

import hashlib
import math
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Task:
    """The model, its batches and its number of steps. One batch is ``batch`` sequences of ``length`` bytes."""

    steps: int = 400
    warmup: int = 20
    batch: int = 16
    length: int = 128
    width: int = 128
    layers: int = 5
    seed: int = 0


def standard_library() -> tuple[Tensor, Tensor]:
    """Return the standard library's sources as (train, held-out) bytes; the hash of a file's name picks its side.

    Left out: what is not part of every installation (tests, IDLE, installed packages) and files that are
    tables rather than code (codecs, pydoc's topics).
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "idle_test",
        "encodings",
        "pydoc_data",
    }
    sides: tuple[bytearray, bytearray] = (bytearray(), bytearray())
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root)
        if left_out.isdisjoint(name.parts):
            held_out = hashlib.sha256(name.as_posix().encode()).digest()[0] < 26  # about one file in ten
            sides[held_out].extend(path.read_bytes())
    return torch.frombuffer(sides[0], dtype=torch.uint8), torch.frombuffer(sides[1], dtype=torch.uint8)


def batches(data: Tensor, count: int, task: Task, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``count`` batches of (inputs, targets), each [batch, length], from places that ``seed`` decides.

    Places are drawn on the data's device, so that a GPU is not waited for.
    """
    generator = torch.Generator(data.device).manual_seed(seed)
    offsets = torch.arange(task.length + 1, device=data.device)
    for _ in range(count):
        starts = torch.randint(len(data) - task.length, (task.batch, 1), generator=generator, device=data.device)
        window = data[starts + offsets].long()
        yield window[:, :-1], window[:, 1:]


def warmup_cosine(step: int, task: Task) -> float:
    """Return the learning rate's factor: up in a line over the warm-up, then down to 0 along a cosine."""
    warmup = min(task.warmup, task.steps // 10 + 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, task.steps - warmup)))


class Block(nn.Module):
    """Pre-norm causal attention, then a pre-norm MLP of four times the width."""

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.heads = max(1, width // head_width)
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.key, self.value, self.mix = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        maps = (self.query, self.key, self.value)
        query, key, value = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in maps)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Bytes [batch, length] to logits [batch, length, 256]."""

    def __init__(self, task: Task, head_width: int = 32) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, task.width), nn.Embedding(task.length, task.width)
        self.blocks = nn.Sequential(*(Block(task.width, head_width) for _ in range(task.layers)))
        self.norm, self.head = nn.RMSNorm(task.width), nn.Linear(task.width, 256, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                std = 0.02 if name in ("bytes.weight", "places.weight") else weight.shape[1] ** -0.5
                into_residual = name.endswith(("mix.weight", "down.weight"))
                nn.init.normal_(weight, std=std / math.sqrt(2 * task.layers) if into_residual else std)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.bytes(x) + self.places.weight[: x.shape[1]])))

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per byte."""
        return F.cross_entropy(self(inputs).flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def sample(self, prompt: str, count: int, seed: int, temperature: float = 0.7) -> str:
        """``prompt`` and ``count`` bytes after it."""
        generator = torch.Generator().manual_seed(seed)
        text = torch.tensor([list(prompt.encode())])
        for _ in range(count):
            logits = self(text[:, -len(self.places.weight) :])[:, -1] / temperature
            text = torch.cat([text, torch.multinomial(logits.softmax(-1), 1, generator=generator)], 1)
        return bytes(text[0].tolist()).decode(errors="replace")
