"""`make bench-pytest`: its figures are ratios to a reference, however busy the machine is."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from statistics import median
from types import SimpleNamespace

import pytest

pytest.importorskip("pytest_benchmark", reason="bench/steps/benchmarks needs pytest-benchmark")
from bench.common.paths import ROOT
from bench.steps.benchmarks import conftest as benchmarks


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


def test_a_time_is_in_units_of_the_reference_of_its_round_and_warmups_do_not_count(monkeypatch):
    """The machine gets slower and slower, and warming up takes long."""
    seconds, calls = [100.0], []
    monkeypatch.setattr(benchmarks, "time", SimpleNamespace(perf_counter=lambda: seconds[0]))
    in_units_of = inspect.unwrap(benchmarks.in_units_of)(Benchmark())

    def take(time):
        calls.append(time)
        seconds[0] += 1e6 if len(calls) <= 8 else time * 2.0 ** (len(calls) // 2)

    ratio = in_units_of(lambda: take(2.0), lambda: take(3.0), warmups=4)
    assert ratio == pytest.approx(3.0)  # of a run, when the machine is twice as slow, over its reference
    assert len(calls) == 2 * (4 + benchmarks.ROUNDS)


def test_the_ratio_is_saved_and_not_seconds(tmp_path):
    path = tmp_path / "saved.json"
    chosen = ["-k", "rf_rmsprop_in_copies", f"--benchmark-json={path}", "-p", "no:cacheprovider", "-q"]
    command = [sys.executable, "-m", "pytest", "bench/steps/benchmarks", *chosen]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "1 passed" in result.stdout or "1 failed" in result.stdout, result.stdout + result.stderr
    (saved,) = json.loads(path.read_text())["benchmarks"]
    # a step moves 3.5 times the bytes of the copy, in some milliseconds
    assert saved["stats"]["median"] > 0.5 and saved["stats"]["rounds"] == benchmarks.ROUNDS
