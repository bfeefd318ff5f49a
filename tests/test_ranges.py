"""Ranges for profilers: names, order and nesting. Without a profiler, there are no ranges."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile

from rootfree_kernels import IFShampoo, RFRMSProp, ranges
from rootfree_kernels.eager import common
from tests.calls.backends import functions_of, stand_in
from tests.calls.cpu import needs_cpp, threads
from tests.calls.optimizers import SHAPES, Case, Model, gradients, train

SHAMPOO = Case("IFShampoo", IFShampoo, {"precondition_frequency": 2})
RMSPROP = Case("RFRMSProp", RFRMSProp)

needs_triton = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning:triton"),
    *([pytest.mark.gpu] if torch.cuda.is_available() else []),
]
BACKENDS = ["eager", pytest.param("cpp", marks=needs_cpp), pytest.param("triton", marks=needs_triton)]
every_backend = pytest.mark.parametrize("backend", BACKENDS)

Tree = list[tuple[str, "Tree"]]
"""Ranges in order, each with its inner ranges."""


class FakeNVTX:
    """Record the ranges of every thread.

    Like NVTX, functions return the level of the range if a tool `answers`, and -2 otherwise.
    """

    def __init__(self, answers: bool) -> None:
        self.answers, self.calls = answers, []
        self.mine = threading.local()

    def open(self) -> list[Tree]:
        if not hasattr(self.mine, "open"):
            self.mine.open = [[]]
        return self.mine.open

    def range_push(self, name: str) -> int:
        self.calls.append(f"push {name}")
        self.open()[-1].append((name, inner := []))
        self.open().append(inner)
        return len(self.open()) - 2 if self.answers else -2

    def range_pop(self) -> int:
        self.calls.append("pop")
        self.open().pop()
        return len(self.open()) - 1 if self.answers else -2

    def tree(self) -> Tree:
        """Return all ranges of this thread. All must be closed."""
        (tree,) = self.open()
        return tree


@pytest.fixture
def attach(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FakeNVTX]]:
    def attach(answers: bool = True, injected: bool = False) -> FakeNVTX:
        nvtx = FakeNVTX(answers)
        monkeypatch.setattr(ranges, "_nvtx", nvtx)
        monkeypatch.setattr(ranges, "_injected", injected)
        return nvtx

    yield attach
    ranges.listened = False


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def start(case: Case, backend: str, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Callable[[], None]:
    """Take two steps, the first with an update. Return a function that takes the next step."""
    monkeypatch.setenv("ROOTFREE_BACKEND", backend)
    model = Model().to(device_of(backend))
    optimizer = case.make(model.parameters(), **changes)

    def step() -> None:
        set_gradients(model)
        optimizer.step()

    step(), step()
    return step


def set_gradients(model: Model) -> None:
    for param, grad in zip(model.parameters(), gradients(SHAPES.values(), 0, torch.float32), strict=True):
        param.grad = grad.to(param.device)


def leaves(*names: str) -> Tree:
    return [(name, []) for name in names]


def weights(backend: str, inside: bool) -> Tree:
    """Return the phases of `kron_step`. The C++ operator marks inner phases only for PyTorch's profilers."""
    phases = leaves("precondition", "apply")
    return [("precondition and apply", phases if inside else [])] if backend == "cpp" else phases


def expected(backend: str, update: bool, inside: bool = False) -> Tree:
    phases = leaves("gather", *(["factor update"] if update else []))
    labels = ("2 blocks of 7x5", "1 block of 4x6")
    batches = [(label, [*phases, *weights(backend, inside)]) for label in labels]
    return [("IFShampoo.step", [("diagonal step of 2 tensors", leaves("apply")), *batches])]


# ---- NVTX ----------------------------------------------------------------------------------------------------------


@every_backend
def test_nvtx_has_every_step_batch_and_phase(backend: str, attach: Any, monkeypatch: Any) -> None:
    step = start(SHAMPOO, backend, monkeypatch)
    for update in (True, False):
        nvtx = attach()
        step()
        assert nvtx.tree() == expected(backend, update)


def test_the_diagonal_optimizers_have_one_phase(attach: Any, monkeypatch: Any) -> None:
    step, nvtx = start(RMSPROP, "eager", monkeypatch), attach()
    step()
    assert nvtx.tree() == [("RFRMSProp.step", [("diagonal step of 5 tensors", leaves("apply"))])]


def test_labels_count_blocks_and_not_parameters(attach: Any, monkeypatch: Any) -> None:
    """7 × 5 is split into blocks of 3 × 3, 3 × 2, 2 × 3 and 2 × 2, and 4 × 6 into blocks of 2 × 3."""
    step, nvtx = start(SHAMPOO, "eager", monkeypatch, max_preconditioner_dim=3), attach()
    step()
    ((_, batches),) = nvtx.tree()
    labels = ["2 blocks of 3x3", "2 blocks of 3x2", "8 blocks of 2x3", "4 blocks of 2x2"]
    assert sorted(name for name, _ in batches[1:]) == sorted(labels)


def test_on_a_cpu_both_phases_of_eager_pytorch_take_turns_by_slices(attach: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(common, "CACHE_ELEMENTS", 35)  # one block of 7 × 5
    step, nvtx = start(SHAMPOO, "eager", monkeypatch), attach()
    step()
    ((_, (_, (_, phases), _)),) = nvtx.tree()
    assert phases == leaves("gather", "factor update", *("precondition", "apply") * 2)


@pytest.mark.parametrize("backend", ["eager", pytest.param("cpp", marks=needs_cpp)])
def test_a_step_looks_for_a_tool_once_if_none_is_attached(backend: str, attach: Any, monkeypatch: Any) -> None:
    step, nvtx = start(SHAMPOO, backend, monkeypatch), attach(answers=False)
    step(), step()
    assert nvtx.calls == ["push IFShampoo.step"] * 2


def test_a_tool_that_counts_no_levels_is_recognized_by_its_injection_library(attach: Any, monkeypatch: Any) -> None:
    step, nvtx = start(SHAMPOO, "eager", monkeypatch), attach(answers=False, injected=True)
    step()
    assert nvtx.tree() == expected("eager", update=True)


def test_nvtx_is_not_called_if_pytorch_lacks_it() -> None:
    """Calls of its functions would raise."""
    has_nvtx = bool(torch.version.cuda) and hasattr(torch._C, "_nvtx")
    assert (ranges._nvtx is not None) == has_nvtx


@pytest.mark.gpu
@pytest.mark.skipif(not torch.version.cuda or not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.skipif(ranges._injected, reason="a profiler is attached")
def test_nvtx_says_that_no_tool_is_attached() -> None:
    assert torch.cuda.nvtx.range_push("nobody") == -2


# ---- exceptions and threads ----------------------------------------------------------------------------------------


def fails(*args: Any, **options: Any) -> Any:
    """Replace an operator. Open a range and raise inside it."""
    ranges.phase("half way")
    raise FloatingPointError("on purpose")


@pytest.mark.parametrize("operator", ["rf_rmsprop", "kron_gather", "kron_factor", "kron_step"])
def test_ranges_are_closed_when_an_exception_passes(operator: str, attach: Any, monkeypatch: Any) -> None:
    step, nvtx = start(SHAMPOO, "eager", monkeypatch), attach()
    with monkeypatch.context() as patch:
        stand_in(patch, "eager", **{operator: fails})
        with pytest.raises(FloatingPointError):
            step()
    ((name, batches),) = nvtx.tree()
    assert name == "IFShampoo.step" and batches[-1][1][-1] == ("half way", [])
    again = attach()
    step(), step()
    assert [name for name, _ in again.tree()] == ["IFShampoo.step"] * 2


def test_a_step_that_raises_leaves_no_range_open(attach: Any, monkeypatch: Any) -> None:
    model, optimizer = SHAMPOO.start()
    train(model, optimizer, [0])
    nvtx = attach()
    model.bias.grad = torch.ones_like(model.bias).to_sparse()
    with pytest.raises(RuntimeError, match="make it dense"):
        optimizer.step()
    assert nvtx.tree() == leaves("IFShampoo.step")


def test_every_thread_has_its_own_ranges(attach: Any, monkeypatch: Any) -> None:
    """Two threads wait for each other at every batch, so their ranges overlap in time."""
    steps = [start(SHAMPOO, "eager", monkeypatch) for _ in range(2)]
    nvtx, turn, trees = attach(), threading.Barrier(2, timeout=60), []
    stand_in(monkeypatch, "eager", kron_gather=waiting(turn))

    def run(step: Callable[[int], None]) -> None:
        step()
        trees.append(nvtx.tree())

    every = [threading.Thread(target=run, args=(step,)) for step in steps]
    for thread in every:
        thread.start()
    for thread in every:
        thread.join()
    assert trees == [expected("eager", update=True)] * 2


def waiting(turn: threading.Barrier) -> Callable[..., Any]:
    gather = functions_of("eager", "kron_gather")["kron_gather"]

    def kron_gather(*args: Any, **options: Any) -> Any:
        turn.wait()
        return gather(*args, **options)

    return kron_gather


def test_an_operator_called_by_itself_has_no_ranges(attach: Any, monkeypatch: Any) -> None:
    step, nvtx = start(SHAMPOO, "eager", monkeypatch), attach()
    step()  # detects the tool
    nvtx.calls.clear()
    ranges.phase("apply"), ranges.batch("a batch"), ranges.end_batch()
    assert nvtx.calls == []


# ---- PyTorch's profilers -------------------------------------------------------------------------------------------


def tree_of(profiler: profile) -> Tree:
    """Return the ranges of this thread from `record_function` and C++, without torch.optim's own ranges."""
    events = [event for event in profiler.events() if event.is_user_annotation and "#" not in event.name]
    events.sort(key=lambda event: (event.time_range.start, -event.time_range.end))
    tree: Tree = []
    around: list[tuple[float, Tree]] = [(torch.inf, tree)]
    for event in events:
        while event.time_range.start >= around[-1][0]:
            around.pop()
        around[-1][1].append((event.name, inner := []))
        around.append((event.time_range.end, inner))
    return tree


def profiled(run: Callable[[], Any]) -> Tree:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    return tree_of(profiler)


@every_backend
def test_the_profiler_has_every_step_batch_and_phase(backend: str, monkeypatch: Any) -> None:
    step = start(SHAMPOO, backend, monkeypatch)
    with threads(1):  # the profiler sees only slices of the calling thread
        for update in (True, False):
            assert profiled(step) == expected(backend, update, inside=True)


@every_backend
def test_a_range_lies_within_an_operator_or_around_it(backend: str, monkeypatch: Any) -> None:
    """The profiler has its own ranges around operators. A trace cannot display ranges that overlap them partly."""
    step = start(SHAMPOO, backend, monkeypatch)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    spans = sorted((event.time_range.start, -event.time_range.end, event.name) for event in profiler.events())
    around: list[tuple[float, str]] = []
    for start_time, negative_end, name in spans:
        while around and start_time >= around[-1][0]:
            around.pop()
        assert not around or -negative_end <= around[-1][0], f"{name} ends after its outer range {around[-1][1]}"
        around.append((-negative_end, name))
    assert any("rootfree::kron_step" in name for *_, name in spans)


def test_profilers_of_pytorch_have_priority_over_nvtx(attach: Any, monkeypatch: Any) -> None:
    """One of them is `torch.autograd.profiler.emit_nvtx`, which would otherwise report every range to NVTX twice."""
    step, nvtx = start(SHAMPOO, "eager", monkeypatch), attach()
    assert profiled(step) == expected("eager", update=True)
    assert nvtx.calls == []


def test_the_profiler_s_ranges_are_closed_when_an_exception_passes(monkeypatch: Any) -> None:
    step = start(SHAMPOO, "eager", monkeypatch)

    def run() -> None:
        with monkeypatch.context() as patch:
            stand_in(patch, "eager", kron_factor=fails)
            with pytest.raises(FloatingPointError):
                step()
        step()

    assert [name for name, _ in profiled(run)] == ["IFShampoo.step"] * 2


# ---- torch.compile -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [Case("IFShampoo", IFShampoo), RMSPROP], ids=lambda case: case.name)
def test_a_compiled_step_has_no_ranges_and_is_compiled_once(case: Case, attach: Any, monkeypatch: Any) -> None:
    """It is one graph, even if a profiler is attached before, between and during calls."""
    torch._dynamo.reset()
    other, nvtx = start(case, "eager", monkeypatch), attach()
    model, optimizer = case.start(capturable=True, lr=torch.tensor(0.01))
    set_gradients(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(optimizer.step, backend=counter, fullgraph=True)
    for _ in range(3):
        other()
        assert ranges.listened
        nvtx.calls.clear()
        compiled()
        assert nvtx.calls == []
    assert "step" not in str(profiled(compiled))
    assert counter.frame_count == 1
