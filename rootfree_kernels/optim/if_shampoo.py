"""IF-Shampoo: Shampoo without inverses and without roots."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim.optimizer import ParamsT

from rootfree_kernels.optim.base import RootFreeOptimizer
from rootfree_kernels.optim.recipe import PAPER_RULE, RECIPE, model_groups
from rootfree_kernels.param_split import split_params


class IFShampoo(RootFreeOptimizer):
    r"""Shampoo without roots and without inverses, by the paper's rule or by the recipe.

    `IFShampoo.for_model(model, lr, weight_decay)` splits a model and sets the recipe. `IFShampoo(params, ...)` follows
    the paper's rule (Lin et al., ICML 2024, Fig. 5 right and Fig. 7), unless options of the recipe are passed, for
    example as `**RECIPE`.

    **The paper's rule** for a block W of p × d with gradient G. C (p × p) and K (d × d) start at I, m_C and m_K at 0::

        every T-th step, both sides from the old factors:
          A   = CᵀGK
          Δ_C = ½[(B/d)·AAᵀ + (λ/d)·‖K‖²_F·CᵀC − γI]        Δ_K = ½[(B/p)·AᵀA + (λ/p)·‖C‖²_F·KᵀK − γI]
          m   ← α₂m + (1−α₂)Δ
          C   ← C − β₂/max(1, ‖m_C‖)·C·m_C                   K ← K − β₂/max(1, ‖m_K‖)·K·m_K
        every step:
          U   = CCᵀ·G·KKᵀ
          buf ← α₁buf + U + κW
          W   ← W − β₁buf

    **The options of the recipe** change one part each::

        factor_init="gradient"   C = K = (q(1+λ))^(−1/4)·I at the first update with a gradient that is not 0
        relative_damping=True    λq in the place of λ, where
                                   q ← B·mean(G²) at the first update, then 0.95·q + 0.05·B·mean(G²)
        direction="whitened"     Δ_C = ½[(B/d)·AAᵀ + √λ·(tr K/d)·C − γI]          Δ_K likewise
                                   C ← C − ½β₂/max(1, ‖m_C‖)·(C·m_C + m_C·C)      K likewise
                                   U = C·G·K
        momentum_on="gradient"   M ← α₁M + (1−α₁)G, preconditioned in the place of G
                                   W ← (1 − β₁κ)W − β₁U
        nesterov=True            M' = (1−α₁)G + α₁M is preconditioned in the place of M
        update_norm="muon"       U ← U·s·√(p·d/D)/‖U‖_F, with s = `update_scale`
                                   D is the number of columns of the whole W
        update_norm="rms"        U ← U·s·√(p·d)/‖U‖_F

    In the root-free direction CCᵀ and KKᵀ follow the inverse of the curvature. In the whitened one C and K themselves
    are symmetric and follow its inverse root, without a root or an inverse: the step is that of KL-Shampoo (Lin et al.,
    2025), and S_C^(−½)·G·S_K^(−½) where the factors have converged. Its update is (I − ½b·m)·C·(I − ½b·m) to first
    order in b. Its damping is added to the root of the curvature, as eps is in Adam. "muon" is the size of Muon's
    update of a whole weight, which is √p.

    With `factor_init="gradient"`, `relative_damping=True` and an `update_norm`, steps depend neither on B nor on the
    scale of the loss. `batch_size` may then be left out, and lr is that of Muon.

    A parameter with two or more axes is viewed as a matrix [shape[0], rest] and cut into blocks. A parameter with fewer
    axes, or with a side of 1, takes the diagonal step of `RFRMSProp` with the same options. With options of the recipe
    each such tensor has an s, a q and an update's norm of its own (p × 1 for "muon")::

        s ← (1 − β₂γ)s + β₂·B·g²          from 1, or from 0 if factor_init="gradient"
        q ← (1 − β₂γ)q + β₂·B·mean(g²)    the mean of s
        u = M'/(s + λ), or M'/(√s + √λ) if whitened

    Without an `update_norm`, that start from 0 makes the first steps of vectors large, as those of torch's RMSprop are.

    Args:
        params: parameters, named parameters or groups; FP32, BF16, FP16 or FP64, of any shape and strides.
        lr: β₁, a number or a one-element Tensor (which the host never reads).
        batch_size: B, the number of terms that the loss averages over (sequences worked well for language models);
            1 for a summed loss. It is required, since a wrong B silently changes the method, unless it cancels (see
            above). A training loop can set it in the group at every step.
        beta2: β₂, the step size of the factors: below 1, so that with a clip CCᵀ and KKᵀ stay positive definite.
        momentum: α₁. There is no factor 1 − α₁ in the heavy ball, so its step grows by 1/(1 − α₁).
        riemannian_momentum: α₂, the momentum of the factors.
        damping: λ. For small gradients, lr/(λ(1−α₁)) is the step size of plain SGD.
        weight_decay: κ, added to the preconditioned gradient before the momentum.
        decoupled_weight_decay: apply the decay to the weights instead, W ← (1 − β₁κ)W, as in AdamW. With
            `momentum_on="gradient"` both are the same.
        direction: "root_free" (the paper's) or "whitened".
        momentum_on: what the momentum averages, "update" (the paper's heavy ball) or "gradient".
        nesterov: look ahead in the average of gradients.
        update_norm: "muon" or "rms" scales every update to a fixed norm. None leaves it as it is (the paper's).
        update_scale: s, a factor of that norm. "rms" with 0.2 makes steps as large as AdamW's are with the same lr.
        relative_damping: make λ relative to the mean curvature q of the block (of the tensor, in the diagonal step).
        factor_init: where C and K start, "identity" (the paper's) or "gradient".
        gamma: γ. 1 averages the curvature (as RMSProp), 0 sums it (as AdaGrad).
        precondition_frequency: T, or a callable that takes a parameter's step (0, 1, …) and returns whether its factors
            are updated, such as `GrowingInterval(10)`. Updating at every step trains best.
        clip: the norm ‖m‖ in the update. "frobenius" is the paper's. "row_sum" is the largest absolute row sum, which
            grows less with width, so that the factors of wide layers learn faster. "none" does not clip.
        structure: "dense" factors, or "elementwise" to give the whole group the diagonal step.
        max_preconditioner_dim: the longest side of a block. Longer sides are cut into nearly equal blocks, each with
            its own factors. None leaves matrices whole. Smaller blocks cost less: an update of n × n takes 24n³.
        cache_products: keep CCᵀ and KKᵀ between updates, which halves the work of the other steps. None keeps them
            unless T is 1. False saves the memory.
        packed_momentum: store the symmetric m_C and m_K as one triangle each, n(n+1)/2 elements instead of n² (LAPACK's
            rectangular full packed format, see `rootfree_kernels.packing`). An update unpacks them, a batch at a time,
            and packs them again. With BF16 factors, `state_dtype=torch.bfloat16` and `cache_products=False`, the state
            of an n × n block then takes 8 + 2/n bytes for each weight instead of 12.
        factor_dtype: the dtype of C, K and m: torch.bfloat16, torch.float32 or torch.float64.
        matmul_dtype: the dtype in which the factors are multiplied. None is `factor_dtype`, or FP32 on a CPU that
            multiplies BF16 slowly. Each process measures that once: pass a dtype if processes have to agree bitwise.
        state_dtype: the dtype of the momentum buffer and of the diagonal step's state. None is FP32 (FP64 for FP64
            parameters).
        rounding: how BF16 factors are rounded: "stochastic", "compensated" (bitwise FP32 factors, in two more bytes) or
            "nearest" (the paper's, with which factors mostly do not move; see `rootfree_kernels.rounding`). m is
            rounded to nearest.
        weight_rounding: how BF16 parameters are rounded, with the same choices.
        seed: the seed of stochastic rounding. It does not touch the global generators.
        maximize: ascend instead of descend.
        foreach: False steps one parameter at a time. None and True step all blocks of a shape together.
        fused: True asks for a backend with kernels, False for eager PyTorch. None takes the best one available.
        capturable: keep the step count on the device. A CUDA graph can then capture the step, after a first step
            outside of it, and `torch.compile` makes one graph of it (`fullgraph=True`). Pass lr as a Tensor on the
            device, or its present value is compiled in. It needs T = 1.

    A group's `direction`, `relative_damping`, `factor_init` and `momentum_on` are set before its first step. Another
    `direction` or `momentum_on` afterwards is an error.

    The state of a matrix is `step` and `momentum_buffer`, and for its n blocks of one shape: `factor_c` [n, p, p],
    `factor_k` [n, d, d], `momentum_c` and `momentum_k` of the same shapes (packed: [n, p + 1, p/2] for even p,
    [n, p, (p + 1)/2] for odd p, and the same for d), and `skipped` [n]. `curvature` [n] is q, if it is needed (0-d in
    the diagonal step). Compensated rounding adds int16 `residual_c` and `residual_k`, and `weight_residual` for BF16
    weights. If blocks differ in shape, further names end in .1, .2 and .3.

    A step leaves out a whole block if its gradient is not finite, or so large that its square overflows. The diagonal
    step leaves out elements by the paper's rule, and whole tensors with options of the recipe. `skipped` counts such
    steps. It also counts steps in which elements of the preconditioned update overflow although the gradient is finite.
    These elements count as 0, and the others step. The next step goes on.

    Raises:
        ValueError: an option or a parameter cannot be served. The message names it, its value and the remedy.
    """

    _newer_options = PAPER_RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-4,
        *,
        batch_size: float | None = None,
        beta2: float = 0.2,
        momentum: float = 0.9,
        riemannian_momentum: float = 0.5,
        damping: float = 1e-4,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        direction: str = "root_free",
        momentum_on: str = "update",
        nesterov: bool = False,
        update_norm: str | None = None,
        update_scale: float = 1.0,
        relative_damping: bool = False,
        factor_init: str = "identity",
        gamma: float = 1.0,
        precondition_frequency: int | Callable[[int], bool] = 1,
        clip: str = "frobenius",
        structure: str = "dense",
        max_preconditioner_dim: int | None = 1024,
        cache_products: bool | None = None,
        packed_momentum: bool = False,
        factor_dtype: torch.dtype = torch.bfloat16,
        matmul_dtype: torch.dtype | None = None,
        state_dtype: torch.dtype | None = None,
        rounding: str = "stochastic",
        weight_rounding: str = "stochastic",
        seed: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        options = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        super().__init__(params, options)

    @classmethod
    def for_model(
        cls,
        model: Module,
        lr: float | Tensor = 0.045,
        weight_decay: float = 0.2,
        *,
        heads: Collection[str] = (),
        rest: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> IFShampoo:
        """Return an optimizer of all trainable parameters of a model, with the options of `RECIPE`.

        Matrices take the whitened step of the recipe. Embeddings, output heads and vectors take its diagonal step.
        `split_params` decides which is which. Tune lr and weight_decay: the settings of all parts follow from them, and
        no `batch_size` is needed.

        The update of an embedding, a head or a vector has a root mean square of 0.02·lr over all of its elements. If a
        batch touches few rows of a large embedding, these rows therefore take larger steps.

        Args:
            model: any module. Frozen parameters are left out.
            lr: β₁, that of Muon, the same in all groups.
            weight_decay: κ of the matrices, W ← (1 − β₁κ)W.
            heads: names of further modules to count as output heads (see `split_params`).
            rest: options of embeddings, heads and vectors. They have `structure`, `beta2`, `update_norm`,
                `update_scale` and `weight_decay` of their own (`rootfree_kernels.optim.recipe.model_groups`).
            options: further options of `IFShampoo`, for all groups, in the place of those of the recipe. They do not
                replace the options that embeddings, heads and vectors have of their own.

        Raises:
            ValueError: `heads` names a module that the model does not have, or an option cannot be served.
        """
        groups = model_groups(split_params(model, heads), weight_decay, rest or {})
        return cls(groups, lr, **{**RECIPE, "weight_decay": weight_decay, **options})
