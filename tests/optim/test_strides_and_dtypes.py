"""Strides and dtypes of parameters and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.calls.optimizers import SHAPES, Case, Model, gradients, snapshot, train
from tests.calls.tensors import assert_same_bits, channels_last, permuted, sliced
from tests.optim.runs import AFTER, BEFORE

LAYOUTS = [
    pytest.param((7, 5), permuted, id="matrix-transposed"),
    pytest.param((7, 5), sliced, id="matrix-sliced"),
    pytest.param((6,), sliced, id="vector-strided"),
    pytest.param((4, 3, 2, 2), channels_last, id="conv-channels_last"),
    pytest.param((4, 3, 2, 2), permuted, id="conv-permuted"),
    pytest.param((4, 3, 2, 2), sliced, id="conv-sliced"),
]


@pytest.mark.parametrize(("shape", "layout"), LAYOUTS)
def test_parameters_of_any_strides_step_as_contiguous_ones(case: Case, shape: Any, layout: Any) -> None:
    """This includes loaded parameters. Memory between the elements of a parameter does not change."""
    finals, states = [], []
    for arrange in (layout, torch.clone):
        (value,) = gradients([shape], -1, case.dtype)
        param = nn.Parameter(arrange(value))
        strides = param.stride()
        optimizer = case.make([param])
        for step in [*BEFORE, *AFTER]:
            (grad,) = gradients([shape], step, case.dtype)
            param.grad = arrange(grad)
            optimizer.step()
            if step == BEFORE[-1]:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert param.stride() == strides
        finals.append(param)
        states.append(snapshot(optimizer))
    assert finals[0].stride() != finals[1].stride()
    assert_same_bits(*states)
    memory = torch.tensor([], dtype=case.dtype).set_(finals[0].untyped_storage())
    assert memory.count_nonzero() == finals[0].count_nonzero()  # the gaps are still 0


GRADIENT_LAYOUTS = [
    pytest.param((7, 5), permuted, id="matrix-transposed"),
    pytest.param((7, 5), sliced, id="matrix-sliced"),
    pytest.param((7, 5), lambda x: x[:1].expand(7, 5), id="matrix-expanded"),
    pytest.param((6,), sliced, id="vector-strided"),
    pytest.param((6,), lambda x: x[:1].expand(6), id="vector-expanded"),
    pytest.param((4, 3, 2, 2), channels_last, id="conv-channels_last"),
    pytest.param((4, 3, 2, 2), lambda x: x[:, :1].expand(4, 3, 2, 2), id="conv-expanded"),
]


@pytest.mark.parametrize(("shape", "layout"), GRADIENT_LAYOUTS)
def test_gradients_of_any_strides_act_as_contiguous_ones(case: Case, shape: Any, layout: Any) -> None:
    states = []
    for arrange in (layout, lambda x: layout(x).contiguous()):
        param = nn.Parameter(torch.ones(shape, dtype=case.dtype))
        optimizer = case.make([param])
        for step in BEFORE:
            param.grad = arrange(gradients([shape], step, case.dtype)[0])
            optimizer.step()
        states.append(snapshot(optimizer))
    assert_same_bits(*states)


DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_floating_dtype_of_weights_is_supported(case: Case, dtype: torch.dtype) -> None:
    """Weights match FP64 weights within eight roundings of eps · |w|.

    Weights are rounded at the start and after each of six steps. The eighth rounding covers the gradients.
    """

    def run(dtype: torch.dtype) -> Tensor:
        changes = {"factor_dtype": torch.float64, "state_dtype": torch.float64} if case.is_shampoo else {}
        model = Model(dtype)
        optimizer = case.make(model.parameters(), lr=0.25, **changes)
        train(model, optimizer, [*BEFORE, *AFTER])
        assert all(param.dtype == dtype for param in model.parameters())
        return nn.utils.parameters_to_vector(model.parameters()).detach().double()

    actual, expected = run(dtype), run(torch.float64)
    tolerance = 0.0 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps * expected.abs().max()
    assert (actual - expected).abs().max() <= tolerance
    start = nn.utils.parameters_to_vector(Model(torch.float64).parameters())
    assert (start - expected).abs().max() > 5 * tolerance


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_gradient_may_have_another_floating_dtype(case: Case, grad_dtype: torch.dtype) -> None:
    """An example are gradients that were reduced in another precision. Casts of these gradients are exact."""
    states = []
    for dtype in (grad_dtype, case.dtype):
        params = [nn.Parameter(torch.ones(shape, dtype=case.dtype)) for shape in SHAPES.values()]
        optimizer = case.make(params)
        for step in BEFORE:
            for param, grad in zip(params, gradients(SHAPES.values(), step, torch.bfloat16), strict=True):
                param.grad_dtype = None
                param.grad = grad.to(dtype)
            optimizer.step()
        states.append(snapshot(optimizer))
    if grad_dtype == torch.float64:  # the diagonal step then divides in FP64 and rounds to FP32 afterwards
        torch.testing.assert_close(*states, rtol=2**-20, atol=2**-20)
    else:
        assert_same_bits(*states)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_momentum_is_stored_in_fp32_or_fp64_by_default(case: Case, dtype: torch.dtype) -> None:
    for chosen in (None, torch.bfloat16, torch.float32):
        model = Model(dtype)
        optimizer = case.make(model.parameters(), state_dtype=chosen)
        train(model, optimizer, [0])
        expected = chosen or (torch.float64 if dtype == torch.float64 else torch.float32)
        assert {state["momentum_buffer"].dtype for state in optimizer.state.values()} == {expected}
        squares = {state["square"].dtype for state in optimizer.state.values() if "square" in state}
        assert squares == {expected}
