"""The C++ operators in PyTorch: schemas, versions of tensors, and inference mode."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.library import infer_schema, opcheck

from rootfree_kernels import eager
from tests.calls.cpu import needs_cpp
from tests.calls.kron import KEPT, LAYOUTS, PLACES, ROOT_FREE, WHITENED
from tests.calls.operators import STEMS, dispatched, operator
from tests.calls.tensors import BF16
from tests.cpp.calls import cpp_batch, cpp_call, scaled_call

pytestmark = needs_cpp


@pytest.mark.parametrize(
    ("rule", "stays", "also_changes"),
    [
        ({}, set(), {"p_c", "p_k"}),
        (ROOT_FREE, {"update_norms"}, {"p_c", "p_k", "curvature"}),
        (WHITENED, {"update_norms"}, {"curvature"}),
    ],
    ids=["paper", "root_free", "whitened"],
)
def test_changed_tensors_get_a_new_version(rule, stays, also_changes):
    batch = cpp_batch(16, 8, PLACES[2], param=BF16, rounding="compensated", weight_rounding="compensated", dtype=BF16)
    batch.rule = rule
    t = batch.tensors()
    before = {name: x._version for name, x in t.named().items()}
    batch.run(t)
    changed = {name.split()[0] for name, version in before.items() if t.named()[name]._version > version}
    same = {name.split()[0] for name, version in before.items() if t.named()[name]._version == version}
    assert changed == {*KEPT, "skipped"} - {"curvature"} | also_changes
    assert same == {"grads", "seeds", "steps"} | stays


def test_inference_tensors_can_be_stepped():
    batch = cpp_batch(
        16, 8, PLACES[2], LAYOUTS, param=BF16, rounding="compensated", weight_rounding="compensated", dtype=BF16
    )
    with torch.inference_mode():
        t = batch.run()
    assert t.c.is_inference() and t.bytes() == batch.run().bytes()


@pytest.mark.parametrize(
    "stem", ["rf_rmsprop", "scaled_rmsprop", "kron_gather", "kron_factor", "kron_products", "kron_step"]
)
def test_schemas_of_the_extension_match_the_public_operators(stem):
    """Compare the names, order, types and mutability of all arguments."""
    native = getattr(torch.ops.rootfree_native, stem).default._schema
    if stem in STEMS:
        public, arguments = operator(stem)._schema, slice(-1)  # the last is the backend
    else:
        public = torch._C.parse_schema(f"{stem}{infer_schema(getattr(eager, stem), mutates_args=())}")
        arguments = slice(None)

    def described(schema: Any) -> list[Any]:
        changes = [x.alias_info is not None and x.alias_info.is_write for x in schema.arguments]
        return [(x.name, str(x.type), y) for x, y in zip(schema.arguments, changes, strict=True)]

    assert described(native) == described(public)[arguments]
    assert [str(x.type) for x in native.returns] == [str(x.type) for x in public.returns]


@pytest.mark.parametrize(
    "batch",
    [
        cpp_batch(5, 4, PLACES[2]),
        cpp_batch(5, 4, PLACES[2], dtype=BF16, matmul=BF16, param=BF16, rounding="compensated", keeps_products=False),
        cpp_batch(5, 4, PLACES[2], rule=ROOT_FREE),
        cpp_batch(5, 4, PLACES[2], dtype=BF16, matmul=BF16, param=BF16, rounding="compensated", rule=WHITENED),
    ],
    ids=["fp32", "bf16", "root_free", "whitened"],
)
def test_the_public_operators_pass_opcheck(batch):
    def checked(stem: str, *args: Any) -> Any:
        if stem in STEMS:
            opcheck(operator(stem), (*args, "cpp"))
        return dispatched("cpp")(stem, *args)

    batch = replace(batch, weight_rounding=batch.rounding, found_inf=0.0, grad_scale=8.0)
    batch.run(run=checked)
    momenta = [torch.ones(2, n, n, dtype=batch.dtype) for n in (3, 5)]
    opcheck(operator("clipped_momentum"), (momenta, [m.float() for m in momenta], None, 0.5, "row_sum", "cpp"))
    modes = (batch.param, batch.param, batch.dtype, batch.dtype, batch.rounding, "stochastic")
    call = cpp_call([(3, 2), (), (4,)], LAYOUTS[:1], *modes, grad_scale=8.0)
    opcheck(operator("rf_rmsprop"), (*call.arguments(call.tensors()[0]), "cpp"))
    scaled = scaled_call([(3, 2), (), (4,)], LAYOUTS[:1], *modes, grad_scale=8.0, rule=batch.rule)
    opcheck(operator("scaled_rmsprop"), (*scaled.arguments(scaled.tensors()[0]), "cpp"))
