"""The sizes of the demo's model, and the settings of each method at each size, with the reasons beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.common.gpt import GPT, GPTConfig


@dataclass(frozen=True)
class Task:
    """The model, its batches and its number of steps. One batch is `batch` sequences of `length` bytes."""

    steps: int = 400
    warmup: int = 20
    batch: int = 16
    length: int = 128
    width: int = 128
    layers: int = 5
    seed: int = 0
    head_width: int = 32
    held_out_batches: int = 16

    def model(self) -> GPT:
        """Return a model with random weights from the global generator."""
        return GPT(GPTConfig(self.layers, self.width, context=self.length, head_width=self.head_width))


LARGE = {"batch": 64, "length": 512, "warmup": 100, "head_width": 64, "held_out_batches": 8}

SIZES = {
    # 1.07M weights, on the standard library
    "small": Task(),
    # 28.8M weights
    "30m": Task(width=512, layers=9, **LARGE),
    # 121.0M weights: GPT-2 124M's width, and five more layers in the place of its embedding of 50257 tokens
    "124m": Task(width=768, layers=17, **LARGE),
    # for tests
    "tiny": Task(width=32, layers=1, batch=4, length=32, warmup=10, held_out_batches=8),
}

TERM = 128
"""Bytes that count as one term of the loss. The curvature of the root-free methods grows with the number of terms, and
their damping was tuned with sequences of 128 bytes. With terms of 128 bytes it means the same at every size."""

Settings = dict[str, dict[str, Any]]

# Found by `python -m bench.demo.tune --method NAME` (bench/results/demo-tuning.json). Most methods had as many trials
# as AdamW; Muon had more, and the recipe fewer.
AT_SMALL: Settings = {
    "adamw": {"lr": 2.48e-3, "betas": (0.9, 0.9797), "weight_decay": 0.0168},
    "rfrmsprop": {"lr": 1.79e-4, "beta2": 0.0829, "damping": 3.35e-5},
    "ifshampoo": {"lr": 7.21e-5, "beta2": 0.753, "riemannian_momentum": 0.203, "damping": 2.23e-5},
    "shampoo": {"lr": 4.21e-3, "betas": (0.9, 0.9856), "weight_decay": 0.0216, "T": 3},
    "muon": {"lr": 4.5e-2, "adamw_lr": 3.02e-3, "weight_decay": 0.234, "momentum": 0.9},
    "recipe": {"lr": 4.5e-2, "weight_decay": 0.234},
}

# No method was tuned at these sizes. AdamW and Muon have settings that are usual for them. There are no usual settings
# of the root-free methods: theirs come from a small search by README's "How to tune", at a third to half of the width.
AT_LARGE: Settings = {
    "adamw": {
        "lr": 1e-3,  # above GPT-3's 6e-4 at 125M, for a smaller model
        "betas": (0.9, 0.95),  # those of GPT-3 and its successors
        "weight_decay": 0.1,  # likewise
        "decay_vectors": False,  # likewise: norms are not decayed
        "fused": True,  # the fastest of PyTorch's implementations on a GPU
    },
    "muon": {
        "lr": 0.03,  # between Keller Jordan's .02 and the .045 that was best at width 128; torch's "original" scale,
        # sqrt(max(1, rows / columns)), makes steps whose spectral norm does not depend on the width
        "momentum": 0.95,  # its authors'
        "weight_decay": 0.1,  # torch's default
        "adamw_lr": 3e-3,  # for embeddings, head and norms; the search at width 128 (bench.demo.tune) had 3.02e-3
    },
    "recipe": {
        "lr": 0.03,  # Muon's, since updates have the same size
        "weight_decay": 0.1,  # likewise
    },
    # The best of six by held-out loss, around the settings at size small, at width 256 (two layers, 150 steps of
    # 8 × 128 bytes, on a CPU): those of size small, with 2.340. Half the lr and damping gave 2.362, twice 2.368, half
    # the damping alone 2.355, beta2 .6 and .9 2.348 and 2.366.
    "ifshampoo": {"lr": 7.2e-5, "beta2": 0.75, "riemannian_momentum": 0.2, "damping": 2.25e-5},
    # The best of seven in the same way: 2.420 at half the lr and damping of size small. These themselves gave 2.424, a
    # quarter of them 2.448, twice 2.430. At the lr of size small, beta2 .2 gave 2.483 and damping 9e-5 2.427; at half
    # of it, beta2 .04 gave 2.850.
    "rfrmsprop": {"lr": 9e-5, "beta2": 0.083, "damping": 1.7e-5},
}

SETTINGS: dict[str, Settings] = {
    "small": AT_SMALL,
    "30m": AT_LARGE,
    "124m": {**AT_LARGE, "adamw": {**AT_LARGE["adamw"], "lr": 6e-4}},  # GPT-3's at 125M
    "tiny": AT_LARGE,
}
"""Settings by size and method."""


def settings_of(method: str, size: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a method at a size, with the user's changes."""
    return {**SETTINGS[size][method], **changes}
