"""Compile without a GPU what a run on one will launch:

    python tests/fake_gpu python -m bench.gpu_run.warm_cache [--peers]

It steps optimizers with every combination of options that chooses another kernel. On the fake GPU Triton's keys are
those of a real launch. The compile gate's keys differ (in the alignment of arguments), so its results cannot be used.
--peers compiles what other people's optimizers launch, instead.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch.nn import Parameter

from bench.common.gpt import GPT2
from bench.common.optimizers import dion_muon
from bench.common.peers import why_missing
from rootfree_kernels import RECIPE, IFShampoo, RFRMSProp
from rootfree_kernels.ops.backends import choose
from rootfree_kernels.rounding import ROUNDINGS
from rootfree_kernels.triton_kernels.launch import num_compilations

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FP32, BF16, FP16)

SMALL = ((24, 16), (9, 5))
"""Matrices for the small tile, aligned and not."""

LARGE = ((136, 136), (136, 72), (129, 136), (130, 70))
"""Matrices for the large tile; in the third only rows are not a multiple of 8."""

VECTORS = ((70,), (3000,), (64, 72))
"""Parameters of diagonal steps, aligned and not."""

Options = Mapping[str, Any]

RULES: tuple[Options, ...] = (
    {"clip": "frobenius", "damping": 1e-4},
    {"clip": "frobenius", "damping": 1e-4, "precondition_frequency": 3},
    {"clip": "frobenius", "damping": 0.0},
    {"clip": "row_sum", "damping": 1e-4},
    RECIPE,
)
"""Options that choose another kernel of the update or of the step of matrices; no kernel knows all of them."""


def parameters(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[Parameter]:
    """Return parameters of zeros with gradients of zeros."""
    params = [Parameter(torch.zeros(shape, dtype=dtype, device="cuda")) for shape in shapes]
    for param in params:
        param.grad = torch.zeros_like(param)
    return params


def roundings() -> Iterator[tuple[torch.dtype, Options]]:
    """Yield the dtype of the weights, and the options of how weights and state are stored."""
    for dtype, rounding, weight_rounding, state in product(DTYPES, ROUNDINGS, ROUNDINGS, (FP32, BF16)):
        if dtype == BF16 or weight_rounding == "stochastic":  # only BF16 weights have a rounding
            yield dtype, {"rounding": rounding, "weight_rounding": weight_rounding, "state_dtype": state}


def step_if_shampoo() -> None:
    """Take two steps with every combination of options, an update and another one."""
    for (dtype, stored), rule, shapes in product(roundings(), RULES, (SMALL, LARGE)):
        optimizer = IFShampoo(parameters([*shapes, VECTORS[0]], dtype), lr=1e-3, batch_size=4, **stored, **rule)
        for _ in range(2):
            optimizer.step()


def step_diagonal() -> None:
    """Take a diagonal step with every combination of options, by the paper's rule and by the recipe's."""
    recipe = {**RECIPE, "structure": "elementwise", "update_norm": "rms"}
    for dtype, stored in roundings():
        RFRMSProp(parameters(VECTORS, dtype), lr=1e-3, batch_size=4, **stored).step()
        IFShampoo(parameters(VECTORS, dtype), lr=1e-3, batch_size=4, **stored, **recipe).step()


def step_clipped_momentum() -> None:
    """Call the operator that no optimizer calls by itself."""
    clipped_momentum = choose(torch.device("cuda"), FP32).operators.clipped_momentum
    for dtype, clip in product((FP32, BF16), ("frobenius", "row_sum", "none")):
        momentum = torch.zeros(2, 64, 64, dtype=dtype, device="cuda")
        clipped_momentum([momentum], [momentum.float()], None, 0.5, clip)


def step_peers() -> None:
    """Take a step of Dion's Muon on GPT-2's matrices: it compiles over a hundred kernels and keeps the fastest."""
    if reason := why_missing("dion"):
        print(f"Dion's Muon: {reason}")
        return
    dion_muon(parameters(sorted(set(GPT2().matrices())), FP32), 1, 1024, use_triton=True).step()


def main() -> int:
    """Compile, and return the exit status: 1 if something could not be launched."""
    failed = 0
    ours = (step_if_shampoo, step_diagonal, step_clipped_momentum)
    for step in (step_peers,) if sys.argv[1:] == ["--peers"] else ours:
        try:
            step()
        except Exception as error:  # the rest is compiled nevertheless
            print(f"✗ {step.__name__}: {type(error).__name__}: {error}")
            failed += 1
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
    print(f"{num_compilations()} kinds of launches")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
