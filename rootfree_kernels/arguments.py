"""Named tuples that carry the operators' arguments: state, options and sources of random bits.

The schemas of `torch.ops.rootfree` are flat. Each operator of `rootfree_kernels.ops` lists the fields of these tuples
one after the other, so a field's name is also the name of an argument in the schema. (Only the fields of
`Preconditioner` stand in three places.)

Shapes: L blocks of p × d, or n tensors of any shape. "Wide" means FP32, or FP64 where parameters or state are FP64.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# ---- both methods ------------------------------------------------------------------------------------------------


class Draws(NamedTuple):
    """Where random bits come from: one seed and one step for every block, or every tensor of a list."""

    seeds: Tensor  # [L] or [n], int32, on the parameters' device
    steps: Tensor  # [L] or [n], int64, on any device; empty if nothing is rounded stochastically


class Scaling(NamedTuple):
    """What `torch.amp.GradScaler` hands to an optimizer. Both are None without a scaler."""

    grad_scale: Tensor | None  # one element: gradients are divided by it
    found_inf: Tensor | None  # one element: nothing is stepped unless it is 0


# ---- the diagonal method -----------------------------------------------------------------------------------------


class DiagonalState(NamedTuple):
    """The state of n tensors in the diagonal method, each tensor of its parameter's shape."""

    squares: list[Tensor]  # s; wide or BF16
    buffers: list[Tensor]  # m; wide or BF16
    skipped: list[Tensor]  # 0-d, int32: steps that left elements out
    square_residuals: list[Tensor]  # int16, for a compensated BF16 s; otherwise an empty list
    weight_residuals: list[Tensor]  # int16, for compensated BF16 parameters; otherwise an empty list


class DiagonalOptions(NamedTuple):
    """Options of one diagonal step. Symbols are those of `rootfree_kernels.RFRMSProp`."""

    batch_size: float  # B
    beta2: float  # β₂
    gamma: float  # γ
    momentum: float  # α₁
    damping: float  # λ
    weight_decay: float  # κ
    decoupled: bool
    maximize: bool
    rounding: str  # of s
    weight_rounding: str


class ScaledState(NamedTuple):
    """The state of n tensors in the scaled diagonal method, and the size of their updates.

    Tensors have their parameter's shape, unless it says otherwise.
    """

    squares: list[Tensor]  # s; wide or BF16
    buffers: list[Tensor]  # M, or the heavy-ball momentum; wide or BF16
    skipped: list[Tensor]  # 0-d, int32: steps that left the tensor or elements out
    curvatures: list[Tensor]  # q, 0-d, wide, for relative damping; otherwise an empty list
    square_residuals: list[Tensor]  # int16, for a compensated BF16 s; otherwise an empty list
    weight_residuals: list[Tensor]  # int16, for compensated BF16 parameters; otherwise an empty list
    update_norms: Tensor | None  # [n], FP32: ‖u‖ is scaled to it; None leaves u as it is


class ScaledOptions(NamedTuple):
    """Options of one step of the scaled diagonal method. Symbols are those of `rootfree_kernels.IFShampoo`."""

    batch_size: float  # B
    beta2: float  # β₂
    gamma: float  # γ
    momentum: float  # α₁
    damping: float  # λ
    weight_decay: float  # κ
    decoupled: bool
    maximize: bool
    rounding: str  # of s
    weight_rounding: str
    direction: str
    relative_damping: bool
    momentum_on: str
    nesterov: bool


# ---- the Kronecker-factored method -------------------------------------------------------------------------------


class Tiling(NamedTuple):
    """Which blocks of a list of tensors form a batch: one tile of each tensor."""

    tiles: list[int]  # `Tile.as_ints` of every tile, one after the other
    rows: int  # p
    cols: int  # d


class Gathered(NamedTuple):
    """What `kron_gather` returns: the gradients of a batch of blocks."""

    grad: Tensor  # G [L, p, d]; some backends pad p and d
    squares: Tensor  # [1 + number of factors, L, partial sums], FP32; for later operators of the same backend only


class Factors(NamedTuple):
    """Everything that an update of the Kronecker factors changes."""

    factor_c: Tensor  # C [L, p, p]
    factor_k: Tensor  # K [L, d, d]
    momentum_c: Tensor  # m_C [L, p, p], or packed (see `rootfree_kernels.packing`)
    momentum_k: Tensor  # m_K [L, d, d], or packed
    residual_c: Tensor | None = None  # [L, p, p], int16, for a compensated BF16 C
    residual_k: Tensor | None = None  # [L, d, d], int16, for a compensated BF16 K
    product_c: Tensor | None = None  # P_C = CCᵀ [L, p, p]: written if given
    product_k: Tensor | None = None  # P_K = KKᵀ [L, d, d]: written if given
    curvature: Tensor | None = None  # q [L], wide; None if neither damping nor start depends on it


class FactorOptions(NamedTuple):
    """Options of one update of the factors. Symbols are those of `rootfree_kernels.IFShampoo`."""

    batch_size: float  # B
    beta2: float  # β₂
    riemannian_momentum: float  # α₂
    damping: float  # λ
    gamma: float  # γ
    clip: str
    rounding: str  # of C and K
    direction: str = "root_free"
    relative_damping: bool = False
    factor_init: str = "identity"


class Preconditioner(NamedTuple):
    """What preconditions the gradients of a batch: U = CCᵀ·G·KKᵀ, or U = X·G·Y with two matrices as they are."""

    factor_c: Tensor  # C [L, p, p]; where `cached`, X: P_C = CCᵀ, or the C of the whitened direction
    factor_k: Tensor  # K [L, d, d]; where `cached`, Y: P_K = KKᵀ, or the K of the whitened direction
    cached: bool
    ok: Tensor | None  # [L], bool: blocks whose update succeeded; None without an update in this step


class Weights(NamedTuple):
    """The weights of a batch of blocks and their state."""

    params: list[Tensor]  # contiguous, or with two axes
    buffers: list[Tensor]  # M or the heavy-ball momentum (`StepOptions.momentum_on`), of the parameters' shapes
    residuals: list[Tensor]  # int16, for compensated BF16 parameters; otherwise an empty list
    tiles: list[int]  # as in `Tiling`
    skipped: Tensor  # [L], int32: steps that left the block or elements of its update out
    update_norms: Tensor | None = None  # [L], FP32: ‖U‖_F is scaled to it; None leaves U as it is


class StepOptions(NamedTuple):
    """Options of one step of the weights. Symbols are those of `rootfree_kernels.IFShampoo`."""

    momentum: float  # α₁
    weight_decay: float  # κ
    decoupled: bool
    rounding: str  # of the weights
    momentum_on: str = "update"  # what the momentum averages: "update" (the paper's heavy ball) or "gradient"
    nesterov: bool = False
