"""Warnings about parameters whose shapes hide matrices."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from rootfree_kernels import IFShampoo, RFRMSProp
from tests.calls.optimizers import OPTIONS


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device="meta"))


def warnings_of(groups: Any, optimizer: Any = IFShampoo, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer(groups, **OPTIONS, **options)
    assert all(warning.filename == __file__ for warning in caught)  # they point at the caller
    return [str(warning.message) for warning in caught]


FLAT = {
    "one": [parameter(53)],
    "several": [parameter(53), parameter(7), parameter()],
    "several groups": [{"params": [parameter(53)]}, {"params": [parameter(9)]}],
    "beside matrices": [{"params": [parameter(4, 3)]}, {"params": [parameter(1 << 21)]}],
}


@pytest.mark.parametrize("kind", FLAT)
def test_flattened_parameters_are_warned_of_once(kind: str) -> None:
    (message,) = warnings_of(FLAT[kind])
    assert "every parameter of group" in message
    assert "FSDP1" in message
    assert "structure='elementwise'" in message


NOT_FLAT = {
    "with a matrix": [parameter(53), parameter(4, 3)],
    "a group without weight decay": [{"params": [parameter(4, 3)]}, {"params": [parameter(53)], "weight_decay": 0.0}],
    "the diagonal step is asked for": [{"params": [parameter(53)], "structure": "elementwise"}],
    "one output": [parameter(1, 5)],
}


@pytest.mark.parametrize("kind", NOT_FLAT)
def test_other_groups_are_not_warned_of(kind: str) -> None:
    assert warnings_of(NOT_FLAT[kind]) == []
    assert warnings_of([parameter(53)], RFRMSProp) == []


def test_a_model_of_vectors_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="every parameter of the model has one axis"):
        IFShampoo.for_model(nn.LayerNorm(8))


def test_stacked_matrices_are_warned_of_once() -> None:
    experts = [parameter(8, 256, 512), parameter(8, 512, 256), parameter(6)]
    (message,) = warnings_of(experts)
    assert "'params[0]' of shape (8, 256, 512) (and 1 more) is viewed as one matrix of 8 x 131072" in message
    assert "structure='elementwise'" in message
    assert warnings_of(experts, structure="elementwise") == []
    convolutions = [parameter(64, 32, 3), parameter(8, 64, 7), parameter(2, 64, 7, 7), parameter(768, 48, 128)]
    assert warnings_of(convolutions) == []
