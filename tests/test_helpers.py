"""Counting the batch size, splitting parameters, schedules, and the report of `python -m rootfree_kernels`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import reference as ref
import torch
from torch import nn

from bench.demo import GPT, Task
from rootfree_kernels import BatchSizeCounter, GrowingInterval, RFRMSProp, split_params


class Keyword(nn.Module):
    """A model that is called with keywords only."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 2)

    def forward(self, *, inputs, scale=1.0):
        return self.inner(inputs) * scale


def counted(calls, **options):
    """The group's batch_size in a step after these calls of (size, training)."""
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


def test_the_world_size_multiplies_and_terms_may_be_counted_otherwise():
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


def test_the_count_starts_anew_after_every_step_and_ends_with_remove():
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


class Tied(nn.Module):
    """A language model whose head shares the embedding's weight, with a second head of its own."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.hidden = nn.Linear(6, 6)
        self.frozen = nn.Linear(6, 6, bias=False).requires_grad_(False)
        self.conv = nn.Conv1d(6, 6, 3)
        self.tied = nn.Linear(6, 11, bias=False)
        self.tied.weight = self.embed.weight
        self.value = nn.Linear(6, 3)
        self.square = nn.Linear(6, 11)  # as many outputs as the embedding has rows, but a hidden layer
        self.logits = nn.Linear(6, 11)


def names(part):
    return [name for name, _ in part]


def test_parameters_fall_into_matrices_embeddings_with_heads_and_vectors_each_with_a_reason():
    model = Tied()
    split = split_params(model)
    assert names(split.matrices) == ["hidden.weight", "conv.weight", "value.weight", "square.weight"]
    assert names(split.embeddings_and_heads) == ["embed.weight", "logits.weight"]
    assert names(split.vectors) == [
        "norm.weight",
        "norm.bias",
        "hidden.bias",
        "conv.bias",
        "value.bias",
        "square.bias",
        "logits.bias",
    ]
    every = {name for name, param in model.named_parameters() if param.requires_grad}
    assert set(split.reasons) == every
    assert str(split).count("\n") == len(every) - 1


def test_only_the_tables_and_the_head_of_the_demo_s_model_are_set_apart():
    split = split_params(GPT(Task()))
    assert names(split.embeddings_and_heads) == ["bytes.weight", "places.weight", "head.weight"]
    assert len(split.matrices) == 6 * Task().layers


def test_a_named_module_counts_as_a_head_and_an_unknown_one_is_refused():
    assert "value.weight" in names(split_params(Tied(), heads=["value"]).embeddings_and_heads)
    with pytest.raises(ValueError, match="nothing"):
        split_params(Tied(), heads=["nothing"])


def test_the_groups_go_straight_into_an_optimizer():
    split = split_params(Tied())
    groups = split.groups(vectors={"weight_decay": 0.0}, matrices={"lr": 0.5})
    optimizer = RFRMSProp(groups, batch_size=1, weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    assert optimizer.param_groups[0]["lr"] == 0.5
    with pytest.raises(ValueError, match="vektors"):
        split.groups(vektors={})


@pytest.mark.parametrize("max_interval", [1, 2, 3, 10])
def test_the_growing_interval_is_the_documented_one(max_interval):
    due = GrowingInterval(max_interval)
    assert [due(t) for t in range(5000)] == [ref.growing_interval_updates(t, max_interval) for t in range(5000)]
    with pytest.raises(ValueError, match="max_interval=0"):
        GrowingInterval(0)


def report(**environment):
    command = [sys.executable, "-m", "rootfree_kernels"]
    compiled = {"TRITON_INTERPRET": "0"}  # as users have it: kernels then run on GPUs alone
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **compiled, **environment})
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_report_names_versions_devices_backends_and_reasons():
    text = report()
    for word in ("rootfree-kernels", torch.__version__, "triton", "cpu:", "bfloat16", "eager", "not triton:"):
        assert word in text


def test_the_report_says_when_a_forced_backend_cannot_run():
    text = report(ROOTFREE_BACKEND="triton")
    assert "ROOTFREE_BACKEND=triton" in text and "it does not run on cpu devices" in text
