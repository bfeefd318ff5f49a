"""Random bits depend on every bit of the step count, up to 2³² steps and around again, in every backend."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from tests.calls.cpu import needs_cpp
from tests.calls.kron import KEPT, TWO, Batch, assert_same
from tests.calls.operators import through
from tests.calls.rf_rmsprop import Call, assert_equal
from tests.calls.scaled_rmsprop import ScaledCall
from tests.calls.tensors import BF16

STEPS = (2**24, 2**24 + 1, 2**31 + 5, 2**32 - 1, 2**32 + 7)
"""In FP32 the first two are equal. The last two are −1 and 7 in 32 bits."""

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [
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
KINDS = (BF16, BF16, BF16, BF16, "stochastic", "stochastic")


@pytest.mark.parametrize("steps", [*STEPS, "each its own"], ids=str)
@pytest.mark.parametrize("make", [Call, partial(ScaledCall, rule={"direction": "whitened"})], ids=["rf", "scaled"])
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_diagonal_steps_round_as_eager_pytorch(backend: str, device: Any, make: Any, steps: Any) -> None:
    if steps == "each its own":
        steps = torch.tensor(STEPS)
    call = make([(40,)] * len(STEPS), ("whole",), *KINDS, steps=steps, exact=True, backend=backend, device=device)
    actual = call.run()
    assert_equal(actual, call.run(run=through("eager")))
    before = replace(call, steps=steps - 1).run()
    assert not any(map(torch.equal, actual["param"], before["param"]))
    around = replace(call, steps=steps % 2**32).run()
    assert_equal(actual, around)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("rule", [{}, {"direction": "whitened", "momentum_on": "gradient", "nesterov": True}])
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_matrix_steps_round_as_eager_pytorch(backend: str, device: Any, rule: dict[str, Any], steps: int) -> None:
    kinds = {"dtype": BF16, "matmul": BF16, "param": BF16, "rounding": "stochastic", "weight_rounding": "stochastic"}
    batch = Batch(8, 16, TWO, **kinds, exact="rounding", clip="none", rule=rule, backend=backend, device=device)

    def run(name: str, *counts: int) -> Any:
        tensors = batch.tensors()
        tensors.steps = torch.tensor(counts)
        return batch.run(tensors, through(name))

    for counts in ((steps, steps), (steps, 3)):  # a kernel on a GPU is passed a number if all are equal
        actual = run(backend, *counts)
        assert_same(actual, run("eager", *counts), *KEPT)
        before = run(backend, *[count - 1 for count in counts])
        assert all(actual.bytes(*names) != before.bytes(*names) for names in (("c", "k"), ("params",)))
