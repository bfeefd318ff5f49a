"""State dicts hold nothing but numbers, text, bools, None and Tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rootfree_kernels import IFShampoo
from tests.calls.optimizers import OPTIONS, Case, Model
from tests.optim.checkpoints import resumed, through_file
from tests.optim.runs import trained


def plain_kinds(value: Any) -> set[type]:
    """Return the types of everything in a state dict."""
    if isinstance(value, dict):
        return set().union(*map(plain_kinds, value.keys()), *map(plain_kinds, value.values()))
    return set().union(*map(plain_kinds, value)) if isinstance(value, list) else {type(value)}


@resumed
def test_a_state_dict_holds_only_numbers_text_bools_none_and_tensors(case: Case) -> None:
    assert plain_kinds(trained(case)[1].state_dict()) <= {int, float, str, bool, type(None), torch.Tensor}


def test_scalars_of_numpy_are_saved_as_numbers(case: Case) -> None:
    np = pytest.importorskip("numpy")
    _, optimizer = trained(case)
    optimizer.param_groups[0].update(
        momentum=np.float64(0.5),
        initial_lr=np.float32(0.25),
        layer=np.int64(3),
        is_last=np.bool_(True),
        seen=(np.int8(1),),
    )
    saved = through_file(optimizer.state_dict())["param_groups"][0]
    values = [saved[name] for name in ("momentum", "initial_lr", "layer", "is_last")]
    assert list(map(type, values)) == [float, float, int, bool] and values == [0.5, 0.25, 3, True]
    assert saved["seen"] == (1,)


@pytest.mark.parametrize("written", ["bfloat16", "torch.bfloat16", torch.bfloat16], ids=repr)
def test_a_dtype_is_saved_as_text_and_read_from_text(written: Any) -> None:
    saved = IFShampoo(Model().parameters(), **OPTIONS).state_dict()
    assert saved["param_groups"][0]["factor_dtype"] == "bfloat16"
    saved["param_groups"][0]["state_dtype"] = written
    loaded = IFShampoo(Model().parameters(), **OPTIONS, factor_dtype=torch.float64)
    loaded.load_state_dict(saved)
    group = loaded.param_groups[0]
    assert (group["factor_dtype"], group["state_dtype"], group["matmul_dtype"]) == (
        torch.bfloat16,
        torch.bfloat16,
        None,
    )
