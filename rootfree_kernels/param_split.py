"""Split a model's parameters into groups that may need hyperparameters of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn import Module, Parameter

from rootfree_kernels.blocks import matrix_shape

HEAD_NAMES = frozenset(
    {"head", "heads", "lm_head", "classifier", "score", "unembed", "output_projection", "fc_out"}
    | {"qa_outputs", "embed_out", "vocab_projector", "last_linear"}
)
"""Names of output heads, at any depth."""

SHARED_NAMES = frozenset({"fc", "proj_out"})
"""Names of output heads in some models and of hidden layers in others. They count at the top of a model, or if nothing
else in the model has the name."""

HEAD_METHODS = ("get_output_embeddings", "get_classifier")
"""Methods by which models of transformers and of timm tell their heads."""


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
        heads: names of modules (or parameters) to count as heads, with everything below them. Without it, heads are
            recognised by the methods of transformers' and timm's models (`get_output_embeddings`, `get_classifier`); by
            their name (`lm_head`, `classifier`, `fc`, …), where the last layer of a container is its head; and the last
            linear layer of the model is a head if it maps the columns of an embedding to its rows. A weight that a head
            shares with an embedding has the embedding's name.

    Raises:
        ValueError: a name in `heads` selects no weight that could be a head.
    """
    modules = dict(model.named_modules())
    heads = set(heads)
    _check_heads(model, heads)
    recognised = _recognised_heads(modules)
    split = ParamSplit()
    for name, param, owner_name in _owned_params(model):
        if matrix_shape(param.shape) is None:
            part, why = (
                split.vectors,
                f"shape {tuple(param.shape)} has no two sides longer than 1: diagonal step",
            )
        elif param.is_complex():
            part, why = split.vectors, f"{param.dtype} has no Kronecker factors: diagonal step"
        elif isinstance(modules[owner_name], nn.Embedding | nn.EmbeddingBag):
            part, why = split.embeddings_and_heads, "the weight of an embedding: one row for each token"
        elif owner_name in recognised or _is_below(name, heads):
            part, why = split.embeddings_and_heads, "the weight of an output head: one row for each class"
        else:
            part, why = split.matrices, f"a hidden weight of shape {tuple(param.shape)}: Kronecker factors"
        part.append((name, param))
        split.reasons[name] = why
    return split


def _is_below(name: str, heads: Iterable[str]) -> bool:
    """Return whether a parameter is, or belongs to, one of the named modules or parameters."""
    return any(name == head or name.startswith(f"{head}.") for head in heads)


def _check_heads(model: Module, heads: Iterable[str]) -> None:
    """Raise ValueError unless each name selects a trainable weight with two sides longer than 1."""
    every = list(model.named_parameters(remove_duplicate=False))
    for head in heads:
        below = [param for name, param in every if _is_below(name, [head])]
        if not below:
            raise ValueError(f"heads={head!r}: no such module; choose from model.named_modules().")
        if not any(param.requires_grad and matrix_shape(param.shape) for param in below):
            raise ValueError(
                f"heads={head!r}: it selects no trainable weight with two sides longer than 1; choose a module that "
                "has one."
            )


def _owned_params(model: Module) -> Iterator[tuple[str, Parameter, str]]:
    """Yield (name, parameter, name of the module that holds it) for every trainable parameter, once."""
    for name, param in model.named_parameters():
        if param.requires_grad:
            yield name, param, name.rpartition(".")[0]


def _recognised_heads(modules: dict[str, Module]) -> set[str]:
    """Return the names of the layers that are output heads: see `split_params`."""
    names = {id(module): name for name, module in modules.items()}
    told = [head for module in modules.values() for head in _told_heads(module)]
    heads = {name for module in told if (top := names.get(id(module))) is not None for name in _layers(modules, top)}
    ends = Counter(name.rpartition(".")[2] for name in modules)
    for name in modules:
        end = name.rpartition(".")[2]
        if end in HEAD_NAMES or (end in SHARED_NAMES and (name == end or ends[end] == 1)):
            heads.update(_layers(modules, name)[-1:])
    return heads | _inverse_of_an_embedding(modules)


def _told_heads(module: Module) -> list[Module]:
    """Return the heads that a model of transformers or timm tells."""
    told: list[Any] = []
    for method in HEAD_METHODS:
        with suppress(AttributeError, NotImplementedError, TypeError):
            told.append(getattr(module, method)())
    flat = [head for answer in told for head in (answer if isinstance(answer, tuple | list) else [answer])]
    return [head for head in flat if isinstance(head, Module)]


def _layers(modules: dict[str, Module], top: str) -> list[str]:
    """Return the modules at or below `top` that hold a weight with two sides longer than 1, in order."""
    below = [name for name in modules if name == top or not top or name.startswith(f"{top}.")]
    return [name for name in below if any(matrix_shape(p.shape) for p in modules[name].parameters(recurse=False))]


def _inverse_of_an_embedding(modules: dict[str, Module]) -> set[str]:
    """Return the last linear layer if it maps the columns of an embedding to its rows."""
    tables = {(m.embedding_dim, m.num_embeddings) for m in modules.values() if isinstance(m, nn.Embedding)}
    linears = [(name, m) for name, m in modules.items() if isinstance(m, nn.Linear)]
    return {name for name, m in linears[-1:] if (m.in_features, m.out_features) in tables}
