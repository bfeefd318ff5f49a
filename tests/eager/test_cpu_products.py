"""The dtype of products on a CPU is chosen by a measurement."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rootfree_kernels import IFShampoo
from rootfree_kernels.eager import cpu_products
from rootfree_kernels.optim.report import step_reports

CPU = torch.device("cpu")
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(("bf16", "chosen"), [(0.25, BF16), (0.8, BF16), (0.9, FP32), (1.0, FP32), (1.87, FP32)])
def test_bf16_is_chosen_if_it_is_clearly_faster(monkeypatch, bf16, chosen):
    monkeypatch.setattr(cpu_products, "probe", lambda: cpu_products.Probe(256, bf16, 1.0))
    assert cpu_products.cpu_matmul_dtype(BF16, CPU) == chosen
    assert [cpu_products.cpu_matmul_dtype(dtype, CPU) for dtype in (FP32, FP64)] == [FP32, FP64]
    weight = torch.nn.Parameter(torch.ones(3, 2))
    weight.grad = torch.ones(3, 2)
    optimizer = IFShampoo([weight], batch_size=1)
    optimizer.step()
    assert step_reports(optimizer)[0][0].matmul_dtype == chosen


def test_a_gpu_is_not_probed(monkeypatch):
    monkeypatch.setattr(cpu_products, "probe", lambda: pytest.fail("probed"))
    assert cpu_products.cpu_matmul_dtype(BF16, torch.device("cuda")) == BF16


def test_the_probe_runs_once():
    cpu_products.probe.cache_clear()
    first = cpu_products.probe()
    assert cpu_products.probe() is first


def test_probe_stops_early_if_bf16_is_very_slow(monkeypatch):
    sides = []

    def measured(side):
        sides.append(side)
        return cpu_products.Probe(side, 26.0, 1.0)

    monkeypatch.setattr(cpu_products, "_measured", measured)
    cpu_products.probe.cache_clear()
    assert cpu_products.probe().dtype == FP32
    assert sides == [128]
    cpu_products.probe.cache_clear()


def test_the_probe_measures_real_products_whatever_the_caller_does():
    cpu_products.probe.cache_clear()
    state = torch.get_rng_state()
    with FakeTensorMode(), torch.autocast("cpu", dtype=BF16):
        measured = cpu_products.probe()
    assert min(measured.bf16, measured.fp32) > 1e-6  # seconds; a product has at least 4 million multiplications
    assert torch.equal(torch.get_rng_state(), state)
    cpu_products.probe.cache_clear()
