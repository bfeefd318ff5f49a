"""What `BatchSizeCounter` reads from a forward call: the number of its terms, and the tensors of its output."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.distributions import Distribution
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


def number_of_terms(count_terms: CountTerms, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return what `count_terms` says about a forward call.

    Raises:
        ValueError: it is not a whole number.
    """
    terms = count_terms(args, kwargs)
    try:
        number = operator.index(terms)
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(f"count_terms returned {terms!r}: return a whole number, 0 or more.")
    return number


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Yield the tensors in the output of a model: in containers, mappings, dataclasses and distributions."""
    if isinstance(output, Tensor):
        yield output
        return
    if isinstance(output, Mapping):
        parts = list(output.values())
    elif is_dataclass(output) and not isinstance(output, type):
        parts = [getattr(output, field.name, None) for field in fields(output)]
    elif isinstance(output, Distribution):
        parts = list(vars(output).values())
    else:
        parts = [leaf for leaf in tree_leaves(output) if leaf is not output]
    for part in parts:
        yield from tensors_in(part)
