"""The optimizers that the demo compares, ours and other people's, each as its authors recommend it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch.optim import AdamW, Optimizer

from bench.common.gpt import GPT
from bench.common.muon import make_muon
from bench.common.peers import find, why_missing
from bench.common.together import Together
from bench.demo.settings import TERM, Task
from rootfree_kernels import IFShampoo, RFRMSProp


def adamw(model: GPT, decay_vectors: bool = True, **settings: Any) -> Optimizer:
    """Return AdamW for all weights."""
    if decay_vectors:
        return AdamW(model.parameters(), **settings)
    vectors = [x for x in model.parameters() if x.ndim < 2]
    matrices = [x for x in model.parameters() if x.ndim >= 2]
    return AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], **settings)


def muon(model: GPT, lr: float, adamw_lr: float, weight_decay: float, momentum: float = 0.95) -> Optimizer:
    """Return PyTorch's Muon for the matrices of the blocks, and AdamW for embeddings, head and vectors."""
    return Together(
        make_muon(model.matrices(), lr=lr, weight_decay=weight_decay, momentum=momentum),
        AdamW(model.rest(), lr=adamw_lr, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True),
    )


def shampoo(model: GPT, lr: float, betas: tuple[float, float], weight_decay: float, T: int) -> Optimizer:
    """Return Meta's Distributed Shampoo, with Adam's learning rate by grafting, and roots by eigh every T-th step, from
    the T-th on."""
    package = find("distributed_shampoo")
    optimizer: Optimizer = package.DistributedShampoo(
        model.parameters(),
        lr=lr,
        betas=betas,
        epsilon=1e-12,
        weight_decay=weight_decay,
        max_preconditioner_dim=1024,
        precondition_frequency=T,
        start_preconditioning_step=T,
        grafting_config=package.AdamPreconditionerConfig(beta2=betas[1], epsilon=1e-8),
        distributed_config=package.SingleDeviceDistributedConfig(target_parameter_dimensionality=2),
        preconditioner_config=package.RootInvShampooPreconditionerConfig(use_symmetric_packing=False),
    )
    return optimizer


def if_shampoo(model: GPT, **settings: Any) -> Optimizer:
    """Return IFShampoo by the paper's rule for all weights."""
    return IFShampoo(model.parameters(), **settings)


def rf_rmsprop(model: GPT, **settings: Any) -> Optimizer:
    """Return RFRMSProp for all weights."""
    return RFRMSProp(model.parameters(), **settings)


class Method(NamedTuple):
    """A way to train."""

    title: str
    make: Callable[..., Optimizer]
    """Makes the optimizer of a model from its settings."""

    options: Callable[..., Any] | None = None
    """The function whose signature has the settings, unless it is `make`."""

    peer: str | None = None
    """The package of other people that it needs."""


METHODS = {
    "adamw": Method("AdamW", adamw, AdamW),
    "muon": Method("Muon", muon),
    "recipe": Method("IFShampoo.for_model", IFShampoo.for_model, IFShampoo),
    "ifshampoo": Method("IFShampoo (paper's rule)", if_shampoo, IFShampoo),
    "rfrmsprop": Method("RFRMSProp", rf_rmsprop, RFRMSProp),
    "shampoo": Method("Distributed Shampoo", shampoo, peer="distributed_shampoo"),
}


def terms(method: str, task: Task) -> dict[str, Any]:
    """Return the batch size that a root-free method is told: how many terms the loss has. Other methods need none."""
    return {"batch_size": max(1, task.batch * task.length // TERM)} if method in ("ifshampoo", "rfrmsprop") else {}


def make(method: str, model: GPT, settings: Mapping[str, Any], task: Task) -> Optimizer:
    """Return a method's optimizer."""
    return METHODS[method].make(model, **{**terms(method, task), **settings})


def options_of(method: str) -> list[str]:
    """Return the names of a method's settings."""
    _, make, options, _ = METHODS[method]
    names = [*inspect.signature(options or make).parameters]
    names += inspect.signature(make).parameters
    return [name for name in dict.fromkeys(names) if name not in ("self", "model", "params", "options", "settings")]


def why_unavailable(method: str) -> str | None:
    """Return why a method cannot be used here, or None."""
    peer = METHODS[method].peer
    return why_missing(peer) if peer else None
