"""State, peak memory, launches and roofline of a step, against numbers by hand."""

from __future__ import annotations

import os
from collections import OrderedDict, deque
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from bench.common import roofline
from bench.common.launches import count_launches
from bench.common.memory import peak_bytes, state_bytes, storage_bytes, tensors_of
from bench.common.optimizers import ENTRIES, WHOLE
from bench.common.roofline import Roofline
from bench.common.workloads import Workload
from bench.compare.work import work_of
from rootfree_kernels import eager
from rootfree_kernels.eager import cpu_matmul_dtype as matmul_dtype

CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16
PRODUCT = matmul_dtype(BF16, CPU).itemsize
"""Bytes of an element of CCᵀ or KKᵀ of BF16 factors, which are FP32 on a CPU that multiplies BF16 slowly."""

# ---- bytes of the state --------------------------------------------------------------------------------------------

SIDE = 256
SQUARE = SIDE * SIDE
SMALL = 64
"""Bytes of counters, norms and scales, which do not depend on the size of the weight."""


def stepped(name, period=1, **changes):
    entry = ENTRIES[name]
    generator = torch.Generator().manual_seed(0)
    param = Parameter(torch.randn(SIDE, SIDE, generator=generator).to(entry.weights))
    param.grad = torch.randn(SIDE, SIDE, generator=generator).to(entry.weights)
    optimizer = entry.make([param], period, WHOLE, **changes)
    for _ in range(2):
        optimizer.step()
    return optimizer, param


BYTES_A_WEIGHT = {
    # factors C, K and their momenta m_C, m_K of 2 bytes each and the momentum of 4; from T = 2 on also CCᵀ and KKᵀ
    ("IFShampoo", 1): 4 * 2 + 4,
    ("IFShampoo", 2): 4 * 2 + 2 * PRODUCT + 4,
    ("IFShampoo, FP32 factors", 1): 4 * 4 + 4,
    ("IFShampoo, FP32 factors", 2): 6 * 4 + 4,
    ("IFShampoo, compensated", 1): 4 * 2 + 2 * 2 + 4,  # and the remainders of C and K
    ("IFShampoo, eager", 2): 4 * 2 + 2 * PRODUCT + 4,
    # C, K, half of m_C and of m_K, whose diagonals add 2 · 256 bytes, and a momentum of 2
    ("IFShampoo, least memory", 1): 2 * 2 + 2 + 2 + 2 * SIDE / SQUARE,
    ("IFShampoo, least memory", 2): 2 * 2 + 2 + 2 + 2 * SIDE / SQUARE,
    ("RFRMSProp", 1): 4 + 4,
    ("RFRMSProp, BF16 state", 1): 2 + 2,
    ("RFRMSProp, BF16 state, compensated", 1): 2 + 2 + 2,
    ("AdamW, fused", 1): 4 + 4,
    ("AdamW, fused, BF16 weights", 1): 2 + 2,
    ("RMSprop, foreach", 1): 4 + 4,
    ("SGD, fused", 1): 4,
    ("Muon of torch", 1): 4,
    ("IFShampoo, recipe", 1): 4 * 2 + 4,
}


@pytest.mark.parametrize(("name", "period"), BYTES_A_WEIGHT)
def test_the_state_of_a_square_weight_is_its_tensors(name, period):
    optimizer, param = stepped(name, period)
    expected = BYTES_A_WEIGHT[name, period] * SQUARE
    assert expected <= state_bytes(optimizer, [param]) <= expected + SMALL


def test_weights_and_gradients_are_not_state():
    optimizer, param = stepped("SGD, fused", momentum=0.0)
    assert state_bytes(optimizer, [param]) == 0
    optimizer.views = [param.detach()[3:], param.grad.view(-1)]
    assert state_bytes(optimizer, [param]) == 0
    assert state_bytes(optimizer, []) == 2 * 4 * SQUARE


@dataclass
class Slotted:
    __slots__ = ("inner",)
    inner: Tensor


def test_tensors_are_found_in_containers_attributes_and_slots_and_not_in_code():
    tensors = [torch.full((2,), float(number)) for number in range(10)]
    thing = SimpleNamespace(
        plain=tensors[0],
        nested=[{"a": (tensors[1],)}, OrderedDict(b={tensors[2]})],
        keys={tensors[3]: "a weight is often a key"},
        slots=Slotted(tensors[4]),
        queue=deque([frozenset([tensors[5]])]),
        module=torch.nn.ParameterList([Parameter(tensors[6])]),
        optimizer=torch.optim.SGD([tensors[7]]),
        twice=[tensors[0], tensors[8], tensors[8]],
    )
    thing.itself = thing
    thing.code = [torch, lambda: tensors[9], Tensor, torch.add, tensors[9].add_]
    assert sorted(x[0].item() for x in tensors_of(thing)) == [float(number) for number in range(9)]


def test_views_of_one_memory_count_once_and_all_of_it_counts():
    base = torch.zeros(10, 10)
    assert sum(storage_bytes([base[3:], base.t(), base.view(-1)[::7], base.detach()]).values()) == 400
    assert sum(storage_bytes([base, base.clone()]).values()) == 800


# ---- peak memory ---------------------------------------------------------------------------------------------------


def test_the_peak_is_the_most_that_was_allocated_at_once_without_earlier_tensors():
    before = torch.zeros(100_000)

    def run():
        first = torch.empty(1000)
        second = torch.empty(2000)
        del first
        third = torch.empty(500, dtype=torch.float64)
        return before[:10].clone(), second, third

    assert peak_bytes(run, CPU) == 8000 + 4000 + 40


def test_memory_that_is_freed_and_allocated_again_counts_once():
    def run():
        for _ in range(5):
            torch.empty(1000).fill_(1.0)

    assert peak_bytes(run, CPU) == 4000
    assert peak_bytes(lambda: None, CPU) == 0


def test_an_error_passes_and_the_standard_error_is_restored(capfd):
    def run():
        os.write(2, b"of the library")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        peak_bytes(run, CPU)
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"


# ---- launches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda x: x + x, 1),
        (lambda x: x.add_(x).mul_(0.5), 2),
        (lambda x: torch._foreach_add_([x, x, x], 1.0), 1),
        (lambda x: (x.view(-1), x.t(), x[1:], x[0].detach(), x.unsqueeze(0)), 0),
        (lambda x: x.t().contiguous(), 1),
    ],
    ids=["sum", "two in place", "a list at once", "views", "a copy of a view"],
)
def test_every_operator_counts_but_views(run, expected):
    x = torch.ones(4, 4)
    assert count_launches(lambda: run(x), CPU) == expected


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)  # with casts
def test_an_operator_of_this_package_counts_as_the_operators_that_it_calls(dtype):
    def arguments(dtype):
        return [torch.ones(2, 3, 3, dtype=dtype)], [torch.ones(2, 3, 3)], None, 0.5, "frobenius"

    inside = count_launches(lambda: eager.clipped_momentum(*arguments(dtype)), CPU)
    whole = count_launches(lambda: torch.ops.rootfree.clipped_momentum(*arguments(dtype), "eager"), CPU)
    assert whole == inside > 5


def test_batching_20_weights_takes_less_than_twice_the_launches_of_one():
    launches = []
    for count in (1, 20):
        params = [Parameter(torch.randn(4, 4)) for _ in range(count)]
        for param in params:
            param.grad = torch.randn(4, 4)
        optimizer = ENTRIES["IFShampoo, eager"].make(params, 1, WHOLE)
        optimizer.step()
        launches.append(count_launches(optimizer.step, CPU))
    assert launches[1] < 2 * launches[0]


# ---- roofline ------------------------------------------------------------------------------------------------------


def test_the_limit_is_the_longer_of_moving_and_multiplying_at_the_rate_of_the_dtype():
    roof = Roofline(bandwidth=1e9, fp32=1e10, bf16=1e11)
    work = roofline.Work(flops=1e6, bytes=5e4)
    assert roof.limit(work, FP32) == pytest.approx(100.0)
    assert roof.limit(work, BF16) == pytest.approx(50.0)


@pytest.mark.parametrize(
    ("name", "dtype"), [("IFShampoo", BF16), ("IFShampoo, eager", BF16), ("IFShampoo, FP32 factors", FP32)]
)
def test_an_update_takes_18_cubes_another_step_4_and_the_work_of_blocks_adds_up(name, dtype):
    n, entry, found = 96, ENTRIES[name], {}
    square, long = Workload("square", ((n, n),)), Workload("long", ((n, 4 * n), (n, n)))
    for kind, cubes in (("update", 18), ("other", 4)):
        found[kind], multiplied = work_of(entry, square, WHOLE, kind)
        assert (found[kind].flops, multiplied) == (cubes * n**3, dtype)
        assert work_of(entry, long, n, kind)[0].flops == 5 * cubes * n**3
    assert found["update"].bytes > found["other"].bytes > 12 * n * n


BYTES_OF_A_DIAGONAL_STEP = {
    "RFRMSProp": 28,  # weight, momentum and second moment read and written, gradient read
    "RFRMSProp, BF16 state": 20,
    "RFRMSProp, BF16 state, compensated": 24,  # also the remainder, read and written
    "RFRMSProp, BF16 weights and state": 14,
    "AdamW, fused": 28,
    "AdamW, fused, BF16 weights": 14,
    "RMSprop, foreach": 28,
    "SGD, fused": 20,
}


@pytest.mark.parametrize("name", BYTES_OF_A_DIAGONAL_STEP)
def test_a_diagonal_step_moves_each_number_once_each_way(name):
    work, _ = work_of(ENTRIES[name], Workload("pair", ((8, 10), (4, 5))), WHOLE, "update")
    assert (work.bytes, work.flops) == (100 * BYTES_OF_A_DIAGONAL_STEP[name], 0)


@pytest.mark.parametrize("name", ["Muon of torch", "SOAP", "sirfshampoo"])
def test_the_work_of_some_optimizers_is_not_known(name):
    assert work_of(ENTRIES[name], Workload("square", ((8, 8),)), WHOLE, "update") is None


def test_the_bandwidth_counts_both_ways_and_the_rate_is_that_of_the_faster_library():
    times = {"copy": 10.0, "torch.float32 mm": 4.0, "torch.float32 oneDNN": 2.0, "torch.bfloat16 mm": 1.0}

    def measure(calls):
        for variants in calls.values():
            variants[0]()
        return {name: SimpleNamespace(total=SimpleNamespace(median=times[name])) for name in calls}

    found = roofline.measure(SimpleNamespace(measure=measure), CPU, numbers=1000, side=10)
    best = 2.0 if "oneDNN" in roofline.products(4, FP32, CPU) else 4.0
    assert found.bandwidth == pytest.approx(8000 / 10e-6)
    assert [found.fp32, found.bf16] == pytest.approx([2000 / (best * 1e-6), 2000 / 1e-6])


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_all_libraries_multiply_matrices_of_the_size_and_dtype_asked_for(dtype):
    results = [call() for call in roofline.products(16, dtype, CPU).values()]
    assert {(tuple(x.shape), x.dtype) for x in results} == {((16, 16), dtype)}
