"""Bad parameters and gradients raise before anything changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from rootfree_kernels import RECIPE, IFShampoo, RFAdaGrad, RFRMSProp
from tests.calls.optimizers import OPTIONS, Case, Model, snapshot, train
from tests.calls.tensors import assert_same_bits

OPTIMIZERS = (RFRMSProp, RFAdaGrad, IFShampoo)


def trainable(dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.ones(3, 4).to(dtype))


BAD_PARAMETERS = {
    "float8": (lambda: trainable(torch.float8_e4m3fn), ValueError, "torch.float8_e4m3fn.*freeze"),
    "complex32": (lambda: trainable(torch.complex32), ValueError, "torch.complex32.*freeze"),
    "sparse": (lambda: torch.eye(4).to_sparse(), ValueError, "torch.sparse_coo"),
    "expanded": (
        lambda: nn.Parameter(torch.ones(4).expand(3, 4)),
        ValueError,
        r"strides \(0, 1\).*share memory.*param\.clone",
    ),
    "windows": (lambda: nn.Parameter(torch.ones(6).as_strided((3, 4), (1, 1))), ValueError, r"share memory"),
    "negated": (
        lambda: nn.Parameter(torch._neg_view(torch.ones(3, 4))),
        ValueError,
        r"negates.*resolve_neg\(\)",
    ),
    "number": (lambda: 1.0, TypeError, "float"),
    "string": (lambda: "weight", TypeError, "str"),
    "list": (lambda: [torch.ones(3, 4)], TypeError, "list"),
    "not-a-leaf": (lambda: torch.ones(3, 4, requires_grad=True) * 2, ValueError, "non-leaf"),
}


@pytest.mark.parametrize("kind", BAD_PARAMETERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_bad_parameter_is_refused(optimizer: Any, kind: str) -> None:
    make, error, word = BAD_PARAMETERS[kind]
    good = nn.Parameter(torch.ones(3, 4))
    with pytest.raises(error, match=word):
        optimizer([good, make()], **OPTIONS)

    opt = optimizer([good], **OPTIONS)
    groups = copy.deepcopy(opt.state_dict()["param_groups"])
    with pytest.raises(error, match=word):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2)), make()]})
    assert opt.state_dict()["param_groups"] == groups


@pytest.mark.parametrize("remedy", [lambda x: x.clone(memory_format=torch.contiguous_format), torch.Tensor.contiguous])
def test_the_remedy_for_elements_that_share_memory_works(case: Case, remedy: Any) -> None:
    case.make([nn.Parameter(remedy(torch.ones(4, dtype=case.dtype).expand(3, 4)))])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_bad_named_parameter_is_named(optimizer: Any) -> None:
    named = [("good", nn.Parameter(torch.ones(3))), ("encoder.table", trainable(torch.float8_e5m2))]
    with pytest.raises(ValueError, match=r"encoder\.table.*torch\.float8_e5m2.*pass"):
        optimizer(named, **OPTIONS)


# ---- frozen parameters, complex parameters ---------------------------------------------------------------------------

FROZEN = (torch.uint8, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex32, torch.complex64)


@pytest.mark.parametrize("dtype", FROZEN, ids=str)
def test_a_frozen_parameter_of_any_dtype_is_carried_along(case: Case, dtype: torch.dtype) -> None:
    """Quantised weights have such dtypes. The other parameters are stepped as without it."""
    finals = []
    for extra in ([], [torch.ones(4, 4).to(dtype)]):
        model = Model(case.dtype)
        optimizer = case.make([*model.parameters(), *extra])
        train(model, optimizer, range(3))
        assert optimizer.state_dict()["param_groups"][0]["params"] == list(range(len([*model.parameters(), *extra])))
        optimizer.load_state_dict(optimizer.state_dict())
        train(model, optimizer, range(3, 5))
        finals.append(snapshot(optimizer))
    number = len(list(Model().parameters()))
    assert_same_bits({k: v for k, v in finals[1].items() if not k.startswith(f"{number} ")}, finals[0])


def test_a_frozen_parameter_of_another_dtype_that_gets_a_gradient_is_an_error(case: Case) -> None:
    model, frozen = Model(case.dtype), nn.Parameter(torch.ones(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    optimizer = case.make([*model.parameters(), frozen])
    model(0).backward()
    frozen.requires_grad_(True).grad = torch.ones_like(frozen)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"torch\.float8_e4m3fn.*requires_grad_\(False\)"):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (3, 4)], ids=str)
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [(RFRMSProp, {}), (RFAdaGrad, {}), (IFShampoo, {}), (IFShampoo, RECIPE)],
    ids=["RFRMSProp", "RFAdaGrad", "IFShampoo", "recipe"],
)
def test_a_complex_parameter_is_stepped_as_two_real_ones(
    optimizer: Any, options: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    if optimizer is IFShampoo:
        options = {**options, "structure": "elementwise", "update_norm": "rms"}
    start, generator = torch.randn(shape, dtype=dtype), torch.Generator().manual_seed(0)
    whole, parts = nn.Parameter(start.clone()), nn.Parameter(torch.view_as_real(start).clone())
    steppers = [optimizer([x], **{**OPTIONS, **options}) for x in (whole, parts)]
    for step in range(4):
        grad = torch.randn(shape, dtype=dtype, generator=generator)
        whole.grad = grad.conj().clone().conj() if step % 2 else grad  # with and without a lazy conjugate
        parts.grad = torch.view_as_real(grad).clone()
        for stepper in steppers:
            stepper.step()
        steppers[0].load_state_dict(copy.deepcopy(steppers[0].state_dict()))
    assert torch.equal(torch.view_as_real(whole.detach()), parts.detach())
    assert not torch.equal(whole, start)


def test_a_complex_matrix_has_no_kronecker_factors() -> None:
    with pytest.raises(ValueError, match=r"'params\[0\]' is a matrix of torch\.complex64.*structure='elementwise'"):
        IFShampoo([trainable(torch.complex64)], **OPTIONS)


@pytest.mark.parametrize("shape", [(3,), (4, 3)], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_parameter_that_is_twice_in_a_group_is_stepped_once(optimizer: Any, shape: tuple[int, ...]) -> None:
    first, second, alone = (nn.Parameter(torch.ones(shape)) for _ in range(3))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        doubled = optimizer([first, second, first], **OPTIONS, rounding="nearest")
    single = optimizer([alone], **OPTIONS, rounding="nearest")
    for _ in range(3):
        for param in (first, second, alone):
            param.grad = torch.full(shape, 0.5)
        doubled.step()
        single.step()
        assert torch.equal(first, alone) and torch.equal(second, alone)
    assert float(doubled.state[first]["step"]) == 3
    again = optimizer([nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))], **OPTIONS)
    doubled.load_state_dict(doubled.state_dict())
    assert len(doubled.state_dict()["state"]) == 2
    with pytest.raises(ValueError, match="other groups"):
        again.load_state_dict(doubled.state_dict())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_parameter_in_two_groups_is_refused(optimizer: Any) -> None:
    first, second = (nn.Parameter(torch.ones(3)) for _ in range(2))
    with pytest.raises(ValueError, match="more than one"):
        optimizer([{"params": [first, second]}, {"params": [first]}], **OPTIONS)
    opt = optimizer([first], **OPTIONS)
    with pytest.raises(ValueError, match="more than one"):
        opt.add_param_group({"params": [second, first]})
    assert [group["params"] for group in opt.param_groups] == [[first]]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("params", [[], {}], ids=["list", "dict"])
def test_an_empty_list_of_parameters_is_an_error(optimizer: Any, params: Any) -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        optimizer(params, **OPTIONS)


def test_a_group_that_is_not_a_dict_is_an_error(case: Case) -> None:
    _, optimizer = case.start()
    with pytest.raises(TypeError, match="dict"):
        optimizer.add_param_group([nn.Parameter(torch.ones(3))])


def test_a_set_of_parameters_is_refused(case: Case) -> None:
    """The order of a set differs between runs, and random bits and checkpoints depend on it."""
    with pytest.raises(TypeError, match="set"):
        case.make([{"params": {nn.Parameter(torch.ones(3))}}])


# ---- gradients -------------------------------------------------------------------------------------------------------


def sparse_gradient(param: nn.Parameter) -> None:
    param.grad = torch.ones_like(param).to_sparse()


def complex_gradient(param: nn.Parameter) -> None:
    param.grad, param.grad_dtype = None, None
    param.grad = torch.ones(param.shape, dtype=torch.complex64)


def integer_gradient(param: nn.Parameter) -> None:
    param.grad, param.grad_dtype = None, None
    param.grad = torch.ones(param.shape, dtype=torch.int32)


def gradient_of_another_shape(param: nn.Parameter) -> None:
    """Set a gradient of another shape, as after a vocabulary was resized. (PyTorch rejects one on another device.)"""
    param.grad.data = torch.ones(3)


BAD_GRADIENTS = {
    "sparse": (sparse_gradient, r"sparse_coo.*dense"),
    "complex": (complex_gradient, r"complex64.*pass"),
    "integer": (integer_gradient, r"int32.*pass"),
    "shape": (gradient_of_another_shape, r"\(3,\)"),
}


@pytest.mark.parametrize("kind", BAD_GRADIENTS)
@pytest.mark.parametrize("target", ["conv", "bias", "scale"])
def test_a_bad_gradient_is_refused_before_anything_changes(case: Case, kind: str, target: str) -> None:
    """Earlier groups, whose gradients are valid, do not step either."""
    spoil, message = BAD_GRADIENTS[kind]
    model = Model(case.dtype)
    params = list(model.parameters())
    optimizer = case.make([{"params": params[:2]}, {"params": params[2:]}])
    for steps in ((), (0, 1)):  # without state and with it
        train(model, optimizer, steps)
        before = snapshot(optimizer)
        model(2).backward()
        spoil(getattr(model, target))
        with pytest.raises((RuntimeError, ValueError), match=message):
            optimizer.step()
        assert_same_bits(snapshot(optimizer), before)


def test_a_sparse_embedding_is_refused_with_the_remedy(case: Case) -> None:
    embedding = nn.Embedding(6, 4, sparse=True, dtype=case.dtype)
    optimizer = case.make(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"sparse=False"):
        optimizer.step()
    assert not optimizer.state


def test_a_bad_gradient_names_its_parameter(case: Case) -> None:
    model = Model(case.dtype)
    optimizer = case.make(model.named_parameters())
    model.weight.grad = torch.ones_like(model.weight).to_sparse()
    with pytest.raises(RuntimeError, match="parameter 'weight'"):
        optimizer.step()


@pytest.mark.parametrize("optimizer", [RFRMSProp, IFShampoo])
def test_changing_the_dtype_of_a_parameter_is_an_error_before_anything_changes(optimizer: Any) -> None:
    model = Model()
    opt = optimizer(model.parameters(), **OPTIONS, weight_rounding="compensated")
    train(model, opt, range(2))
    model.to(torch.bfloat16)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    before = snapshot(opt)
    with pytest.raises(ValueError, match=r"torch.bfloat16 on cpu .* before the first step"):
        opt.step()
    assert_same_bits(snapshot(opt), before)
