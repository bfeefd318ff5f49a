"""`packed_momentum=True`: equal steps with less memory. m_C and m_K are stored as triangles."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from rootfree_kernels import IFShampoo, packing
from rootfree_kernels.packing import unpack
from tests.calls.cpu import needs_cpp
from tests.calls.optimizers import OPTIONS, Model, gradients, snapshot, train
from tests.calls.tensors import BF16, FP32, FP64, assert_same_bits, same_bits
from tests.calls.tolerances import tolerance

SHAPES = {"eager": [(7, 5), (7, 5), (7, 5), (6, 4), (6,)], "cpp": [(40, 33)] * 3 + [(70, 64), (6,)]}
SHAPES["triton"] = [(9, 5), (9, 5), (16, 24)]
"""Shapes have odd and even sides. Several are equal, so that a batch can have a block without a gradient.

Eager PyTorch computes products of such small blocks in a fixed order, so m is bitwise symmetric. Triton pads all shapes
except the last.
"""

CONFIGURATIONS = {
    "fp32": {"factor_dtype": FP32},
    "bf16": {},
    "bf16-others": {"precondition_frequency": 3, "clip": "row_sum"},
    "nearest-others-without-products": {
        **{"precondition_frequency": 2, "rounding": "nearest", "cache_products": False, "state_dtype": BF16},
    },
    "compensated": {"rounding": "compensated", "clip": "none", "beta2": 0.05},
    "tiles": {"max_preconditioner_dim": 4},
}
COMBINATIONS = [
    pytest.param(
        backend,
        options,
        id=f"{backend}-{name}",
        marks={
            "eager": [],
            "cpp": [needs_cpp],
            "triton": [
                pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
                pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning:triton"),
                *([pytest.mark.gpu] if torch.cuda.is_available() else []),
            ],
        }[backend],
    )
    for backend in SHAPES
    for name, options in CONFIGURATIONS.items()
    if backend != "triton" or name not in ("fp32", "tiles")  # Triton needs BF16 factors, and its interpreter is slow
]


@contextmanager
def served_by(backend: str) -> Iterator[torch.device]:
    """Force `backend`, and return the device for its tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROOTFREE_BACKEND", backend)
        yield torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")


def unpacked(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return a snapshot with m_C and m_K as matrices."""
    shot = snapshot(optimizer)
    packed = [name for name in shot if "momentum_c" in name or "momentum_k" in name]
    return {**shot, **{name: unpack(shot[name]) for name in packed}}


def set_gradients(params: Sequence[nn.Parameter], step: int, present: Sequence[int] | None = None) -> None:
    grads = gradients([tuple(param.shape) for param in params], step, FP32)
    for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
        param.grad = grad.to(param.device) if present is None or index in present else None


STEPS = [None, None, (0, 2, 4), (1, 3), None, None, None]
"""For each step, the indices of the parameters with a gradient, or None for all. Triton takes only four steps."""

NOT_FINITE = (1, 5)
"""Steps in which a gradient has a NaN."""


@pytest.mark.parametrize(("backend", "options"), COMBINATIONS)
def test_packed_and_unpacked_runs_are_bitwise_equal(backend: str, options: dict[str, Any]) -> None:
    """Runs include updates, steps without an update, missing gradients and skipped gradients."""
    with served_by(backend) as device:
        params = [
            [nn.Parameter(x.to(device)) for x in gradients(SHAPES[backend], -1, FP32)] for packed in (False, True)
        ]
        plain, packed = (
            IFShampoo(some, **{**OPTIONS, **options}, packed_momentum=bool(index)) for index, some in enumerate(params)
        )
        steps = STEPS[:4] if backend == "triton" else STEPS
        for step, present in enumerate(steps):
            before = snapshot(packed)
            for some, optimizer in zip(params, (plain, packed), strict=True):
                set_gradients(some, step, present)
                if step in NOT_FINITE:
                    some[1].grad[0, 0] = torch.nan
                optimizer.step()
            assert_same_bits(unpacked(packed), snapshot(plain))
            if step in NOT_FINITE:  # the NaN lies in the first block of its parameter
                assert same_bits(snapshot(packed)["1 momentum_c"][0], before["1 momentum_c"][0])
    skipped = sum(int(x.sum()) for name, x in snapshot(packed).items() if "skipped" in name)
    assert skipped == sum(step < len(steps) for step in NOT_FINITE)


@pytest.mark.parametrize("shape", [(37, 24), (150, 70)], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@needs_cpp
def test_kernels_keep_m_bitwise_symmetric(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """This is why storing one triangle is enough."""
    with served_by("cpp"):
        params = [nn.Parameter(x) for x in gradients([shape], -1, FP32)]
        optimizer = IFShampoo(params, **OPTIONS, factor_dtype=dtype)
        for step in range(3):
            set_gradients(params, step)
            optimizer.step()
            for name in ("momentum_c", "momentum_k"):
                assert same_bits(optimizer.state[params[0]][name], optimizer.state[params[0]][name].mT)


def test_packing_an_almost_symmetric_m_changes_a_run_by_roundings_only() -> None:
    """On some CPUs, m is only almost symmetric in eager PyTorch with FP64."""
    params = [[nn.Parameter(x) for x in gradients([(65, 34)], -1, FP64)] for _ in range(2)]
    options = {**OPTIONS, "factor_dtype": FP64}
    plain, packed = (IFShampoo(some, **options, packed_momentum=bool(i)) for i, some in enumerate(params))
    for step in range(4):
        for some, optimizer in zip(params, (plain, packed), strict=True):
            some[0].grad = gradients([(65, 34)], step, FP64)[0]
            optimizer.step()
    expected = snapshot(plain)
    for name, value in unpacked(packed).items():
        error = (value.double() - expected[name].double()).norm()
        assert error <= tolerance("a chain", FP64) * expected[name].double().norm(), name


def test_only_one_batch_is_unpacked_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []
    alive = []

    def watched(packed: Tensor) -> Tensor:
        alive.append(sum(ref() is not None for ref in made))
        result = unpack(packed)
        made.append(weakref.ref(result))
        return result

    monkeypatch.setattr(packing, "unpack", watched)
    params = [nn.Parameter(torch.ones(size, size)) for size in (3, 4, 5)]
    optimizer = IFShampoo(params, **OPTIONS, packed_momentum=True, fused=False)
    set_gradients(params, 0)
    optimizer.step()
    assert alive == [0, 1] * 3
    assert all(ref() is None for ref in made)


# ---- memory ----------------------------------------------------------------------------------------------------------


SMALL = {"packed_momentum": True, "state_dtype": BF16, "cache_products": False}


@pytest.mark.parametrize(("options", "limit"), [({}, 12.001), (SMALL, 8.01)], ids=["default", "small"])
def test_bytes_of_state_per_weight(options: dict[str, Any], limit: float) -> None:
    """The weight is one square block. The optimizer keeps no other large tensors."""
    param = nn.Parameter(torch.zeros(512, 512))
    param.grad = torch.ones_like(param)
    optimizer = IFShampoo([param], **{**OPTIONS, **options})
    optimizer.step()
    state = optimizer.state_dict()["state"][0].values()
    assert sum(x.numel() * x.element_size() for x in state) <= limit * param.numel()
    (batch,) = optimizer._planner.caches[0].device_states[0].batches
    kept = sum(x.numel() * x.element_size() for x in batch.tensors())
    buffer = optimizer.state[param]["momentum_buffer"]
    assert kept + buffer.numel() * buffer.element_size() <= limit * param.numel()


# ---- checkpoints (test_checkpoint.py has the resumed runs) -----------------------------------------------------------


def trained(steps: range = range(3), **options: Any) -> tuple[Model, IFShampoo]:
    model = Model()
    optimizer = IFShampoo(model.parameters(), **OPTIONS, **options)
    train(model, optimizer, steps)
    return model, optimizer


@pytest.mark.parametrize("packed", [True, False])
def test_loading_a_checkpoint_sets_its_layout(packed: bool) -> None:
    """A checkpoint contains the option. The option cannot be changed after the state was created."""
    source, saver = trained(packed_momentum=packed)
    model, loader = trained(packed_momentum=not packed)
    model.load_state_dict(source.state_dict())
    loader.load_state_dict(copy.deepcopy(saver.state_dict()))
    train(model, loader, range(3, 5))
    train(source, saver, range(3, 5))
    assert_same_bits(snapshot(loader), snapshot(saver))

    before = snapshot(loader)
    loader.param_groups[0]["packed_momentum"] = not packed
    with pytest.raises(ValueError, match=rf"packed_momentum={not packed}.*momentum_c is .* before the first step"):
        train(model, loader, range(5, 6))
    assert_same_bits(snapshot(loader), before)


@pytest.mark.parametrize("packed", [True, False])
def test_state_of_the_other_layout_is_an_error(packed: bool) -> None:
    _, optimizer = trained(packed_momentum=packed)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["packed_momentum"] = not packed
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=rf"state_dict has momentum_c .* load one .*packed_momentum={not packed}"):
        optimizer.load_state_dict(saved)
    assert_same_bits(snapshot(optimizer), before)


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")  # warns that there is no process group
def test_a_distributed_checkpoint_of_the_other_layout_is_an_error(tmp_path: Path) -> None:
    """PyTorch loads into the existing state, and its error names the entry and the mismatched shapes."""
    saved = get_optimizer_state_dict(*trained(packed_momentum=True))
    dcp.save({"optimizer": saved}, checkpoint_id=tmp_path, no_dist=True)
    into = {"optimizer": get_optimizer_state_dict(*trained(packed_momentum=False))}
    with pytest.raises(dcp.api.CheckpointException, match=r"\[1, 7, 4\].*\[1, 7, 7\].*momentum_c"):
        dcp.load(into, checkpoint_id=tmp_path, no_dist=True)


def test_a_group_may_be_packed_beside_one_that_is_not() -> None:
    model = Model()
    params = list(model.parameters())
    optimizer = IFShampoo(params[:1], **OPTIONS)
    train(model, optimizer, range(1))
    optimizer.add_param_group({"params": params[1:], "packed_momentum": True})
    train(model, optimizer, range(1, 4))
    shapes = [tuple(optimizer.state[param]["momentum_c"].shape) for param in params[:2]]
    assert shapes == [(1, 7, 7), (1, 7, 4)]
