"""Count the batch size B from the model's forward calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

CountTerms = Callable[[tuple[Any, ...], dict[str, Any]], int]


def leading_dim(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the size of the first axis of the first tensor among the arguments of a forward call, or its keywords.

    Raises:
        ValueError: there is no tensor with an axis.
    """
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.dim():
            return leaf.shape[0]
    raise ValueError("the forward call has no tensor with an axis to count by: pass count_terms=... of your own.")


class BatchSizeCounter:
    """Set the `batch_size` of all groups before every step, to the loss terms that the model saw since the last one.

    It adds up forward calls in training mode and with gradients enabled, including those of a closure. With gradient
    accumulation over N micro-batches, each loss divided by N, the sum is the B of the whole batch. A step without a
    counted call keeps the groups' values.

    Args:
        model: the module whose forward calls are counted. Pass the outermost one that the training loop calls.
        optimizer: an optimizer whose groups have a `batch_size`.
        count_terms: returns the number of loss terms from the (args, kwargs) of a forward call. The default,
            `leading_dim`, is the first axis of the first tensor: samples or sequences.
        world_size: the number of ranks over which gradients are averaged.

    Use it as a context manager, or call `remove()` when done::

        counter = BatchSizeCounter(model, optimizer)

    Raises:
        ValueError: a group of the optimizer has no `batch_size`.
    """

    def __init__(
        self,
        model: Module,
        optimizer: Optimizer,
        count_terms: CountTerms = leading_dim,
        world_size: int = 1,
    ) -> None:
        if not all("batch_size" in group for group in optimizer.param_groups):
            raise ValueError(
                f"optimizer={type(optimizer).__name__} has groups without a batch_size: pass RFRMSProp or IFShampoo."
            )
        self.count = 0
        self._count_terms = count_terms
        self._world_size = world_size
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def _before_forward(self, model: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model.training and torch.is_grad_enabled():
            self.count += self._count_terms(args, kwargs)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Set the batch size. Wrap a closure so that it is set again after the closure's forward calls."""
        self._set_batch_size(optimizer)

        def counted(argument: Any) -> Any:
            return partial(self._run_closure, optimizer, argument) if callable(argument) else argument

        optimizer_itself, *rest = args
        return (optimizer_itself, *map(counted, rest)), {name: counted(value) for name, value in kwargs.items()}

    def _run_closure(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Any:
        loss = closure()
        self._set_batch_size(optimizer)
        return loss

    def _set_batch_size(self, optimizer: Optimizer) -> None:
        if self.count:
            for group in optimizer.param_groups:
                group["batch_size"] = self.count * self._world_size

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.count = 0

    def remove(self) -> None:
        """Stop counting."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> BatchSizeCounter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
