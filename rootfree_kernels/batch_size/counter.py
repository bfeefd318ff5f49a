"""The counter: it joins the forward calls, the backward passes and the steps."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rootfree_kernels.batch_size.backward_passes import (
    INTERRUPTED,
    NO_MODEL,
    UNCOUNTED,
    BackwardPass,
    Call,
    GradientWindow,
    UnknownTermsError,
    are_zero,
)
from rootfree_kernels.batch_size.forward_calls import CountTerms, leading_dim, number_of_terms, tensors_in
from rootfree_kernels.batch_size.hooks import ModelHook, innermost, params_of, unhook

SeveralCalls = Literal["add", "same"]

_lock = threading.RLock()
"""One lock for all counters. Hooks run in the threads of autograd, and counters of one optimizer read each other."""


class BatchSizeCounter:
    """Set `batch_size` before every step to the number of terms that the gradients are made of.

    It counts the forward calls of the model that a backward pass goes through, if this pass changes gradients of the
    optimizer's parameters. So none of these count: evaluation, batches that were skipped, forward calls that activation
    checkpointing repeats, `torch.autograd.grad`, and gradients that were set to None or zero. With gradient
    accumulation over N micro-batches, each loss divided by N, the sum is the B of the whole batch. The passes of a
    closure count too.

    Only groups that have parameters of the model are set. For two models with one optimizer, or one model with two
    optimizers, make two counters. A deep copy of (model, optimizer), or a pickle of both, has a counter of its own. A
    copy of the model alone counts nothing.

    Args:
        model: the module whose forward calls are counted. Pass the outermost one that the training loop calls.
        optimizer: an optimizer whose groups have a `batch_size`, or a trainer's wrapper around it.
        count_terms: returns the number of loss terms from the (args, kwargs) of a forward call. The default,
            `leading_dim`, is the first axis of the first tensor: samples or sequences.
        world_size: the number of ranks over which gradients are averaged.
        calls_in_one_backward: what it means if one backward pass goes through several calls of the model. "add": every
            call has terms of its own, as in one loss over two batches. "same": all calls see the same terms, as in a
            recurrent cell or two views of the same samples. None: such a step is an error, since it cannot be known.

    Use it as a context manager, or call `remove()` when done::

        counter = BatchSizeCounter(model, optimizer)

    Raises:
        ValueError: an argument is wrong, a group of the optimizer has no `batch_size`, or the optimizer has no
            parameter of the model. Nothing was changed.

    A step raises RuntimeError if its batch size cannot be known. The parameters were not changed.
    """

    # Weak references. A copy of the model has no copy of the optimizer, since it has the counter but not the optimizer.
    _model: Callable[[], Module | None]
    _optimizer: Callable[[], Optimizer | None]

    def __init__(
        self,
        model: Module,
        optimizer: Optimizer,
        count_terms: CountTerms = leading_dim,
        world_size: int = 1,
        *,
        calls_in_one_backward: SeveralCalls | None = None,
    ) -> None:
        if calls_in_one_backward not in ("add", "same", None):
            raise ValueError(f"calls_in_one_backward={calls_in_one_backward!r}: choose one of add, same, or None.")
        inner = innermost(optimizer)
        if not all("batch_size" in group for group in inner.param_groups):
            raise ValueError(
                f"optimizer={type(optimizer).__name__} has groups without a batch_size: pass RFRMSProp or IFShampoo."
            )
        if not params_of(model, optimizer):
            raise ValueError(
                f"optimizer={type(optimizer).__name__} has no parameter of model={type(model).__name__}: pass the "
                "model whose parameters it has."
            )
        self.__setstate__((count_terms, world_size, calls_in_one_backward))
        for counter in _counters(inner):
            if counter._model() is None:  # it came with a copy of the optimizer, without the model
                counter.remove()
        self._model = weakref.ref(model)
        model.register_forward_hook(ModelHook(model, self), with_kwargs=True)
        self._attach(inner)
        inner.__dict__["_counters"] = [*_counters(inner), self]

    # ---- copies ------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> tuple[CountTerms, int, SeveralCalls | None]:
        """Return the options. Copies of parameters have no gradients, so that a copy begins at zero."""
        return self._count_terms, self._world_size, self._several_calls

    def __setstate__(self, state: tuple[CountTerms, int, SeveralCalls | None]) -> None:
        self._count_terms, self._world_size, self._several_calls = state
        self._model, self._optimizer = _nothing, _nothing
        self._handles: list[RemovableHandle] = []
        self._window = GradientWindow(self._several_calls)
        self._open: BackwardPass | None = None
        self._last_task = -1  # the last backward pass that went through a call

    def _attach(self, optimizer: Optimizer) -> None:
        """Count for an optimizer. It calls this too, when it is made as a copy."""
        self._optimizer = weakref.ref(optimizer)
        self._handles.append(optimizer.register_step_pre_hook(self._before_step))

    # ---- forward and backward passes ---------------------------------------------------------------------------------

    def _after_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        optimizer = self._optimizer()
        if optimizer is None or torch._C._functorch.maybe_current_level() is not None:
            return
        task = torch._C._current_graph_task_id()
        with _lock:
            if task == -1:
                self._interrupt()
            else:  # checkpointing repeats the call, and may run a backward pass inside of this one
                self._enter(task)
        if not torch.is_grad_enabled():
            return
        # A hook on a leaf would stay there, and would not tell of this call.
        outputs = [tensor for tensor in tensors_in(output) if tensor.requires_grad and not tensor.is_leaf]
        if outputs:
            for counter in _counters(optimizer):  # models may share parameters
                counter._watch_params()
            call = Call(number_of_terms(self._count_terms, args, kwargs), task)
            for tensor in outputs:
                tensor.register_hook(partial(self._on_output, call))

    def _watch_params(self) -> None:
        """Hook the parameters, since some may receive their gradients before the outputs do."""
        for param in self._params():
            if param.requires_grad and self._on_param not in (param._backward_hooks or {}).values():
                self._handles.append(param.register_hook(self._on_param))

    @torch.compiler.disable(reason="it runs in a backward pass")
    def _on_param(self, grad: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if self._open is None or self._open.task != task:
            with _lock:
                self._enter(task)

    @torch.compiler.disable(reason="it runs in a backward pass")
    def _on_output(self, call: Call, grad: Tensor) -> None:
        if self._optimizer() is None:
            return
        task = torch._C._current_graph_task_id()
        with _lock:
            if self._open is not None and self._open.task != task and call.task == -1:
                self._interrupt()
            entered = self._enter(task)
            entered.calls.add(call)
            self._last_task = entered.task

    def _enter(self, task: int) -> BackwardPass:
        """Return the present backward pass. A pass inside of another one, as in checkpointing, belongs to that one."""
        if self._open is None:
            self._open = self._window.open(task, self._params())
            # Others write gradients in callbacks too (DistributedDataParallel, FSDP). The second callback is the last.
            _at_the_end(partial(_at_the_end, partial(self._leave, self._open)))
        return self._open

    @torch.compiler.disable(reason="it runs in a backward pass")
    def _leave(self, left: BackwardPass) -> None:
        with _lock:
            if self._open is left:
                self._close(left)

    def _interrupt(self) -> None:
        """Close a pass that raised: it is still open, although its backward() is over."""
        if self._open is not None:
            self._open.problem = INTERRUPTED
            self._close(self._open)

    def _close(self, closed: BackwardPass) -> None:
        self._open = None
        optimizer = self._optimizer()
        if optimizer is None:
            return
        if not closed.calls:
            closed.is_foreign = any(counter._last_task == closed.task for counter in _counters(optimizer))
            closed.problem = closed.problem or ("" if closed.is_foreign else UNCOUNTED)
        self._window.close(closed)

    # ---- steps -------------------------------------------------------------------------------------------------------

    @torch.compiler.disable(reason="it reads what the backward passes have counted")
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Set the batch size. With a closure, set it after the closure has run its passes."""
        optimizer_itself, *rest = args
        if not any(map(callable, (*rest, *kwargs.values()))):
            self._set_batch_size(optimizer)
            return None

        def counted(argument: Any) -> Any:
            return partial(self._run_closure, optimizer, argument) if callable(argument) else argument

        return (optimizer_itself, *map(counted, rest)), {name: counted(value) for name, value in kwargs.items()}

    def _run_closure(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Any:
        loss = closure()
        self._set_batch_size(optimizer)
        return loss

    def _set_batch_size(self, optimizer: Optimizer) -> None:
        with _lock:
            try:
                batch_size = self._batch_size()
                groups = [] if batch_size is None or self._yields(optimizer, batch_size) else self._groups()
            except UnknownTermsError as error:
                reason = str(error) if self._model() is not None else NO_MODEL
                raise RuntimeError(
                    f"the batch_size of {type(optimizer).__name__} cannot be counted: {reason}. Or remove() the "
                    "counter and set group['batch_size'] before every step."
                ) from None
            for group in groups:
                group["batch_size"] = batch_size

    def _batch_size(self) -> int | None:
        if self._open is not None and torch._C._current_graph_task_id() == -1:
            self._interrupt()
        elif self._open is not None:  # the step is taken by a hook of a parameter
            self._close(self._open)
        terms = self._window.terms(self._params())
        return None if terms is None else terms * self._world_size

    def _yields(self, optimizer: Optimizer, batch_size: int) -> bool:
        """Return whether another counter knows the batch size of a shared group: this one's gradients are zero.

        Raises:
            UnknownTermsError: another counter has another number for the same group, and no gradients are zero.
        """
        groups = {id(group) for group in self._groups()}
        for other in _counters(optimizer):
            number = other._batch_size()
            if number in (None, batch_size) or groups.isdisjoint(map(id, other._groups())):
                continue
            if bool(are_zero(self._params())):
                return True
            if not bool(are_zero(other._params())):
                raise UnknownTermsError(
                    f"its counters have counted {batch_size} and {number} for the same group. Give the parameters of "
                    "every model groups of their own"
                )
        return False

    def _params(self) -> list[Tensor]:
        """Return the parameters whose gradients count. All of the optimizer's, if the model is not there."""
        model, optimizer = self._model(), self._optimizer()
        if optimizer is None:
            return []
        of_model = [] if model is None else params_of(model, optimizer)
        return of_model or [param for group in optimizer.param_groups for param in group["params"]]

    def _groups(self) -> list[dict[str, Any]]:
        optimizer, ids = self._optimizer(), set(map(id, self._params()))
        groups = [] if optimizer is None else optimizer.param_groups
        return [group for group in groups if not ids.isdisjoint(map(id, group["params"]))]

    # ---- the end -----------------------------------------------------------------------------------------------------

    def remove(self) -> None:
        """Stop counting."""
        model, optimizer = self._model(), self._optimizer()
        if model is not None:
            unhook(model, self)
        if optimizer is not None:
            optimizer.__dict__["_counters"] = [each for each in _counters(optimizer) if each is not self]
        for handle in self._handles:
            handle.remove()
        self.__setstate__(self.__getstate__())

    def __enter__(self) -> BatchSizeCounter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _counters(optimizer: Optimizer) -> list[BatchSizeCounter]:
    """Return an optimizer's counters. It keeps them in its pickles and copies, unlike its hooks."""
    return optimizer.__dict__.get("_counters", [])


def _nothing() -> None:
    """Stand in for a weak reference whose object is gone."""


@torch.compiler.disable(reason="it runs in a backward pass")
def _at_the_end(function: Callable[[], Any]) -> None:
    """Call a function at the end of the present backward pass, after those that were registered before."""
    torch.autograd.Variable._execution_engine.queue_callback(function)
