"""Calls of the Triton kernels, and shapes around which they switch between code paths."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tests.calls import kron, rf_rmsprop
from tests.calls.device import DEVICE, module_of
from tests.calls.tensors import BF16

CHUNK: int = module_of("rf_rmsprop").CHUNK
"""Number of elements that a program of the diagonal step processes."""

SHAPES = [(), (1,), (0,), (13,), (1031,), (17, 130), (2, 3, 4), (CHUNK,), (3, CHUNK), (64, 72)]
LAYOUTS = ("whole", "offset by 1", "offset by 8", "transposed", "every other")

triton_call = partial(rf_rmsprop.Call, backend="triton", device=DEVICE)


def triton_batch(*args: Any, dtype: torch.dtype = BF16, **rest: Any) -> kron.Batch:
    """Return a batch whose products have the dtype of its factors."""
    return kron.Batch(*args, dtype=dtype, matmul=dtype, backend="triton", device=DEVICE, **rest)
