"""The work of a step, for the optimizers of which it is known what they compute."""

from __future__ import annotations

import torch

from bench.common.optimizers import Entry
from bench.common.roofline import (
    Work,
    diagonal_bytes,
    recipe_step_stages,
    recipe_update_stages,
    step_stages,
    total,
    update_stages,
)
from bench.common.workloads import Workload
from bench.compare.contest import UPDATE


def work_of(entry: Entry, workload: Workload, block: int, kind: str) -> tuple[Work, torch.dtype] | None:
    """Return the work of a step of an entry and the dtype of its products, or None if it is not known."""
    if entry.name.startswith("IFShampoo"):
        return _if_shampoo(entry, workload, block, kind)
    if entry.family == "diagonal":
        return _diagonal(entry, workload), torch.float32
    return None


def _if_shampoo(entry: Entry, workload: Workload, block: int, kind: str) -> tuple[Work, torch.dtype]:
    dtype = entry.option("factor_dtype") or torch.bfloat16
    factor, weight = dtype.itemsize, entry.weights.itemsize
    step, update = step_stages, update_stages
    if entry.option("direction") == "whitened":
        step, update = recipe_step_stages, recipe_update_stages
    work = Work()
    for p, d in workload.blocks(block):
        stages = step(p, d, grad_bytes=weight, weight_bytes=weight, factor_bytes=factor)
        if kind == UPDATE:
            stages |= update(p, d, grad_bytes=weight, factor_bytes=factor)
        work += total(stages)
    return work, dtype


def _diagonal(entry: Entry, workload: Workload) -> Work:
    if entry.name.startswith("SGD"):
        return Work(0, 20 * workload.num_weights)  # weight and momentum read and written, gradient read
    state = entry.option("state_dtype") or entry.weights  # theirs have it of the weights' dtype
    bytes_ = diagonal_bytes(entry.weights, entry.weights, state)
    if entry.option("rounding") == "compensated":
        bytes_ += 4  # the remainder of s, read and written
    return Work(0, bytes_ * workload.num_weights)
