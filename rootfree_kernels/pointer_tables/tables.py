"""Tables of addresses that stay on the device, for kernels that work on lists of tensors.

A kernel takes a list of tensors as a table of addresses and sizes in the memory of its device. A table is copied there
once and cached by its content. It is made again only when an address changes, which `data_ptr` shows.

A table is filled in the stream that is current at that time. Any other stream waits once, before its first read. The
allocator is told of that stream, so that the memory of a table is not reused while the stream may still read it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rootfree_kernels.arguments import Draws
from rootfree_kernels.backend import is_captured
from rootfree_kernels.rounding import signed

MAX_TABLES = 512
"""Tables kept on the devices. Gradients whose addresses change at every step fill several of them."""

MAX_STRIDE = 1 << 23
"""The longest row stride of blocks that count as aligned. Offsets within a tile of 128 rows then fit 32 bits."""


class _Kept:
    """A cached value on a device, and the streams that may read it without waiting."""

    __slots__ = ("event", "streams", "tensors", "value")

    def __init__(self, value: Any, tensors: Sequence[Tensor], device: torch.device) -> None:
        self.value, self.tensors = value, tensors
        self.streams = {_stream(device)}
        self.event: Any = None  # stays None on devices without streams
        if device.type == "cuda":
            self.event = torch.cuda.current_stream(device).record_event()

    def let_read(self, device: torch.device) -> None:
        """Let the device's current stream wait until the tensors are filled."""
        stream = torch.cuda.current_stream(device)
        stream.wait_event(self.event)
        for tensor in self.tensors:
            tensor.record_stream(stream)
        self.streams.add(stream.cuda_stream)


_Store = OrderedDict[Any, _Kept]
_tables: _Store = OrderedDict()
_tensor_tables: _Store = OrderedDict()
_block_tables: _Store = OrderedDict()
_constants: dict[Any, _Kept] = {}

_captured: dict[int, _Kept] = {}
"""Values that CUDA graphs read, by id. They are never freed: we cannot know when a graph is gone. Capturing the same
step again adds nothing, except tables of temporary tensors: eager updates with the momentum of a kernel make one for
each batch and capture, of a few hundred bytes."""

_captured_hosts: dict[Any, Tensor] = {}
"""Pinned host memory, by content, that the replay of a graph copies to the device. Never freed, for the same reason."""

_raw_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def _stream(device: torch.device) -> int:
    """Return the handle of the device's current stream, or 0 if it has no streams."""
    return int(_raw_stream(device.index)) if device.type == "cuda" else 0


def table(rows: Sequence[int], device: torch.device) -> Tensor:
    """Return integers as an int64 tensor on `device`, cached by content."""
    key = (tuple(rows), device)
    if (kept := _kept(_tables, key, device)) is not None:
        return kept
    made = _copied(torch.tensor(key[0], dtype=torch.int64, device="cpu"), device, key[0])
    return _keep(_tables, key, device, made, [made])


def _kept(store: _Store, key: Any, device: torch.device) -> Any:
    """Return the cached value of a key, safe to read in the current stream, or None."""
    kept = store.get(key)
    if kept is None:
        return None
    store.move_to_end(key)
    if is_captured(device):  # steps before the capture have waited for the value
        _captured[id(kept)] = kept
    elif _stream(device) not in kept.streams:
        kept.let_read(device)
    return kept.value


def _keep(store: _Store, key: Any, device: torch.device, made: Any, tensors: Sequence[Tensor]) -> Any:
    """Cache a new value and return it. Within a CUDA graph it is not cached, because only a replay fills it."""
    if not is_captured(device):
        store[key] = _Kept(made, tensors, device)
        if len(store) > MAX_TABLES:
            store.popitem(last=False)
    return made


def _copied(host: Tensor, device: torch.device, content: Any) -> Tensor:
    """Return a copy of `host` on `device` without waiting for it. `content` identifies the values of `host`."""
    if device.type != "cuda":
        return host.to(device)
    if not is_captured(device):
        return host.pin_memory().to(device, non_blocking=True)
    key = (content, host.dtype)
    if key not in _captured_hosts:  # every replay reads this memory again
        _captured_hosts[key] = host.pin_memory()
    return _captured_hosts[key].to(device, non_blocking=True)


class TensorTable(NamedTuple):
    """The addresses of a list of tensors, and which tensor each program of a launch works on."""

    rows: Tensor  # int64 [n, number of columns + 1]: the columns, then the index of the tensor's first program
    owners: Tensor  # int32 [num_programs]: the index of a program's tensor
    counters: Tensor  # int64 [n]: scratch memory of a kernel, which must leave it filled with 0
    num_programs: int


def tensor_table(
    columns: tuple[tuple[int, ...], ...], programs_of: Callable[[tuple[int, ...]], int], device: torch.device
) -> TensorTable:
    """Return the table of a list of tensors, cached by content.

    A column holds one integer for each tensor, for example its address. `programs_of` returns how many programs work on
    a tensor. It may depend only on the tensor's row of the columns.
    """
    key = (columns, programs_of, device)
    if (kept := _kept(_tensor_tables, key, device)) is not None:
        return kept
    tensors = [*zip(*columns, strict=True)]
    counts = [programs_of(row) for row in tensors]
    firsts = [0, *accumulate(counts)]
    ints = [x for row, first in zip(tensors, firsts, strict=False) for x in (*row, first)]
    repeats = torch.tensor(counts, dtype=torch.int64, device="cpu")
    owners = torch.arange(len(tensors), dtype=torch.int32, device="cpu").repeat_interleave(repeats)
    made = TensorTable(
        _copied(torch.tensor(ints, dtype=torch.int64, device="cpu"), device, tuple(ints)),
        _copied(owners, device, tuple(counts)),
        torch.zeros(len(tensors), dtype=torch.int64, device=device),
        firsts[-1],
    )
    return _keep(_tensor_tables, key, device, made, made[:3])


class BlockTable(NamedTuple):
    """Where the blocks of a batch are: (address, row stride, column stride) of each block in every list of tensors."""

    rows: Tensor
    num_blocks: int
    aligned: bool  # whether every row of every block is contiguous and begins on a 16-byte boundary
    counters: Tensor  # int64 [L], or empty: scratch memory of a kernel, which must leave it filled with 0


def block_table(
    lists: Sequence[Sequence[Tensor]],
    tiles: Sequence[int],
    block_shape: tuple[int, int],
    device: torch.device,
    with_counters: bool = False,
) -> BlockTable:
    """Return the table of the blocks of one tile of each tensor of every list.

    The tensors have two axes, and those of a list have one dtype. `tiles` holds the `Tile.as_ints` of all tiles. The
    kernels of one launch at a time may use the counters, which only a table `with_counters` has.
    """
    known = {id(tensors): _places(tensors) for tensors in {id(x): x for x in lists}.values()}
    places = tuple([known[id(tensors)] for tensors in lists])
    key = (places, tuple(tiles), block_shape, device, with_counters)
    if (kept := _kept(_block_tables, key, device)) is not None:
        return kept
    rows, aligned = _block_rows(places, key[1], block_shape)
    num_blocks = len(rows) // (3 * len(lists))
    counters = torch.zeros(num_blocks if with_counters else 0, dtype=torch.int64, device=device)
    made = BlockTable(table(rows, device), num_blocks, aligned, counters)
    return _keep(_block_tables, key, device, made, [made.rows, counters])


_Places = tuple[tuple[int, ...], tuple[tuple[int, ...], ...], int]


def _places(tensors: Sequence[Tensor]) -> _Places:
    """Return addresses, strides and the bytes of an element. `map` runs in C, which is faster than a comprehension."""
    return tuple(map(Tensor.data_ptr, tensors)), tuple(map(Tensor.stride, tensors)), tensors[0].element_size()


def _block_rows(
    places: Sequence[_Places], tiles: Sequence[int], block_shape: tuple[int, int]
) -> tuple[list[int], bool]:
    """Return the integers of a table, and `BlockTable.aligned`."""
    ints: list[int] = []
    aligned = True
    height, width = block_shape
    for index, (row_start, down, col_start, across) in enumerate(zip(*(iter(tiles),) * 4, strict=True)):
        for i in range(down * across):
            row, col = row_start + i // across * height, col_start + i % across * width
            for addresses, strides, size in places:
                row_stride, col_stride = strides[index]
                address = addresses[index] + (row * row_stride + col * col_stride) * size
                ints += (address, row_stride, col_stride)
                aligned &= address % 16 == 0 and row_stride % 8 == 0 and col_stride == 1 and row_stride < MAX_STRIDE
    return ints, aligned


def constant(value: float, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a cached 0-d tensor: a stand-in for an omitted argument, so that no second kernel variant is compiled."""
    key = (value, device, dtype)
    kept = _constants.get(key)
    if kept is None:
        made = torch.full((), value, dtype=dtype, device=device)
        if not is_captured(device):
            _constants[key] = _Kept(made, [made], device)
        return made
    if _stream(device) not in kept.streams and not is_captured(device):
        kept.let_read(device)
    return kept.value


def on_device(device: torch.device, scalar: Tensor | None, default: float) -> Tensor:
    """Return a one-element tensor as kernels read it: FP32 on `device`, and not a view that PyTorch negates lazily.
    None becomes a cached constant."""
    if scalar is None:
        return constant(default, device)
    return scalar.to(device, torch.float32, non_blocking=True).resolve_neg()


def split_lr(lr: Tensor, device: torch.device) -> tuple[float, Tensor]:
    """Split lr into a float and a tensor on `device` that add up to it.

    Only CPU scalars are read for another device, so that nothing synchronizes.
    """
    if lr.device.type == device.type:
        return 0.0, on_device(device, lr, 0.0)
    return float(lr.item()), constant(0.0, device)


class RandomBits(NamedTuple):
    """Where a kernel finds the seed and the step of block (or tensor) i: at seeds[i·stride], and at
    step + steps[i·step_stride] modulo 2³²."""

    seeds: Tensor  # int32
    steps: Tensor  # int64
    stride: int
    step_stride: int
    step: int  # as an int32


def no_random_bits(device: torch.device) -> RandomBits:
    """Return the arguments of a kernel that draws nothing."""
    return RandomBits(constant(0, device, torch.int32), constant(0, device, torch.int64), 0, 0, 0)


def random_bits(draws: Draws, device: torch.device) -> RandomBits:
    """Return seeds and steps as a kernel on `device` reads them. If either is empty, the kernel must draw nothing.

    Steps on the CPU are mostly all equal. They are then passed to a GPU as a number, and nothing is copied.
    """
    seeds, steps = draws
    if not seeds.shape[0] or not steps.shape[0]:
        return no_random_bits(device)
    if steps.device.type != device.type and len(values := set(steps.tolist())) == 1:
        return RandomBits(seeds, constant(0, device, torch.int64), 1, 0, signed(int(values.pop())))
    return RandomBits(seeds, steps.to(device, torch.int64, non_blocking=True).contiguous(), 1, 1, 0)
