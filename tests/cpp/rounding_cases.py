"""FP32 values to test rounding to 16 bits, and calls of `rf_rmsprop` that round them."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.calls.rf_rmsprop import OPTIONS, Call, Lists
from tests.calls.tensors import FP32
from tests.cpp.calls import cpp_call


def every_pattern(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def to_be_rounded(dtype: torch.dtype) -> Tensor:
    """Return finite FP32 values to round to `dtype`.

    These are all values of `dtype`, the midpoints of neighbours, the FP32 values next to them, and random values.
    """
    every = every_pattern(dtype)
    every = every[every.isfinite()].double().sort().values
    ties = ((every[1:] + every[:-1]) / 2).float()
    beside = [torch.nextafter(ties, torch.tensor(bound)) for bound in (torch.inf, -torch.inf)]
    any_bits = torch.randint(-(2**31), 2**31, (2**16,), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    edge = torch.tensor([65504.0, 65519.99, 65520.0, 1e30, 3.4028235e38, 2.0**-25, 2.0**-24, 1e-45])
    values = torch.cat([every.float(), ties, *beside, any_bits.int().view(FP32), edge, -edge])
    return values[values.isfinite()]


def rounding_step(dtype: torch.dtype, lr: float, gradient: Tensor) -> tuple[Call, Lists]:
    """Return a call that steps weights from 0 to −`lr` · gradient. If `lr` is 0, weights keep their values."""
    call = cpp_call([len(gradient)], param=dtype, options=dict.fromkeys(OPTIONS, 0.0), lr=lr)
    lists = call.tensors()[0]
    lists["param"][0].zero_()
    lists["square"][0].fill_(1)
    lists["grad"][0].copy_(gradient)
    return call, lists
