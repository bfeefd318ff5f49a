"""Results are bitwise equal under every instruction set."""

from __future__ import annotations

from hashlib import sha256
from itertools import product

import torch

from tests.calls.cpu import needs_cpp, under_other_instruction_sets
from tests.calls.kron import MIXED, ROOT_FREE, WHITENED
from tests.calls.operators import call, through
from tests.calls.rf_rmsprop import bits
from tests.calls.tensors import BF16, CLIPS, FP16, FP32, ROUNDINGS, drawn
from tests.cpp.calls import LAYOUTS, cpp_call, scaled_call
from tests.cpp.kron_batches import HALVED, assert_update_matches_reference, steps_of_exact_batches
from tests.cpp.rounding_cases import every_pattern, rounding_step, to_be_rounded

pytestmark = needs_cpp


def digest_of_elements() -> str:
    """Return a digest of steps in every dtype and mode, of conversions of 16-bit values, and of clipped momenta."""
    results = []
    for param, square, buffer in product([FP32, BF16, FP16], [FP32, BF16], [FP32, BF16]):
        for number, modes in enumerate(product(ROUNDINGS, ROUNDINGS)):
            options = {"decoupled": number % 2 == 0, "maximize": number % 3 == 0}
            grad = (param, FP32)[number % 2]
            cpp = cpp_call(
                [1031, 70], LAYOUTS[:1], param, grad, square, buffer, *modes, options, grad_scale=3.0, steps=number
            )
            lists = cpp.tensors()[0]
            lists["grad"][0][number] = torch.inf
            results.append(bits(cpp.run(lists)))
    for dtype, rounding, rule in product([FP32, BF16], ROUNDINGS, [WHITENED, ROOT_FREE, *MIXED]):
        kinds = (dtype, FP32, dtype, dtype, rounding, rounding)
        scaled = scaled_call([1031, 70], LAYOUTS[:1], *kinds, grad_scale=3.0, rule=rule)
        results.append(bits(scaled.run()))
    for dtype in (BF16, FP16):
        for lr, gradient in ((0.0, torch.ones(2**16)), (1.0, to_be_rounded(dtype))):
            cpp, lists = rounding_step(dtype, lr, gradient)
            if lr == 0:
                lists["param"][0].copy_(every_pattern(dtype))
            results.append(bits(cpp.run(lists)))
    for dtype, clip in product([FP32, BF16], CLIPS):
        generator = torch.Generator().manual_seed(0)
        numbers = [drawn((2, n, n), generator) / 2 for n in (130, 67, 130, 67)]
        momenta, deltas = [x.to(dtype) for x in numbers[:2]], numbers[2:]
        clips = call("cpp", "clipped_momentum", momenta, deltas, None, 0.3, clip)
        results.append(bits({"m": momenta, "clips": [clips]}))
    return sha256(repr(results).encode()).hexdigest()


def test_result_does_not_depend_on_the_instruction_set():
    others = under_other_instruction_sets(__name__, "digest_of_elements()")
    assert others or torch.backends.cpu.get_cpu_capability() == "DEFAULT"
    assert set(others.values()) <= {digest_of_elements()}, others


def digest_of_matrices() -> str:
    """Return a digest of matrix steps with exact products.

    Large products may use another library under another instruction set, so these are checked against the reference.
    """
    for batch in HALVED:
        assert_update_matches_reference(batch, through("cpp"))
    return sha256(repr(steps_of_exact_batches()).encode()).hexdigest()


def test_matrix_steps_with_exact_products_do_not_depend_on_the_instruction_set():
    others = under_other_instruction_sets(__name__, "digest_of_matrices()")
    assert set(others.values()) <= {digest_of_matrices()}, others
