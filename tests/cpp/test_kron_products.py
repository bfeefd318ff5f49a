"""CCᵀ and KKᵀ in C++, and products with several threads."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.calls.cpu import needs_cpp, threads
from tests.calls.tensors import BF16, fp64, same_bits
from tests.calls.tolerances import assert_near, one_step
from tests.cpp.calls import cpp_batch
from tests.cpp.kron_batches import HALVED, MANY, steps_of_exact_batches

pytestmark = needs_cpp


KEEP_PRODUCTS = [batch for batch in (*HALVED[:2], *HALVED[3:]) if not batch.is_whitened]


@pytest.mark.parametrize("batch", [cpp_batch(70, 65), *KEEP_PRODUCTS, replace(MANY, dtype=BF16)], ids=str)
def test_recomputed_products_are_bitwise_equal_to_those_of_an_update(batch):
    """A resumed run recomputes products, so it continues bitwise."""
    batch = replace(batch, keeps_products=True)
    t = batch.tensors()
    batch.update(t)
    for actual, expected in zip(batch.make_products(t), (t.p_c, t.p_k), strict=True):
        assert same_bits(actual, expected)


# ---- threads ---------------------------------------------------------------------------------------------------------


def test_exact_products_do_not_depend_on_the_number_of_threads():
    runs = []
    for number in (1, 2, 3):
        with threads(number):
            runs.append(steps_of_exact_batches())
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("batch", [*HALVED, MANY], ids=str)
def test_result_is_close_for_any_number_of_threads(batch):
    runs = []
    for number in (1, 2):
        with threads(number):
            runs.append(batch.run())
    for name, value in runs[0].named().items():
        if name.split()[0] in ("m_c", "m_k", "p_c", "p_k", "buffers") or (name == "params 0" and not runs[0].residuals):
            assert_near(runs[1].named()[name], fp64(value), one_step(value.dtype, products=batch.matmul))
