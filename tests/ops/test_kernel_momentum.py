"""Matrix steps in eager PyTorch with a kernel for the momentum of the factors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rootfree_kernels import IFShampoo
from rootfree_kernels.optim.report import step_reports
from rootfree_kernels.packing import pack, packed_shape, unpack
from rootfree_kernels.triton_kernels import EAGER_WITH_TRITON_MOMENTUM
from tests.calls.backends import noted_launches
from tests.calls.device import DEVICE, kernel_test, needs_gpu
from tests.calls.kron import STATE, Batch, assert_same
from tests.calls.operators import call, dispatched, through
from tests.calls.optimizers import OPTIONS, gradients
from tests.calls.tensors import BF16, FP32
from tests.calls.tolerances import assert_near, one_step, tolerance

pytestmark = kernel_test

NAME = EAGER_WITH_TRITON_MOMENTUM.name
TWO_BLOCKS = ((0, 1, 0, 2),)


def batch(**options: Any) -> Batch:
    return Batch(23, 18, TWO_BLOCKS, backend=NAME, device=DEVICE, **options)


@pytest.mark.parametrize("clip", ["frobenius", "row_sum", "none"])
@pytest.mark.parametrize("run", [through(NAME), dispatched(NAME)], ids=["function", "dispatcher"])
@pytest.mark.parametrize(("dtype", "matmul"), [(FP32, FP32), (BF16, FP32), (FP32, BF16)], ids=str)
def test_an_update_matches_the_reference(clip: str, run: Any, dtype: torch.dtype, matmul: torch.dtype) -> None:
    some = batch(clip=clip, dtype=dtype, matmul=matmul)
    t = some.tensors()
    expected = some.reference_update(t)
    with noted_launches() as launched:
        ok = some.update(t, run)
    assert [name for name in launched if name != "bmm"] == ["norms_kernel", "momentum_kernel"]
    assert ok.tolist() == [True, True]
    for side, name in (("c", "C"), ("k", "K")):
        allowed = one_step(dtype, products=matmul)
        assert_near(t.factor(side), [getattr(state, name) for state in expected], allowed)
        assert_near(
            getattr(t, f"m_{side}").double().cpu(), [getattr(state, f"m_{name}") for state in expected], allowed
        )


@pytest.mark.parametrize("found_inf", [None, 1.0])
def test_a_block_that_is_not_finite_keeps_its_factors(found_inf: float | None) -> None:
    some = batch(found_inf=found_inf)
    t = some.tensors()
    if found_inf is None:
        t.grads[0][3, 20] = torch.nan  # in the second block
    before = t.copies()
    ok = some.update(t)
    assert ok.tolist() == [found_inf is None, False]
    after = t.copies()
    for name in ("c", "k", "m_c", "m_k"):
        assert torch.equal(after[f"{name} 0"][1], before[f"{name} 0"][1])
        assert torch.equal(after[f"{name} 0"][0], before[f"{name} 0"][0]) is (found_inf is not None)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_packed_momenta_use_the_kernel(dtype: torch.dtype) -> None:
    """Momenta are unpacked for the kernel, so results are bitwise equal with and without packing."""
    some = replace(batch(dtype=dtype), rows=23, cols=18)
    whole, packed = some.tensors(), some.tensors()
    for side in ("c", "k"):
        m = getattr(packed, f"m_{side}")
        setattr(packed, f"m_{side}", m.new_empty(len(m), *packed_shape(m.shape[-1])))
        pack(m, out=getattr(packed, f"m_{side}"))
    some.update(whole)
    with noted_launches() as launched:
        some.update(packed)
    assert "momentum_kernel" in launched
    for side in ("c", "k"):
        assert torch.equal(getattr(packed, side), getattr(whole, side))
        assert torch.equal(unpack(getattr(packed, f"m_{side}")), getattr(whole, f"m_{side}"))


def test_other_operators_use_eager_pytorch() -> None:
    some = batch(keeps_products=False)
    ours, eager = some.tensors(), some.tensors()
    for backend, t in ((NAME, ours), ("eager", eager)):
        some.gather(t, through(backend))
        some.step(t, None, False, through(backend))
    assert_same(
        ours, eager, "params", "buffers", "skipped", *[name for name in STATE if getattr(eager, name) is not None]
    )
    products = [call(backend, "kron_products", eager.c, eager.k, FP32) for backend in (NAME, "eager")]
    assert all(map(torch.equal, *products))


@needs_gpu
@pytest.mark.parametrize("packed", [False, True])
def test_fp32_factors_use_the_kernel_on_a_gpu(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROOTFREE_BACKEND", raising=False)
    options = {**OPTIONS, "factor_dtype": FP32, "packed_momentum": packed}
    results = []
    for fused in (None, False):
        params = [torch.nn.Parameter(x.to(DEVICE)) for x in gradients([(24, 16), (9, 5), (6,)], -1, FP32)]
        optimizer = IFShampoo(params, **options, fused=fused)
        for step in range(3):
            for param, grad in zip(params, gradients([tuple(x.shape) for x in params], step, FP32), strict=True):
                param.grad = grad.to(DEVICE)
            optimizer.step()
        results.append((params, {batch.backend.name for batches in step_reports(optimizer) for batch in batches}))
    (ours, names), (eager, eager_names) = results
    assert NAME in names and eager_names == {"eager"}
    for x, y in zip(ours, eager, strict=True):
        assert (x - y).norm() <= tolerance("a chain", FP32) * y.norm()
