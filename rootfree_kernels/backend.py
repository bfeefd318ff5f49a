"""What a backend is, and what it says about itself.

A backend is a module that implements the operators. Each backend's package describes it in one `Backend` object:
`rootfree_kernels.eager`, `rootfree_kernels.native` (C++ and CUDA) and `rootfree_kernels.triton_kernels`. Nothing else
knows a backend by name: `rootfree_kernels.ops.backends` lists these objects and chooses among them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from rootfree_kernels.arguments import (
    DiagonalOptions,
    DiagonalState,
    Draws,
    FactorOptions,
    Factors,
    Gathered,
    Preconditioner,
    ScaledOptions,
    ScaledState,
    Scaling,
    StepOptions,
    Tiling,
    Weights,
)

logger = logging.getLogger(__name__)

FactorDtypes = tuple[torch.dtype, "torch.dtype | None"]
"""Dtypes in which the factors of a batch are stored and multiplied. None leaves the second one to the backend."""

FP64_PROBLEM = "its arithmetic is FP32, and parameters or state are FP64"


class Operators(Protocol):
    """What a backend's module defines. `rootfree_kernels.eager` documents each function and gives its formula.

    A backend without matrix kernels defines `rf_rmsprop`, `scaled_rmsprop` and `clipped_momentum` only. Its `why_not`
    refuses matrices.
    """

    def rf_rmsprop(
        self,
        params: list[Tensor],
        state: DiagonalState,
        grads: list[Tensor],
        lr: Tensor,
        draws: Draws,
        scaling: Scaling,
        options: DiagonalOptions,
    ) -> None: ...

    def scaled_rmsprop(
        self,
        params: list[Tensor],
        state: ScaledState,
        grads: list[Tensor],
        lr: Tensor,
        draws: Draws,
        scaling: Scaling,
        options: ScaledOptions,
    ) -> None: ...

    def clipped_momentum(
        self,
        momenta: list[Tensor],
        deltas: list[Tensor],
        found_inf: Tensor | None,
        riemannian_momentum: float,
        clip: str,
    ) -> Tensor: ...

    def kron_gather(
        self,
        grads: list[Tensor],
        tiling: Tiling,
        factors: list[Tensor],
        grad_scale: Tensor | None,
        dtype: torch.dtype,
        maximize: bool,
    ) -> Gathered: ...

    def kron_factor(
        self, factors: Factors, gathered: Gathered, draws: Draws, found_inf: Tensor | None, options: FactorOptions
    ) -> Tensor: ...

    def kron_step(
        self,
        weights: Weights,
        preconditioner: Preconditioner,
        gathered: Gathered,
        lr: Tensor,
        draws: Draws,
        found_inf: Tensor | None,
        options: StepOptions,
    ) -> None: ...

    def kron_products(self, factor_c: Tensor, factor_k: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]: ...

    def padded_side(self, size: int) -> int:
        """Return the side of G for a block side of `size`."""

    def num_partial_sums(self, rows: int, cols: int) -> int:
        """Return the last axis of `Gathered.squares` for blocks of rows × cols."""


WhyNot = Callable[[torch.device, torch.dtype, "FactorDtypes | None"], "str | None"]


def _same_dtype(factor_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    return factor_dtype


class BlockWork(NamedTuple):
    """What a backend has to know of a step of a batch of blocks, to say how much memory it takes."""

    num_blocks: int
    block_shape: tuple[int, int]
    matmul_dtype: torch.dtype
    updates_factors: bool
    keeps_products: bool
    packs_momenta: bool
    is_whitened: bool  # its updates have no products CCᵀ and KKᵀ


@dataclass(frozen=True, eq=False, repr=False)
class Backend:
    """A backend's description of itself. Two backends are equal only if they are the same object."""

    name: str
    """As in ROOTFREE_BACKEND, in dispatch tables and in the last argument of `torch.ops.rootfree`."""

    module: str
    """The module with the operators. It is imported when it is first needed."""

    devices: tuple[str, ...] | None
    """Types of devices on which it is chosen without being asked for. None means every type."""

    why_not: WhyNot
    """Return why it cannot serve parameters of a dtype on a device, or None if it can. The third argument holds the
    dtypes of the factors, or None for the diagonal step."""

    is_selectable: bool = True
    """Whether users may ask for it by name. The others are chosen only where those that are selectable cannot serve."""

    is_fused: bool = True
    """Whether it has kernels of its own: `fused=True` accepts no other backend."""

    serves_matrices: bool = True
    """Whether it has the `kron_*` operators."""

    makes_products: bool = False
    """Whether an update computes CCᵀ and KKᵀ on its way, whether they are kept or not. Kernels save half of the
    multiplications by symmetry, so that (CCᵀ)·G·(KKᵀ) takes three quarters of the work of C·(Cᵀ·G·K)·Kᵀ."""

    fuses_last_product: bool = False
    """Whether `kron_step` takes the last product of U together with the step of the weights, in one phase."""

    matmul_dtype: Callable[[torch.dtype, torch.device], torch.dtype] = _same_dtype
    """Return the dtype in which factors of a dtype are multiplied on a device, if the user does not say."""

    workspace: Callable[[BlockWork], list[int]] | None = None
    """Return the bytes of each piece of memory that a step holds at once. None for a backend that may fail halfway."""

    variants: Mapping[str, Backend] = field(default_factory=dict)
    """The same backend with one part done in another way, by the name of that way in dispatch tables."""

    def __repr__(self) -> str:
        return f"Backend({self.name!r})"

    def __reduce__(self) -> tuple[Callable[[str], Backend], tuple[str]]:
        return _named, (self.name,)  # a copy is the same object

    @cached_property
    def import_problem(self) -> str | None:
        """Import the module. None if that worked, otherwise the reason."""
        try:
            import_module(self.module)
        except Exception as error:  # a broken installation raises anything
            logger.warning("backend %s cannot be imported: %s: %s", self.name, type(error).__name__, error)
            return f"it cannot be imported: {type(error).__name__}: {error}"
        return None

    @cached_property
    def operators(self) -> Operators:
        """The imported module.

        Raises:
            RuntimeError: it cannot be imported.
        """
        if self.import_problem:
            raise RuntimeError(f"backend {self.name!r}: {self.import_problem}")
        return cast(Operators, import_module(self.module))


def _named(name: str) -> Backend:
    backend: Backend = import_module("rootfree_kernels.ops.backends").named(name)
    return backend


def old_gpu_problem(device: torch.device) -> str | None:
    """Return why compiled kernels cannot run on a GPU of an old generation, or None."""
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 (A100) or later"
    return None


def momentum_problem(factors: FactorDtypes | None) -> str | None:
    """Return why eager matrices whose momentum a kernel steps cannot serve factors of these dtypes, or None."""
    if factors is None:
        return "it serves matrices only"
    if not {*factors} <= {torch.float32, torch.bfloat16, None}:
        return f"its momentum is FP32 or BF16, and factors are {' and '.join(map(str, factors))}"
    return None


def is_captured(device: torch.device) -> bool:
    """Return whether a CUDA graph is recording the work of `device`, to run it at every replay."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
