"""Steps with `capturable=True`: captured in a CUDA graph, compiled, and without host syncs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from rootfree_kernels import RECIPE, IFShampoo, RFRMSProp
from tests.calls.graphs import captured
from tests.calls.optimizers import snapshot
from tests.calls.tensors import assert_same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU that PyTorch can use"),
]

DEVICE = torch.device("cuda")
WARMUPS = 3
SHAPES = {"weight": (64, 48), "twin": (64, 48), "ragged": (33, 21), "conv": (16, 4, 3, 2), "bias": (70,), "scale": ()}
"""With `BLOCKS`, the first two weights have two blocks each. No side of `ragged` is a multiple of 8."""

NOT_FINITE = 6
"""The step in which a gradient has a NaN. Its block or element is skipped with and without a graph."""


class Case(NamedTuple):
    optimizer: Callable[..., torch.optim.Optimizer]
    dtype: torch.dtype
    options: dict[str, Any]

    def __str__(self) -> str:
        options = (f"{name}={value}" for name, value in self.options.items() if name != "max_preconditioner_dim")
        return "-".join([self.optimizer.__name__, str(self.dtype).removeprefix("torch."), *options])


BLOCKS = {"max_preconditioner_dim": 48}
COMPENSATED = {"rounding": "compensated", "weight_rounding": "compensated"}
CASES = [
    Case(RFRMSProp, torch.float32, {}),
    Case(RFRMSProp, torch.bfloat16, {"state_dtype": torch.bfloat16}),
    Case(IFShampoo, torch.float32, BLOCKS),
    Case(IFShampoo, torch.bfloat16, BLOCKS),
    Case(IFShampoo, torch.bfloat16, {**BLOCKS, **COMPENSATED}),
    Case(IFShampoo, torch.float32, {**BLOCKS, "packed_momentum": True, "state_dtype": torch.bfloat16}),
    Case(IFShampoo, torch.float32, {**BLOCKS, "fused": False}),
    Case(IFShampoo, torch.float32, {**BLOCKS, **RECIPE}),
    Case(IFShampoo, torch.bfloat16, {**BLOCKS, **COMPENSATED, **RECIPE, "direction": "root_free"}),
    Case(IFShampoo, torch.float32, {**BLOCKS, **RECIPE, "fused": False}),
]


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


class Run:
    """Parameters, gradients with fixed addresses, and an optimizer with its learning rate on the GPU."""

    def __init__(self, case: Case, **options: Any) -> None:
        self.lr = torch.tensor(0.01, device=DEVICE)
        self.params = [torch.nn.Parameter(x) for x in numbers(-1, case.dtype)]
        for param in self.params:
            param.grad = torch.zeros_like(param)
        options = {"fused": True, "capturable": True, "weight_decay": 0.1, "batch_size": 4, **case.options, **options}
        self.optimizer = case.optimizer(self.params, lr=self.lr, **{"damping": 0.05, **options})

    def prepare(self, step: int) -> None:
        """Overwrite the gradients and the learning rate in place."""
        self.lr.fill_(0.01 / (1 + step))
        for param, grad in zip(self.params, numbers(step, self.params[0].dtype), strict=True):
            param.grad.copy_(grad)
        if step == NOT_FINITE:
            self.params[1].grad[3, 4] = torch.nan

    def take(self, steps: Iterable[int]) -> None:
        """Take steps without a graph."""
        for step in steps:
            self.prepare(step)
            self.optimizer.step()

    def warm_up(self) -> None:
        """Take WARMUPS steps, all with the gradients of step 0."""
        self.take([0] * WARMUPS)

    def snapshot(self) -> dict[str, Tensor]:
        return {name: value.cpu() for name, value in snapshot(self.optimizer).items()}


def numbers(step: int, dtype: torch.dtype) -> list[Tensor]:
    """Return random tensors. Only the step determines the random values."""
    generator = torch.Generator().manual_seed(step + 1)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in SHAPES.values()]


def captured_run(case: Case) -> tuple[Run, Any]:
    """Return a run after its warm-up, and the graph of its next step."""
    run = Run(case)
    run.prepare(0)
    return run, captured(run.optimizer.step, WARMUPS)


def replay(run: Run, graph: Any, steps: Iterable[int]) -> None:
    for step in steps:
        run.prepare(step)
        graph.replay()


@pytest.mark.parametrize("capturable", [True, False], ids=["", "against-not-capturable"])
def test_replays_match_eager_steps(case: Case, capturable: bool) -> None:
    """Results are bitwise equal. Gradients and the learning rate change at each step."""
    run, graph = captured_run(case)
    plain = Run(case, capturable=capturable)
    plain.warm_up()
    assert_same_bits(run.snapshot(), plain.snapshot())  # the capture changed nothing
    for step in range(1, 10):
        replay(run, graph, [step])
        plain.take([step])
        assert_same_bits(run.snapshot(), plain.snapshot())
    skipped = [int(x.sum()) for name, x in run.snapshot().items() if "skipped" in name]
    assert sum(skipped) > 0 and run.params[1].isfinite().all()
    assert {int(state["step"]) for state in run.optimizer.state.values()} == {WARMUPS + 9}


def test_steps_without_the_graph_may_come_between(case: Case) -> None:
    run, graph = captured_run(case)
    replay(run, graph, [1, 2])
    run.take([3, 4])
    replay(run, graph, [5, 6])
    run.take([7])
    plain = Run(case)
    plain.warm_up()
    plain.take(range(1, 8))
    assert_same_bits(run.snapshot(), plain.snapshot())


def test_a_new_graph_continues_after_the_old_one(case: Case) -> None:
    """A new graph is needed, for example, after addresses of gradients changed."""
    run, graph = captured_run(case)
    replay(run, graph, [1, 2])
    for param in run.params:
        param.grad = param.grad.clone()
    run.prepare(3)
    graph = captured(run.optimizer.step, warmups=1)
    replay(run, graph, [4, 5])
    plain = Run(case)
    plain.warm_up()
    plain.take(range(1, 6))
    assert_same_bits(run.snapshot(), plain.snapshot())


def test_a_compiled_step_matches_the_eager_step(case: Case) -> None:
    torch._dynamo.reset()
    run, plain = Run(case), Run(case)
    compiled = torch.compile(run.optimizer.step, backend="aot_eager")
    for step in range(4):
        run.prepare(step)
        compiled()
    plain.take(range(4))
    assert_same_bits(run.snapshot(), plain.snapshot())


# ---- host syncs ----------------------------------------------------------------------------------------------------


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Raise if an operation makes the host wait for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_the_check_notices_a_wait() -> None:
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones((), device=DEVICE).item()


@pytest.mark.parametrize("moved", [False, True], ids=["", "new-addresses"])
@pytest.mark.parametrize("capturable", [True, False], ids=["capturable", "not-capturable"])
def test_the_host_never_waits(case: Case, capturable: bool, moved: bool) -> None:
    run = Run(case, capturable=capturable)
    run.take(range(2))  # creates the state and compiles
    for step in range(2, 5):
        run.prepare(step)
        if moved:
            for param in run.params:
                param.grad = param.grad.clone()
        with waiting_is_an_error():
            run.optimizer.step()


def test_deciding_when_to_update_does_not_wait() -> None:
    run = Run(Case(IFShampoo, torch.float32, BLOCKS), capturable=False, precondition_frequency=3)
    run.take(range(4))
    for step in range(4, 8):
        run.prepare(step)
        with waiting_is_an_error():
            run.optimizer.step()
