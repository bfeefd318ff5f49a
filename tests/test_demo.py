"""The demo, in a version of seconds: it writes what it promises."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from bench.demo import CHOSEN, GPT, METHODS, Task, batches, standard_library
from bench.tune_demo import RECORD

TINY = Task(steps=6, batch=2, length=16, width=16, layers=1)


def test_the_demo_writes_its_summary_and_plot_and_prints_its_table(tmp_path):
    sizes = ["--steps", "6", "--batch", "2", "--length", "16", "--width", "16", "--layers", "1"]
    command = [sys.executable, "-m", "bench.demo", "--out", str(tmp_path), *sizes]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["results"]) == set(METHODS)
    for method, numbers in summary["results"].items():
        assert f"{numbers['held_out_loss']:.3f}" in result.stdout, method
        assert 0 < numbers["final_train_loss"] < 10 and numbers["state_bytes"] > 0
        assert 0 < numbers["optimizer_share"] < 1 and numbers["steps_per_second"] > 0
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_every_method_sees_the_same_data_in_the_same_order():
    data = standard_library()[0]
    first, second = ([x for x, _ in batches(data, 3, TINY, seed=1)] for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_no_file_stands_on_both_sides_of_the_split():
    train, held_out = standard_library()
    assert len(train) > 5 * len(held_out) > 500_000


def test_the_model_is_causal():
    torch.manual_seed(0)
    model = GPT(TINY)
    text = torch.randint(0, 256, (1, 16))
    changed = text.clone()
    changed[0, 9] += 1 if changed[0, 9] < 255 else -1
    before, after = model(text), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert (before[:, 9:] - after[:, 9:]).abs().max() > 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_the_recorded_settings_are_the_best_of_the_recorded_search(method):
    rows = [row for row in json.loads(RECORD.read_text()) if row["method"] == method]
    longest = max(row["task"]["steps"] for row in rows)
    best = min((row for row in rows if row["task"]["steps"] == longest), key=lambda row: row["held_out_loss"])
    assert json.loads(json.dumps(CHOSEN[method])) == best["settings"]
