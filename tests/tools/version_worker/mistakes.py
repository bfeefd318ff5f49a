"""Make mistakes, and record whether they raise and their error messages."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from digests import Results, message_of
from torch import Tensor, nn
from training import OPTIONS

from rootfree_kernels import GrowingInterval, IFShampoo, RFAdaGrad, RFRMSProp


def _params(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    values = (torch.ones(shape, dtype=dtype) for shape in ((4, 3), (6,)))
    return [nn.Parameter(value) for value in values]


def _option(**options: Any) -> Callable[[], Any]:
    """Return a call that creates an IFShampoo with bad options."""
    return lambda: IFShampoo(_params(), **{**OPTIONS, **options})


def _param(make: Callable[[], Any]) -> Callable[[], Any]:
    """Return a call that creates an RFRMSProp with a bad parameter."""
    return lambda: RFRMSProp([nn.Parameter(torch.ones(2)), make()], **OPTIONS)


def _stepped(optimizer: Any = IFShampoo, dtype: torch.dtype = torch.float32, **options: Any) -> torch.optim.Optimizer:
    """Return an optimizer that has taken a step."""
    params = _params(dtype)
    made = optimizer(params, **{**OPTIONS, **options})
    for param in params:
        param.grad = torch.ones_like(param)
    made.step()
    return made


def _first(optimizer: torch.optim.Optimizer) -> nn.Parameter:
    return optimizer.param_groups[0]["params"][0]


def _gradient(spoil: Callable[[nn.Parameter], None]) -> Callable[[], Any]:
    """Return a call that steps with a bad gradient."""

    def call() -> None:
        optimizer = _stepped()
        spoil(_first(optimizer))
        optimizer.step()

    return call


def _sparse(param: nn.Parameter) -> None:
    param.grad = torch.ones_like(param).to_sparse()


def _complex(param: nn.Parameter) -> None:
    param.grad, param.grad_dtype = None, None
    param.grad = torch.ones(param.shape, dtype=torch.complex64)


def _shorter(param: nn.Parameter) -> None:
    param.grad.data = torch.ones(3)


def _changed_layout(**options: Any) -> Callable[[], Any]:
    """Return a call that changes options after the first step."""

    def call() -> None:
        optimizer = _stepped(dtype=torch.bfloat16)
        optimizer.param_groups[0].update(options)
        optimizer.step()

    return call


def _changed_dtype() -> None:
    optimizer = _stepped(weight_rounding="compensated")
    for param in optimizer.param_groups[0]["params"]:
        param.data, param.grad = param.data.bfloat16(), None
        param.grad = torch.ones_like(param)
    optimizer.step()


def _load(make: Callable[[], Any]) -> Callable[[], Any]:
    """Return a call that loads a state dict that does not match the optimizer."""
    return lambda: _stepped().load_state_dict(make())


def _with_more_state() -> dict[str, Any]:
    saved = _stepped().state_dict()
    saved["state"][0]["exp_avg"] = torch.ones(4, 3)
    return saved


def _of_other_shapes() -> dict[str, Any]:
    params = [nn.Parameter(torch.ones(5, 3)), nn.Parameter(torch.ones(6))]
    optimizer = IFShampoo(params, **OPTIONS)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer.state_dict()


def _backend(name: str, **options: Any) -> Callable[[], Any]:
    """Return a call that steps with ROOTFREE_BACKEND set to a name."""

    def call() -> None:
        before = os.environ["ROOTFREE_BACKEND"]
        os.environ["ROOTFREE_BACKEND"] = name
        try:
            _stepped(**options)
        finally:
            os.environ["ROOTFREE_BACKEND"] = before

    return call


def _unknown_operator_backend() -> Tensor:
    delta = torch.ones(1, 2, 2)
    return torch.ops.rootfree.clipped_momentum([delta.clone()], [delta], None, 0.5, "none", "no-such-backend")


MISTAKES: dict[str, Callable[[], Any]] = {
    "lr below 0": _option(lr=-0.1),
    "lr tensor of two": _option(lr=torch.ones(2)),
    "no batch_size": lambda: RFRMSProp(_params(), lr=0.01),
    "batch_size of 0": _option(batch_size=0),
    "beta2 of 1": _option(beta2=1.0),
    "momentum of 1": _option(momentum=1),
    "damping not finite": _option(damping=float("inf")),
    "gamma of a half": _option(gamma=0.5),
    "gamma of RFAdaGrad": lambda: RFAdaGrad(_params(), **OPTIONS, gamma=1.0),
    "precondition_frequency of 0": _option(precondition_frequency=0),
    "capturable and T": _option(capturable=True, precondition_frequency=2),
    "foreach and fused": _option(foreach=True, fused=True),
    "unknown clip": _option(clip="spectral"),
    "unknown structure": _option(structure="diagonal"),
    "unknown rounding": _option(rounding="up"),
    "factor_dtype of fp16": _option(factor_dtype=torch.float16),
    "maximize of 1": _option(maximize=1),
    "unknown option": _option(nesterov=True),
    "max_interval of 0": lambda: GrowingInterval(0),
    "integer parameter": _param(lambda: torch.ones(3, dtype=torch.int64)),
    "complex parameter": _param(lambda: torch.ones(3, dtype=torch.complex64)),
    "sparse parameter": _param(lambda: torch.eye(4).to_sparse()),
    "a number as parameter": _param(lambda: 1.0),
    "a parameter twice": lambda: RFRMSProp(2 * _params(), **OPTIONS),
    "a group that is no dict": lambda: _stepped().add_param_group([nn.Parameter(torch.ones(3))]),
    "sparse gradient": _gradient(_sparse),
    "complex gradient": _gradient(_complex),
    "gradient of another shape": _gradient(_shorter),
    "bad option between steps": _changed_layout(momentum=2.0),
    "other rounding after the first step": _changed_layout(rounding="compensated"),
    "other blocks after the first step": _changed_layout(max_preconditioner_dim=2),
    "other dtype after the first step": _changed_dtype,
    "state dict of a model": _load(lambda: nn.Linear(3, 2).state_dict()),
    "state dict of another optimizer": _load(lambda: _stepped(RFRMSProp).state_dict()),
    "state dict of other shapes": _load(_of_other_shapes),
    "state dict of other groups": _load(lambda: IFShampoo(_params()[:1], **OPTIONS).state_dict()),
    "state dict with an entry too many": _load(_with_more_state),
    "unknown backend": _backend("no-such-backend"),
    "backend cuda": _backend("cuda"),
    "backend of fp64": _backend("cpp", dtype=torch.float64),
    "fused eager": _backend("eager", fused=True),
    "fused fp64": _backend("", dtype=torch.float64, fused=True),
    "unknown backend of an operator": _unknown_operator_backend,
}


def run_all(results: Results) -> None:
    """Make all mistakes. Record whether each raises, and its error message separately."""
    with results.case("mistakes") as entries:
        for name, call in MISTAKES.items():
            try:
                call()
            except Exception as error:
                entries[name] = "refused"
                results.messages[name] = message_of(error)
            else:
                entries[name] = "accepted"
