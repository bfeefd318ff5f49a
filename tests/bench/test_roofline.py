"""The formulas of work: operations and bytes against counts by hand."""

from __future__ import annotations

import pytest
import torch

from bench.common.gpt import GPT2
from bench.common.roofline import (
    Roofline,
    Work,
    diagonal_bytes,
    least_step_bytes,
    least_update_bytes,
    momentum_bytes,
    recipe_step_stages,
    recipe_update_stages,
    row_sum_stages,
    scaled_bytes,
    step_stages,
    total,
    update_stages,
    whole_step,
)
from bench.common.timing import HostClock, Timer, Timing
from bench.kernels import rf_rmsprop, symmetric
from bench.kernels.cases import TINY, Context, Sizes

FP32, BF16 = torch.float32, torch.bfloat16


def test_gpt2_has_the_tensors_of_the_124m_model() -> None:
    model = GPT2()
    assert model.num_numbers() == 124_439_808
    assert len(model.shapes()) == 2 + 12 * 12 + 2
    blocks = {(768, 768): 48, (768, 1024): 36, (1024, 768): 36 + 1, (1008, 768): 49, (865, 768): 1}
    assert model.blocks() == blocks
    vectors = 12 * (2 + 3 + 1 + 2 + 4 + 1) * 768 + 2 * 768
    assert sum(p * d * count for (p, d), count in blocks.items()) + vectors == 124_439_808


@pytest.mark.parametrize(
    ("stages", "cubes"),
    [(update_stages, 14), (row_sum_stages, 14), (step_stages, 4), (recipe_update_stages, 10), (recipe_step_stages, 4)],
)
def test_operations_of_a_square_block(stages, cubes: int) -> None:
    assert total(stages(7, 7)).flops == cubes * 7**3


def test_operations_of_a_block_that_is_not_square() -> None:
    """An update and a step take 5pd(p+d) + 4(p³+d³)."""
    p, d = 2, 3
    assert total(update_stages(p, d)).flops + total(step_stages(p, d)).flops == 5 * 6 * 5 + 4 * (8 + 27)


def test_bytes_of_a_block() -> None:
    p, d = 2, 3  # pd is 6, p² + d² is 13
    assert least_update_bytes(p, d) == 4 * 6 + 13 * (4 * 2 + 2)  # C, K, m_C, m_K read and written; P_C and P_K written
    assert least_update_bytes(p, d, with_products=False) == 4 * 6 + 13 * 4 * 2
    assert least_step_bytes(p, d) == 6 * (4 + 8 + 8) + 13 * 2  # gradient, weight and buffer; P_C and P_K
    gather = 6 * (4 + 2) + 13 * 2
    first, second, momentum = 2 * (4 + 6 + 6), 2 * (6 + 9 + 6), 2 * 6 + 13 * 6
    by_launch = [work.bytes for work in update_stages(p, d).values()]
    assert by_launch == [gather, first, second, momentum, 13 * 8, 13 * 6]
    assert [work.bytes for work in step_stages(p, d).values()] == [6 * (4 + 2), first, 2 * (6 + 9) + 6 * 16]
    sums = 4 * (2 + 3)
    by_launch = [work.bytes for work in recipe_update_stages(p, d).values()]
    assert by_launch == [6 * 6, 2 * 5, first, second, momentum + sums, sums, 13 * 8, 13 * 4]
    by_launch = [work.bytes for work in recipe_step_stages(p, d).values()]
    assert by_launch == [6 * 6, 6 * (4 + 8), first, second, 6 * 2, 6 * (2 + 8)]


def test_row_sums_are_written_and_read_once_more() -> None:
    """A block of 300 × 128 has three tiles a row of m_C and one of m_K, with 4 bytes each."""
    plain, row_sum = update_stages(300, 128), row_sum_stages(300, 128)
    sums = Work(0, 4 * (300 * 3 + 128))
    assert [*row_sum] == ["gather", "CᵀG", "·K", "momentum", "norms", "factor", "products"]
    assert row_sum.pop("norms") == sums
    assert row_sum == {**plain, "momentum": plain["momentum"] + sums}


def test_bytes_of_a_number() -> None:
    dtypes = ((FP32, FP32, FP32), (BF16, BF16, FP32), (BF16, BF16, BF16))
    assert [diagonal_bytes(*x) for x in dtypes] == [28, 22, 14]
    assert [scaled_bytes(*x) for x in dtypes] == [44, 34, 22]
    assert momentum_bytes(BF16) == 2 + 4 + 2 and momentum_bytes(BF16, passes=2) == 14


def test_the_limit_is_the_slower_of_copying_and_multiplying() -> None:
    roofline = Roofline(bandwidth=1e12, bf16=1e14)
    assert roofline.limit(Work(1e8, 2e6)) == pytest.approx(2.0)
    assert roofline.limit(Work(3e8, 2e6)) == pytest.approx(3.0)
    assert roofline.limit(Work(0, 2e6), FP32) == pytest.approx(2.0)  # the rate was not measured, and is not needed
    context = Context(torch.device("cpu"), TINY, Timer(HostClock()), roofline)
    assert context.fraction(Work(3e8, 2e6), Timing.of([4.0])) == pytest.approx(0.75)
    context.roofline = None
    assert context.fraction(Work(1, 1), Timing.of([4.0])) is None


def test_the_work_of_a_model_is_that_of_its_blocks_and_vectors() -> None:
    model = GPT2(depth=0, width=4, vocabulary=6, context=2)  # 6 × 4, 2 × 4, and two vectors of 4
    expected = total(step_stages(6, 4)) + total(step_stages(2, 4)) + Work(0, 28 * 8)
    assert whole_step(model, update=False) == expected
    gathers = step_stages(6, 4)["gather"] + step_stages(2, 4)["gather"]  # the gather of an update serves the step
    updates = total(update_stages(6, 4)) + total(update_stages(2, 4))
    assert whole_step(model, update=True) + gathers == expected + updates


def test_no_target_asks_for_more_than_bytes_and_operations_allow() -> None:
    for precision in rf_rmsprop.PRECISIONS:
        target = rf_rmsprop.diagonal_targets(precision, 0.92)["AdamW / ours"]
        assert target.bound <= 28 / precision.bytes + 0.005
    for n, target in symmetric.TARGETS.items():
        tiles = n // 128
        assert target <= 0.8 * tiles**2 / (tiles * (tiles + 1) / 2)
    assert [symmetric.TARGETS[n] for n in (1024, 2048, 4096)] == [1.15, 1.3, 1.5]
    for bandwidth in (2.9e12, 4.2e12):  # about those of an H100 and of an H200
        for count, p, d in Sizes().blocks:
            stages, roofline = update_stages(p, d), Roofline(bandwidth, bf16=7e14)
            possible = roofline.limit(total(stages)) / sum(map(roofline.limit, stages.values()))
            assert possible >= (0.8 if p < 4096 else 0.9), (count, p, d)  # targets are 0.6 and 0.7
