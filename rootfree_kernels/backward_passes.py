"""Which forward calls of a model the present gradients of its parameters are made of. `BatchSizeCounter` asks it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.utils.weak import TensorWeakRef

NOTHING_COUNTED = (
    "no backward pass went through a call of the model that the counter was made for. Call that model itself, and not "
    "a part of it or a copy"
)
NO_MODEL = (
    "the counter has no model: the optimizer was copied or unpickled without it, or the model is gone. Make a new "
    "BatchSizeCounter, which replaces this one"
)
UNCOUNTED = (
    "a backward pass changed the gradients without going through a call of the model. Call the model itself, and not a "
    "part of it; add a penalty to the loss, and call backward() once"
)
INTERRUPTED = "a backward pass raised after it had changed the gradients. Call zero_grad() before the next one"
FOUND = (
    "the gradients held something before the first backward pass that was counted. Call zero_grad() before the first "
    "forward call"
)
REPLACED = (
    "all gradients were replaced after the last backward pass (by p.grad = ...). Change them in place, as in "
    "p.grad.copy_(...)"
)
PARTLY_DISCARDED = (
    "some gradients were discarded between two backward passes and others were kept. Call zero_grad() for all "
    "parameters of the optimizer"
)


class UnknownTermsError(Exception):
    """The number of terms cannot be known. The message says why, and what to do."""


class Call:
    """A forward call of the model: its number of terms, and the backward pass that ran it (-1: it ran in none)."""

    __slots__ = ("__weakref__", "task", "terms")

    def __init__(self, terms: int, task: int) -> None:
        self.terms, self.task = terms, task


class Snapshot:
    """Which tensors were the gradients at a moment, and their versions. It does not keep them alive."""

    def __init__(self, params: Iterable[Tensor] = ()) -> None:
        self._grads = {id(p): (TensorWeakRef(p.grad), p.grad._version) for p in params if p.grad is not None}

    def __bool__(self) -> bool:
        return bool(self._grads)

    def has_changed(self, params: Sequence[Tensor]) -> bool:
        """Return whether a gradient is now another tensor, or was changed in place."""
        now = [p for p in params if p.grad is not None]
        return len(now) != len(self._grads) or not all(self._is_kept(p, exactly=True) for p in now)

    def is_left(self, params: Iterable[Tensor]) -> bool:
        """Return whether at least one gradient is still the same tensor, with the same or other values."""
        return any(self._is_kept(p) for p in params)

    def discarded(self, params: Iterable[Tensor]) -> set[int]:
        """Return the ids of the parameters that had a gradient and now have none."""
        return {id(p) for p in params if p.grad is None and id(p) in self._grads}

    def _is_kept(self, param: Tensor, exactly: bool = False) -> bool:
        grad, (ref, version) = param.grad, self._grads.get(id(param), (None, 0))
        return ref is not None and grad is not None and ref() is grad and not (exactly and grad._version != version)


def are_zero(params: Iterable[Tensor]) -> Tensor:
    """Return whether all gradients are zero, as a tensor on their device, so that nothing waits for the device."""
    grads = [p.grad.detach() for p in params if p.grad is not None]
    if any(grad.layout != torch.strided for grad in grads):
        return torch.tensor(False, device="cpu")  # the step refuses such a gradient
    with torch.no_grad():
        return get_total_norm(grads, norm_type=1.0) == 0  # the 2-norm of small values is 0


class BackwardPass:
    """One call of `backward()`, with the calls of the model that it has gone through so far.

    Attributes:
        task: PyTorch's number of the pass.
        problem: why its terms cannot be known, or "".
        is_foreign: it went through no call of this counter's model, but another counter of the optimizer counts it.
        is_first: whether gradients were discarded before it. A tensor is read only when the number is needed.
        is_continued: whether the gradients, when it began, were those that the pass before had left.
    """

    def __init__(self, task: int, params: Sequence[Tensor], left: Snapshot, left_zero: Tensor | None) -> None:
        self.task = task
        self.params = params
        self.calls: set[Call] = set()
        self.problem = ""
        self.is_foreign = False
        self.before = Snapshot(params)
        self.is_first: bool | Tensor = are_zero(params) if self.before else True
        if left_zero is not None and not left.has_changed(params):
            self.is_first = self.is_first & ~left_zero  # the pass before may have left gradients of zero
        self.is_continued = left.is_left(params)
        self.discarded = left.discarded(params)


class GradientWindow:
    """The backward passes that the present gradients are made of.

    A window begins where a backward pass begins with gradients that are all None or zero. A step does not end it.
    Otherwise a step that raised could not be repeated, and gradients that are summed over several steps would be
    counted wrongly.

    Args:
        several_calls: what several calls in one pass mean: "add", "same" or None, as in `BatchSizeCounter`.
    """

    def __init__(self, several_calls: str | None) -> None:
        self._several_calls = several_calls
        self._passes: list[BackwardPass] = []  # that are not in the sum below yet
        self._left = Snapshot()
        self._left_zero: Tensor | None = None
        self._start()

    def _start(self, problem: str = "") -> None:
        self._terms, self._problem, self._is_foreign = 0, problem, False
        self._counted = WeakSet[Call]()
        self._discarded = set[int]()

    def open(self, task: int, params: Sequence[Tensor]) -> BackwardPass:
        """Return a pass that begins now."""
        opened = BackwardPass(task, params, self._left, self._left_zero)
        if not opened.before:
            self._passes.clear()  # so that nothing of them is read
        elif len(self._passes) > 100:  # of an optimizer that takes no steps
            self._add_up()
        return opened

    def close(self, closed: BackwardPass) -> None:
        """Keep a pass that has ended, if it changed a gradient."""
        if closed.before.has_changed(closed.params):
            self._left = Snapshot(closed.params)
            # After a pass that raised, gradients of zero were discarded.
            self._left_zero = are_zero(closed.params) if self._left and not closed.problem else None
            self._passes.append(closed)
        closed.params = ()

    def terms(self, params: Sequence[Tensor]) -> int | None:
        """Return the number of terms. None means that it does not matter, or that another counter knows it.

        Raises:
            UnknownTermsError: it cannot be known, and the gradients are not zero.
        """
        with_grad = [p for p in params if p.grad is not None]
        if not with_grad:
            return None
        self._add_up()
        problem = self._problem or self._problem_now(with_grad)
        if not problem and (self._terms or self._is_foreign):
            return self._terms or None
        if bool(are_zero(with_grad)):
            return None
        raise UnknownTermsError(problem or NOTHING_COUNTED)

    def _problem_now(self, with_grad: Sequence[Tensor]) -> str:
        if self._discarded.intersection(map(id, with_grad)):
            return PARTLY_DISCARDED
        return REPLACED if self._terms and not self._left.is_left(with_grad) else ""

    def _add_up(self) -> None:
        for each in self._passes:
            if bool(each.is_first):
                self._start()
            elif not each.is_continued:
                self._start(FOUND)
            else:
                self._discarded |= each.discarded
            self._add(each)
        self._passes.clear()

    def _add(self, added: BackwardPass) -> None:
        """Add the terms of a pass. A call that an earlier pass went through has the same terms, not further ones."""
        self._problem = self._problem or added.problem or self._problem_of_calls(added)
        self._is_foreign |= added.is_foreign
        new = [call.terms for call in added.calls if call not in self._counted]
        if self._several_calls == "same":
            self._terms += new[0] if len(new) == len(added.calls) > 0 else 0
        else:
            self._terms += sum(new)
        self._counted.update(added.calls)

    def _problem_of_calls(self, added: BackwardPass) -> str:
        terms = sorted(call.terms for call in added.calls)
        if len(terms) < 2 or self._several_calls == "add":
            return ""
        if self._several_calls is None:
            return (
                f"one backward pass went through {len(terms)} calls of the model, of {listed(terms)} terms, and "
                "calls_in_one_backward=None. Pass calls_in_one_backward='add' if the loss averages over the terms of "
                "all calls, or 'same' if every call sees the same terms"
            )
        if len(set(terms)) > 1:
            return (
                f"calls_in_one_backward='same', but one backward pass went through calls of {listed(terms)} terms. "
                "Pass 'add', or a count_terms that gives the same number for all of them"
            )
        return ""


def listed(terms: Sequence[int]) -> str:
    """Return numbers as a text, at most ten of them."""
    return ", ".join(map(str, terms[:10])) + (", ..." if len(terms) > 10 else "")
