"""Batches for the operators of IF-Shampoo in Triton.

In Triton's interpreter, batches also have FP32 factors, whose products show errors of 1e-5. A GPU would use TF32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st

from tests.calls.device import DEVICE, module_of
from tests.calls.kron import LAYOUTS, ONE, THREE
from tests.calls.operators import dispatched, through
from tests.calls.tensors import BF16, CLIPS, FP16, FP32, ROUNDINGS
from tests.triton.calls import triton_batch

FACTOR_DTYPES = [BF16] if DEVICE.type == "cuda" else [FP32, BF16]


STEMS = ("gather", "start", "norms", "factor", "whiten", "apply", "step")
MODULES = [module_of(stem) for stem in (*(f"kron_{stem}" for stem in STEMS), "products")]


STACKED = ((0, 2, 0, 1),)
"""One tensor with two blocks, one above the other."""
INSIDE = ((3, 1, 5, 1),)
"""One tensor with one block. Its first rows and columns belong to no block."""
PLACES = (ONE, STACKED, INSIDE, ((8, 1, 16, 2), (0, 1, 0, 1)), THREE)
SMALL_SIDES = [(1, 1), (1, 9), (5, 4), (8, 16), (13, 31), (13, 24), (64, 24)]
LARGE_SIDES = [(17, 130), (64, 65), (72, 128), (130, 5)]
CUTS = [*product(SMALL_SIDES, PLACES), *product(LARGE_SIDES, [ONE, INSIDE])]
DTYPES = st.sampled_from([FP32, BF16, FP16])
BATCHES = st.builds(
    lambda cut, **rest: triton_batch(*cut[0], cut[1], **rest),
    st.sampled_from(CUTS),
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=5).map(tuple),
    dtype=st.sampled_from(FACTOR_DTYPES),
    grad=DTYPES,
    param=DTYPES,
    buffer=st.sampled_from([FP32, BF16]),
    rounding=st.sampled_from(ROUNDINGS),
    weight_rounding=st.sampled_from(ROUNDINGS),
    clip=st.sampled_from(CLIPS),
    maximize=st.booleans(),
    options=st.fixed_dictionaries(
        {
            "batch_size": st.sampled_from([1, 7.5]),
            "beta2": st.sampled_from([0.0, 0.1, 0.9]),
            "riemannian_momentum": st.sampled_from([0, 0.6]),
            "damping": st.sampled_from([0, 0.2]),
            "gamma": st.sampled_from([0, 1]),
        }
    ),
    descent=st.fixed_dictionaries(
        {
            "momentum": st.sampled_from([0, 0.9]),
            "weight_decay": st.sampled_from([0, 0.1]),
            "decoupled": st.booleans(),
        }
    ),
    lr=st.sampled_from([0.0, 0.5]),
    grad_scale=st.sampled_from([None, 8.0]),
    found_inf=st.sampled_from([None, 0.0]),
    seed=st.integers(0, 99),
)
ANY_BATCH = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),  # without shrinking, which takes minutes in the interpreter
)
CALLS = st.sampled_from([through("triton"), dispatched("triton")])
PER_PROGRAM = st.sampled_from([1 << 15, 256])
"""Elements of a block per program of the gather: the kernel's default, and a small number for many partial sums."""

LARGE = triton_batch(136, 136, INSIDE, LAYOUTS[:3], grad=BF16, param=BF16, rounding="compensated", clip="row_sum")
ALIGNED = triton_batch(136, 64, rounding="stochastic", weight_rounding="compensated", param=BF16)
ODD_ROWS = triton_batch(137, 72, STACKED, rounding="compensated", weight_rounding="stochastic", param=BF16, grad=BF16)


@contextmanager
def elements_per_program(numbers: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module_of("sizes"), "ELEMENTS_PER_PROGRAM", numbers)
        yield
