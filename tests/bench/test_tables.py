"""The tables of all benchmarks, and what a record says about its origin."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.common import record
from bench.common.report import Alternatives, Row, Target, cell, markdown, number, table
from bench.common.timing import Timing

ROWS = [
    Row("T", "good", {"µs": Timing(12.34, 10.0, 15.0, 50), "ratio": 1.2}, {"ratio": Target("≥", 1.15)}),
    Row("T", "slow", {"µs": Timing(600.0, 590.0, 700.0, 50, False), "ratio": None}, {"µs": Target("≤", 500.0)}),
    Row("T", "a|b", {"kind": "x|y"}, note="remark"),
    Row("U", "broken", error="ValueError: a\nmessage"),
]


def squeezed(lines: list[str]) -> list[str]:
    return [" ".join(line.split()) for line in lines]


def test_markdown_shows_values_targets_and_errors() -> None:
    text = markdown({"device": "GPU", "commit": "abc"}, ROWS, {"T": "What T is."})
    lines = squeezed(text.splitlines())
    assert lines[0] == "# Kernels on GPU" and "| commit | abc |" in lines and "| driver | unknown |" in lines
    assert "1 of 2 met; 1 cases were not measured." in lines
    assert "| T | slow | µs | 600 (590–700) with gaps | ≤ 500 | **missed** |" in lines
    assert "What T is." in lines and "| case | µs | ratio | kind |" in lines
    assert "| good | 12.3 (10.0–15.0) | 1.20 (≥ 1.15: met) | |" in lines
    assert "| slow | **600 (590–700) with gaps (≤ 500: missed)** | – | |" in lines
    assert r"| a\|b | | | x\|y |" in lines and "- a|b: remark" in lines
    assert "- **broken: not measured.** ValueError: a message" in lines


def test_columns_are_aligned_and_headings_are_not() -> None:
    lines = table(("", "registers"), ["a heading", ("sm_90", "64")])
    assert lines == ["|       | registers |", "| ----- | --------- |", "a heading", "| sm_90 | 64        |"]


def test_json_holds_all_of_a_row() -> None:
    alternatives = Alternatives("diagonal", {"numbers": 5, "tensors": 1}, {"cuda": Timing(2.0, 1.0, 3.0, 9)})
    assert Row("T", "case", alternatives=alternatives).as_json()["alternatives"] == {
        "operation": "diagonal",
        "sizes": {"numbers": 5, "tensors": 1},
        "times": {"cuda": {"median": 2.0, "p10": 1.0, "p90": 3.0, "samples": 9, "queued": True}},
    }
    assert ROWS[0].as_json() == {
        "table": "T",
        "case": "good",
        "values": {"µs": {"median": 12.34, "p10": 10.0, "p90": 15.0, "samples": 50, "queued": True}, "ratio": 1.2},
        "targets": {"ratio": {"bound": "≥ 1.15", "met": True}},
    }
    assert ROWS[3].as_json()["error"] == "ValueError: a\nmessage"


@pytest.mark.parametrize("value", [None, torch.nan, "text"])
def test_a_target_without_a_measured_value_is_missed(value: Any) -> None:
    assert not Target("≥", 0.0).is_met(value) and not Target("≤", 1e9).is_met(value)


def test_numbers_have_three_digits() -> None:
    values = {0.0: "0", 0.9249: "0.925", 12.345: "12.3", 1.0: "1.00", 1234567.8: "1,234,568", 0.00123: "1.2e-03"}
    assert [number(value) for value in values] == [*values.values()]
    assert number(torch.nan) == "–" and cell(12_345) == "12,345"


def test_a_copy_without_git_has_the_commit_of_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_git(*args: Any, **options: Any) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(record.subprocess, "run", no_git)
    monkeypatch.delenv("ROOTFREE_COMMIT", raising=False)
    assert record.commit() == "unknown"
    monkeypatch.setenv("ROOTFREE_COMMIT", "abc1234")
    assert record.commit() == "abc1234"
    assert record.nvidia_smi("driver_version") == ""
    assert record.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_a_record_names_gpu_and_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(multi_processor_count=132, total_memory=80 << 30, L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(record, "nvidia_smi", lambda fields: "580.1" if fields == "driver_version" else "1980 MHz")
    found = record.gpu(torch.device("cuda"))
    assert (found["device"], found["driver"], found["multiprocessors"]) == ("NVIDIA H100", "580.1", 132)
    assert found["nvidia_smi"] == "1980 MHz" and found["triton"] != "not installed"
