"""Splitting the parameters of a model."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

import pytest
import torch
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
    for name in ("value", "value.weight"):
        assert "value.weight" in names(split_params(Tied(), heads=[name]).embeddings_and_heads)
    with pytest.raises(ValueError, match=r"heads='nothing': no such module; choose"):
        split_params(Tied(), heads=["nothing"])


@pytest.mark.parametrize("name", ["norm", "hidden.bias", "frozen"])
def test_a_name_that_selects_no_weight_is_refused(name):
    with pytest.raises(ValueError, match=rf"heads='{name}': it selects no trainable weight.*choose"):
        split_params(Tied(), heads=[name])


def test_a_complex_weight_takes_the_diagonal_step():
    split = split_params(nn.Linear(4, 3, dtype=torch.complex64))
    assert names(split.vectors) == ["weight", "bias"]


# ---- heads -----------------------------------------------------------------------------------------------------------


def layers(*sizes):
    """Return linear layers with an activation between them."""
    both = [x for size in pairwise(sizes) for x in (nn.Linear(*size), nn.ReLU())]
    return nn.Sequential(*both[:-1])


def model_of(**children):
    return nn.Sequential(OrderedDict(children))


class Told(nn.Module):
    """A model that tells its head by a method, as those of timm and transformers do."""

    def __init__(self, method, answer):
        super().__init__()
        self.body, self.last = layers(8, 8, 8), nn.Linear(8, 5)
        setattr(self, method, lambda: answer(self))


HEADS = {
    "a ResNet's fc": (model_of(conv=nn.Conv2d(3, 8, 3), fc=nn.Linear(8, 10)), ["fc.weight"]),
    "fc in a wrapper": (model_of(net=model_of(conv=nn.Conv2d(3, 8, 3), fc=nn.Linear(8, 10))), ["net.fc.weight"]),
    "fc of every layer": (model_of(a=model_of(fc=nn.Linear(8, 8)), b=model_of(fc=nn.Linear(8, 8))), []),
    "the last layer of a VGG's classifier": (
        model_of(features=nn.Conv2d(3, 8, 3), classifier=layers(8, 8, 8, 10)),
        ["classifier.4.weight"],
    ),
    "a ViT's heads.head": (
        model_of(encoder=layers(8, 8), heads=model_of(head=nn.Linear(8, 10))),
        ["heads.head.weight"],
    ),
    "a convolution as the last layer": (
        model_of(features=nn.Conv2d(3, 8, 3), classifier=nn.Sequential(nn.Dropout(), nn.Conv2d(8, 10, 1))),
        ["classifier.1.weight"],
    ),
    "question answering": (model_of(bert=layers(8, 8), qa_outputs=nn.Linear(8, 2)), ["qa_outputs.weight"]),
    "told by timm's method": (Told("get_classifier", lambda m: m.last), ["last.weight"]),
    "two, told by timm's method": (
        Told("get_classifier", lambda m: (m.last, m.body[2])),
        ["body.2.weight", "last.weight"],
    ),
    "told by transformers' method": (Told("get_output_embeddings", lambda m: m.last), ["last.weight"]),
    "none is told": (Told("get_output_embeddings", lambda m: None), []),
    "a method with arguments": (Told("get_classifier", lambda m, name: m.last), []),
}


@pytest.mark.parametrize("kind", HEADS)
def test_heads_of_common_models_are_recognised(kind):
    model, expected = HEADS[kind]
    assert names(split_params(model).embeddings_and_heads) == expected


def test_a_named_container_counts_with_everything_below_it():
    model = model_of(features=nn.Conv2d(3, 8, 3), classifier=layers(8, 8, 10))
    split = split_params(model, heads=["classifier"])
    assert names(split.embeddings_and_heads) == ["classifier.0.weight", "classifier.2.weight"]
    assert names(split.matrices) == ["features.weight"]


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet18", "fc"),
        ("vgg11", "classifier.6"),
        ("vit_b_32", "heads.head"),
        ("convnext_tiny", "classifier.2"),
        ("mobilenet_v3_small", "classifier.3"),
        ("swin_t", "head"),
        ("densenet121", "classifier"),
        ("squeezenet1_0", "classifier.1"),
    ],
)
def test_heads_of_torchvision(name, head):
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = torchvision.models.get_model(name, num_classes=10)
    assert names(split_params(model).embeddings_and_heads) == [f"{head}.weight"]


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet18", "fc"),
        ("vit_tiny_patch16_224", "head"),
        ("convnext_atto", "head.fc"),
        ("efficientnet_b0", "classifier"),
        ("swin_tiny_patch4_window7_224", "head.fc"),
        ("mixer_s32_224", "head"),
        ("regnetx_002", "head.fc"),
    ],
)
def test_heads_of_timm(name, head):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=10)
    assert names(split_params(model).embeddings_and_heads) == [f"{head}.weight"]


SMALL = {"vocab_size": 99, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TRANSFORMERS = [
    ("BertForQuestionAnswering", "BertConfig", SMALL, ["qa_outputs.weight"]),
    ("BertForSequenceClassification", "BertConfig", SMALL, ["classifier.weight"]),
    ("RobertaForSequenceClassification", "RobertaConfig", SMALL, ["classifier.out_proj.weight"]),
    ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "num_key_value_heads": 2}, ["lm_head.weight"]),
    ("BertForMaskedLM", "BertConfig", {**SMALL, "tie_word_embeddings": False}, ["cls.predictions.decoder.weight"]),
]


@pytest.mark.parametrize(("model", "config", "options", "heads"), TRANSFORMERS, ids=[x[0] for x in TRANSFORMERS])
def test_heads_of_transformers(model, config, options, heads):
    transformers = pytest.importorskip("transformers")
    made = getattr(transformers, model)(getattr(transformers, config)(**options))
    found = names(split_params(made).embeddings_and_heads)
    assert [name for name in found if "embed" not in name] == heads


def test_the_groups_can_be_passed_to_an_optimizer():
    split = split_params(Tied())
    groups = split.groups(vectors={"weight_decay": 0.0}, matrices={"lr": 0.5})
    optimizer = RFRMSProp(groups, batch_size=1, weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    assert optimizer.param_groups[0]["lr"] == 0.5
    with pytest.raises(ValueError, match="vektors"):
        split.groups(vektors={})
