"""`make bench-pytest`: its figures are ratios to a reference, whatever the machine is busy with."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest

pytest.importorskip("pytest_benchmark", reason="bench/steps/benchmarks needs pytest-benchmark")
from bench.steps.benchmarks import conftest as benchmarks

ROOT = Path(__file__).resolve().parents[2]


class Benchmark:
    """The part of pytest-benchmark that the fixture uses."""

    _timer = None
    stats = None

    def pedantic(self, run, setup, rounds):
        samples = []
        for _ in range(rounds):
            setup()
            start = self._timer()
            run()
            samples.append(self._timer() - start)
        self.stats = SimpleNamespace(stats=SimpleNamespace(median=median(samples)))


@pytest.fixture
def seconds(monkeypatch):
    """A clock to move by hand."""
    seconds = [100.0]
    monkeypatch.setattr(benchmarks, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))
    return seconds


@pytest.fixture
def in_units_of(seconds):
    return inspect.unwrap(benchmarks.in_units_of)(Benchmark())


def test_a_time_is_in_units_of_the_reference_of_its_own_round(seconds, in_units_of):
    slowness = [1.0]

    def reference():
        slowness[0] *= 2  # the machine gets slower and slower
        seconds[0] += 2.0 * slowness[0]

    def run():
        seconds[0] += 6.0 * slowness[0]

    assert in_units_of(reference, run) == pytest.approx(3.0)


def test_calls_before_the_rounds_are_not_measured(seconds, in_units_of):
    calls = []

    def run():
        calls.append("run")
        seconds[0] += 1e6 if len(calls) <= 4 else 5.0

    def reference():
        seconds[0] += 1e6 if len(calls) < 4 else 2.0

    assert in_units_of(reference, run, warmups=4) == pytest.approx(2.5)
    assert len(calls) == 4 + benchmarks.ROUNDS


def test_what_is_saved_is_the_ratio_and_not_seconds(tmp_path):
    path = tmp_path / "saved.json"
    chosen = ["-k", "rf_rmsprop_in_copies", f"--benchmark-json={path}", "-p", "no:cacheprovider", "-q"]
    command = [sys.executable, "-m", "pytest", "bench/steps/benchmarks", *chosen]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "1 passed" in result.stdout or "1 failed" in result.stdout, result.stdout + result.stderr
    (saved,) = json.loads(path.read_text())["benchmarks"]
    # a step moves 3.5 times the bytes of the copy, in some milliseconds
    assert saved["stats"]["median"] > 0.5 and saved["stats"]["rounds"] == benchmarks.ROUNDS
