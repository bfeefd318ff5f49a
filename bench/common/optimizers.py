"""The registry of optimizers that are compared, with the settings that make the comparison fair.

All of them step the same matrices with the same gradients, in FP32 unless the name says otherwise. Learning rates are
small, and momentum is 0.9 if there is one, so that times and memory include it. Two numbers decide the cost of a
second-order step, and every entry takes them: the longest side of a block, and T, the number of steps between updates
of the factors (or of their roots).
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

from bench.common.muon import make_muon
from bench.common.peers import find
from rootfree_kernels import RECIPE, IFShampoo, RFRMSProp
from rootfree_kernels.ops.backends import BACKENDS, why_not

LR = 1e-4
SETTINGS = {"beta2": 0.2, "momentum": 0.9, "riemannian_momentum": 0.5, "damping": 1e-4, "batch_size": 16}
WHOLE = 1 << 20
"""The longest side of a block with which no weight is cut."""

FP32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Entry:
    """One optimizer with one setting of everything but T and the block."""

    name: str
    family: str
    """"IFShampoo", "Shampoo", "SOAP", "Muon" or "diagonal"."""

    make: partial[Optimizer]
    """Called with parameters, T and the longest side of a block. Optimizers without T or blocks ignore these."""

    peer: str = ""
    """The module that it comes from, "" for PyTorch and this package."""

    update_at: int = 0
    """The step, counted from 0, of every T in which the factors are updated or their roots taken."""

    cuts: bool = True
    """Whether it cuts long sides by itself, and evenly. If not, it gets the blocks as weights of their own."""

    blocks: tuple[int, ...] = (1024, WHOLE)
    on_cpu: bool = True
    """Whether it takes part without a GPU unless it is asked for."""

    devices: tuple[str, ...] = ("cpu", "cuda")
    """The types of devices on which it can take part."""

    weights: torch.dtype = FP32
    """The dtype of weights and gradients."""

    backend: str = ""
    """The backend of ours that is asked for, "" for the best."""

    @property
    def has_period(self) -> bool:
        """Return whether T makes a difference."""
        return self.family not in ("diagonal", "Muon")

    @property
    def is_ours(self) -> bool:
        return not self.peer and self.name.startswith(("IFShampoo", "RFRMSProp"))

    def option(self, name: str) -> Any:
        """Return the value that the entry gives an option of the optimizer, None if it gives none."""
        return self.make.keywords.get(name)

    def why_left_out(self, device: torch.device) -> str | None:
        """Return why the backend that the entry asks for was not built or cannot run here, or None.

        An extension that was built and is broken is no reason: the first step of the entry raises the error.
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


USUAL_RECIPE = {"lr": 0.045, **RECIPE}
LEAST_MEMORY = {"packed_momentum": True, "state_dtype": BF16, "cache_products": False}
"""Options of IFShampoo that save memory: with BF16 factors 8 + 2/n bytes a weight of an n × n block."""

ENTRY_OPTIONS = ("on_cpu", "devices", "weights", "backend", "blocks")


def _ours(name: str, **options: Any) -> Entry:
    """Return an entry of ours with options of `Entry` and of the optimizer, by default in blocks of 1024 only."""
    about = {option: options.pop(option) for option in ENTRY_OPTIONS if option in options}
    is_shampoo = name.startswith("IFShampoo")
    make = partial(if_shampoo if is_shampoo else rf_rmsprop, **options)
    return Entry(name, "IFShampoo" if is_shampoo else "diagonal", make, **{"blocks": (1024,), **about})


OURS = (
    _ours("IFShampoo", blocks=(1024, WHOLE)),
    _ours("IFShampoo, FP32 factors", blocks=(1024, WHOLE), factor_dtype=FP32),
    _ours("IFShampoo, recipe", **USUAL_RECIPE),
    _ours("IFShampoo, recipe, FP32 factors", devices=("cpu",), factor_dtype=FP32, **USUAL_RECIPE),
    _ours("IFShampoo, FP64 factors", on_cpu=False, factor_dtype=torch.float64),
    _ours("IFShampoo, compensated", rounding="compensated"),
    _ours("IFShampoo, nearest", on_cpu=False, rounding="nearest"),
    _ours("IFShampoo, least memory", **LEAST_MEMORY),
    _ours("IFShampoo, BF16 weights", weights=BF16),
    _ours("IFShampoo, eager", fused=False),
    _ours("IFShampoo, FP32 factors, eager", on_cpu=False, factor_dtype=FP32, fused=False),
    _ours("RFRMSProp"),
    _ours("RFRMSProp, BF16 state", state_dtype=BF16),
    _ours("RFRMSProp, BF16 state, compensated", state_dtype=BF16, rounding="compensated"),
    _ours("RFRMSProp, BF16 weights and state", state_dtype=BF16, weights=BF16),
    *(
        _ours(f"RFRMSProp, {backend.name.upper()}", backend=backend.name, devices=("cuda",))
        for backend in BACKENDS
        if not backend.serves_matrices
    ),
    _ours("RFRMSProp, eager", fused=False),
)


# ---- PyTorch's ---------------------------------------------------------------------------------------------------


def of_torch(name: str, params: Sequence[Parameter], period: int, block: int, **options: Any) -> Optimizer:
    optimizer: Optimizer = getattr(torch.optim, name)(params, **{"lr": LR, **options})
    return optimizer


def muon_of_torch(params: Sequence[Parameter], period: int, block: int) -> Optimizer:
    return make_muon(params, lr=LR, momentum=0.9)


ADAMW = partial(of_torch, "AdamW", fused=True)
TORCH = (
    Entry("AdamW, fused", "diagonal", ADAMW),
    Entry("RMSprop, foreach", "diagonal", partial(of_torch, "RMSprop", foreach=True, momentum=0.9)),
    Entry("AdamW, fused, BF16 weights", "diagonal", ADAMW, weights=BF16),
    Entry("SGD, fused", "diagonal", partial(of_torch, "SGD", fused=True, momentum=0.9)),
    Entry("Muon of torch", "Muon", partial(muon_of_torch), cuts=False),
)


# ---- other people's ----------------------------------------------------------------------------------------------


def distributed_shampoo(
    params: Sequence[Parameter], period: int, block: int, *, solver: str, packed: bool
) -> Optimizer:
    """Make Meta's in the setting nearest to the paper's: no grafting, no bias correction, momentum on the step.

    Small dimensions are not merged, which would give a small matrix one giant factor.
    """
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


def soap(params: Sequence[Parameter], period: int, block: int, *, module: str, limit: str) -> Optimizer:
    """Make the SOAP of a module, where the option `limit` is the longest side of a factor."""
    options = {"lr": LR, "precondition_frequency": period, "weight_decay": 0.0, limit: min(block, 8192)}
    optimizer: Optimizer = find(module).SOAP(params, **options)
    return optimizer


def dion_muon(params: Sequence[Parameter], period: int, block: int, **options: Any) -> Optimizer:
    optimizer: Optimizer = find("dion").Muon(params, lr=LR, mu=0.9, weight_decay=0.0, **options)
    return optimizer


def _theirs(name: str, family: str, peer: str, make: Any, **about: Any) -> Entry:
    """Return an entry of a peer, which gets blocks as weights of their own."""
    return Entry(name, family, make, peer, cuts=False, **about)


def _meta(name: str, solver: str, packed: bool) -> Entry:
    """Return a setting of Meta's, which would cut 2304 into 1024, 1024 and 256, and ours into three blocks of 768."""
    name = f"Distributed Shampoo, {name}, {'packed' if packed else 'unpacked'}"
    make = partial(distributed_shampoo, solver=solver, packed=packed)
    blocks = (1024,) if packed else (1024, WHOLE)
    return _theirs(name, "Shampoo", "distributed_shampoo", make, update_at=-1, blocks=blocks)


SIRF_BF16 = partial(sirfshampoo, preconditioner_dtypes=BF16)
SOAP_AUTHORS = partial(soap, module="soap", limit="max_precond_dim")
SOAP_OTHER = partial(soap, module="pytorch_optimizer", limit="max_precondition_dim")
DION_TRITON = partial(dion_muon, use_triton=True)
THEIRS = (
    _meta("eigh", "EigenConfig", packed=False),
    _meta("eigh", "EigenConfig", packed=True),
    _meta("Newton", "CoupledNewtonConfig", packed=False),
    _meta("Newton", "CoupledNewtonConfig", packed=True),
    _theirs("sirfshampoo", "IFShampoo", "sirfshampoo", partial(sirfshampoo)),
    _theirs("sirfshampoo, BF16 factors", "IFShampoo", "sirfshampoo", SIRF_BF16, on_cpu=False),
    _theirs("SOAP", "SOAP", "soap", SOAP_AUTHORS),
    _theirs("SOAP of pytorch_optimizer", "SOAP", "pytorch_optimizer", SOAP_OTHER),
    # torch.compile takes longer for it on a CPU than all measurements of the others
    _theirs("Muon of Dion", "Muon", "dion", partial(dion_muon), on_cpu=False, devices=("cpu",)),
    _theirs("Muon of Dion, Triton", "Muon", "dion", DION_TRITON, devices=("cuda",)),
)

ENTRIES = {entry.name: entry for entry in (*OURS, *TORCH, *THEIRS)}
