"""Compiles, without a GPU, what a run on one will launch:

    python tests/fake_gpu python -m bench.gpu_run.warm_cache [--peers]

It steps optimizers with every combination of options that chooses another kernel. On the fake GPU Triton's keys are
those of a real launch; what the compile gate caches has other keys (of its arguments' alignment) and is never found.
--peers compiles what other people's optimizers launch, instead.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch.nn import Parameter

from bench.common.gpt2 import GPT2
from bench.common.optimizers import dion_muon
from bench.common.peers import why_missing
from bench.common.workloads import gpt2_matrices
from rootfree_kernels import IFShampoo, RFRMSProp
from rootfree_kernels.ops.backends import choose
from rootfree_kernels.rounding import ROUNDINGS
from rootfree_kernels.triton_kernels.launch import num_compilations

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FP32, BF16, FP16)

SMALL = ((24, 16), (9, 5))
"""Matrices for the small tile, aligned and not."""

LARGE = ((136, 136), (136, 72), (129, 136), (130, 70))
"""Matrices for the large tile; in the third only rows are not a multiple of 8."""

VECTOR = (70,)


def parameters(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[Parameter]:
    """Return parameters of zeros with gradients of zeros."""
    params = [Parameter(torch.zeros(shape, dtype=dtype, device="cuda")) for shape in shapes]
    for param in params:
        param.grad = torch.zeros_like(param)
    return params


def if_shampoo_options() -> Iterator[tuple[torch.dtype, dict[str, Any]]]:
    """Yield the dtype of the weights and the options that together choose every kernel of a batch."""
    choices = product(DTYPES, ROUNDINGS, ROUNDINGS, (FP32, BF16), ("frobenius", "row_sum"), (1e-4, 0.0), (1, 3))
    for dtype, rounding, weight_rounding, state, clip, damping, period in choices:
        if weight_rounding != "stochastic" and dtype != BF16:
            continue  # only BF16 weights have a rounding
        if (clip, damping) == ("row_sum", 0.0) or (period == 3 and (clip == "row_sum" or damping == 0.0)):
            continue  # no kernel knows all of these
        yield (
            dtype,
            {
                "rounding": rounding,
                "weight_rounding": weight_rounding,
                "state_dtype": state,
                "clip": clip,
                "damping": damping,
                "precondition_frequency": period,
            },
        )


def step_if_shampoo() -> None:
    """Take two steps with every combination, an update and another one."""
    for (dtype, options), shapes in product(if_shampoo_options(), (SMALL, LARGE)):
        optimizer = IFShampoo(parameters([*shapes, VECTOR], dtype), lr=1e-3, batch_size=4, **options)
        for _ in range(2):
            optimizer.step()


def step_rf_rmsprop() -> None:
    """Take a step with every combination, of aligned tensors and others."""
    for dtype, rounding, weight_rounding, state in product(DTYPES, ROUNDINGS, ROUNDINGS, (FP32, BF16)):
        options = {"rounding": rounding, "weight_rounding": weight_rounding, "state_dtype": state}
        RFRMSProp(parameters([(3000,), (64, 72)], dtype), lr=1e-3, batch_size=4, **options).step()


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
    dion_muon(parameters(sorted(set(gpt2_matrices(GPT2()))), FP32), 1, 1024, use_triton=True).step()


def main() -> int:
    """Compile, and return the exit status: 1 where something could not be launched."""
    failed = 0
    ours = (step_if_shampoo, step_rf_rmsprop, step_clipped_momentum)
    for step in (step_peers,) if sys.argv[1:] == ["--peers"] else ours:
        try:
            step()
        except Exception as error:  # what else there is to compile is compiled
            print(f"✗ {step.__name__}: {type(error).__name__}: {error}")
            failed += 1
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
    print(f"{num_compilations()} kinds of launches")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
