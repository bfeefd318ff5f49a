"""What `BatchSizeCounter` hooks: the call of a model, and the optimizer inside of wrappers."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer


class Counter(Protocol):
    """What the hook of a model needs of a counter."""

    _model: Callable[[], Module | None]

    def _after_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None: ...


class ModelHook:
    """The forward hook of a counter. It is copied with the model, and tells the copy of the counter about its model."""

    def __init__(self, model: Module, counter: Counter) -> None:
        self.model, self.counter = weakref.ref(model), counter

    @torch.compiler.disable(reason="it registers hooks on the outputs")
    def __call__(self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.counter._after_forward(args, kwargs, output)

    def __getstate__(self) -> tuple[Module | None, Counter]:
        return self.model(), self.counter

    def __setstate__(self, state: tuple[Module, Counter]) -> None:
        model, self.counter = state
        self.model = self.counter._model = weakref.ref(model)


def unhook(model: Module, counter: Counter) -> None:
    """Remove the hooks of a counter. A copy of a model has hooks for which there is no handle."""
    for key, hook in list(model._forward_hooks.items()):
        if isinstance(hook, ModelHook) and hook.counter is counter:
            del model._forward_hooks[key]
            model._forward_hooks_with_kwargs.pop(key, None)


def innermost(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer inside the wrappers of Accelerate, Lightning and ZeroRedundancyOptimizer."""
    for name in ("optimizer", "optim"):
        inner = getattr(optimizer, name, None)
        if isinstance(inner, Optimizer):
            return innermost(inner)
    return optimizer


def params_of(model: Module, optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters of the model that the optimizer has."""
    ids = {id(param) for param in model.parameters()}
    return [param for group in optimizer.param_groups for param in group["params"] if id(param) in ids]
