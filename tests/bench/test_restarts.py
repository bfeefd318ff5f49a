"""Runs that go on after a crash, a hang or a spoiled device, in real processes."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.common import restarts
from bench.common.restarts import RESTART, Progress, is_spoiled, supervise, supervise_module

WORKER = """
import os, signal, sys, time
from pathlib import Path
from bench.common.restarts import RESTART, Progress

progress = Progress.load(Path(sys.argv[-1]))
for name in "abcd":
    if name in progress.done or name in progress.broken:
        continue
    progress.begin(name)
    if name == "b":
        {trouble}
    progress.end([*(progress.payload or []), name])
sys.exit(3)
"""

FOCUSED = """
        for part in "xyz":
            if part not in progress.excluded:
                progress.focus(part)
                if part == "y":
                    os.kill(os.getpid(), signal.SIGKILL)
"""


def run(tmp_path: Path, trouble: str, seconds: float = 60.0, stall: float = 30.0) -> tuple[int, Progress]:
    """Return the exit status and the progress of a supervised worker that gets into trouble in its second piece."""
    worker, path = tmp_path / "worker.py", tmp_path / "progress"
    worker.write_text(WORKER.format(trouble=trouble))
    status = supervise([sys.executable, str(worker), str(path)], path, seconds, stall)
    return status, Progress.load(path)


@pytest.fixture(autouse=True)
def bench_can_be_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).resolve().parents[2]}:{tmp_path}")


def test_without_trouble_the_status_is_the_worker_s(tmp_path: Path) -> None:
    status, progress = run(tmp_path, "pass")
    assert status == 3 and progress.done == [*"abcd"] and progress.broken == {}


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "the process was ended by signal 9"),
        ("sys.exit(RESTART)", "an error spoiled the CUDA context, and a new process goes on"),
        ("time.sleep(600)", "the process was ended: nothing measured for"),
    ],
    ids=["killed", "spoiled", "hung"],
)
def test_another_process_goes_on_with_the_next_piece(tmp_path: Path, trouble: str, reason: str) -> None:
    status, progress = run(tmp_path, trouble, stall=12.0)
    assert status == 3 and progress.done == [*"acd"] and progress.payload == [*"acd"]
    assert list(progress.broken) == ["b"] and progress.broken["b"].startswith(reason)


def test_a_part_that_ends_the_process_is_left_out_and_its_piece_is_begun_again(tmp_path: Path) -> None:
    status, progress = run(tmp_path, FOCUSED)
    assert status == 3 and progress.done == [*"abcd"]
    assert progress.excluded == {"y": "the process was ended by signal 9"} and progress.broken == {}


def test_the_beginning_of_a_part_counts_as_progress(tmp_path: Path) -> None:
    progress = Progress(tmp_path / "progress", until=0.0)
    progress.begin("contest")
    os.utime(progress.path, (1.0, 1.0))
    progress.focus("x")
    assert time.time() - progress.path.stat().st_mtime < 60


def test_a_process_that_does_not_end_in_time_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts, "GRACE", 0.0)
    status, progress = run(tmp_path, "time.sleep(600)", seconds=6.0)
    assert status == 1 and progress.done == ["a"] and "b" in progress.broken


def test_a_worker_that_dies_before_it_begins_is_not_started_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts, "MAX_STARTS", 2)
    path = tmp_path / "progress"
    assert supervise([sys.executable, "-c", f"import sys; sys.exit({RESTART})"], path, 60.0, 30.0) == 1


def test_a_module_gets_its_arguments_and_a_file_for_its_progress(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER.format(trouble="assert sys.argv[1:-1] == ['--quick', '--worker']"))
    assert supervise_module("worker", ["--quick"], 60.0, 30.0) == 3


def test_a_device_is_spoiled_if_synchronizing_fails_and_a_cpu_never_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    assert is_spoiled(torch.device("cuda")) and not is_spoiled(torch.device("cpu"))
