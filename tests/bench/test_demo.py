"""The demo, in a version of seconds: it writes what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import pytest
import torch

from bench.common.peers import PEERS, why_missing
from bench.demo.__main__ import CHOSEN, GPT, SHOWN, Task, batches, parse, standard_library, train
from bench.demo.peers import MODULES
from bench.demo.report import Run, seconds_to_baseline
from bench.demo.tune import RECORD, SPACES, arguments_of, loss_of, points
from rootfree_kernels import split_params
from tests.bench.fakes import without_peers

TINY = Task(steps=6, batch=2, length=16, width=16, layers=1)


def test_the_demo_writes_its_summary_and_plot_and_prints_its_table(tmp_path):
    sizes = ["--steps", "6", "--batch", "2", "--length", "16", "--width", "16", "--layers", "1"]
    command = [sys.executable, "-m", "bench.demo", "--out", str(tmp_path), *sizes]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["results"]) == set(SHOWN)
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


# ---- the search ----------------------------------------------------------------------------------------------------


def searched(method):
    return [row for row in json.loads(RECORD.read_text()) if row["method"] == method]


@pytest.mark.parametrize("method", CHOSEN)
def test_the_recorded_settings_are_the_best_of_the_recorded_search(method):
    longest = max(row["task"]["steps"] for row in searched(method))
    best = min((row for row in searched(method) if row["task"]["steps"] == longest), key=loss_of)
    assert json.loads(json.dumps(CHOSEN[method])) == best["settings"]


def budget(method):
    """How often a method was tried on each task."""
    return Counter(json.dumps(row["task"]) for row in searched(method))


@pytest.mark.parametrize("method", [method for method in CHOSEN if method not in ("muon", "recipe")])
def test_every_method_was_searched_as_long_and_on_the_same_task_as_adamw(method):
    assert budget(method) == budget("adamw")


def test_muon_was_searched_longer_and_the_recipe_less_long():
    assert budget("muon") > budget("adamw") > budget("recipe")


# ---- other people's ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SPACES)
def test_every_method_that_is_at_hand_trains_with_settings_of_its_space(method):
    if problem := method in MODULES and why_missing(MODULES[method]):
        pytest.skip(f"{method} is {problem}")
    settings = arguments_of(points(method, 1)[0])
    run, model = train(method, settings, TINY, standard_library(), evaluations=1)
    torch.manual_seed(TINY.seed)
    before = GPT(TINY)
    assert not any(torch.equal(*pair) for pair in zip(model.parameters(), before.parameters(), strict=True))
    assert all(0 < loss < 10 for loss in run.train) and run.state_bytes > 0


@pytest.mark.parametrize("method", MODULES)
def test_a_method_that_is_not_here_is_refused_before_anything_is_trained(method, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(CHOSEN, method, {})
    monkeypatch.setattr(sys, "argv", ["bench.demo", "--optimizers", "adamw", method])
    with without_peers(tmp_path), pytest.raises(SystemExit):
        parse()
    message = capsys.readouterr().err
    assert f"--optimizers {method}: not installed: {PEERS[MODULES[method]].how_to_install()}" in message


# ---- the report ----------------------------------------------------------------------------------------------------


def test_the_time_to_a_loss_lies_on_the_line_between_two_evaluations():
    run = Run([0.0] * 20, {10: 4.0, 20: 3.0}, {10: 1.0, 20: 3.0}, 3.0)
    assert [run.seconds_to(loss) for loss in (5.0, 4.0, 3.5, 3.0, 2.9)] == [1.0, 1.0, 2.0, 3.0, None]
    slower = Run([0.0] * 20, {10: 9.0, 20: 3.5}, {10: 1.0, 20: 3.0}, 3.0)
    assert seconds_to_baseline({"first": run, "slower": slower}) == {"first": 3.0, "slower": None}
    assert seconds_to_baseline({"first": slower, "faster": run}) == {"first": 3.0, "faster": 2.0}


def test_only_the_tables_and_the_head_of_the_demo_s_model_are_set_apart():
    split = split_params(GPT(Task()))
    assert [name for name, _ in split.embeddings_and_heads] == ["bytes.weight", "places.weight", "head.weight"]
    assert len(split.matrices) == 6 * Task().layers
