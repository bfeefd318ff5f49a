"""Split a model's parameters into groups that may need hyperparameters of their own."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn import Module, Parameter

from rootfree_kernels.blocks import matrix_shape

HEAD_NAMES = frozenset({"head", "lm_head", "classifier", "score", "unembed", "output_projection", "fc_out"})


@dataclass
class ParamSplit:
    """Named parameters of a model in three parts. `print(split)` says for every parameter where it is, and why.

    Attributes:
        matrices: hidden weights with Kronecker factors, as pairs (name, parameter).
        embeddings_and_heads: weights with one row for each token or class, as such pairs.
        vectors: everything else, as such pairs.
        reasons: one sentence for each name that says why the parameter is in its part.
    """

    matrices: list[tuple[str, Parameter]] = field(default_factory=list)
    embeddings_and_heads: list[tuple[str, Parameter]] = field(default_factory=list)
    vectors: list[tuple[str, Parameter]] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)

    def groups(self, **options: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the parts that are not empty as parameter groups, in the order of the fields.

        Args:
            options: group options by part, such as `vectors={"weight_decay": 0.0}`.

        Raises:
            ValueError: an unknown part is named.
        """
        parts = ("matrices", "embeddings_and_heads", "vectors")
        if unknown := sorted(set(options) - set(parts)):
            raise ValueError(f"{unknown[0]}={options[unknown[0]]!r}: no such part; choose from {', '.join(parts)}.")
        return [{"params": getattr(self, part), **options.get(part, {})} for part in parts if getattr(self, part)]

    def __str__(self) -> str:
        return "\n".join(f"{name}: {reason}" for name, reason in self.reasons.items())


def split_params(model: Module, heads: Collection[str] = ()) -> ParamSplit:
    """Split the trainable parameters of `model`. Each parameter appears once, under its first name.

    - *matrices*: hidden weights with two or more axes (and two sides longer than 1). Kronecker factors help most here.
    - *embeddings and heads*: weights with one row for each token or class. Their sides are long and most rows of their
      gradients are zero, so another learning rate, smaller blocks or `structure="elementwise"` may work better.
    - *vectors*: biases, gains and everything else that takes the diagonal step.

    Args:
        model: any module.
        heads: names of further modules to count as heads. Two kinds are recognised without it: modules named like a
            head (`lm_head`, `classifier`, …), and the last linear layer of the model if it maps the columns of an
            embedding to its rows. A weight that a head shares with an embedding has the embedding's name.

    Raises:
        ValueError: `heads` names a module that the model does not have.
    """
    modules = dict(model.named_modules())
    if unknown := sorted(set(heads) - set(modules)):
        raise ValueError(f"heads={unknown[0]!r}: no such module; choose from model.named_modules().")
    heads = {*heads, *_recognised_heads(modules)}
    split = ParamSplit()
    for name, param, owner_name in _owned_params(model):
        owner = modules[owner_name]
        if matrix_shape(param.shape) is None:
            part, why = (
                split.vectors,
                f"shape {tuple(param.shape)} has no two sides longer than 1: diagonal step",
            )
        elif isinstance(owner, nn.Embedding | nn.EmbeddingBag):
            part, why = split.embeddings_and_heads, "the weight of an embedding: one row for each token"
        elif owner_name in heads:
            part, why = split.embeddings_and_heads, "the weight of an output head: one row for each class"
        else:
            part, why = split.matrices, f"a hidden weight of shape {tuple(param.shape)}: Kronecker factors"
        part.append((name, param))
        split.reasons[name] = why
    return split


def _owned_params(model: Module) -> Iterator[tuple[str, Parameter, str]]:
    """Yield (name, parameter, name of the module that holds it) for every trainable parameter, once."""
    for name, param in model.named_parameters():
        if param.requires_grad:
            yield name, param, name.rpartition(".")[0]


def _recognised_heads(modules: dict[str, Module]) -> set[str]:
    """Return the modules named like a head, and the last linear layer if it maps an embedding's columns to its rows."""
    named = {name for name in modules if name.rpartition(".")[2] in HEAD_NAMES}
    tables = {(m.embedding_dim, m.num_embeddings) for m in modules.values() if isinstance(m, nn.Embedding)}
    linears = [(name, m) for name, m in modules.items() if isinstance(m, nn.Linear)]
    last = {name for name, m in linears[-1:] if (m.in_features, m.out_features) in tables}
    return named | last
