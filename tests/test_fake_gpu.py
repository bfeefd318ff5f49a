"""Tests on the fake GPU (`make fake-gpu`): devices, launches and host syncs. Its kernels compute nothing."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.fake_gpu,
    pytest.mark.skipif(os.environ.get("ROOTFREE_FAKE_GPU") != "1", reason="needs the fake GPU: make fake-gpu"),
]

from rootfree_kernels import IFShampoo, RFRMSProp  # noqa: E402

SHAPES = ((64, 48), (64, 48), (33, 21), (70,))
pair = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two fake GPUs: --devices 2")


def make(cls: Any, *devices: int, **options: Any) -> torch.optim.Optimizer:
    """Return an optimizer after two steps. It has the same parameters on each device."""
    params = [torch.nn.Parameter(torch.ones(s, device=f"cuda:{device}")) for device in devices for s in SHAPES]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer: torch.optim.Optimizer = cls(params, batch_size=4, fused=True, **{"lr": 1e-3, **options})
    for _ in range(2):
        optimizer.step()
    return optimizer


@pytest.fixture
def fake() -> Any:
    from tests.fake_gpu.plugin import fake

    return fake


@pytest.mark.parametrize("moved", [False, True], ids=["", "new addresses"])
@pytest.mark.parametrize("capturable", [False, True], ids=["", "capturable"])
@pytest.mark.parametrize("cls", [IFShampoo, RFRMSProp])
def test_a_step_never_waits(cls: Any, capturable: bool, moved: bool, fake: Any) -> None:
    lr = torch.tensor(1e-3, device="cuda") if capturable else 1e-3
    optimizer = make(cls, 0, lr=lr, capturable=capturable)
    before = fake.synchronizations()
    for _ in range(3):
        if moved:
            for param in optimizer.param_groups[0]["params"]:
                param.grad = param.grad.clone()
        optimizer.step()
    assert fake.synchronizations() == before


def test_a_wait_is_counted(fake: Any) -> None:
    before = fake.synchronizations()
    torch.ones((), device="cuda").item()
    assert fake.synchronizations() > before


def test_a_step_of_vectors_is_one_launch(fake: Any) -> None:
    optimizer = make(RFRMSProp, 0)
    before = fake.launches()
    optimizer.step()
    assert fake.launches() == before + 1


@pair
@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("capturable", [False, True], ids=["", "capturable"])
@pytest.mark.parametrize("cls", [IFShampoo, RFRMSProp])
def test_parameters_on_two_devices(cls: Any, capturable: bool, current: int) -> None:
    """The current device has no effect and does not change. The plugin checks the tensors and streams of launches."""
    with torch.cuda.device(current):
        optimizer = make(cls, 0, 1, capturable=capturable)
        assert torch.cuda.current_device() == current
    devices = {x.device.index for state in optimizer.state.values() for x in state.values() if x.is_cuda}
    assert devices == {0, 1}


@pair
def test_parameters_on_a_device_that_is_not_current() -> None:
    make(IFShampoo, 1)
    make(RFRMSProp, 1)


# ---- the fake GPU reports errors -----------------------------------------------------------------------------------


def launch(fake: Any, stream: int, threads: int = 32) -> None:
    """Launch a kernel directly, as the extension does."""
    sizes = ctypes.c_uint * 3
    fake.library.fake_gpu_launch(sizes(1, 1, 1), sizes(threads, 1, 1), 0, ctypes.c_void_p(stream))


def test_a_launch_with_too_many_threads_is_noticed(fake: Any) -> None:
    launch(fake, 0)
    assert fake.forget_problems() == []
    launch(fake, 0, threads=2048)
    assert fake.forget_problems() == ["1 problems, the last: a launch of 1 x 1 x 1 blocks of 2048 threads"]


@pair
def test_a_launch_in_a_stream_of_another_device_is_noticed(fake: Any) -> None:
    stream = torch.cuda.Stream(device=1).cuda_stream
    with torch.cuda.device(1):
        launch(fake, stream)
    assert fake.forget_problems() == []
    launch(fake, stream)
    assert fake.forget_problems() == ["1 problems, the last: a launch on device 0 in a stream of device 1"]


@pair
def test_a_tensor_on_another_device_is_noticed(fake: Any) -> None:
    fake.check_launch(named("kernel"), (torch.ones(4, device="cuda:1"),))
    assert fake.wrong_launches.pop() == "kernel on device 0 gets a tensor on cuda:1"


@pair
def test_a_table_that_names_another_device_s_memory_is_noticed(fake: Any) -> None:
    x = torch.ones(4, device="cuda:1")
    fake.check_launch(named("kernel"), (torch.tensor([x.data_ptr(), 4], device="cuda:0"),))
    assert fake.wrong_launches.pop() == "a table of kernel on device 0 names memory of device 1"


def test_a_table_that_names_freed_memory_is_noticed(fake: Any) -> None:
    address = torch.ones(1 << 22, device="cuda").data_ptr()  # so large that the table does not reuse this memory
    fake.check_launch(named("kernel"), (torch.tensor([address, 4], device="cuda"),))
    assert fake.wrong_launches.pop() == "a table of kernel on device 0 names freed memory"


def named(name: str) -> Any:
    kernel: Any = lambda: None  # noqa: E731
    kernel.__name__ = name
    return kernel
