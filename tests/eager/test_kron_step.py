"""`kron_step` in eager PyTorch: against the FP64 reference."""

from __future__ import annotations

import pytest

from tests.calls.operators import dispatched
from tests.calls.tensors import FP32, FP64, fp64
from tests.calls.tolerances import assert_near, one_step
from tests.eager.batches import wide_batch


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("dtype", [FP64, FP32], ids=str)
def test_a_preconditioned_step_is_the_reference_s(cached, decoupled, dtype):
    batch = wide_batch(3, 7, 5, dtype, descent={"decoupled": decoupled})
    t = batch.tensors()
    batch.gather(t)
    t.p_c, t.p_k = batch.make_products(t)
    weights, buffers = batch.reference_step(t)
    batch.step(t, None, cached, dispatched("eager"))
    assert_near(map(fp64, batch.blocks(t.params)), weights, one_step(products=dtype))
    assert_near(map(fp64, batch.blocks(t.buffers)), buffers, one_step(products=dtype))
