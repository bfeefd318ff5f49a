"""A step does not wait for the device, because the host reads no tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.calls.backends import functions_of, stand_in
from tests.calls.operators import STEMS
from tests.calls.optimizers import CASES, Case, Model
from tests.optim.runs import BEFORE

READS = ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__index__", "__bool__", "nonzero")


class NoReads(TorchDispatchMode):
    """Fail if the host reads the value of a tensor."""

    TAGS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        size_is_told = kwargs.get("output_size") is not None
        assert size_is_told or self.TAGS.isdisjoint(func.tags), f"{func} waits for the device"
        return func(*args, **kwargs)


@contextmanager
def no_reads() -> Iterator[None]:
    """Fail if the host reads the value of a tensor. This includes operators, which hide their work from modes."""

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the host reads a tensor")

    def watched(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            with NoReads():
                return function(*args, **options)

        return call

    functions = {name: watched(function) for name, function in functions_of("eager", *STEMS, "kron_products").items()}
    with pytest.MonkeyPatch.context() as patch, NoReads():
        stand_in(patch, "eager", **functions)
        for name in READS:
            patch.setattr(torch.Tensor, name, forbidden)
        yield


@pytest.mark.parametrize("capturable", [False, True], ids=["default", "capturable"])
@pytest.mark.parametrize("case", [case for case in CASES if "T3" not in case.name], ids=lambda case: case.name)
@pytest.mark.parametrize("backend", ["", "eager"], ids=["best backend", "eager"])
def test_a_step_with_t_1_reads_no_tensor(
    case: Case, capturable: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROOTFREE_BACKEND", backend)
    model, optimizer = case.start(lr=torch.tensor(0.01), capturable=capturable)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    for step in BEFORE:
        model(step).backward()
        with no_reads():
            optimizer.step()


READERS = {
    "float": float,
    "bool": bool,
    "item": lambda x: x.item(),
    "tolist": lambda x: x.tolist(),
    "equal": lambda x: torch.equal(x, x),
    "mask": lambda x: x[x > 0],
    "repeat": lambda x: torch.repeat_interleave(x.long()),
}


@pytest.mark.parametrize("reader", READERS)
def test_reading_a_tensor_is_noticed(reader: str) -> None:
    """This shows that the test above can fail."""
    x, noticed = torch.ones(1), False
    with no_reads():
        try:
            READERS[reader](x)
        except AssertionError:
            noticed = True
    assert noticed


@pytest.mark.parametrize("lr", [torch.tensor(0.01), torch.tensor([0.01])], ids=["0-d", "1-d"])
def test_the_learning_rate_is_never_read(case: Case, lr: Tensor) -> None:
    """This also holds for T > 1, although the host then reads the step counts."""
    model, optimizer = case.start(lr=lr)

    def guarded(name: str) -> Any:
        original = getattr(torch.Tensor, name)

        def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            assert self.data_ptr() != lr.data_ptr(), f"{name} of the learning rate"
            return original(self, *args, **kwargs)

        return read

    for step in BEFORE:
        model(step).backward()
        with pytest.MonkeyPatch.context() as patch:
            for name in READS:
                patch.setattr(torch.Tensor, name, guarded(name))
            optimizer.step()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use")
@pytest.mark.parametrize("capturable", [False, True], ids=["default", "capturable"])
@pytest.mark.parametrize("case", [case for case in CASES if "T3" not in case.name], ids=lambda case: case.name)
def test_a_step_with_t_1_never_waits_for_the_gpu(case: Case, capturable: bool) -> None:
    """The first step creates the state and may wait."""
    model = Model(case.dtype).cuda()
    params = list(model.parameters())
    optimizer = case.make(params, lr=torch.tensor(0.01, device="cuda"), capturable=capturable)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
