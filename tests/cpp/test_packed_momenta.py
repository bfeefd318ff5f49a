"""C++ updates of packed and of full m_C and m_K are bitwise equal, for any size and number of threads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.library import opcheck

from rootfree_kernels.packing import pack, packed_shape, unpack
from tests.calls.cpu import needs_cpp, threads
from tests.calls.kron import KEPT, PLACES
from tests.calls.operators import call, dispatched, operator
from tests.calls.tensors import BF16, FP32
from tests.cpp.calls import cpp_batch
from tests.cpp.kron_batches import BATCHES, SOME

pytestmark = needs_cpp


def with_packed_momenta(stem: str, *args: Any) -> Any:
    """Call an operator. Before `kron_factor`, pack m_C and m_K, and unpack them afterwards."""
    if stem != "kron_factor":
        return call("cpp", stem, *args)
    c, k, *momenta = args[:4]
    packed = [m.new_full((len(m), *packed_shape(m.shape[-1])), torch.nan) for m in momenta]
    for m, p in zip(momenta, packed, strict=True):
        pack(m, out=p)
    ok = call("cpp", stem, c, k, *packed, *args[4:])
    for m, p in zip(momenta, packed, strict=True):
        m.copy_(unpack(p))
    return ok


@SOME
@given(BATCHES, st.integers(1, 2), st.booleans())
@example(cpp_batch(257, 256, PLACES[1]), 2, False)
@example(cpp_batch(3, 389, dtype=BF16, matmul=BF16, rounding="stochastic", clip="row_sum"), 1, False)
@example(cpp_batch(64, 64, ((0, 9, 0, 9),)), 2, True)
def test_update_of_packed_momenta_is_bitwise_equal(batch, num_threads, skips):
    """This includes skipped blocks, whose momenta must not change."""
    expected, actual = batch.tensors(), batch.tensors()
    if skips:
        for t in (expected, actual):
            batch.blocks(t.grads)[-1][0, 0] = torch.nan
    with threads(num_threads):
        batch.run(expected)
        batch.run(actual, with_packed_momenta)
    assert actual.bytes(*KEPT, "ok", "skipped") == expected.bytes(*KEPT, "ok", "skipped")
    assert bool(expected.ok.all()) != skips


@pytest.mark.parametrize("shape", [(1, 5, 3), (1, 4, 3), (2, 5, 2)], ids=str)
def test_momenta_of_another_shape_are_an_error_before_anything_changes(shape):
    batch = cpp_batch(5, 4)
    t = batch.tensors()
    t.m_k = torch.zeros(shape)
    before = t.bytes("c", "k", "m_c", "m_k")
    with pytest.raises(ValueError, match=r"pass the factor's shape, or one packed"):
        batch.update(t)
    assert t.bytes("c", "k", "m_c", "m_k") == before


@pytest.mark.parametrize("backend", ["eager", "cpp"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_the_operator_with_packed_momenta_passes_opcheck(backend, dtype):
    def checked(stem: str, *args: Any) -> Any:
        if stem == "kron_factor":
            packed = [m.new_zeros((len(m), *packed_shape(m.shape[-1]))) for m in args[2:4]]
            arguments = (*args[:2], *packed, *args[4:])
            opcheck(operator(stem), (*arguments, backend))
        return dispatched(backend)(stem, *args)

    batch = replace(cpp_batch(5, 4, PLACES[2]), dtype=dtype, matmul=dtype, rounding="compensated")
    batch.run(run=checked)
