"""Memory of the Triton kernels: failing allocations, tables, and tensors with more than 2³¹ elements."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rootfree_kernels.pointer_tables import tables
from tests.calls.device import DEVICE, kernel_test, launches, needs_gpu
from tests.calls.kron import KEPT, LAYOUTS, STATE, THREE, WHITENED, assert_same
from tests.calls.operators import call
from tests.calls.tables import forget_tables, note_copies
from tests.calls.tensors import BF16, FP32, same_bits
from tests.triton.calls import triton_batch
from tests.triton.kron_batches import MODULES, STACKED

pytestmark = kernel_test


class OutOfMemory(TorchDispatchMode):
    """Make the `number`-th allocation fail. The mode is paused during launches, since kernels do not allocate."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func._schema.returns
        if not self.paused and returned and all(x.alias_info is None for x in returned):
            self.left -= 1
            if self.left == 0:
                raise torch.OutOfMemoryError(f"no memory for {func}")
        return func(*args, **(kwargs or {}))

    @contextmanager
    def around_launches(self) -> Iterator[None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.paused = True
            launches.launch(*args, **kwargs)
            self.paused = False

        with pytest.MonkeyPatch.context() as patch:
            for module in MODULES:
                patch.setattr(module, "launch", launch)
            yield


@pytest.mark.parametrize(("sides", "clip"), [((13, 9), "row_sum"), ((16, 8), "frobenius")], ids=["padded", "aligned"])
@pytest.mark.parametrize(("cached", "rule"), [(False, {}), (True, {}), (False, WHITENED)], ids=str)
def test_running_out_of_memory_changes_nothing(sides, clip, cached, rule):
    batch = triton_batch(*sides, STACKED, LAYOUTS, param=BF16, rounding="compensated", weight_rounding="compensated")
    batch = replace(batch, clip=clip, rule=rule, lr=torch.tensor(0.05, device=DEVICE, dtype=torch.float64))
    t = batch.tensors()
    if not cached:
        t.p_c = t.p_k = None
    for action in (lambda: batch.update(t), lambda: batch.step(t, t.ok, cached)):
        was, failures = t.copies(), []
        while True:
            mode = OutOfMemory(1 + len(failures))
            try:
                with mode.around_launches(), mode:
                    action()
                break
            except torch.OutOfMemoryError as error:
                failures.append(str(error))
            now = t.copies()
            assert all(same_bits(now[name], was[name]) for name in was if name.split()[0] in (*KEPT, "skipped"))
        assert len(failures) >= 3


# ---- tables ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_tables(monkeypatch):
    forget_tables(monkeypatch)


def test_a_new_address_of_a_gradient_is_used_and_an_old_one_needs_no_copy(no_tables, monkeypatch):
    copied = note_copies(monkeypatch)
    batch = triton_batch(13, 9, THREE)
    t = batch.tensors()
    batch.gather(t)
    assert len(copied) == 1
    for grad in t.grads:
        grad.mul_(2)
    first, _ = batch.gather(t)
    assert len(copied) == 1
    old, t.grads[1] = t.grads[1], t.grads[1].flip(0).contiguous()
    second, _ = batch.gather(t)
    assert len(copied) == 2
    assert torch.equal(second[1, :13, :9], t.grads[1][1:].to(BF16)) and torch.equal(second[::2], first[::2])
    t.grads[1] = old
    third, _ = batch.gather(t)
    assert len(copied) == 2 and torch.equal(third, first)


def test_the_number_of_tables_is_bounded(no_tables, monkeypatch):
    monkeypatch.setattr(tables, "MAX_TABLES", 3)
    batch = triton_batch(5, 4)
    kept = [batch.tensors() for _ in range(6)]
    for t in [*kept, *kept]:
        grad, _ = batch.gather(t)
        assert torch.equal(grad[0, :5, :4], t.grads[0].to(BF16))
    assert (len(tables._tables), len(tables._block_tables)) == (3, 3)


@pytest.mark.parametrize(
    ("sides", "place", "layout", "dtype", "aligned"),
    [
        ((16, 8), (0, 2, 0, 2), "whole", BF16, True),
        ((16, 8), (3, 1, 8, 2), "wide rows", BF16, True),
        ((16, 8), (0, 1, 4, 1), "wide rows", FP32, True),
        ((16, 8), (0, 1, 4, 1), "wide rows", BF16, False),
        ((16, 8), (0, 1, 0, 1), "offset by 1", FP32, False),
        ((16, 8), (0, 1, 0, 1), "transposed", FP32, False),
        ((16, 8), (0, 1, 0, 1), "every other", FP32, False),
        ((16, 4), (0, 1, 0, 3), "whole", FP32, False),
        ((16, 8), (0, 1, 0, 1), "far apart", BF16, False),
    ],
)
def test_blocks_are_aligned_if_every_row_starts_at_a_multiple_of_16_bytes(sides, place, layout, dtype, aligned):
    """Kernels on a GPU require this alignment. The interpreter does not."""
    batch = triton_batch(*sides, (place, place), ("whole" if layout == "far apart" else layout,), grad=dtype)
    grads = batch.tensors().grads
    if layout == "far apart":  # offsets within a tile exceed 32 bits
        grads[1] = torch.empty_strided(sides, (tables.MAX_STRIDE, 1), dtype=dtype, device=DEVICE)
    numbers = [*batch.tiles]
    device = grads[0].device
    assert tables.block_table((grads,), numbers, sides, device).aligned is aligned
    if not aligned:
        in_reverse = [x for start in range(len(numbers) - 4, -1, -4) for x in numbers[start : start + 4]]
        assert tables.block_table((grads[::-1],), in_reverse, sides, device).aligned is False


# ---- large tensors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_strides_of_more_than_2_31_are_supported(layout):
    """Rows or columns are so far apart that only a few pages of the memory are used."""
    distance = 2**31 + 24
    try:
        memory = torch.empty(distance + 16, dtype=BF16, device=DEVICE)
    except (RuntimeError, torch.OutOfMemoryError):
        pytest.skip("needs 4 GiB of address space on a CPU, or 4 GiB of GPU memory")
    batch = triton_batch(2, 9, grad=BF16, param=BF16, weight_rounding="stochastic")
    if layout == "columns":
        batch = replace(batch, rows=9, cols=2)
    strides = (distance, 1) if layout == "rows" else (1, distance)
    expected, t = batch.run(), batch.tensors()
    for name in ("grads", "params"):
        x = memory.as_strided(batch.sides, strides)
        values = getattr(t, name)[0]
        if name == "grads":
            x.copy_(values)
            t.grads = [x]
            batch.update(t)
        else:
            x.copy_(values)
            t.params = [x]
    batch.step(t, t.ok, True)
    assert same_bits(t.params[0], expected.params[0])
    assert_same(t, expected, *STATE, "buffers")


@pytest.mark.gpu
@needs_gpu
def test_batches_of_more_than_2_31_elements():
    """Compare the last of 2049 blocks of 1024 × 1024 with a batch that has only this block."""
    size, num_blocks = 1024, 2049
    alone = triton_batch(size, 8, dtype=BF16, grad=BF16).tensors()
    c = torch.zeros(num_blocks, size, size, dtype=BF16, device=DEVICE)
    k = torch.zeros(num_blocks, 8, 8, dtype=BF16, device=DEVICE)
    c[-1], k[-1] = alone.c[0], alone.k[0]
    expected = call("triton", "kron_products", alone.c, alone.k, BF16)
    for actual, wanted in zip(call("triton", "kron_products", c, k, BF16), expected, strict=True):
        assert same_bits(actual[-1], wanted[0]) and not actual[:-1].any()
    grads = list(c.unbind())
    grad, squares = call("triton", "kron_gather", grads, [0, 1, 0, 1] * num_blocks, size, size, [], None, BF16, False)
    assert same_bits(grad, c) and squares[0, -1].sum() > 0 and not squares[0, :-1].any()
