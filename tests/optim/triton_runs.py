"""Runs of optimizers with Triton kernels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from tests.calls.device import DEVICE
from tests.calls.optimizers import gradients
from tests.calls.tensors import FP32

BOTH = ("eager", "triton")


@contextmanager
def backend(name: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROOTFREE_BACKEND", name)
        yield


def on_device(x: Tensor) -> Tensor:
    """Copy `x` to the device with the same strides and gaps in memory."""
    memory = torch.tensor([], dtype=x.dtype).set_(x.untyped_storage()).to(DEVICE, copy=True)
    return memory.as_strided(x.shape, x.stride(), x.storage_offset())


def parameters(tensors: Iterable[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(on_device(x)) for x in tensors]


def start(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = FP32) -> list[Tensor]:
    return gradients(shapes, -1, dtype)


def set_gradients(params: Sequence[Tensor], step: int, scale: float = 1.0) -> None:
    grads = gradients([tuple(param.shape) for param in params], step, params[0].dtype)
    for param, grad in zip(params, grads, strict=True):
        param.grad = (grad * scale).to(DEVICE)


COMPENSATED = {"rounding": "compensated", "weight_rounding": "compensated"}
