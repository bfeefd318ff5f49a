"""Optimizers with backends from a dispatch table, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rootfree_kernels import IFShampoo
from rootfree_kernels.ops import backends, dispatch
from rootfree_kernels.optim.report import BatchReport, step_reports
from tests.calls.backends import noted_launches
from tests.calls.device import DEVICE, kernel_test, needs_gpu, triton_operators, triton_with_bmm
from tests.calls.dispatch_files import entry, table, user_of_tables
from tests.calls.graphs import captured
from tests.calls.optimizers import OPTIONS, gradients, params_only, snapshot
from tests.calls.tensors import BF16, FP32, assert_same_bits, same_bits
from tests.calls.tolerances import tolerance

pytestmark = kernel_test

SHAPES = [(24, 16), (24, 16), (9, 13), (6,)]


class Run:
    """Parameters and an optimizer on the device that runs the kernels."""

    def __init__(self, optimizer: Any = IFShampoo, shapes: Any = SHAPES, **options: Any) -> None:
        self.params = [nn.Parameter(x.to(DEVICE)) for x in gradients(shapes, -1, FP32)]
        self.optimizer = optimizer(self.params, **{**OPTIONS, **options})

    def step(self, step: int, bad: bool = False) -> None:
        grads = gradients([tuple(x.shape) for x in self.params], step, FP32)
        if bad:
            grads[1][3, 5] = torch.nan
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad.to(DEVICE)
        self.optimizer.step()

    def batches(self) -> list[BatchReport]:
        return [batch for batches in step_reports(self.optimizer) for batch in batches]

    def backends(self) -> set[str]:
        return {batch.backend.name for batch in self.batches()}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Use a table for this device whose single entries match all shapes of `SHAPES`."""
    use = user_of_tables(tmp_path, monkeypatch)

    def chosen(**choices: str) -> None:
        matrix = {"side": 16, "blocks": 1}
        sizes = {"diagonal": {"numbers": 8, "tensors": 1}, "matrices": matrix, "symmetric": matrix}
        listed = {name: [entry(choice, **sizes[name])] for name, choice in choices.items()}
        use(table(dispatch.device_name(DEVICE), **listed))

    return chosen


def test_the_table_can_choose_eager_pytorch(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    here(diagonal="eager", matrices="eager", symmetric="bmm")
    by_table, forced = Run(), Run()
    by_table.step(0)
    assert by_table.backends() == {"eager"}
    monkeypatch.setenv("ROOTFREE_BACKEND", "eager")
    forced.step(0)
    assert_same_bits(snapshot(by_table.optimizer), snapshot(forced.optimizer))


def test_the_table_chooses_how_products_are_computed(here: Any) -> None:
    here(diagonal="triton", matrices="triton", symmetric="bmm")
    run = Run()
    with noted_launches() as names:
        run.step(0)
    assert run.backends() == {"triton", "triton_bmm"}
    assert "kron_products_kernel" not in names and "kron_factor_kernel" in names
    assert names.count("bmm") == 2 * (2 + 2 + 1)  # CᵀG·K, both products, P_C·G


def block(run: Run, index: int) -> dict[str, Tensor]:
    """Return the weight and the state of a parameter without its counters."""
    shot = params_only(snapshot(run.optimizer), index)
    return {name: x for name, x in shot.items() if name.split()[1] not in ("step", "skipped")}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rounding": "compensated"},
        {"precondition_frequency": 2},
        {"precondition_frequency": 2, "cache_products": False},
    ],
    ids=str,
)
def test_products_by_cublas_keep_factors_bitwise_and_weights_within_a_rounding(here: Any, options: Any) -> None:
    """Both runs round factors stochastically with the same random bits. The third step skips a block."""
    runs = {}
    for name in ("triton", "bmm"):
        here(matrices="triton", symmetric=name)
        runs[name] = Run(**options)
        for step in range(4):
            before = block(runs[name], 1)
            runs[name].step(step, bad=step == 2)
            if step == 2:
                assert_same_bits(block(runs[name], 1), before)
    kernel, cublas = (snapshot(run.optimizer) for run in runs.values())
    assert runs["bmm"].backends() >= {"triton_bmm"} and int(cublas["1 skipped"].sum()) == 1
    for name, expected in kernel.items():
        if "weight" in name or "buffer" in name:
            error = (cublas[name] - expected).norm() / expected.norm()
            assert error <= tolerance("one step of products", BF16), name
        else:
            assert same_bits(cublas[name], expected), name
    for batch in [x for state in runs["bmm"].optimizer._planner.caches[0].device_states for x in state.batches]:
        if batch.products:
            c, product = batch.storage["factor_c"].float(), batch.products["product_c"]
            assert (product - c @ c.mT).norm() <= tolerance("one step of products", BF16) * product.norm()


def test_a_resumed_run_computes_the_same_products(here: Any) -> None:
    here(matrices="triton", symmetric="bmm")
    runs = [Run(precondition_frequency=3) for _ in range(2)]
    for step in range(2):
        runs[0].step(step)
    for param, source in zip(runs[1].params, runs[0].params, strict=True):
        param.data.copy_(source)
    runs[1].optimizer.load_state_dict(runs[0].optimizer.state_dict())
    for step in range(2, 5):
        for run in runs:
            run.step(step)
    assert_same_bits(*(snapshot(run.optimizer) for run in runs))


def test_a_table_is_read_once_per_plan(here: Any, monkeypatch: Any) -> None:
    asked: list[str] = []
    choice = dispatch.Table.choice
    monkeypatch.setattr(dispatch.Table, "choice", lambda *args: asked.append(args[1]) or choice(*args))
    here(diagonal="triton", matrices="triton", symmetric="bmm")
    run = Run()
    for step in range(3):
        run.step(step)
        assert sorted(asked) == ["diagonal", "matrices", "matrices", "symmetric", "symmetric"]
    monkeypatch.setenv("ROOTFREE_DISPATCH", "off")
    run.step(3)
    assert run.backends() == ({"triton"} if DEVICE.type == "cuda" else {backends.choose(DEVICE, FP32).name})
    assert len(asked) == 5


def test_a_step_with_a_table_compiles_bitwise(here: Any) -> None:
    here(diagonal="triton", matrices="triton", symmetric="bmm")
    torch._dynamo.reset()
    lr = {"lr": torch.tensor(0.01, device=DEVICE), "capturable": True}
    plain, compiled = Run(**lr), Run(**lr)
    step = torch.compile(compiled.optimizer.step, backend="aot_eager", fullgraph=True)
    compiled.optimizer.step = step
    for number in range(3):
        plain.step(number)
        compiled.step(number)
    assert "triton_bmm" in plain.backends()
    assert_same_bits(snapshot(plain.optimizer), snapshot(compiled.optimizer))


@pytest.mark.gpu
@needs_gpu
def test_a_step_with_a_table_can_be_captured(here: Any) -> None:
    here(diagonal="triton", matrices="triton", symmetric="bmm")
    lr = {"lr": torch.tensor(0.01, device=DEVICE), "capturable": True}
    plain, replayed = Run(**lr), Run(**lr)
    for run in (plain, replayed):
        run.step(0)
    graph = captured(replayed.optimizer.step, warmups=1)
    graph.replay()
    for _ in range(2):
        plain.optimizer.step()
    assert "triton_bmm" in plain.backends()
    assert_same_bits(snapshot(plain.optimizer), snapshot(replayed.optimizer))


def test_triton_with_products_by_cublas_has_every_function() -> None:
    assert sorted(triton_with_bmm.__all__) == sorted(triton_operators.__all__)
    for name in triton_operators.__all__:
        ours, theirs = (getattr(module, name) for module in (triton_operators, triton_with_bmm))
        assert (ours is theirs) == (name not in ("kron_factor", "kron_step", "kron_products"))
