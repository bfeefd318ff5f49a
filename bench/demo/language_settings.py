"""Sizes and optimizers of `bench.demo.language`, with the reason for every setting beside it."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from bench.demo import peers as demo_peers
from bench.demo.model import Task
from rootfree_kernels import IFShampoo, RFRMSProp

HEAD_WIDTH = 64
"""Columns of an attention head, as in GPT-2."""

SIZES = {
    # 28.9M weights
    "30m": Task(width=512, layers=9, batch=64, length=512, warmup=100),
    # 121.0M weights: GPT-2 124M's width, and five more layers in the place of its embedding of 50257 tokens
    "124m": Task(width=768, layers=17, batch=64, length=512, warmup=100),
    # for tests
    "tiny": Task(width=32, layers=1, batch=4, length=32, warmup=10),
}
PUBLIC_SIZES = ("30m", "124m")

TERM = 128
"""Bytes that count as one term of the loss. The curvature of the root-free methods grows with the number of terms, and
their damping was tuned with sequences of 128 bytes: with terms of as many bytes it means the same here."""

# No method was tuned at these sizes. AdamW and Muon have settings that are usual for them. For the root-free methods
# there are none: theirs come from a small search by README's "How to tune", at a half to a third of the width.
SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {
        "lr": 1e-3,  # above GPT-3's 6e-4 at 125M, for a smaller model
        "betas": (0.9, 0.95),  # of GPT-3 and its successors
        "weight_decay": 0.1,  # likewise; norms are not decayed
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
    # The best of seven by held-out loss, around the demo's settings, at width 256 (two layers, 150 steps of 8 × 128
    # bytes, on a CPU): 2.420 at half the demo's lr and damping. The demo's own gave 2.424, a quarter of them 2.448,
    # twice 2.430; at the demo's lr beta2 .2 gave 2.483 and damping 9e-5 2.427; at half of it beta2 .04 gave 2.850.
    "rfrmsprop": {"lr": 9e-5, "beta2": 0.083, "damping": 1.7e-5},
    # The best of six in the same way: the demo's own, with 2.340. Half its lr and damping gave 2.362, twice 2.368,
    # half its damping alone 2.355, beta2 .6 and .9 2.348 and 2.366.
    "ifshampoo": {"lr": 7.2e-5, "beta2": 0.75, "riemannian_momentum": 0.2, "damping": 2.25e-5},
}

AT_SIZE: dict[tuple[str, str], dict[str, Any]] = {
    ("124m", "adamw"): {"lr": 6e-4},  # GPT-3's at 125M
}
"""What differs at a size, by (size, method)."""


def adamw(model: nn.Module, **settings: Any) -> Optimizer:
    """AdamW, fused; vectors are not decayed."""
    groups = [
        {"params": [x for x in model.parameters() if x.ndim >= 2]},
        {"params": [x for x in model.parameters() if x.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, fused=True, **settings)


def if_shampoo(model: nn.Module, **settings: Any) -> Optimizer:
    """IFShampoo on all weights, with BF16 factors, as it is by default."""
    return IFShampoo(model.parameters(), **settings)


def recipe(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    momentum: float = 0.9,
    beta2: float = 0.95,
    damping: float = 1e-8,
    factor_dtype: torch.dtype = torch.bfloat16,
) -> Optimizer:
    """IFShampoo by its recipe, on the whole model."""
    options: dict[str, Any] = {"momentum": momentum, "beta2": beta2, "damping": damping, "factor_dtype": factor_dtype}
    return IFShampoo.for_model(model, lr, weight_decay, **options)


def rf_rmsprop(model: nn.Module, **settings: Any) -> Optimizer:
    return RFRMSProp(model.parameters(), **settings)


METHODS: dict[str, tuple[Callable[..., Optimizer], Callable[..., Any]]] = {
    "adamw": (adamw, torch.optim.AdamW),
    "muon": (demo_peers.muon, demo_peers.muon),
    "recipe": (recipe, recipe),
    "ifshampoo": (if_shampoo, IFShampoo),
    "rfrmsprop": (rf_rmsprop, RFRMSProp),
}
"""By method: what makes the optimizer of a model, and the function whose signature has its options."""

TAKEN = {"self", "model", "params", "fused"}
"""Arguments that are not for `--set` to change."""


def options_of(method: str) -> list[str]:
    return [name for name in inspect.signature(METHODS[method][1]).parameters if name not in TAKEN]


def settings_of(method: str, size: str, task: Task, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a method at a size, with the user's changes."""
    terms = {"batch_size": max(1, task.batch * task.length // TERM)} if method in ("ifshampoo", "rfrmsprop") else {}
    return {**terms, **SETTINGS[method], **AT_SIZE.get((size, method), {}), **changes}


def make(method: str, model: nn.Module, settings: Mapping[str, Any]) -> Optimizer:
    return METHODS[method][0](model, **settings)


def parse_change(text: str) -> tuple[str, str, Any]:
    """Read METHOD.OPTION=VALUE, as in `adamw.lr=1e-3`; the value is a Python literal, torch.DTYPE or a word.

    Raises:
        ValueError: it has another form, or there is no such method or option.
    """
    place, equals, value = text.partition("=")
    method, dot, option = place.partition(".")
    if not (equals and dot and option and value):
        raise ValueError(f"{text!r} is not METHOD.OPTION=VALUE, as in adamw.lr=1e-3")
    if method not in METHODS:
        raise ValueError(f"{text!r}: no method {method!r}: choose one of {', '.join(METHODS)}")
    if option not in options_of(method):
        raise ValueError(f"{text!r}: {method} has no option {option!r}: choose one of {', '.join(options_of(method))}")
    return method, option, _value(value)


def _value(text: str) -> Any:
    if text.startswith("torch."):
        return getattr(torch, text[len("torch.") :], text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
