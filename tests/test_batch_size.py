"""Counting the batch size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rootfree_kernels import BatchSizeCounter, RFRMSProp


class Keyword(nn.Module):
    """A model that is called with keywords only."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 2)

    def forward(self, *, inputs, scale=1.0):
        return self.inner(inputs) * scale


def counted(calls, **options):
    """Return the group's batch_size after forward calls with (size, training), and a step."""
    model = Keyword()
    optimizer = RFRMSProp(model.parameters(), batch_size=1)
    with BatchSizeCounter(model, optimizer, **options):
        for size, training in calls:
            model.train(training)
            model(inputs=torch.randn(size, 4)).sum().backward()
        optimizer.step()
    return optimizer.param_groups[0]["batch_size"]


def test_a_forward_call_with_keywords_only_is_counted():
    assert counted([(7, True)]) == 7


def test_micro_batches_add_up_and_evaluation_does_not_count():
    assert counted([(7, True), (5, True), (100, False)]) == 12


def test_a_step_without_a_counted_call_keeps_the_batch_size():
    assert counted([(9, False)]) == 1


def test_the_world_size_multiplies_and_terms_may_be_counted_by_a_function():
    assert counted([(7, True)], world_size=4) == 28
    assert counted([(7, True)], count_terms=lambda args, kwargs: kwargs["inputs"].numel()) == 28


def test_forward_calls_inside_a_closure_are_counted_and_those_without_gradients_are_not():
    model = nn.Linear(3, 2)
    optimizer = RFRMSProp(model.parameters(), batch_size=1)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.randn(16, 3)).square().mean()
        loss.backward()
        return loss

    with BatchSizeCounter(model, optimizer):
        with torch.no_grad():
            model(torch.randn(100, 3))
        assert optimizer.step(closure) > 0
    assert optimizer.param_groups[0]["batch_size"] == 16


def test_the_count_is_reset_after_every_step_and_ends_with_remove():
    model = nn.Linear(3, 2)
    optimizer = RFRMSProp(model.parameters(), batch_size=1)
    counter = BatchSizeCounter(model, optimizer)
    sizes = []
    for size in (4, 6):
        model(torch.randn(size, 3)).sum().backward()
        optimizer.step()
        sizes.append(optimizer.param_groups[0]["batch_size"])
    counter.remove()
    model(torch.randn(50, 3))
    optimizer.step()
    assert [*sizes, optimizer.param_groups[0]["batch_size"]] == [4, 6, 6]


def test_a_call_without_a_tensor_and_an_optimizer_without_batch_size_are_refused():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="batch_size"):
        BatchSizeCounter(model, torch.optim.SGD(model.parameters(), lr=0.1))
    counter = BatchSizeCounter(model, RFRMSProp(model.parameters(), batch_size=1))
    with pytest.raises(ValueError, match="count_terms"):
        counter._count_terms((1, "text"), {})
