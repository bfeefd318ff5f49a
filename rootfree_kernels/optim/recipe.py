"""Two sets of options of `IFShampoo`: the paper's rule, and the recipe, which trains better.

`IFShampoo.for_model` splits a model and gives each part its options. `IFShampoo(params, lr=0.045, **RECIPE)` is for
matrices of your own choice: embeddings, heads and vectors want other options (see `model_groups`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rootfree_kernels.param_split import ParamSplit

PAPER_RULE = MappingProxyType(
    {
        "direction": "root_free",
        "momentum_on": "update",
        "nesterov": False,
        "update_norm": None,
        "update_scale": 1.0,
        "relative_damping": False,
        "factor_init": "identity",
    }
)
"""The options that make the rule of Lin et al., ICML 2024. They are the defaults."""

RECIPE: MappingProxyType[str, Any] = MappingProxyType(
    {
        "direction": "whitened",
        "momentum_on": "gradient",
        "nesterov": True,
        "update_norm": "muon",
        "relative_damping": True,
        "factor_init": "gradient",
        "beta2": 0.95,
        "riemannian_momentum": 0.0,
        "damping": 1e-8,
        "clip": "row_sum",
        "decoupled_weight_decay": True,
    }
)
"""The options of the recipe. The whitened direction has the momentum and the size of Muon's updates, and its start and
its damping are relative to the gradients, so that the scale of the loss changes nothing."""

REST_SCALE = 0.02
"""The root mean square of an update of an embedding, a head or a vector, relative to lr."""

REST_BETA2 = 0.02
"""β₂ of embeddings, heads and vectors."""


def model_groups(split: ParamSplit, weight_decay: float, rest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the groups of a model, with the options by which embeddings, heads and vectors differ from RECIPE.

    `rest` replaces some of these.
    """
    options = {
        "structure": "elementwise",
        "update_norm": "rms",
        "update_scale": REST_SCALE,
        "beta2": REST_BETA2,
        "weight_decay": REST_SCALE * weight_decay,
        **rest,
    }
    return split.groups(embeddings_and_heads=options, vectors=options)
