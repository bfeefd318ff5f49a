"""Inputs that PyTorch negates when they are read, such as the gradient of the imaginary part of a conjugate.

Their memory holds the values with the other sign, which a kernel must not take for the values.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tests.calls.clipped_momentum import sides
from tests.calls.cpu import needs_cpp
from tests.calls.kron import TWO, WHITENED, Batch
from tests.calls.operators import STEMS, Call, dispatched, operator, through
from tests.calls.rf_rmsprop import Call as DiagonalCall
from tests.calls.scaled_rmsprop import ScaledCall
from tests.calls.tensors import BF16, FP32, same_bits

INPUTS = ("grads", "deltas", "lr", "grad_scale", "found_inf")
"""Names of arguments that come from a user, or from PyTorch."""

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [
    pytest.param("eager", "cpu"),
    pytest.param("cpp", "cpu", marks=needs_cpp),
    pytest.param(
        *("triton", DEVICE),
        marks=[
            pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
            pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning:triton"),
            *([pytest.mark.gpu] if DEVICE == "cuda" else []),
        ],
    ),
]


def inputs_of(stem: str, way: Any) -> set[str]:
    """Return the inputs of an operator. PyTorch's dispatcher refuses a negated list that an operator may write."""
    arguments = operator(stem)._schema.arguments
    refused = {"deltas"} if way is dispatched else set()
    return {argument.name for argument in arguments} & set(INPUTS) - refused


def negated(run: Call, inputs: set[str]) -> Call:
    """Return a function that calls `run` with `inputs` that are negated lazily."""

    def call(stem: str, *flat: Any) -> Any:
        names = [argument.name for argument in operator(stem)._schema.arguments[: len(flat)]]
        values = dict(zip(names, flat, strict=True))
        assert all(values[name] is not None for name in inputs)
        lazily = partial(tree_map_only, Tensor, lambda x: torch._neg_view(-x))
        return run(stem, *[lazily(value) if name in inputs else value for name, value in values.items()])

    return call


def results(stem: str, backend: str, device: Any, run: Call) -> list[Tensor]:
    """Call an operator of a backend through `run`, and return all tensors that it may have changed."""
    lr = torch.tensor(0.05, device=device)
    common = {"grad_scale": 3.0, "found_inf": 0.0, "backend": backend, "device": device}
    if stem in ("rf_rmsprop", "scaled_rmsprop"):
        rule = {"rule": WHITENED} if stem == "scaled_rmsprop" else {}
        made = (ScaledCall if rule else DiagonalCall)([(6, 4), (5,)], lr=lr, **rule, **common)
        lists = made.run(run=run)
        return [x for name, tensors in lists.items() for x in tensors if name != "grad"]
    if stem == "clipped_momentum":
        momenta, deltas = sides(2, [(5, 5), (4, 4)], device=device)
        return [run(stem, momenta, deltas, torch.zeros((), device=device), 0.5, "frobenius"), *momenta]
    dtype = BF16 if backend == "triton" else FP32
    batch = Batch(5, 4, TWO, dtype=dtype, matmul=dtype, lr=lr, **common)
    tensors = batch.tensors()
    only = lambda name, *flat: (run if name == stem else through(backend))(name, *flat)  # noqa: E731
    return [x for name, x in batch.run(tensors, only).named().items() if not name.startswith("grads")]


@pytest.mark.parametrize("way", [through, dispatched], ids=["directly", "through the dispatcher"])
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_inputs_that_are_negated_lazily_count_with_their_sign(backend: str, device: Any, stem: str, way: Any) -> None:
    run = way(backend)
    expected = results(stem, backend, device, run)
    actual = results(stem, backend, device, negated(run, inputs_of(stem, way)))
    assert len(actual) == len(expected) > 0
    assert all(map(same_bits, actual, expected))
