"""What `bench.compare` measures on a machine, and for how long: on a CPU, on a GPU, and in a test."""

from __future__ import annotations

from dataclasses import dataclass

from bench.common.gpt import GPT2
from bench.common.workloads import Workload
from bench.compare import training
from bench.compare.contest import Limits


@dataclass(frozen=True)
class Plan:
    """What a machine measures, and for how long."""

    limits: Limits
    scaling_limits: Limits
    copied: int
    product: int
    widths: tuple[int, ...]
    layer_counts: tuple[int, ...]
    layer_side: int
    periods: tuple[int, ...]
    period_side: int
    task: training.Task
    training_cycles: tuple[int, int]
    """Of T = 10 steps each: that warm up, and that are measured."""

    budget: float = 0.5
    """The part of a GPU's memory that the contestants of a round may take."""


CPU = Plan(
    limits=Limits(most=8, least=3, seconds=1.5, all_seconds=15.0),
    scaling_limits=Limits(most=4, least=2, seconds=0.3, all_seconds=8.0),
    copied=1 << 25,
    product=1024,
    widths=(128, 256, 512, 1024, 2048),
    layer_counts=(1, 4, 16, 96),
    layer_side=128,
    periods=(1, 2, 5, 10),
    period_side=512,
    task=training.SMALL,
    training_cycles=(2, 1),
)
GPU = Plan(
    limits=Limits(most=30, least=3, seconds=0.6, all_seconds=8.0),
    scaling_limits=Limits(most=10, least=2, seconds=0.2, all_seconds=4.0),
    copied=1 << 29,
    product=8192,
    widths=(256, 512, 1024, 2048, 4096, 8192),
    layer_counts=(1, 2, 4, 8, 16, 32, 64, 96),
    layer_side=768,
    periods=(1, 2, 5, 10, 20),
    period_side=1024,
    task=training.GPT2_124M,
    training_cycles=(2, 2),
)
TINY = Plan(
    limits=Limits(most=1, least=1, seconds=0.0),
    scaling_limits=Limits(most=1, least=1, seconds=0.0),
    copied=1 << 12,
    product=16,
    widths=(8, 16, 32),
    layer_counts=(1, 2, 3),
    layer_side=8,
    periods=(1, 2),
    period_side=16,
    task=training.Task("tiny GPT", GPT2(1, 8, 50, 4, head_width=4), batch=2, bf16=False),
    training_cycles=(1, 1),
)
TINY_WORKLOADS = (Workload("16²", ((16, 16),)), Workload("pair", ((8, 40), (24, 8))))
