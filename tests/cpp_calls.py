"""Calls of the diagonal step in C++, and what tests of the C++ kernels share: threads and instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_on_cpu import calls
from cuda_on_cpu.calls import FILL
from torch import Tensor

from rootfree_kernels.backends import build_record, implementation

LEFT_OUT = build_record()["left_out"]["cpp"]
needs_cpp = pytest.mark.skipif(bool(LEFT_OUT), reason=f"the extension was not built: {LEFT_OUT}")
"""A mark. An extension that was built and is broken is an error."""

LISTS = ("param", "square", "buffer", "grad", "square_residual", "weight_residual")
LAYOUTS = ("whole", "offset by 1", "offset by 3", "channels last", "transposed", "every other")


def cpp(stem: str, *args: Any) -> Any:
    return implementation("cpp", stem)(*args)


def step(*args: Any) -> None:
    cpp("rf_rmsprop", *args)


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


def under_other_instruction_sets(module: str, expression: str) -> dict[str, str]:
    """What an expression about a test module gives where PyTorch is told to use lesser instruction sets, by set."""
    names = {"DEFAULT": True, "AVX2": torch.cpu._is_avx2_supported(), "AVX512": torch.cpu._is_avx512_supported()}
    here = torch.backends.cpu.get_cpu_capability()
    program = f"import torch, {module}; print(torch.backends.cpu.get_cpu_capability(), {module}.{expression})"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    runs = []
    for name in [name for name, is_there in names.items() if is_there and name != here]:
        environment = {**os.environ, "PYTHONPATH": path, "ATEN_CPU_CAPABILITY": name.lower()}
        runs.append(subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE))
    outputs = [run.communicate()[0].decode().split() for run in runs]
    assert [run.returncode for run in runs] == [0] * len(runs)
    return dict(outputs)


def strides(shape: tuple[int, ...], layout: str) -> list[int]:
    """Of a tensor of four axes that is "channels last" (others are whole), say."""
    order = list(range(len(shape)))
    if layout == "transposed":
        order.reverse()
    elif layout == "channels last" and len(shape) == 4:
        order = [0, 2, 3, 1]
    result, stride = [0] * len(shape), 2 if layout == "every other" else 1
    for axis in reversed(order):
        result[axis] = stride
        stride *= max(1, shape[axis])
    return result


def whole_numbers(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Below 2²⁰ in magnitude: unlike normal ones they are the same under every instruction set."""
    return torch.randint(-(2**20) + 1, 2**20, shape, generator=generator).float()


@dataclass
class Call(calls.Call):
    """A call on tensors of any shapes, in layouts that take turns over the tensors and over the lists."""

    shapes: list[tuple[int, ...]] = field(default_factory=list)
    layouts: tuple[str, ...] = ("whole",)

    def __post_init__(self) -> None:
        self.shapes = self.shapes or [(size,) for size in self.sizes]
        self.sizes = [prod(shape) for shape in self.shapes]

    def draw(self, name: str, size: int, generator: torch.Generator) -> Tensor:
        value = whole_numbers((size,), generator) / 2**19
        return value.abs() + 0.5 if name == "square" else value

    def placed(self, name: str, index: int, value: Tensor) -> tuple[Tensor, Tensor]:
        shape, layout = self.shapes[index], self.layouts[(index + LISTS.index(name)) % len(self.layouts)]
        memory = torch.full((2 * value.numel() + 32,), FILL, dtype=value.dtype)
        offset = {"offset by 1": 1, "offset by 3": 3}.get(layout, 8)
        return memory.as_strided(shape, strides(shape, layout), offset).copy_(value.view(shape)), memory


def flat(lists: calls.Lists) -> calls.Lists:
    """Copies, every tensor as a vector of its numbers in row-major order."""
    return {name: [x.reshape(-1).clone() for x in tensors] for name, tensors in lists.items()}


def bits(lists: calls.Lists) -> dict[str, list[bytes]]:
    return {name: [x.view(torch.uint8).numpy().tobytes() for x in tensors] for name, tensors in flat(lists).items()}


def assert_memory_around_is_untouched(memory: Iterable[tuple[Tensor, Tensor]]) -> None:
    for x, around in memory:
        inside = torch.zeros(around.shape, dtype=torch.bool)
        inside.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(True)
        assert (around[~inside] == int(FILL)).all()
