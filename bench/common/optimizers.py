"""Every optimizer that is compared, with the settings that make the comparison fair.

All of them step the same matrices with the same gradients, FP32 but where the name says otherwise. Learning rates are
small and momentum is 0.9 where there is one, so that times and memory include it. Two things decide what a second-order
step costs, and are therefore part of every entry: the longest side of a block, and T, the number of steps between
updates of the factors (or of their roots).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from bench.common.peers import find
from bench.demo.fp32_muon import use_fp32
from rootfree_kernels import RECIPE, IFShampoo, RFRMSProp
from rootfree_kernels.eager import cpu_matmul_dtype
from rootfree_kernels.ops.backends import BACKENDS, why_not

LR = 1e-4
SETTINGS = {"beta2": 0.2, "momentum": 0.9, "riemannian_momentum": 0.5, "damping": 1e-4, "batch_size": 16}
WHOLE = 1 << 20
"""A block's longest side of which no weight is cut."""

FP32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Entry:
    """One optimizer with one setting of everything but T and the block."""

    name: str
    family: str
    """"IFShampoo", "Shampoo", "SOAP", "Muon" or "diagonal": with what it belongs together."""

    make: partial[Optimizer]
    """Called with parameters, T and the longest side of a block; those without a use for them ignore them."""

    peer: str = ""
    """The module that it comes from, "" where that is PyTorch or this package."""

    update_at: int = 0
    """In which of T steps, counted from 0, the factors are updated, or their roots taken."""

    has_period: bool = True
    """Whether T makes a difference."""

    cuts: bool = True
    """Whether it cuts long sides by itself, and evenly; if not, it is given the blocks as weights of their own."""

    blocks: tuple[int, ...] = (1024, WHOLE)
    on_cpu: bool = True
    """Whether it takes part without a GPU unless it is asked for."""

    devices: tuple[str, ...] = ("cpu", "cuda")
    """On which types of devices it can take part."""

    weights: torch.dtype = torch.float32
    """Of weights and gradients."""

    backend: str = ""
    """The backend of ours that is asked for, "" for the best."""

    @property
    def is_ours(self) -> bool:
        return not self.peer and self.name.startswith(("IFShampoo", "RFRMSProp"))

    def option(self, name: str) -> Any:
        """The value that the entry gives an option of the optimizer, None where it leaves it alone."""
        return self.make.keywords.get(name)

    def why_left_out(self, device: torch.device) -> str | None:
        """Return why the backend that the entry asks for was not built or cannot run here; None where it can.

        An extension that was built and is broken is no reason: the entry's first step raises an error that says so.
        """
        with suppress(ImportError):
            if self.backend and (reason := why_not(self.backend, device, self.weights)):
                return f"left out: backend {self.backend}: {reason}"
        return None


# ---- ours --------------------------------------------------------------------------------------------------------


def if_shampoo(params: Sequence[Parameter], period: int, block: int, **options: Any) -> Optimizer:
    options = {"lr": LR, **SETTINGS, "max_preconditioner_dim": block, **options}
    return IFShampoo(params, precondition_frequency=period, **options)


def rf_rmsprop(params: Sequence[Parameter], period: int, block: int, **options: Any) -> Optimizer:
    return RFRMSProp(params, lr=LR, batch_size=16, **options)


RECIPE_OPTIONS = {"lr": 0.045, **RECIPE}
"""Options of IFShampoo for the recipe, with the learning rate that is usual for it."""

LEAST_MEMORY = {"packed_momentum": True, "state_dtype": BF16, "cache_products": False}
"""Options of IFShampoo that save memory: with BF16 factors 8 + 2/n bytes a weight of an n × n block."""


def _ours(
    name: str,
    family: str,
    on_cpu: bool = True,
    backend: str = "",
    weights: Any = FP32,
    devices: tuple[str, ...] = ("cpu", "cuda"),
    **options: Any,
) -> Entry:
    """An entry of ours that differs by options from the first of its family, measured with blocks of 1024 only."""
    diagonal = family == "diagonal"
    make = partial(rf_rmsprop if diagonal else if_shampoo, **options)
    return Entry(
        name,
        family,
        make,
        has_period=not diagonal,
        blocks=(1024,),
        on_cpu=on_cpu,
        devices=("cuda",) if backend == "cuda" else devices,
        weights=weights,
        backend=backend,
    )


OURS = (
    Entry("IFShampoo", "IFShampoo", partial(if_shampoo)),
    Entry("IFShampoo, FP32 factors", "IFShampoo", partial(if_shampoo, factor_dtype=FP32)),
    _ours("IFShampoo, recipe", "IFShampoo", **RECIPE_OPTIONS),
    _ours("IFShampoo, recipe, FP32 factors", "IFShampoo", devices=("cpu",), factor_dtype=FP32, **RECIPE_OPTIONS),
    _ours("IFShampoo, FP64 factors", "IFShampoo", on_cpu=False, factor_dtype=torch.float64),
    _ours("IFShampoo, compensated", "IFShampoo", rounding="compensated"),
    _ours("IFShampoo, nearest", "IFShampoo", on_cpu=False, rounding="nearest"),
    _ours("IFShampoo, least memory", "IFShampoo", **LEAST_MEMORY),
    _ours("IFShampoo, BF16 weights", "IFShampoo", weights=BF16),
    _ours("IFShampoo, eager", "IFShampoo", fused=False),
    _ours("IFShampoo, FP32 factors, eager", "IFShampoo", on_cpu=False, factor_dtype=FP32, fused=False),
    _ours("RFRMSProp", "diagonal"),
    _ours("RFRMSProp, BF16 state", "diagonal", state_dtype=BF16),
    _ours("RFRMSProp, BF16 state, compensated", "diagonal", state_dtype=BF16, rounding="compensated"),
    _ours("RFRMSProp, BF16 weights and state", "diagonal", state_dtype=BF16, weights=BF16),
    *(
        _ours(f"RFRMSProp, {backend.name.upper()}", "diagonal", backend=backend.name)
        for backend in BACKENDS
        if not backend.serves_matrices
    ),
    _ours("RFRMSProp, eager", "diagonal", fused=False),
)


# ---- PyTorch's ---------------------------------------------------------------------------------------------------


def muon_is_fp32(device: torch.device) -> bool:
    """Return whether Muon of torch iterates in FP32: on CPUs that multiply BF16 slowly, as ours does there."""
    return device.type == "cpu" and cpu_matmul_dtype(BF16, device) != BF16


def muon_of_torch(params: Sequence[Parameter], period: int, block: int) -> Optimizer:
    if muon_is_fp32(params[0].device):
        use_fp32()
    return torch.optim.Muon(params, lr=LR, momentum=0.9)


def of_torch(name: str, params: Sequence[Parameter], period: int, block: int, **options: Any) -> Optimizer:
    optimizer: Optimizer = getattr(torch.optim, name)(params, lr=LR, **options)
    return optimizer


TORCH = (
    Entry("AdamW, fused", "diagonal", partial(of_torch, "AdamW", fused=True), has_period=False),
    Entry("RMSprop, foreach", "diagonal", partial(of_torch, "RMSprop", foreach=True, momentum=0.9), has_period=False),
    Entry(
        "AdamW, fused, BF16 weights",
        "diagonal",
        partial(of_torch, "AdamW", fused=True),
        has_period=False,
        weights=BF16,
    ),
    Entry("SGD, fused", "diagonal", partial(of_torch, "SGD", fused=True, momentum=0.9), has_period=False),
    Entry("Muon of torch", "Muon", partial(muon_of_torch), has_period=False, cuts=False),
)


# ---- other people's ----------------------------------------------------------------------------------------------


def distributed_shampoo(
    params: Sequence[Parameter], period: int, block: int, *, solver: str, packed: bool
) -> Optimizer:
    """Meta's, in the setting nearest to the paper's: no grafting, no bias correction, momentum on the step, and no
    small dimensions merged, which would give a small matrix one giant factor."""
    package = find("distributed_shampoo")
    types = import_module("distributed_shampoo.shampoo_types")
    root = package.RootInvShampooPreconditionerConfig(
        amortized_computation_config=getattr(package, solver)(), use_symmetric_packing=packed
    )
    optimizer: Optimizer = package.DistributedShampoo(
        params,
        lr=LR,
        betas=(0.0, 0.99),
        epsilon=1e-6,
        use_bias_correction=False,
        weight_decay=0.0,
        iterate_averaging_config=types.ClassicMomentumConfig(momentum=0.9),
        grafting_config=None,
        max_preconditioner_dim=min(block, 8192),
        precondition_frequency=period,
        start_preconditioning_step=period,
        distributed_config=package.SingleDeviceDistributedConfig(target_parameter_dimensionality=2),
        preconditioner_config=root,
    )
    return optimizer


def sirfshampoo(params: Sequence[Parameter], period: int, block: int, **options: Any) -> Optimizer:
    optimizer: Optimizer = find("sirfshampoo").SIRFShampoo(
        torch.nn.ParameterList(params),
        lr=LR,
        beta2=SETTINGS["beta2"],
        alpha1=SETTINGS["momentum"],
        alpha2=SETTINGS["riemannian_momentum"],
        lam=SETTINGS["damping"],
        batch_size=SETTINGS["batch_size"],
        T=period,
        **options,
    )
    return optimizer


def soap(params: Sequence[Parameter], period: int, block: int) -> Optimizer:
    options = {"lr": LR, "precondition_frequency": period, "weight_decay": 0.0}
    optimizer: Optimizer = find("soap").SOAP(params, max_precond_dim=min(block, 8192), **options)
    return optimizer


def soap_of_pytorch_optimizer(params: Sequence[Parameter], period: int, block: int) -> Optimizer:
    options = {"lr": LR, "precondition_frequency": period, "weight_decay": 0.0}
    maker = find("pytorch_optimizer").SOAP
    optimizer: Optimizer = maker(params, max_precondition_dim=min(block, 8192), **options)
    return optimizer


def dion_muon(params: Sequence[Parameter], period: int, block: int, **options: Any) -> Optimizer:
    optimizer: Optimizer = find("dion").Muon(params, lr=LR, mu=0.9, weight_decay=0.0, **options)
    return optimizer


def _meta(name: str, solver: str, packed: bool) -> Entry:
    make = partial(distributed_shampoo, solver=solver, packed=packed)
    sizes = (1024,) if packed else (1024, WHOLE)
    return Entry(
        f"Distributed Shampoo, {name}",
        "Shampoo",
        make,
        "distributed_shampoo",
        update_at=-1,
        cuts=False,  # it would cut 2304 into 1024, 1024 and 256, where ours has three blocks of 768
        blocks=sizes,
    )


SOLVERS = {"eigh": "EigenConfig", "Newton": "CoupledNewtonConfig"}
META = tuple(
    _meta(f"{name}, {'packed' if packed else 'unpacked'}", solver, packed)
    for name, solver in SOLVERS.items()
    for packed in (False, True)
)

THEIRS = (
    *META,
    Entry("sirfshampoo", "IFShampoo", partial(sirfshampoo), "sirfshampoo", cuts=False),
    Entry(
        "sirfshampoo, BF16 factors",
        "IFShampoo",
        partial(sirfshampoo, preconditioner_dtypes=BF16),
        "sirfshampoo",
        cuts=False,
        on_cpu=False,
    ),
    Entry("SOAP", "SOAP", partial(soap), "soap", cuts=False),
    Entry("SOAP of pytorch_optimizer", "SOAP", partial(soap_of_pytorch_optimizer), "pytorch_optimizer", cuts=False),
    # torch.compile takes longer for it on a CPU than all that is measured of the others
    Entry(
        "Muon of Dion",
        "Muon",
        partial(dion_muon),
        "dion",
        has_period=False,
        cuts=False,
        on_cpu=False,
        devices=("cpu",),
    ),
    Entry(
        "Muon of Dion, Triton",
        "Muon",
        partial(dion_muon, use_triton=True),
        "dion",
        has_period=False,
        cuts=False,
        devices=("cuda",),
    ),
)

ENTRIES = {entry.name: entry for entry in (*OURS, *TORCH, *THEIRS)}
