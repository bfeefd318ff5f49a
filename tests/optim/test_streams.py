"""Steps in several streams: tables and constants are filled before they are read, and freed after the last read.

PyTorch's CUDA sanitizer tracks reads and writes of tensors in streams. It does not see launches of Triton kernels, so
the tests report each launch to it, with all tensors of the launch as read.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from rootfree_kernels import RECIPE, IFShampoo, RFRMSProp
from rootfree_kernels.ops import operators
from rootfree_kernels.pointer_tables import tables
from tests.calls.tables import STORES, forget_tables, note_copies, num_kept

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="streams need a GPU that PyTorch can use"),
]

KERNELS = (
    *("kron_gather", "kron_start", "kron_norms", "kron_factor", "kron_whiten", "kron_step", "kron_apply", "products"),
    *("rf_rmsprop", "scaled_rmsprop", "clipped_momentum"),
)
SHAPES = ((64, 48), (33, 21), (70,))
Maker = Callable[[], torch.optim.Optimizer]


def if_shampoo() -> torch.optim.Optimizer:
    return IFShampoo(parameters(), lr=1e-3, batch_size=4, fused=True)


def recipe() -> torch.optim.Optimizer:
    return IFShampoo(parameters(), **RECIPE, fused=True)


def rf_rmsprop() -> torch.optim.Optimizer:
    return RFRMSProp(parameters(), lr=1e-3, batch_size=4, fused=True)


def parameters() -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.ones(shape, device="cuda")) for shape in SHAPES]
    for param in params:
        param.grad = torch.ones_like(param)
    return params


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_tables(monkeypatch)


@contextmanager
def races() -> Iterator[list[str]]:
    """Collect the races that the sanitizer finds in a `with` block."""
    from torch.cuda._sanitizer import CUDASanitizerDispatchMode, CUDASanitizerErrors

    found: list[str] = []
    mode = CUDASanitizerDispatchMode()

    def told(launch: Callable[..., None]) -> Callable[..., None]:
        def call(kernel: Any, grid: int, tensors: tuple[Tensor, ...], *rest: Any, **options: Any) -> None:
            launch(kernel, grid, tensors, *rest, **options)
            read = {x.data_ptr() for x in tensors if x.numel()}
            stream = torch.cuda.current_stream().cuda_stream
            aliases: dict[int, list[str]] = {address: [] for address in read}
            errors = mode.event_handler._handle_kernel_launch(stream, read, set(), set(), kernel.__name__, aliases)
            found.extend(str(error) for error in errors)

        return call

    modules = [importlib.import_module(f"rootfree_kernels.triton_kernels.{name}") for name in KERNELS]
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(patch.object(module, "launch", told(module.launch)))
        stack.enter_context(patch.object(operators, "_is_observed", lambda: False))  # show operations to it
        stack.enter_context(mode)
        try:
            yield found
        except CUDASanitizerErrors as error:
            found.append(str(error))


def step_in_two_streams(first: Maker, second: Maker) -> None:
    """Step two optimizers in two streams that do not wait for each other."""
    optimizers = first(), second()
    torch.cuda.synchronize()
    for optimizer in optimizers:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(2):
                optimizer.step()


MAKERS: dict[str, Maker] = {"if_shampoo": if_shampoo, "recipe": recipe, "rf_rmsprop": rf_rmsprop}


def all_races() -> dict[str, list[str]]:
    """Return the races of every pair of optimizers, and the races if streams do not wait for each other."""
    every = {}
    for (first, make_first), (second, make_second) in product(MAKERS.items(), repeat=2):
        for name in STORES:
            getattr(tables, name).clear()
        with races() as every[f"{first}, {second}"]:
            step_in_two_streams(make_first, make_second)
    for name in STORES:
        getattr(tables, name).clear()
    nothing = patch.object(tables._Kept, "let_read", lambda self, device: None)
    with nothing, races() as every["without waiting"]:
        step_in_two_streams(if_shampoo, if_shampoo)
    return every


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    """Run `all_races` in another process, because the tracing of the sanitizer cannot be stopped."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-m", __name__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    races: dict[str, list[str]] = json.loads(run.stdout.splitlines()[-1])
    return races


@pytest.mark.parametrize("second", MAKERS)
@pytest.mark.parametrize("first", MAKERS)
def test_another_stream_waits_for_shared_tables(first: str, second: str, found: dict[str, list[str]]) -> None:
    assert found[f"{first}, {second}"] == []


def test_the_check_finds_a_race_without_waiting(found: dict[str, list[str]]) -> None:
    """This shows that the test above can fail."""
    assert found["without waiting"]


def test_a_step_in_another_stream_reads_the_same_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = rf_rmsprop()
    optimizer.step()
    numbers, copied = num_kept(), note_copies(monkeypatch)
    with torch.cuda.stream(torch.cuda.Stream()):
        optimizer.step()
    assert copied == [] and num_kept() == numbers


def test_a_freed_table_is_recorded_in_every_stream_that_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator waits for these streams before it reuses the memory."""
    noted: list[tuple[int, int]] = []
    record = Tensor.record_stream
    monkeypatch.setattr(
        Tensor,
        "record_stream",
        lambda self, stream: (noted.append((self.data_ptr(), stream.cuda_stream)), record(self, stream))[1],
    )
    optimizer = rf_rmsprop()
    optimizer.step()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        optimizer.step()
    (kept,) = tables._tensor_tables.values()
    assert {(x.data_ptr(), stream.cuda_stream) for x in kept.tensors} <= set(noted)


def test_capturing_again_keeps_no_more_memory() -> None:
    """Tables of a graph are never freed. A second graph of the same step uses the same tables."""
    optimizer = IFShampoo(parameters(), lr=torch.tensor(1e-3, device="cuda"), batch_size=4, fused=True, capturable=True)
    for _ in range(3):
        optimizer.step()

    def capture() -> tuple[int, int]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        return len(tables._captured), len(tables._captured_hosts)

    first = capture()
    assert first[0] > 0 and [capture() for _ in range(3)] == [first] * 3


if __name__ == "__main__":
    print(json.dumps(all_races()))
