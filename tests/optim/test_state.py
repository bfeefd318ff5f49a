"""Names, shapes and dtypes of state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rootfree_kernels import IFShampoo, RFRMSProp
from tests.calls.optimizers import CASES, OPTIONS, Case, snapshot, train
from tests.calls.tensors import assert_same_bits
from tests.optim.runs import set_gradients, trained


def shapes_and_dtypes(state: dict[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(value.shape), value.dtype) for name, value in state.items()}


COUNTS = {"step": ((), torch.int64)}


@pytest.mark.parametrize("shape", [(7, 5), (4, 3, 2, 2), (6,), ()], ids=str)
def test_state_of_the_diagonal_optimizers(shape: tuple[int, ...]) -> None:
    for case in CASES[:2]:
        param = nn.Parameter(torch.ones(shape))
        optimizer = case.make([param])
        set_gradients([param], 0)
        optimizer.step()
        assert shapes_and_dtypes(optimizer.state[param]) == COUNTS | {
            "square": (shape, torch.float32),
            "momentum_buffer": (shape, torch.float32),
            "skipped": ((), torch.int32),
        }


def test_state_of_compensated_and_half_precision_diagonal_runs() -> None:
    param = nn.Parameter(torch.ones(6, dtype=torch.bfloat16))
    compensated = {"rounding": "compensated", "weight_rounding": "compensated"}
    optimizer = RFRMSProp([param], **OPTIONS, state_dtype=torch.bfloat16, **compensated)
    set_gradients([param], 0)
    optimizer.step()
    assert shapes_and_dtypes(optimizer.state[param]) == COUNTS | {
        "square": ((6,), torch.bfloat16),
        "square_residual": ((6,), torch.int16),
        "momentum_buffer": ((6,), torch.bfloat16),
        "weight_residual": ((6,), torch.int16),
        "skipped": ((), torch.int32),
    }


def test_state_of_a_matrix() -> None:
    param = nn.Parameter(torch.ones(7, 5))
    optimizer = IFShampoo([param], **OPTIONS)
    set_gradients([param], 0)
    optimizer.step()
    assert shapes_and_dtypes(optimizer.state[param]) == COUNTS | {
        "momentum_buffer": ((7, 5), torch.float32),
        "factor_c": ((1, 7, 7), torch.bfloat16),
        "factor_k": ((1, 5, 5), torch.bfloat16),
        "momentum_c": ((1, 7, 7), torch.bfloat16),
        "momentum_k": ((1, 5, 5), torch.bfloat16),
        "skipped": ((1,), torch.int32),
    }


def test_state_of_a_matrix_of_several_tiles_with_residuals() -> None:
    param = nn.Parameter(torch.ones(7, 5, dtype=torch.bfloat16))
    compensated = {"rounding": "compensated", "weight_rounding": "compensated"}
    optimizer = IFShampoo([param], **OPTIONS, max_preconditioner_dim=3, **compensated)
    set_gradients([param], 0)
    optimizer.step()
    expected: dict[str, Any] = dict(COUNTS)
    expected["momentum_buffer"] = ((7, 5), torch.float32)
    expected["weight_residual"] = ((7, 5), torch.int16)
    tiles = {"": (1, 3, 3), ".1": (1, 3, 2), ".2": (2, 2, 3), ".3": (2, 2, 2)}
    for suffix, (count, rows, cols) in tiles.items():
        for side, size in (("c", rows), ("k", cols)):
            expected[f"factor_{side}{suffix}"] = ((count, size, size), torch.bfloat16)
            expected[f"momentum_{side}{suffix}"] = ((count, size, size), torch.bfloat16)
            expected[f"residual_{side}{suffix}"] = ((count, size, size), torch.int16)
        expected[f"skipped{suffix}"] = ((count,), torch.int32)
    assert shapes_and_dtypes(optimizer.state[param]) == expected


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_the_state_of_one_parameter_is_saved_at_its_own_size(case: Case) -> None:
    """`torch.save` writes whole storages. The states of a batch share memory, but not a storage."""
    params = [nn.Parameter(torch.ones(16, 16)) for _ in range(8)]
    optimizer = case.make(params)
    set_gradients(params, 0)
    optimizer.step()
    for state in (optimizer.state[params[3]], optimizer.state_dict()["state"][3]):
        for name, value in state.items():
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), name


def test_a_value_that_a_user_writes_into_a_state_takes_effect(case: Case) -> None:
    """It shares memory with what the step reads, cached products of factors included."""
    finals = []
    for replaced in (False, True):
        params = [nn.Parameter(torch.ones(7, 5)) for _ in range(3)]
        optimizer = case.make(params)
        for step in range(2):
            set_gradients(params, step)
            optimizer.step()
        for name, value in list(optimizer.state[params[1]].items()):
            if name.startswith(("factor", "square", "momentum_buffer")):
                if replaced:
                    optimizer.state[params[1]][name] = value.clone() * 2
                else:
                    value.mul_(2)
        for step in range(2, 4):
            set_gradients(params, step)
            optimizer.step()
        finals.append(snapshot(optimizer))
    assert_same_bits(*finals)


@pytest.mark.parametrize("fail_at", [1, 2, 4, 7, 12])
def test_state_is_made_whole_or_not_at_all(case: Case, fail_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out while the first step makes the state. The step can be repeated."""
    allocations = 0

    def failing(function: Any) -> Any:
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            nonlocal allocations
            allocations += 1
            if allocations == fail_at:
                raise torch.OutOfMemoryError("no memory")
            return function(*args, **kwargs)

        return allocate

    model, optimizer = case.start()
    model(0).backward()
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_full", failing(Tensor.new_full))
        patch.setattr(torch, "full_like", failing(torch.full_like))
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
    assert not optimizer.state
    optimizer.zero_grad()
    train(model, optimizer, range(3))
    _, expected = trained(case, range(3))
    assert_same_bits(snapshot(optimizer), snapshot(expected))
