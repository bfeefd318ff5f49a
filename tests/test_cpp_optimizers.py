"""The C++ operators as PyTorch sees them, schemas, versions, inference; and the optimizers on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import OPTIONS, assert_same_bits, gradients, snapshot
from cpp_calls import Call, needs_cpp
from kron_batch import BF16, FP16, FP32, FP64, KEPT, LAYOUTS, PLACES, Batch, dispatched
from tolerances import RELATIVE_ERROR
from torch import Tensor, nn
from torch.library import infer_schema, opcheck

from rootfree_kernels import IFShampoo, RFRMSProp, eager, ops
from rootfree_kernels.rounding import join_compensated

pytestmark = needs_cpp

# ---- the operators as such -----------------------------------------------------------------------------------------


def test_what_changes_says_so_to_autograd():
    batch = Batch(16, 8, PLACES[2], param=BF16, rounding="compensated", weight_rounding="compensated", dtype=BF16)
    t = batch.tensors()
    before = {name: x._version for name, x in t.named().items()}
    batch.run(t)
    changed = {name.split()[0] for name, version in before.items() if t.named()[name]._version > version}
    same = {name.split()[0] for name, version in before.items() if t.named()[name]._version == version}
    assert changed == {*KEPT, "p_c", "p_k", "skipped"} and same == {"grads", "seeds", "steps"}


def test_inference_tensors_are_stepped_like_others():
    batch = Batch(
        16, 8, PLACES[2], LAYOUTS, param=BF16, rounding="compensated", weight_rounding="compensated", dtype=BF16
    )
    with torch.inference_mode():
        t = batch.run()
    assert t.c.is_inference() and t.bytes() == batch.run().bytes()


@pytest.mark.parametrize("stem", ["kron_gather", "kron_factor", "kron_products", "kron_step"])
def test_the_extension_s_schemas_are_those_of_the_public_operators(stem):
    """Names, order and types of arguments, and which of them are changed."""
    native = getattr(torch.ops.rootfree_native, stem).default._schema
    if hasattr(ops, stem):
        public, arguments = getattr(torch.ops.rootfree, stem).default._schema, slice(-1)  # the last is the backend
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
        Batch(5, 4, PLACES[2]),
        Batch(5, 4, PLACES[2], dtype=BF16, matmul=BF16, param=BF16, rounding="compensated", keeps_products=False),
    ],
    ids=["fp32", "bf16"],
)
def test_the_public_operators_pass_opcheck(batch):
    def checked(stem: str, *args: Any) -> Any:
        if hasattr(ops, stem):
            opcheck(getattr(ops, stem), (*args, "cpp"))
        return dispatched(stem, *args)

    batch = replace(batch, weight_rounding=batch.rounding, found_inf=0.0, grad_scale=8.0)
    batch.run(call=checked)
    momenta = [torch.ones(2, n, n, dtype=batch.dtype) for n in (3, 5)]
    opcheck(ops.clipped_momentum, (momenta, [m.float() for m in momenta], None, 0.5, "row_sum", "cpp"))
    modes = (batch.param, batch.param, batch.dtype, batch.dtype, batch.rounding, "stochastic")
    call = Call([5], [0], *modes, shapes=[(3, 2), (), (4,)], grad_scale=8.0)
    opcheck(ops.rf_rmsprop, (*call.arguments(call.tensors()[0]), "cpp"))


# ---- the optimizers ------------------------------------------------------------------------------------------------

SHAPES = [(24, 16), (24, 16), (8, 3, 2, 2), (24,), ()]
COMPENSATED = {"rounding": "compensated", "weight_rounding": "compensated"}


@pytest.fixture(autouse=True)
def backend_unset(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("ROOTFREE_BACKEND", raising=False)
    yield


def start(optimizer: Any, dtype: torch.dtype, **options: Any) -> tuple[list[nn.Parameter], Any]:
    params = [nn.Parameter(x) for x in gradients(SHAPES, -1, dtype)]
    return params, optimizer(params, **{**OPTIONS, **options})


def run(params: list[nn.Parameter], optimizer: Any, step: int) -> None:
    for param, grad in zip(params, gradients(SHAPES, step, params[0].dtype), strict=True):
        param.grad = grad
    optimizer.step()


def values(optimizer: Any) -> dict[str, Tensor]:
    """A snapshot with compensated pairs joined to their FP32 values."""
    shot = snapshot(optimizer)
    for name in [name for name in shot if "residual" in name]:
        residual, value = shot.pop(name), name.replace("weight_residual", "weight").replace("residual", "factor")
        shot[value] = join_compensated(shot[value], residual)
    return shot


@pytest.mark.parametrize(
    ("optimizer", "dtype", "options", "tolerance"),
    [
        pytest.param(IFShampoo, FP32, {"factor_dtype": FP32}, FP32, id="shampoo-fp32"),
        pytest.param(IFShampoo, FP32, {"clip": "row_sum", "state_dtype": BF16}, BF16, id="shampoo-bf16-factors"),
        pytest.param(IFShampoo, BF16, COMPENSATED, BF16, id="shampoo-compensated"),
        pytest.param(
            *(IFShampoo, FP16, {"precondition_frequency": 3, "max_preconditioner_dim": 10, "maximize": True}, BF16),
            id="shampoo-T3-tiles",
        ),
        pytest.param(
            *(IFShampoo, FP32, {"precondition_frequency": 3, "max_preconditioner_dim": 10, "factor_dtype": FP32}, FP32),
            id="shampoo-T3-tiles-fp32",
        ),
        pytest.param(RFRMSProp, FP32, {}, FP32, id="rmsprop-fp32"),
        pytest.param(RFRMSProp, BF16, {**COMPENSATED, "decoupled_weight_decay": True}, FP32, id="rmsprop-compensated"),
        pytest.param(RFRMSProp, FP16, {"maximize": True}, FP32, id="rmsprop-fp16"),
    ],
)
def test_steps_are_those_of_eager_pytorch(optimizer, dtype, options, tolerance):
    """Errors do not add up: before each step eager PyTorch's state is copied, hidden from autograd, so that products
    which are kept stay."""
    twins = [start(optimizer, dtype, **options, fused=fused) for fused in (False, None)]
    for step in range(5):
        for source, target in zip(*(params for params, _ in twins), strict=True):
            target.data.copy_(source)
            for name, value in twins[1][1].state.get(target, {}).items():
                value.data.copy_(twins[0][1].state[source][name])
        before = values(twins[0][1])
        for twin in twins:
            run(*twin, step)
        expected, actual = (values(twin[1]) for twin in twins)
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            moved = (value.double() - before.get(name, torch.zeros(()))).norm()
            error = (actual[name].double() - value.double()).norm()
            stored = torch.finfo(value.dtype).eps * value.double().norm() if value.is_floating_point() else 0
            assert error <= RELATIVE_ERROR[tolerance] * moved + stored, f"{name} in step {step}"


@pytest.mark.parametrize(
    ("dtype", "fused", "expected"),
    [
        *((dtype, None, "cpp") for dtype in (FP32, BF16, FP16)),
        *((FP64, None, "eager"), (FP32, False, "eager"), (BF16, True, "cpp")),
    ],
    ids=str,
)
@pytest.mark.parametrize("optimizer", [IFShampoo, RFRMSProp])
def test_a_cpu_is_served_by_this_backend_where_it_can_be(optimizer, dtype, fused, expected, monkeypatch):
    called, implementation = set(), ops.implementation
    monkeypatch.setattr(ops, "implementation", lambda name, stem: called.add(name) or implementation(name, stem))
    run(*start(optimizer, dtype, fused=fused), 0)
    assert called == {expected}


@pytest.mark.parametrize("frequency", [1, 3])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(dtype, frequency):
    options = {"precondition_frequency": frequency, "max_preconditioner_dim": 10, "weight_rounding": "compensated"}
    whole, first = start(IFShampoo, dtype, **options), start(IFShampoo, dtype, **options)
    for step in range(7):
        run(*whole, step)
    for step in range(4):
        run(*first, step)
    resumed = start(IFShampoo, dtype, **options)
    for target, source in zip(resumed[0], first[0], strict=True):
        target.data.copy_(source)
    resumed[1].load_state_dict(first[1].state_dict())
    for step in range(4, 7):
        run(*resumed, step)
    assert_same_bits(snapshot(resumed[1]), snapshot(whole[1]))
