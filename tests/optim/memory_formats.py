"""Tensors in every memory format, and runs in which the formats of weight and gradient differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from rootfree_kernels import RECIPE, IFShampoo, RFRMSProp
from tests.calls.optimizers import OPTIONS, gradients
from tests.calls.tensors import FP32, same_bits, sliced

RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "rmsprop": (RFRMSProp, {}),
    "paper": (IFShampoo, {"max_preconditioner_dim": 20}),
    "recipe": (IFShampoo, {**RECIPE, "max_preconditioner_dim": 20}),
}
"""Optimizers and their options. A convolution has several blocks."""

SHAPES = [(6, 8), (6, 4, 3, 3), (3, 1, 5, 5), (4, 1, 3, 3, 3), (5,), ()]
"""A matrix, convolutions, convolutions of one input channel, a vector and a scalar."""


def formats(x: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return functions that copy a tensor of the shape of `x` into a memory format, by the name of the format."""
    found: dict[str, Callable[[Tensor], Tensor]] = {"contiguous": torch.clone, "sliced": sliced}
    if x.dim() > 1:
        found["transposed"] = lambda x: x.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)
    if x.dim() in (4, 5):
        last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        found["channels_last"] = lambda x: x.clone(memory_format=last)
    return found


def assert_formats_make_no_difference(
    rule: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    pairs: Iterable[tuple[str, str]] | None = None,  # of formats of weight and gradient; None stands for all
    device: torch.device | str = "cpu",
) -> None:
    """Take two steps with weight and gradient in each pair of formats, and compare with the contiguous run.

    BF16 weights must be bitwise equal: their random bits depend on the index of an element and not on its place in
    memory. FP32 sums are added in the order of memory.
    """
    optimizer, options = RULES[rule]
    (value,) = gradients([shape], -1, dtype)
    arranged = formats(value)
    expected = None
    for weight_format, grad_format in [("contiguous", "contiguous"), *(pairs or product(arranged, repeat=2))]:
        param = nn.Parameter(arranged[weight_format](value.to(device)))
        strides, address = param.stride(), param.data_ptr()
        stepped = optimizer([param], **{**OPTIONS, **options})
        for step in range(2):
            param.grad = arranged[grad_format](gradients([shape], step, dtype)[0].to(device))
            stepped.step()
        assert (param.stride(), param.data_ptr()) == (strides, address)
        expected = param.detach().clone() if expected is None else expected
        near = torch.allclose(param.detach(), expected, rtol=1e-6, atol=1e-6)
        assert near if dtype == FP32 else same_bits(param, expected), f"{weight_format} weight, {grad_format} gradient"
