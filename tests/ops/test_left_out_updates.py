"""Elements of an update that are not finite count as 0, and the step is counted in `skipped`, in every backend."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from tests.calls.cpu import needs_cpp
from tests.calls.kron import ROOT_FREE, WHITENED, Batch, Tensors
from tests.calls.scaled_rmsprop import ScaledCall
from tests.calls.tensors import BF16, FP32

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = pytest.mark.parametrize(
    ("backend", "device"),
    [
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
    ],
)

PLACES = ((0, 3, 0, 1), (0, 1, 8, 1))
"""Four blocks, of two weights."""

RULES = {
    "paper": {},
    "averages": {"momentum_on": "gradient", "nesterov": True},
    "scaled": {"scales": True},
    "root_free": ROOT_FREE,
    "whitened": WHITENED,
}


def batch_and_tensors(backend: str, device: Any, rule: dict[str, Any], sides: tuple[int, int]) -> tuple[Batch, Tensors]:
    """Return a batch with C and K that are the identity, and gathered gradients of 1 everywhere."""
    dtype = BF16 if backend == "triton" else FP32
    kinds = {"dtype": dtype, "matmul": dtype, "backend": backend, "device": device}
    batch = Batch(*sides, PLACES, **kinds, rule=rule, descent={"weight_decay": 0.0})
    t = batch.tensors()
    for name in ("c", "k"):
        factor = getattr(t, name)
        factor.copy_(torch.eye(factor.shape[-1]).expand_as(factor))
    for grad, buffer in zip(t.grads, t.buffers, strict=True):
        grad.fill_(1.0)
        buffer.fill_(0.0)
    t.skipped.zero_()
    return batch, t


def step(batch: Batch, t: Tensors) -> list[torch.Tensor]:
    """Step without an update of the factors. Return by how much each block of weights moved."""
    before = [x.clone() for x in batch.blocks(t.params)]
    batch.gather(t)
    batch.step(t, None, False)
    return [(x - old).abs() for x, old in zip(batch.blocks(t.params), before, strict=True)]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@BACKENDS
def test_a_block_with_a_row_of_u_that_overflows_is_counted_and_steps_in_the_other_rows(
    backend: str, device: Any, rule: dict[str, Any]
) -> None:
    """Several programs of a kernel share a block of 70 rows."""
    batch, t = batch_and_tensors(backend, device, rule, (70, 6))
    whitened = rule.get("direction") == "whitened"
    t.c[1, -1, -1] = 3e38 if whitened else 3e19  # u is C·G·K, or C·Cᵀ·G·K·Kᵀ
    t.k[1] *= 40
    moved = step(batch, t)
    assert t.skipped.tolist() == [0, 1, 0, 0]
    assert not moved[1][-1].any()
    for index, block in enumerate(moved):
        assert (block[: -1 if index == 1 else None] > 0).all()
    step(batch, t)
    assert t.skipped.tolist() == [0, 2, 0, 0]
    t.c[1, -1, -1] = 1.0
    step(batch, t)
    assert t.skipped.tolist() == [0, 2, 0, 0]


@BACKENDS
def test_a_block_whose_update_is_lost_altogether_is_counted_once(backend: str, device: Any) -> None:
    """C is finite, and C·Cᵀ is not."""
    batch, t = batch_and_tensors(backend, device, {}, (9, 6))
    t.c[2] = 2e30
    moved = step(batch, t)
    assert t.skipped.tolist() == [0, 0, 1, 0]
    assert not moved[2].any()


@BACKENDS
def test_a_block_that_is_skipped_for_its_gradient_is_counted_once(backend: str, device: Any) -> None:
    batch, t = batch_and_tensors(backend, device, {}, (9, 6))
    t.c[1] = 2e30
    batch.blocks(t.grads)[1][0, 0] = torch.nan
    moved = step(batch, t)
    assert t.skipped.tolist() == [0, 1, 0, 0]
    assert not moved[1].any()


@BACKENDS
def test_a_block_whose_update_is_too_large_to_be_scaled_is_counted(backend: str, device: Any) -> None:
    """Its elements are finite. Their squares are not, so that the scale is 0."""
    batch, t = batch_and_tensors(backend, device, {"scales": True}, (9, 6))
    t.c[1] *= 1e12
    moved = step(batch, t)
    assert t.skipped.tolist() == [0, 1, 0, 0]
    assert not moved[1].any() and (moved[0] > 0).all()


# ---- the diagonal step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("direction", ["root_free", "whitened"])
@pytest.mark.parametrize("size", [7, 5000])
@BACKENDS
def test_a_tensor_with_an_element_of_u_that_overflows_is_counted(
    backend: str, device: Any, size: int, direction: str, scales: bool
) -> None:
    """The element has a curvature of 0 and no damping, as after a load of a damaged state."""
    rule = {"direction": direction, "scales": scales, "momentum_on": "gradient"}
    options = {"beta2": 0.0, "damping": 0.0, "weight_decay": 0.0}
    shapes = [(size,), (size,), (3,)]
    call = ScaledCall(shapes, rule=rule, options=options, backend=backend, device=device)
    lists = call.tensors()[0]
    for name in ("grad", "square"):
        for x in lists[name]:
            x.fill_(1.0)
    lists["square"][1][size // 2] = 0.0
    before = [x.clone() for x in lists["param"]]
    call.run(lists)
    assert [int(x) for x in lists["skipped"]] == [0, 1 + 1, 2]  # they start at 0, 1 and 2
    moved = [x != old for x, old in zip(lists["param"], before, strict=True)]
    assert [int(x.sum()) for x in moved] == [size, size - 1, 3]
    assert not moved[1][size // 2]


@BACKENDS
def test_a_tensor_whose_update_is_too_large_to_be_scaled_is_counted(backend: str, device: Any) -> None:
    rule = {"scales": True, "momentum_on": "gradient"}
    options = {"beta2": 0.0, "damping": 0.0, "weight_decay": 0.0}
    call = ScaledCall([(7,), (7,)], rule=rule, options=options, backend=backend, device=device)
    lists = call.tensors()[0]
    for name in ("grad", "square"):
        for x in lists[name]:
            x.fill_(1.0)
    lists["square"][0][3] = 1e-30
    before = lists["param"][0].clone()
    call.run(lists)
    assert [int(x) for x in lists["skipped"]] == [1, 1]
    assert torch.equal(lists["param"][0], before)


@BACKENDS
def test_an_update_of_zero_by_zero_is_not_counted(backend: str, device: Any) -> None:
    """Before the first gradient of an element, the recipe's s, q and M are 0. Nothing is left out then."""
    call = ScaledCall([(7,), (7,)], rule=WHITENED, options={"weight_decay": 0.0}, backend=backend, device=device)
    lists = call.tensors()[0]
    for name in ("grad", "square", "buffer", "curvature"):
        for x in lists[name]:
            x.zero_()
    lists["grad"][1].fill_(1.0)
    call.run(lists)
    assert [int(x) for x in lists["skipped"]] == [0, 1]  # as at the start
