"""`step_reports`: the batches that an optimizer steps, and their backends."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rootfree_kernels import IFShampoo, RFRMSProp
from rootfree_kernels.optim.report import step_reports
from tests.calls.optimizers import OPTIONS
from tests.calls.tensors import BF16, FP32


def stepped(optimizer: type, steps: int, **options: object) -> torch.optim.Optimizer:
    """Return an optimizer after some steps. It has two equal matrices, a larger matrix and a vector."""
    params = [nn.Parameter(torch.ones(shape)) for shape in ((7, 5), (7, 5), (9, 12), (6,))]
    made = optimizer(params, **{**OPTIONS, **options})
    for _ in range(steps):
        for param in params:
            param.grad = torch.ones_like(param)
        made.step()
    return made


def test_no_report_before_the_first_step_or_for_other_optimizers() -> None:
    assert step_reports(stepped(IFShampoo, 0)) == []
    assert step_reports(torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)) == []


def test_a_report_for_steps_with_an_update_and_one_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOTFREE_BACKEND", "eager")
    options = {"precondition_frequency": 2, "max_preconditioner_dim": 9, "state_dtype": BF16}
    reports = step_reports(stepped(IFShampoo, 3, **options))
    assert [{batch.updates_factors for batch in batches} for batches in reports] == [{False, True}, {False}]
    for batches in reports:
        vector, *matrices = batches
        assert (vector.label, vector.block_shape) == ("diagonal step of 1 tensor", None)
        found = {batch.block_shape: batch for batch in matrices}
        assert {shape: batch.num_blocks for shape, batch in found.items()} == {(7, 5): 2, (9, 6): 2}
        assert found[9, 6].label == "2 blocks of 9x6"
        for batch in batches:
            assert batch.backend.name == "eager" and (batch.grad_dtype, batch.state_dtype) == (FP32, BF16)
        assert all(batch.computes_products for batch in matrices)  # products are cached, because T > 1


def test_the_diagonal_step_is_one_batch() -> None:
    ((batch,),) = step_reports(stepped(RFRMSProp, 2))
    assert len(batch.params) == 4 and batch.label == "diagonal step of 4 tensors"
