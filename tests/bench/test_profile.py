"""`python -m bench.profile`: reading a trace, the work of the phases, and a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.common.roofline import Roofline, Work, total, whole_step
from bench.common.tensors import Model
from bench.profile import __main__ as profile_step
from bench.profile import phases
from bench.profile.__main__ import MODELS
from bench.profile.phases import Task, markdown, rows_of, tasks_of
from bench.profile.step_trace import read, steps
from rootfree_kernels import IFShampoo, RFRMSProp
from tests.calls.cpu import needs_cpp

# ---- traces --------------------------------------------------------------------------------------------------------

BATCH = "2 blocks of 8x8"


def event(category: str, name: str, start: float, end: float, thread: int = 1, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "pid": 7, "tid": thread, "ts": start, "dur": end - start} | {
        "args": args
    }


def mark(name: str, start: float, end: float, thread: int = 1) -> dict[str, Any]:
    return event("user_annotation", name, start, end, thread)


def launched(start: float, at: float, duration: float, number: int, kind: str = "kernel") -> list[dict[str, Any]]:
    """A launch by the host, and what it starts on the device."""
    launch = event("cuda_driver", "cuLaunchKernelEx", start, start + 1, correlation=number)
    return [launch, event(kind, "some_kernel", at, at + duration, thread=99, stream=99, correlation=number)]


STEP = [
    mark("Optimizer.step#IFShampoo.step", 0, 102),
    mark("IFShampoo.step", 1, 101),
    mark(BATCH, 10, 90),
    mark("gather", 10, 30),
    event("cpu_op", "rootfree::kron_gather", 12, 28),
    *launched(14, 1000, 5, 1),
    event("cpu_op", "rootfree::kron_step", 31, 89),  # as the profiler has it: between batch and phase
    mark("precondition", 32, 60),
    event("cpu_op", "aten::bmm", 33, 50),
    *launched(40, 1010, 20, 2),
    mark("apply", 60, 88),
    *launched(61, 1030, 30, 3),
    *launched(65, 1060, 2, 4, "gpu_memcpy"),
    *launched(95, 1070, 1, 5),  # in the step, of no batch
    *launched(200, 1080, 50, 6),  # of no step
    mark("gpu", 1000, 1071, thread=99) | {"cat": "gpu_user_annotation"},
    mark("somebody else's", 0, 300, thread=2),
    event("cpu_op", "aten::somebody_else's", 35, 36, thread=2),
]


def test_kernels_belong_to_the_phase_that_launched_them() -> None:
    (step,) = steps(STEP, "IFShampoo.step")
    phases = {names[-1]: (step.device[names], step.kernels[names]) for names in step.host if names}
    assert phases == {BATCH: (57, 4), "gather": (5, 1), "precondition": (20, 1), "apply": (32, 2)}
    assert (step.device[()], step.kernels[()]) == (58, 5)


def test_without_a_device_the_calling_thread_is_timed() -> None:
    (step,) = steps(STEP, "IFShampoo.step")
    host = {names: (step.host[names], step.operators[names]) for names in step.host}
    assert host == {
        (): (100, 2),
        (BATCH,): (80, 2),
        (BATCH, "gather"): (20, 1),
        (BATCH, "precondition"): (28, 1),  # not kron_step, which calls others
        (BATCH, "apply"): (28, 0),
    }


def test_every_step_of_a_trace_counts_by_itself(tmp_path: Path) -> None:
    later = [{**x, "ts": x["ts"] + 5000} for x in STEP if x["name"] != "precondition"]
    for x in later:
        x["args"] = {**x["args"], "correlation": -x["args"].get("correlation", 0)}
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": [*later, *STEP, {"ph": "M", "name": "process_name"}]}))
    first, second = steps(read(path), "IFShampoo.step")
    assert first.has("precondition") and not second.has("precondition")
    assert first.device[()] == second.device[()] == 58


def test_speeds_are_work_over_the_kernels_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fractions are of the device's speed in a copy and in a product of the same dtype."""
    task = Task(Work(flops=3.2e9, bytes=64e6), torch.bfloat16)  # in the 32 µs of "apply", and the 57 of its batch
    monkeypatch.setattr(phases, "tasks_of", lambda optimizer: {False: {(BATCH, "apply"): task}})
    roof = Roofline(4e12, fp32=1e13, bf16=2e14)
    rows = rows_of(steps(STEP, "IFShampoo.step"), None, roof, on_device=True)  # type: ignore[arg-type]
    values = {row.case: row.cells for row in rows}
    apply = values[f"{BATCH} / apply"]
    assert (apply["µs"].median, apply["µs of the host"].median, apply["kernels"]) == (32, 28, 2)
    speeds = [apply[name] for name in ("GB/s", "of the copy", "TFLOP/s", "of the product")]
    assert speeds == pytest.approx([2000, 0.5, 100, 0.5])
    assert values[BATCH]["GB/s"] == pytest.approx(64e3 / 57)
    assert "GB/s" not in values[f"{BATCH} / gather"]  # of which no work is known here
    names = ("optimizer", "model", "frequency", "device", "command", "date", "commit", "torch", "threads", "steps")
    page = " ".join(markdown(dict.fromkeys(names, "x"), rows, roof, on_device=True).split())
    assert f"| {BATCH} / apply | 32.0 (32.0–32.0) | 28.0 (28.0–28.0) | 2 | 2,000 | 0.500 | 100 | 0.500 |" in page


# ---- work ----------------------------------------------------------------------------------------------------------


def work_of(backend: str, monkeypatch: pytest.MonkeyPatch, update: bool, **options: Any) -> Work:
    """Return the work of a step of the tiny model, which is that of all its phases."""
    monkeypatch.setenv("ROOTFREE_BACKEND", backend)
    params = Model(MODELS["tiny"], torch.device("cpu")).params
    optimizer = IFShampoo(params, batch_size=16, **options)
    for _ in range(2):
        optimizer.step()
    tasks = tasks_of(optimizer)[update]
    joint = {(label, part) for label, phase in tasks if "and" in phase for part in ("precondition", "apply")}
    return total({names: task.work for names, task in tasks.items() if names not in joint})


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning:triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter, which a GPU leaves off")
@pytest.mark.parametrize("update", [True, False], ids=["update", "other step"])
def test_the_phases_together_have_the_work_of_all_launches(update: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    assert work_of("triton", monkeypatch, update, precondition_frequency=2) == whole_step(MODELS["tiny"], update)


@needs_cpp
def test_in_cpp_the_second_product_is_a_launch_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its result is written and read once more."""
    model = MODELS["tiny"]
    between = sum(4 * p * d * count for (p, d), count in model.blocks().items())
    found = work_of("cpp", monkeypatch, True, matmul_dtype=torch.bfloat16)
    assert found == whole_step(model, True) + Work(0, between)


def test_eager_pytorch_without_kept_products_takes_four(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["tiny"]
    more = sum((2 * p * d * (p + d) - p**3 - d**3) * count for (p, d), count in model.blocks().items())
    assert work_of("eager", monkeypatch, True).flops == whole_step(model, True).flops + more


# ---- the command ---------------------------------------------------------------------------------------------------

COMMAND = ["--device", "cpu", "--model", "tiny"]


def test_a_run_on_a_cpu_writes_trace_and_tables(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOTFREE_BACKEND", "eager")
    assert profile_step.main([*COMMAND, "--frequency", "2", "--steps", "4", "--out", str(tmp_path)]) == 0
    (page,) = tmp_path.glob("*.md")
    record = json.loads(page.with_suffix(".json").read_text())
    assert (tmp_path / record["trace"]).exists() and page.read_text() in capsys.readouterr().out
    cases = {(row["table"], row["case"].partition(" / ")[2]) for row in record["rows"]}
    phases = {"gather", "precondition", "apply"}
    assert {phase for table, phase in cases if table == "Steps without"} == {"", *phases}
    assert {phase for table, phase in cases if "with an" in table} == {"", "factor update", *phases}
    for row in record["rows"]:
        values = row["values"]
        assert values["µs"]["samples"] == 2 and values["µs"]["median"] > 0 and values["operators"] > 0
        assert values["GB/s"] > 0 and values["of the copy"] > 0
        assert ("TFLOP/s" in values) == (not row["case"].endswith(("gather", "apply")) and "diag" not in row["case"])


def test_the_diagonal_optimizers_are_profiled_too(tmp_path: Path) -> None:
    assert profile_step.main([*COMMAND, "--optimizer", "RFRMSProp", "--steps", "1", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    assert {row["table"] for row in rows} == {"Steps"}
    label = f"diagonal step of {len(MODELS['tiny'].shapes())} tensors"
    assert [row["case"] for row in rows] == ["whole step", label, f"{label} / apply"]


def test_an_attached_tool_sees_the_wanted_steps_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come after two updates, and nothing else is measured or written."""
    calls: list[str] = []
    monkeypatch.setattr(profile_step, "is_attached", lambda device: True)
    for name in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, name, lambda name=name: calls.append(name))
    monkeypatch.setattr(RFRMSProp, "step", lambda self: calls.append("step"))
    command = [*COMMAND, "--optimizer", "RFRMSProp", "--frequency", "4", "--steps", "2", "--out", str(tmp_path)]
    assert profile_step.main(command) == 0
    assert calls == [*["step"] * 5, "start", "step", "step", "stop"]
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--device", "cpu", "--nsys"], "Leave it out"),
        (["--device", "cpu", "--frequency", "0", "--steps", "1"], "pass 1 or more"),
        pytest.param(
            ["--device", "cuda"],
            "--device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_cannot_be_profiled_is_explained(arguments: list[str], remedy: str, capsys: Any) -> None:
    assert profile_step.main(arguments) == 1
    assert remedy in capsys.readouterr().out
