"""Splitting the parameters of a model."""

from __future__ import annotations

import pytest
from torch import nn

from rootfree_kernels import RFRMSProp, split_params


class Tied(nn.Module):
    """A language model with two heads. One shares the weight of the embedding."""

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


def test_split_sorts_parameters_and_gives_reasons():
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


def test_a_named_module_counts_as_a_head_and_an_unknown_one_is_refused():
    assert "value.weight" in names(split_params(Tied(), heads=["value"]).embeddings_and_heads)
    with pytest.raises(ValueError, match="nothing"):
        split_params(Tied(), heads=["nothing"])


def test_the_groups_can_be_passed_to_an_optimizer():
    split = split_params(Tied())
    groups = split.groups(vectors={"weight_decay": 0.0}, matrices={"lr": 0.5})
    optimizer = RFRMSProp(groups, batch_size=1, weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    assert optimizer.param_groups[0]["lr"] == 0.5
    with pytest.raises(ValueError, match="vektors"):
        split.groups(vektors={})
