"""Tables of addresses that stay on the device, for kernels that work on lists of tensors.

A kernel takes a list of tensors as a table of addresses and sizes in the memory of its device. A table is copied there
once and kept by its content: it is made anew when an address changes (which is seen by `data_ptr`), and only then.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rootfree_kernels.backends import is_captured
from rootfree_kernels.blocks import Tile

MAX_TABLES = 512
"""Tables kept on the devices. Gradients whose addresses change from step to step use up a few of them."""

MAX_STRIDE = 1 << 23
"""Of rows that are called aligned: offsets within a tile of 128 rows then fit 32 bits."""

_tables: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()
_captured: list[Any] = []  # what CUDA graphs read, and the host's copies of tables that a replay copies again
_constants: dict[tuple[float, torch.device, torch.dtype], Tensor] = {}


def table(rows: Sequence[int], device: torch.device) -> Tensor:
    """Whole numbers as an int64 tensor on `device`, kept there by content."""
    key = (tuple(rows), device)
    if (kept := _kept(_tables, key, device)) is not None:
        return kept
    return _keep(_tables, key, device, _copied(torch.tensor(key[0], dtype=torch.int64, device="cpu"), device))


def _kept(tables: OrderedDict[tuple[Any, ...], Any], key: tuple[Any, ...], device: torch.device) -> Any:
    """What is kept under a key, or None. What a CUDA graph reads stays for good: nobody sees when the graph goes."""
    kept = tables.get(key)
    if kept is not None:
        tables.move_to_end(key)
        if is_captured(device):
            _captured.append(kept)
    return kept


def _keep(tables: OrderedDict[tuple[Any, ...], Any], key: tuple[Any, ...], device: torch.device, made: Any) -> Any:
    """Keep what was made, unless it was made within a CUDA graph, where it is filled only by a replay."""
    if not is_captured(device):
        tables[key] = made
        if len(tables) > MAX_TABLES:
            tables.popitem(last=False)
    return made


def _copied(host: Tensor, device: torch.device) -> Tensor:
    """A copy of `host` on `device`, without waiting for it."""
    if device.type != "cuda":
        return host.to(device)
    host = host.pin_memory()
    copy = host.to(device, non_blocking=True)
    if is_captured(device):  # not filled before a replay, which reads `host` every time
        _captured.extend((host, copy))
    return copy


class TensorTable(NamedTuple):
    """Where the tensors of a list lie, and which of them each program of a launch works on."""

    rows: Tensor  # int64 [n, number of columns + 1]: the columns, and the number of the tensor's first program
    owners: Tensor  # int32 [num_programs]: a tensor's index
    counters: Tensor  # int64 [n]: for a kernel's use, who leaves them 0
    num_programs: int


_tensor_tables: OrderedDict[tuple[Any, ...], TensorTable] = OrderedDict()


def tensor_table(
    columns: tuple[tuple[int, ...], ...], programs_of: Callable[[tuple[int, ...]], int], device: torch.device
) -> TensorTable:
    """The table of a list of tensors, kept by content: `columns` have one number, an address, say, for each tensor.

    `programs_of` is a function of a row of the columns and of nothing else: how many programs work on that tensor.
    """
    key = (columns, programs_of, device)
    if (kept := _kept(_tensor_tables, key, device)) is not None:
        return kept
    tensors = [*zip(*columns, strict=True)]
    counts = [programs_of(row) for row in tensors]
    firsts = [0, *accumulate(counts)]
    numbers = [x for row, first in zip(tensors, firsts, strict=False) for x in (*row, first)]
    repeats = torch.tensor(counts, dtype=torch.int64, device="cpu")
    owners = torch.arange(len(tensors), dtype=torch.int32, device="cpu").repeat_interleave(repeats)
    made = TensorTable(
        _copied(torch.tensor(numbers, dtype=torch.int64, device="cpu"), device),
        _copied(owners, device),
        torch.zeros(len(tensors), dtype=torch.int64, device=device),
        firsts[-1],
    )
    return _keep(_tensor_tables, key, device, made)


class BlockTable(NamedTuple):
    """Where the blocks of a batch lie: for each one (address, row stride, column stride) of every list of tensors."""

    rows: Tensor
    num_blocks: int
    aligned: bool  # whether every row of every block begins on 16 bytes and lies in one piece


_block_tables: OrderedDict[tuple[Any, ...], BlockTable] = OrderedDict()


def block_table(lists: tuple[Sequence[Tensor], ...], tiles: Sequence[Tile], device: torch.device) -> BlockTable:
    """The table of the blocks of `tiles`, one tile of each tensor of every list; the tensors have two axes."""
    places = tuple([(x.data_ptr(), x.stride(), x.element_size()) for tensors in lists for x in tensors])
    key = (places, tuple(tiles), device)
    if (kept := _kept(_block_tables, key, device)) is not None:
        return kept
    blocks: list[int] = []
    aligned = True
    for index, tile in enumerate(tiles):
        (row_start, down, height), (col_start, across, width) = tile
        for i in range(down * across):
            row, col = row_start + i // across * height, col_start + i % across * width
            for start in range(index, len(places), len(tiles)):
                address, (row_stride, col_stride), size = places[start]
                address += (row * row_stride + col * col_stride) * size
                blocks += (address, row_stride, col_stride)
                aligned &= address % 16 == 0 and row_stride % 8 == 0 and col_stride == 1 and row_stride < MAX_STRIDE
    made = BlockTable(table(blocks, device), sum(tile.num_blocks for tile in tiles), aligned)
    return _keep(_block_tables, key, device, made)


def constant(value: float, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A 0-d tensor, kept, for an argument that was left out: so that no second kernel is compiled for its absence."""
    kept = _constants.get((value, device, dtype))
    if kept is None:
        kept = torch.full((), value, dtype=dtype, device=device)
        if not is_captured(device):
            _constants[value, device, dtype] = kept
    return kept


def on_device(device: torch.device, scalar: Tensor | None, default: float) -> Tensor:
    """A one-element tensor as kernels read it, FP32 on `device`; for None a constant that is kept there."""
    return constant(default, device) if scalar is None else scalar.to(device, torch.float32, non_blocking=True)


def split_lr(lr: Tensor, device: torch.device) -> tuple[float, Tensor]:
    """(number, tensor on `device`) that add up to `lr`. The host reads it only where that is no wait: a number for a
    GPU, which PyTorch keeps on the CPU."""
    if lr.device.type == device.type:
        return 0.0, on_device(device, lr, 0.0)
    return float(lr.item()), constant(0.0, device)


class Draws(NamedTuple):
    """Where a kernel finds the seed and the step of its random bits: of block (or tensor) i at seeds[i·stride] and
    step + steps[i·step_stride]."""

    seeds: Tensor
    steps: Tensor
    stride: int
    step_stride: int
    step: float


def draws(seeds: Tensor, steps: Tensor, device: torch.device) -> Draws:
    """The draws of `seeds` [n], int32 on the device, and `steps` [n], any dtype, anywhere; any bits where these are
    empty. Steps on the CPU that are all the same, as they mostly are, go to a GPU as a number: nothing is copied."""
    if not len(seeds) or not len(steps):
        return Draws(constant(0, device, torch.int32), constant(0.0, device), 0, 0, 0.0)
    if steps.device.type != device.type and len(values := set(steps.tolist())) == 1:
        return Draws(seeds, constant(0.0, device), 1, 0, float(values.pop()))
    return Draws(seeds, steps.to(device, torch.float32, non_blocking=True).contiguous(), 1, 1, 0.0)
