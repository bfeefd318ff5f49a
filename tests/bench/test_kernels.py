"""What `make gpu` runs, without a GPU: formulas against hand counts, the timer against a simulated device, every
section at tiny sizes in Triton's interpreter, and what is written of it."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.common import record
from bench.common.gpt import (
    GPT2,
    Ceilings,
    Work,
    diagonal_bytes,
    least_step,
    least_update,
    momentum_bytes,
    row_sum_stages,
    step_stages,
    total,
    update_stages,
    whole_step,
)
from bench.common.report import Alternatives, Row, Target, cell, markdown, number
from bench.common.restarts import Progress
from bench.common.timing import HostClock, Timer, Timing, clock_of, num_inputs
from bench.gpu_run import machine as gpu_machine
from bench.kernels import __main__ as kernels
from bench.kernels import kron as gpu_factors
from bench.kernels import optimizers as gpu_optimizers
from bench.kernels import rf_rmsprop as gpu_diagonal
from bench.kernels import symmetric as gpu_symmetric
from bench.kernels.cases import TINY, Case, CheckFailed, Context, Sizes, check, poisoned_memory
from rootfree_kernels.eager import EAGER
from tests.calls.backends import stand_in
from tests.calls.device import DEVICE

FP32, BF16 = torch.float32, torch.bfloat16

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="`python -m bench.kernels` runs all of it on a GPU")


# ---- formulas ------------------------------------------------------------------------------------------------------


def test_gpt2_has_the_tensors_of_the_124m_model():
    model = GPT2()
    assert model.num_numbers() == 124_439_808
    assert len(model.shapes()) == 2 + 12 * 12 + 2
    blocks = {(768, 768): 48, (768, 1024): 36, (1024, 768): 36 + 1, (1008, 768): 49, (865, 768): 1}
    assert model.blocks() == blocks
    vectors = 12 * (2 + 3 + 1 + 2 + 4 + 1) * 768 + 2 * 768
    assert sum(p * d * count for (p, d), count in blocks.items()) + vectors == 124_439_808


def test_an_update_and_its_step_are_18_cubes_and_another_step_4():
    n = 7
    assert total(update_stages(n, n)).flops == 14 * n**3
    assert total(step_stages(n, n)).flops == 4 * n**3
    assert total(update_stages(n, n)).flops + total(step_stages(n, n)).flops == 18 * n**3


def test_operations_of_a_block_that_is_not_square():
    """As ../shared/kernels.md counts them: 5pd(p+d) + 4(p³+d³)."""
    p, d = 2, 3
    assert total(update_stages(p, d)).flops + total(step_stages(p, d)).flops == 5 * 6 * 5 + 4 * (8 + 27)


def test_bytes_of_a_block():
    p, d = 2, 3  # pd is 6, p² + d² is 13
    assert least_update(p, d).bytes == 4 * 6 + 13 * (4 * 2 + 2)  # C, K, m_C, m_K read and written, P_C and P_K written
    assert least_step(p, d).bytes == 6 * (4 + 8 + 8) + 13 * 2  # gradient, weight and buffer; P_C and P_K
    by_launch = {name: work.bytes for name, work in update_stages(p, d).items()}
    gather = 6 * (4 + 2) + 13 * 2
    first, second, symmetric = 2 * (4 + 6 + 6), 2 * (6 + 9 + 6), 2 * 6 + 13 * 6
    assert [*by_launch.values()] == [gather, first, second, symmetric, 13 * 8, 13 * 6]
    assert [work.bytes for work in step_stages(p, d).values()] == [6 * (4 + 2), first, 2 * (6 + 9) + 6 * 16]


def test_row_sums_are_written_and_read_once_more():
    """A block of 300 × 128 has three tiles a row of m_C and one of m_K, with 4 bytes each."""
    plain, row_sum = update_stages(300, 128), row_sum_stages(300, 128)
    sums = Work(0, 4 * (300 * 3 + 128))
    assert [*row_sum] == ["gather", "CᵀG", "·K", "momentum", "norms", "factor", "products"]
    assert row_sum.pop("norms") == sums
    assert row_sum == {**plain, "momentum": plain["momentum"] + sums}


def test_bytes_of_a_number():
    assert diagonal_bytes(FP32, FP32, FP32) == 28
    assert diagonal_bytes(BF16, BF16, FP32) == 22
    assert diagonal_bytes(BF16, BF16, BF16) == 14
    assert momentum_bytes(BF16) == 2 + 4 + 2 and momentum_bytes(BF16, passes=2) == 14


def test_the_limit_is_the_slower_of_copying_and_multiplying():
    ceilings = Ceilings(bandwidth=1e12, rate=1e14)
    assert ceilings.limit(Work(1e8, 2e6)) == pytest.approx(2.0)
    assert ceilings.limit(Work(3e8, 2e6)) == pytest.approx(3.0)
    context = Context(DEVICE, TINY, Timer(HostClock()), ceilings)
    assert context.fraction(Work(3e8, 2e6), Timing.of([4.0])) == pytest.approx(0.75)
    assert Context(DEVICE, TINY, Timer(HostClock())).fraction(Work(1, 1), Timing.of([4.0])) is None


def test_the_work_of_a_model_is_that_of_its_blocks_and_vectors():
    model = GPT2(depth=0, width=4, vocabulary=6, context=2)  # 6 × 4, 2 × 4, and two vectors of 4
    expected = total(step_stages(6, 4)) + total(step_stages(2, 4)) + Work(0, 28 * 8)
    assert whole_step(model, update=False) == expected
    gathers = step_stages(6, 4)["gather"] + step_stages(2, 4)["gather"]  # an update's serves the step
    updates = total(update_stages(6, 4)) + total(update_stages(2, 4))
    assert whole_step(model, update=True) + gathers == expected + updates


# ---- the timer -----------------------------------------------------------------------------------------------------


class SimulatedClock:
    """A host that queues work and a device that does it, in µs."""

    def __init__(self) -> None:
        self.now = self.done = 0.0  # of the host; when the device will have done all that is queued

    def work(self, host: float, device: float) -> None:
        """A call that takes the host some time and then queues work."""
        self.now += host
        self.lead(device)

    def lead(self, microseconds: float) -> None:
        self.done = max(self.done, self.now) + microseconds

    def mark(self) -> float:
        return max(self.done, self.now)

    def elapsed(self, start: float, end: float) -> float:
        return end - start

    def synchronize(self) -> None:
        self.now = max(self.now, self.done)

    def reached(self, mark: float) -> bool:
        return self.now >= mark


def test_a_gap_of_the_host_is_not_timed():
    """The host takes 500 µs to queue work of 30 µs: the device is held up until it is there."""
    clock = SimulatedClock()
    timer = Timer(clock, warmups=2, repeats=20)
    timing = timer.measure({"call": [partial(clock.work, 500.0, 30.0)]})["call"].total
    assert timing == pytest.approx((30.0, 30.0, 30.0, 20, True))


def test_a_gpu_is_timed_by_its_events(monkeypatch: pytest.MonkeyPatch):
    """With a simulated one, of 2000 cycles a microsecond."""
    clock = SimulatedClock()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock.mark()

        def query(self) -> bool:
            return clock.reached(self.at)

        def elapsed_time(self, other: Event) -> float:
            return (other.at - self.at) / 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: clock.lead(cycles / 2000))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: clock.synchronize())
    on_device = clock_of(torch.device("cuda"))
    assert on_device.cycles_per_microsecond == pytest.approx(2000)
    timing = Timer(on_device, repeats=20).measure({"call": [partial(clock.work, 500.0, 30.0)]})["call"].total
    assert timing == pytest.approx((30.0, 30.0, 30.0, 20, True))


def test_a_call_that_waits_for_the_device_is_timed_with_its_gaps_and_says_so():
    clock = SimulatedClock()

    def waits() -> None:
        clock.work(1.0, 30.0)
        clock.synchronize()
        clock.work(100.0, 30.0)

    timing = Timer(clock, repeats=5).measure({"call": [waits]})["call"].total
    assert not timing.queued and timing.median == pytest.approx(160.0)
    assert cell(timing).endswith("with gaps")


def test_a_sample_for_which_the_host_was_held_up_is_left_out():
    clock = SimulatedClock()
    hosts = iter([1.0] * 30 + [1e6] * 7 + [1.0] * 1000)  # one sample with all retries
    timing = Timer(clock, warmups=2, repeats=50).measure({"call": [lambda: clock.work(next(hosts), 30.0)]})
    assert timing["call"].total.queued and timing["call"].total[:3] == pytest.approx((30.0,) * 3)
    assert timing["call"].total.samples == 49


def test_variants_and_their_inputs_take_turns():
    calls: list[str] = []
    variants = {name: [partial(calls.append, f"{name}{index}") for index in range(2)] for name in "ab"}
    Timer(SimulatedClock(), warmups=1, repeats=4).measure(variants)
    assert calls[-8:] == ["a0", "b0", "a1", "b1"] * 2


def test_fewer_repeats_where_time_is_short():
    clock = HostClock()
    calls: list[int] = []
    Timer(clock, warmups=1, repeats=1000, min_repeats=3, seconds=0.0).measure({"call": [partial(calls.append, 0)]})
    assert len(calls) == 1 + 3


def test_quantiles():
    assert Timing.of(range(100, -1, -1)) == (50, 10, 90, 101, True)


def test_inputs_are_enough_to_leave_the_cache(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=50e6))
    assert [num_inputs(size, torch.device("cuda")) for size in (1e3, 50e6, 150e6, 1e9)] == [8, 3, 1, 1]


def test_host_time_excludes_what_comes_before():
    calls: list[str] = []
    timer = Timer(HostClock(), warmups=2, repeats=3)
    timing = timer.host(partial(calls.append, "call"), partial(calls.append, "before"))
    assert timing.samples == 3 and calls == ["before", "call"] * 5


# ---- checks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [1.01, torch.nan])
def test_a_wrong_result_is_an_error(wrong: float):
    expected = [torch.ones(3, dtype=torch.float64), torch.full((2,), 2.0, dtype=torch.float64)]
    assert check("x", [x.float() for x in expected], expected) == 0
    with pytest.raises(CheckFailed, match=r"x: relative error .* against FP64, 3e-05 allowed"):
        check("x", [expected[0].float(), expected[1].float() * wrong], expected)


def test_memory_is_poisoned_within_and_only_within():
    before = torch.empty
    x = torch.ones(2, 2)
    with poisoned_memory():
        made = [torch.empty(3), torch.empty_like(x), x.new_empty(2), torch.empty_strided((2,), (1,))]
        assert all(y.isnan().all() for y in made)
        assert (torch.empty(3, dtype=torch.int16) == -(2**15)).all() and torch.empty(3, dtype=torch.bool).numel() == 3
    assert torch.empty is before and "new_empty" not in vars(torch.Tensor)


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    def slightly_wrong(c: torch.Tensor, k: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        return tuple((x @ x.mT * 1.1).to(dtype) for x in (c, k))

    timer = SimpleNamespace(measure=lambda *args: pytest.fail("it was timed"))
    context = Context(DEVICE, TINY, timer)
    stand_in(monkeypatch, context.backend.name, kron_products=slightly_wrong)
    (row,) = kernels.run(gpu_symmetric.symmetric_cases(context)[0], context)
    assert row.error.startswith("CheckFailed: products: relative error") and not row.cells


# ---- the sections, at tiny sizes -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def context() -> Iterator[Context]:
    """One thread: starting others takes longer than what is measured here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    timer = Timer(HostClock(), warmups=1, repeats=1, min_repeats=1, seconds=0.0)
    made = Context(DEVICE, TINY, timer)
    kernels.ceiling_rows("at the start", made)
    yield made
    torch.set_num_threads(threads)


def rows_of(cases: list[Case], context: Context) -> list[Row]:
    """The rows of cases, none of which may fail."""
    rows = [row for case in cases for row in kernels.run(case, context)]
    assert not [row.error for row in rows if row.error]
    return rows


def columns(rows: list[Row], table: str) -> dict[str, set[str]]:
    return {row.case: set(row.cells) for row in rows if row.table == table}


def assert_alternatives(row: Row, columns: dict[str, str], operation: str, **sizes: int) -> None:
    """The alternatives of a row are those choices, by the columns that show their times."""
    assert row.alternatives.operation == operation
    assert row.alternatives.times == {choice: row.cells[column] for choice, column in columns.items()}
    assert not sizes or row.alternatives.sizes == sizes


def test_ceilings_are_the_first_ones_measured(context: Context):
    before = context.ceilings
    assert before and before.bandwidth > 0 and before.rate > 0
    (row,) = kernels.ceiling_rows("at the end", context)
    assert context.ceilings is before
    assert row.cells["copy, TB/s read and written"] == pytest.approx(8 * 100 / row.cells["copy µs"].median * 1e-6)
    assert row.cells["BF16 32³, TFLOP/s"] == pytest.approx(2 * 32**3 / row.cells["product µs"].median * 1e-6)


def test_diagonal_steps(context: Context):
    context = Context(DEVICE, TINY, context.timer, context.ceilings)
    rows = rows_of(gpu_diagonal.diagonal_cases(context), context)
    assert len(rows) == 4 * (3 + 3)  # lists × (precisions and peers)
    by_case = {row.case: row for row in rows}
    compiled = context.other_backend().name if context.other_backend() else None
    mixed, all_bf16 = gpu_diagonal.MIXED, gpu_diagonal.BF16
    names = ("1 GB", "GPT-2 124M", "10 tensors of 10", "GPT-2 124M's vectors")
    for name, of_copy in zip(names, (0.92, 0.85, None, None), strict=True):
        fp32 = by_case[f"{name}, FP32"]
        of_copy_target = {"of copy": Target("≥", of_copy)} if of_copy else {}
        assert fp32.targets == {**of_copy_target, "AdamW / ours": Target("≥", 1.0)}
        assert (f"{compiled} / ours" in fp32.cells) is (compiled is not None)
        if compiled:
            assert_alternatives(fp32, {"triton": "µs", compiled: f"{compiled} µs"}, "diagonal")
        narrow = [by_case[f"{name}, {precision.name}"] for precision in (mixed, all_bf16)]
        bounds = (1.27, 2.0) if of_copy else (1.0, 1.0)
        assert [row.targets["AdamW / ours"] for row in narrow] == [Target("≥", bound) for bound in bounds]
        assert narrow[1].targets["AdamW in BF16 / ours"] == Target("≥", 1.0) and len(narrow[0].targets) == 1
        assert [row.cells["bytes a number"] for row in (fp32, *narrow)] == [28, 22, 14]
        ours, theirs = (by_case[f"{name}, {x}"].cells["µs"].median for x in ("FP32", "AdamW of PyTorch"))
        assert fp32.cells["AdamW / ours"] == pytest.approx(theirs / ours)
    numbers = TINY.numbers // gpu_diagonal.NUM_LARGE * gpu_diagonal.NUM_LARGE
    assert by_case["1 GB, FP32"].cells["GB"] == pytest.approx(28e-9 * numbers)
    if compiled:
        sizes = by_case["1 GB, FP32"].alternatives.sizes
        assert sizes == {"numbers": numbers, "tensors": gpu_diagonal.NUM_LARGE}


def test_no_target_asks_for_more_than_bytes_and_operations_allow():
    for precision in gpu_diagonal.PRECISIONS:
        target = gpu_diagonal.diagonal_targets(precision, 0.92)["AdamW / ours"]
        assert target.bound <= 28 / precision.bytes + 0.005
    for n, target in gpu_symmetric.TARGETS.items():
        tiles = n // 128
        assert target <= 0.8 * tiles**2 / (tiles * (tiles + 1) / 2)
    assert [gpu_symmetric.TARGETS[n] for n in (1024, 2048, 4096)] == [1.15, 1.3, 1.5]
    for bandwidth, rate in ((2.9e12, 7e14), (4.2e12, 7e14)):  # about those of an H100 and of an H200
        for count, p, d in Sizes().blocks:
            stages, ceilings = update_stages(p, d), Ceilings(bandwidth, rate)
            possible = ceilings.limit(total(stages)) / sum(map(ceilings.limit, stages.values()))
            assert possible >= (0.8 if p < 4096 else 0.9), (count, p, d)  # targets are 0.6 and 0.7


def test_a_peer_that_cannot_run_is_recorded_and_the_others_are_measured(
    context: Context, monkeypatch: pytest.MonkeyPatch
):
    def no_fused(*args: Any, **options: Any) -> None:
        raise RuntimeError("no fused kernels")

    monkeypatch.setattr(torch.optim, "AdamW", no_fused)
    context = Context(DEVICE, TINY, context.timer, context.ceilings, EAGER)
    rows = kernels.run(gpu_diagonal.diagonal_cases(context)[1], context)
    assert [row.case for row in rows if row.error] == ["GPT-2 124M, AdamW", "GPT-2 124M, AdamW BF16"]
    assert "RMSprop / ours" in columns(rows, gpu_diagonal.DIAGONAL)["GPT-2 124M, FP32"]


def test_clipped_momentum(context: Context):
    context = Context(DEVICE, TINY, context.timer, context.ceilings)
    rows = rows_of(gpu_diagonal.momentum_cases(context), context)
    assert len(rows) == 2 and all({"µs", "of copy", "eager / ours"} <= set(row.cells) for row in rows)
    if other := context.other_backend():
        assert all(f"{other.name} / ours" in row.cells for row in rows)


def test_symmetric_products(context: Context):
    rows = rows_of(gpu_symmetric.symmetric_cases(context), context)
    assert [row.case for row in rows] == [f"{name}, L = 1, n = 16" for name in ("P", "P, X copied", "m")]
    assert all({"µs", "bmm / ours", "of limit"} <= set(row.cells) for row in rows)
    flops = 2 * 16**3  # of two symmetric products
    assert rows[0].cells["TFLOP/s"] == pytest.approx(flops / rows[0].cells["µs"].median * 1e-6)
    assert_alternatives(rows[1], {"triton": "µs", "bmm": "bmm µs"}, "symmetric", side=16, blocks=1)


@pytest.mark.parametrize("wrong", ["products", "factors"])
def test_products_that_are_wrong_are_no_alternative(wrong: str, context: Context, monkeypatch: pytest.MonkeyPatch):
    def by_bmm(c: torch.Tensor, k: torch.Tensor, product_c: torch.Tensor, product_k: torch.Tensor, kept: Any) -> None:
        for x, product, old in zip((c, k), (product_c, product_k), kept, strict=True):
            torch.bmm(x, x if wrong == "products" else x.mT, out=product)
            old.copy_(x if wrong == "products" else -x)

    monkeypatch.setattr("rootfree_kernels.triton_kernels.products.products_by_bmm", by_bmm)
    with pytest.raises(CheckFailed, match=r"products by bmm|factors were not kept by bmm"):
        gpu_symmetric._kept_row(1, 16, context)


def test_updates_and_steps_show_every_launch(context: Context):
    """A launch that has no name here would have no limit in the record."""
    rows = rows_of(gpu_factors.block_cases(context), context)
    tables = (gpu_factors.UPDATE, gpu_factors.STEP)
    update, step, together, row_sum = (row for row in rows if row.table in tables)
    assert together.case == "1 × 16×24, T = 1"
    assert row_sum.case == "1 × 16×24, row sums" and row_sum.alternatives is None
    for row in (update, step, together):
        assert_alternatives(row, {"triton": "µs", "eager": "eager µs"}, "matrices", side=24, blocks=1)
    assert all({"of roofline", "of least bytes", "eager / ours"} <= set(row.cells) for row in (update, step, row_sum))
    launches = columns(rows, gpu_factors.LAUNCHES)
    expected = [f"1 × 16×24 update: {name}" for name in update_stages(1, 1)]
    expected += [f"1 × 16×24 step: {name}" for name in step_stages(1, 1)]
    expected += [f"1 × 16×24, row sums update: {name}" for name in row_sum_stages(1, 1)]
    assert [*launches] == expected
    assert all({"of limit", "µs above limit"} <= cells for cells in launches.values())


def test_large_updates_have_another_target_and_small_ones_none(context: Context, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_factors, "check_update", lambda *args: None)
    monkeypatch.setattr(gpu_factors, "_block_rows", lambda *args: [args[5]])
    targets = [gpu_factors.update_rows(1, n, n, context) for n in (512, 1024, 4096)]
    assert targets == [[None], [Target("≥", 0.6)], [Target("≥", 0.7)]]


def test_whole_steps(context: Context):
    rows = rows_of(gpu_optimizers.optimizer_cases(context, [])[:-1], context)
    host = {row.case: row for row in rows if row.table == gpu_optimizers.HOST}
    assert [*host] == [*gpu_optimizers.OURS, *gpu_optimizers.PEERS]
    assert [name for name, row in host.items() if row.targets] == [*gpu_optimizers.OURS]
    device = columns(rows, gpu_optimizers.DEVICE)
    assert all({"of roofline", "eager / ours", "ours / fused AdamW"} <= device[name] for name in gpu_optimizers.OURS)
    assert device["IFShampoo T=10, one update and nine other steps"] == {"mean µs"}


def test_gradients_move_to_addresses_of_their_own():
    model = gpu_optimizers.Model(GPT2(1, 8, 50, 4), DEVICE)
    addresses = []
    for _ in range(20):
        addresses.append([param.grad.data_ptr() for param in model.params])
        model.move_gradients()
    ends = sorted((x.grad.data_ptr(), x.grad.data_ptr() + 4 * x.numel()) for x in model.params)
    assert len({param.grad.data_ptr() % 256 for param in model.params}) == 1  # aligned alike
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    assert all(len(set(of_one)) == 20 for of_one in zip(*addresses, strict=True))


def test_a_replayed_graph_is_compared_with_plain_steps(context: Context, monkeypatch: pytest.MonkeyPatch):
    """With a graph that calls the step."""

    def captured(step: Callable[[], Any], warmups: int, replays: int = 1) -> Any:
        for _ in range(warmups):
            step()
        return SimpleNamespace(replay=lambda: [step() for _ in range(replays)])

    make = gpu_optimizers.OURS["RFRMSProp"]
    monkeypatch.setattr(gpu_optimizers, "captured", captured)
    assert gpu_optimizers.graph_cases(context) == []
    on_gpu = gpu_optimizers.graph_cases(Context(torch.device("cuda"), TINY, context.timer))
    assert [case.name for case in on_gpu] == ["IFShampoo T=1", "RFRMSProp"]
    (row,) = gpu_optimizers.graph_rows("RFRMSProp", make, context)
    assert {"replayed, device µs", "plain, device µs", "replay, host µs"} == set(row.cells)
    monkeypatch.setattr(gpu_optimizers, "captured", partial(captured, replays=2))
    with pytest.raises(CheckFailed, match="a replay is not the step"):
        gpu_optimizers.graph_rows("RFRMSProp", make, context)


def test_first_steps_are_timed_in_processes_with_an_empty_and_a_warm_cache(
    context: Context, monkeypatch: pytest.MonkeyPatch
):
    runs = []

    def run(command: list[str], env: dict[str, str], **options: Any) -> Any:
        runs.append((command, env["TRITON_CACHE_DIR"]))
        steps = gpu_optimizers.first_steps(context)
        return SimpleNamespace(returncode=len(runs) > 2, stdout=f"loading\n{json.dumps(steps)}\n", stderr="a\nb\n")

    monkeypatch.setattr(subprocess, "run", run)
    rows = gpu_optimizers.first_rows(["--tiny"])
    assert [row.case for row in rows[::3]] == ["IFShampoo T=1, cache empty", "IFShampoo T=1, cache warm"]
    assert all(row.cells["first step, s"] > 0 for row in rows)
    assert runs[0] == runs[1] and runs[0][0][-2:] == ["--first-step", "--tiny"]
    with pytest.raises(RuntimeError, match=r"^b$"):
        gpu_optimizers.first_rows(["--tiny"])


# ---- the run -------------------------------------------------------------------------------------------------------


def failing() -> list[Row]:
    raise ValueError("a\nmessage")


def good() -> list[Row]:
    return [Row("t", "good", {"x": 1.0})]


@pytest.fixture
def progress(tmp_path: Path) -> Progress:
    return Progress(tmp_path / "progress", until=time.time() + 60)


def test_an_error_is_recorded_and_stops_nothing(context: Context, progress: Progress):
    saved: list[int] = []
    cases = [Case("t", "bad", failing), Case("t", "good", good)]
    rows = kernels.run_all(cases, context, progress, lambda rows: saved.append(len(rows)))
    assert [(row.case, row.error) for row in rows] == [("bad", "ValueError: a\nmessage"), ("good", "")]
    assert saved == [1, 2, 2] and progress.done == ["t, bad", "t, good"]


def test_what_does_not_fit_into_the_time_is_left_out_and_recorded(context: Context, progress: Progress):
    progress.until = 0.0
    saved: list[int] = []
    rows = kernels.run_all([Case("t", "late", failing)], context, progress, lambda rows: saved.append(len(rows)))
    assert [row.error for row in rows] == ["left out: the run's time was over"] and saved == [1, 1]


def test_after_an_error_that_spoils_the_device_another_process_goes_on(
    context: Context, progress: Progress, monkeypatch: pytest.MonkeyPatch
):
    """It has the rows and the ceilings of the first one, repeats nothing, and blames the case that broke it."""
    cases = [Case("t", "good", good), Case("t", "bad", failing), Case("t", "hung", failing), Case("t", "last", good)]
    monkeypatch.setattr(kernels, "is_spoiled", lambda device: True)
    ceilings = context.ceilings
    assert kernels.run_all(cases, context, progress, lambda rows: None) is None
    again = Progress.load(progress.path)
    again.begin("t, hung")
    again.blame("it hung")
    context.ceilings = None
    rows = kernels.run_all(cases, context, Progress.load(progress.path), lambda rows: None)
    assert context.ceilings == ceilings
    found = [(row.case, row.error) for row in rows]
    assert found == [("good", ""), ("bad", "ValueError: a\nmessage"), ("hung", "it hung"), ("good", "")]


def test_a_run_writes_its_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--device", "cpu", "--tiny", "--only", "RMSprop", "--out", str(tmp_path)]
    assert kernels.main(arguments) == 0
    table, found = sorted(tmp_path.iterdir(), key=lambda path: path.suffix, reverse=True)
    assert found.suffix == ".json" and table.suffix == ".md" and found.stem.endswith("-tiny-part")
    written = json.loads(found.read_text(encoding="utf-8"))
    assert {"device", "driver", "torch", "triton", "python", "commit", "date"} <= set(written)
    assert written["command"].startswith("python -m bench.kernels --device cpu --tiny --only RMSprop")
    assert [row["case"] for row in written["rows"]] == ["at the start", "RMSprop, foreach"]
    assert set(written["rows"][0]["values"]["copy µs"]) == {"median", "p10", "p90", "samples", "queued"}
    assert f"| commit | {written['commit']} |" in table.read_text(encoding="utf-8")
    assert str(table) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("device", "interpret", "message"),
    [
        ("cuda", "", "bench.kernels needs a GPU that PyTorch can use; torch"),
        ("cpu", "", "set TRITON_INTERPRET=1"),
    ],
)
def test_a_machine_without_a_gpu_is_told_so(
    device: str, interpret: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    assert kernels.main(["--device", device]) == 1
    assert message in capsys.readouterr().out


def test_kernels_are_not_measured_in_the_interpreter(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "unset it" in kernels.why_not(kernels.parse_arguments([]))


def test_every_table_of_a_run_has_a_note(context: Context):
    assert {case.table for case in kernels.cases(context, [])} <= set(kernels.NOTES)


# ---- the record ----------------------------------------------------------------------------------------------------

ROWS = [
    Row("T", "good", {"µs": Timing(12.34, 10.0, 15.0, 50), "ratio": 1.2}, {"ratio": Target("≥", 1.15)}),
    Row("T", "slow", {"µs": Timing(600.0, 590.0, 700.0, 50, False), "ratio": None}, {"µs": Target("≤", 500.0)}),
    Row("T", "a|b", {"kind": "x|y"}, note="remark"),
    Row("U", "broken", error="ValueError: a\nmessage"),
]


def test_markdown_shows_values_targets_and_errors():
    text = markdown({"device": "GPU", "commit": "abc"}, ROWS, {"T": "What T is."})
    lines = text.splitlines()
    assert lines[0] == "# Kernels on GPU" and "| commit | abc |" in lines and "| driver | unknown |" in lines
    assert "1 of 2 met; 1 cases were not measured." in lines
    assert "| T | slow | µs | 600 (590–700) with gaps | ≤ 500 | **missed** |" in lines
    assert "What T is." in lines and "| case | µs | ratio | kind |" in lines
    assert "| good | 12.3 (10.0–15.0) | 1.20 (≥ 1.15: met) |  |" in lines
    assert "| slow | **600 (590–700) with gaps (≤ 500: missed)** | – |  |" in lines
    assert r"| a\|b |  |  | x\|y |" in lines and "- a|b: remark" in lines
    assert "- **broken: not measured.** ValueError: a message" in lines


def test_json_holds_all_of_a_row():
    alternatives = Alternatives("diagonal", {"numbers": 5, "tensors": 1}, {"cuda": Timing(2.0, 1.0, 3.0, 9)})
    assert Row("T", "case", alternatives=alternatives).as_json()["alternatives"] == {
        "operation": "diagonal",
        "sizes": {"numbers": 5, "tensors": 1},
        "times": {"cuda": {"median": 2.0, "p10": 1.0, "p90": 3.0, "samples": 9, "queued": True}},
    }
    assert ROWS[0].as_json() == {
        "table": "T",
        "case": "good",
        "values": {"µs": {"median": 12.34, "p10": 10.0, "p90": 15.0, "samples": 50, "queued": True}, "ratio": 1.2},
        "targets": {"ratio": {"bound": "≥ 1.15", "met": True}},
    }
    assert ROWS[3].as_json()["error"] == "ValueError: a\nmessage"


@pytest.mark.parametrize("value", [None, torch.nan, "text"])
def test_a_target_of_what_was_not_measured_is_missed(value: Any):
    assert not Target("≥", 0.0).is_met(value) and not Target("≤", 1e9).is_met(value)


def test_numbers_have_three_digits():
    values = {0.0: "0", 0.9249: "0.925", 12.345: "12.3", 1.0: "1.00", 1234567.8: "1,234,568", 0.00123: "1.2e-03"}
    assert [number(value) for value in values] == [*values.values()]
    assert number(torch.nan) == "–"


def test_the_commit_of_a_copy_without_git_is_what_it_was_told(monkeypatch: pytest.MonkeyPatch):
    def no_git(*args: Any, **options: Any) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(record.subprocess, "run", no_git)
    monkeypatch.delenv("ROOTFREE_COMMIT", raising=False)
    assert record.commit() == "unknown"
    monkeypatch.setenv("ROOTFREE_COMMIT", "abc1234")
    assert record.commit() == "abc1234"
    assert record.nvidia_smi("driver_version") == ""
    assert record.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_a_record_says_which_gpu_and_driver(monkeypatch: pytest.MonkeyPatch):
    properties = SimpleNamespace(multi_processor_count=132, total_memory=80 << 30, L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(record, "nvidia_smi", lambda fields: "580.1" if fields == "driver_version" else "1980 MHz")
    found = record.gpu(torch.device("cuda"))
    assert (found["device"], found["driver"], found["multiprocessors"]) == ("NVIDIA H100", "580.1", 132)
    assert found["nvidia_smi"] == "1980 MHz" and found["triton"] != "not installed"


# ---- the machine ---------------------------------------------------------------------------------------------------


def test_tests_of_a_missing_package_are_left_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_machine, "missing", lambda names: [name for name in names if name == "rich"])
    assert gpu_machine.ignored() == [Path("tests/bench/test_demo.py")]
    monkeypatch.setattr(gpu_machine, "missing", lambda names: [])
    assert gpu_machine.ignored() == []


def test_a_machine_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch):
    assert "sees no GPU here" in gpu_machine.problem()
    monkeypatch.setattr(gpu_machine, "missing", lambda names: ["triton"])
    assert "has no triton: choose another one" in gpu_machine.problem()


def test_a_tree_that_is_installed_in_place_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_machine, "triton_folder", lambda: str(gpu_machine.ROOT / "triton_kernels"))
    assert gpu_machine.install() is None
    monkeypatch.setattr(gpu_machine, "triton_folder", lambda: "")
    monkeypatch.setattr(gpu_machine, "version", lambda name: "65.5.0")
    assert gpu_machine.install() == "setuptools 65.5.0 cannot install this tree: it needs 77 or later."
