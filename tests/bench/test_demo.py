"""The demo: its model, settings, report and figures, and a run of the small size in seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch

from bench.common.gpt import GPT, GPT2, GPTConfig
from bench.common.paths import RESULTS
from bench.common.peers import PEERS, why_missing
from bench.demo import plot, variants
from bench.demo.__main__ import parse
from bench.demo.data import batches, standard_library
from bench.demo.methods import METHODS
from bench.demo.report import Evaluation, Run, baseline_of, common_step, table
from bench.demo.settings import AT_SMALL, SETTINGS, SIZES, Task
from bench.demo.train import Session, Trainee, train
from bench.demo.tune import RECORD, SPACES, arguments_of, loss_of, points
from rootfree_kernels import split_params
from tests.bench.fakes import without_peers

TINY = Task(steps=6, batch=2, length=16, width=16, layers=1)


def test_the_demo_writes_summary_page_and_plots_and_prints_its_table(tmp_path):
    sizes = ["--steps", "6", "--batch", "2", "--length", "16", "--width", "16", "--layers", "1"]
    command = [sys.executable, "-m", "bench.demo", "--out", str(tmp_path), *sizes]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {"command", "date", "commit", "torch", "settings", "task", "bytes", "data"} <= set(summary)
    assert [*summary["results"]] == ["adamw", "muon", "recipe"]
    for method, numbers in summary["results"].items():
        assert f"{numbers['held_out_loss']:.4f}" in result.stdout, method
        assert 0 < numbers["final_train_loss"] < 10 and numbers["state_bytes"] > 0
        assert 0 < numbers["optimizer_share"] < 1 and numbers["steps_per_second"] > 0
        assert [step for step, _, _ in numbers["held_out"]] == [1, 2, 3, 4, 5, 6]
    for name in ("loss-by-seconds.png", "loss-by-steps.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and name in (tmp_path / "README.md").read_text()
    assert "written by the model of" in result.stdout


# ---- data and model ------------------------------------------------------------------------------------------------


def test_batches_follow_from_the_seed_and_most_of_the_standard_library_is_trained_on():
    corpus = standard_library()
    assert len(corpus.train) > 5 * len(corpus.held_out) > 500_000
    first, second, other = ([x for x, _ in batches(corpus.train, 3, TINY, seed)] for seed in (1, 1, 2))
    assert all(map(torch.equal, first, second)) and not any(map(torch.equal, first, other))


@pytest.mark.parametrize("config", [GPTConfig(1, 16, context=16), GPT2(1, 16, 256, 16, head_width=8)])
def test_the_model_is_causal(config):
    torch.manual_seed(0)
    model = GPT(config)
    text = torch.randint(0, 256, (1, 16))
    changed = text.clone()
    changed[0, 9] = (text[0, 9] + 1) % 256
    before, after = model(text), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert (before[:, 9:] - after[:, 9:]).abs().max() > 1e-6


def test_only_embeddings_and_head_of_the_model_are_set_apart():
    model = Task().model()
    split = split_params(model)
    assert [name for name, _ in split.embeddings_and_heads] == ["bytes.weight", "places.weight", "head.weight"]
    assert [id(x) for _, x in split.matrices] == [id(x) for x in model.matrices()]
    assert len(split.matrices) == 6 * Task().layers


@pytest.mark.parametrize(("size", "millions"), [("small", 1.07), ("30m", 28.85), ("124m", 121.0)])
def test_sizes_are_what_they_are_called(size, millions):
    with torch.device("meta"):
        model = SIZES[size].model()
    assert sum(x.numel() for x in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.2)


# ---- methods and settings ------------------------------------------------------------------------------------------


def searched(method):
    return [row for row in json.loads(RECORD.read_text()) if row["method"] == method]


def budget(method):
    """Return how often a method was tried on each task."""
    return Counter(Task(**row["task"]) for row in searched(method))


@pytest.mark.parametrize("method", AT_SMALL)
def test_the_settings_are_the_best_of_the_recorded_search(method):
    longest = max(row["task"]["steps"] for row in searched(method))
    best = min((row for row in searched(method) if row["task"]["steps"] == longest), key=loss_of)
    assert json.loads(json.dumps(AT_SMALL[method])) == best["settings"]


def test_every_method_was_searched_as_long_as_adamw_but_muon_longer_and_the_recipe_less_long():
    assert budget("rfrmsprop") == budget("ifshampoo") == budget("shampoo") == budget("adamw")
    assert budget("muon") > budget("adamw") > budget("recipe")


@pytest.mark.parametrize("method", SPACES)
def test_every_method_that_is_installed_trains_with_settings_of_its_space(method):
    if reason := METHODS[method].peer and why_missing(METHODS[method].peer):
        pytest.skip(f"{method} is {reason}")
    trainee = Trainee(method, arguments_of(points(method, 1)[0]), Session(TINY, standard_library(), evaluations=1))
    before = [x.detach().clone() for x in trainee.model.parameters()]
    run = train(trainee)
    assert not any(map(torch.equal, trainee.model.parameters(), before))
    assert all(0 < loss < 10 for loss in run.train) and run.state_bytes > 0


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.peer])
def test_a_method_that_is_not_installed_is_refused_before_anything_is_trained(method, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(SETTINGS["small"], method, {})
    with without_peers(tmp_path), pytest.raises(SystemExit):
        parse(["--optimizers", "adamw", method])
    message = f"--optimizers {method}: not installed: {PEERS[METHODS[method].peer].how_to_install()}"
    assert message in capsys.readouterr().err


def test_variants_append_their_runs_and_compare_with_the_first_of_a_group(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(variants, "Task", lambda **given: Task(**{**vars(TINY), **given}))
    out = tmp_path / "variants.jsonl"
    options = ["--cases", "adamw", "rounding", "--seeds", "0", "1", "--steps", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["variants", *options])
    variants.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert Counter(row["case"] for row in rows) == {"adamw": 2, **{f"rounding: {x}": 2 for x in variants.ROUNDING}}
    assert all({"seed", "held_out_loss", "final_train_loss", "settings", "clip", "commit"} <= set(row) for row in rows)
    page = out.with_suffix(".md").read_text()
    mean = sum(row["held_out_loss"] for row in rows if row["case"] == "rounding: fp32") / 2
    assert lines_of(page)["rounding: fp32"][3] == f"{mean:.4f} (1.000)"
    assert lines_of(page)["rounding: bf16, nearest"][1] == "0 1"
    assert page.partition("|")[2] in capsys.readouterr().out


def lines_of(page):
    """Return the cells of a table by the first of each line, without its head."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    return {first: cells for first, *cells in rows[2:]}


def test_a_variant_s_table_names_the_seeds_that_diverged_and_compares_with_the_first_case_of_a_group():
    def row(case, seed, loss, **more):
        losses = {"held_out_loss": loss, "final_train_loss": loss}
        return {"case": case, "seed": seed, "state_bytes": 0, "task": {"steps": 4}, **losses, **more}

    lost = {"diverged": "the loss is nan at step 2"}
    rows = [row("recipe: T = 2", 0, 3.0), row("recipe: T = 2", 1, None, **lost), row("recipe: default", 0, 2.0)]
    rows += [row("recipe: clipped at 1", seed, 1.0, **lost) for seed in (0, 1)] + [
        row("rounding: bf16, nearest", 0, 2.0)
    ]
    lines = lines_of(variants.summary(rows))
    assert lines["recipe: T = 2"] == ["4", "0 1", *["3.0000 (1.500), diverged (seed 1)"] * 2, "–"]
    assert lines["recipe: clipped at 1"][2:4] == ["diverged (seeds 0 1)"] * 2
    assert lines["rounding: bf16, nearest"][3] == "2.0000"  # the first of its group was not measured


def test_variants_by_default_are_adamw_muon_and_all_of_the_recipe_s(monkeypatch, tmp_path):
    names = []
    monkeypatch.setattr(variants, "measure", lambda name, *rest: names.append(name) or {"diverged": "at once"})
    monkeypatch.setattr(variants, "summary", lambda rows: "")
    monkeypatch.setattr(sys, "argv", ["variants", "--seeds", "0", "--out", str(tmp_path / "variants.jsonl")])
    variants.main()
    assert names == [name for name in variants.CASES if variants.group_of(name) in ("adamw", "muon", "recipe")]
    assert names[2] == "recipe: default" and len(names) == 11


@pytest.mark.parametrize("record", sorted(RESULTS.glob("recipe-*.jsonl")) + sorted(RESULTS.glob("variants-*.jsonl")))
def test_records_of_variants_can_be_printed_by_the_names_of_today(record, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["variants", "--page", str(record)])
    variants.main()
    lines = lines_of(capsys.readouterr().out)
    assert lines and {*lines} <= {*variants.CASES}
    if "recipe" in record.name:
        assert lines["recipe: FP32 factors"] == ["–", "0 1 2", "–", "1.4722 (1.001)", "32.1 MB"]


# ---- the report ----------------------------------------------------------------------------------------------------


def run_of(held_out, planned, step_seconds):
    """Return a run with these losses by step."""
    points = [Evaluation(step, step * step_seconds, loss, 3.0, 1 - step / planned) for step, loss in held_out.items()]
    last = points[-1]
    return Run([3.0] * last.step, points, last.seconds, 0.1, planned=planned)


def test_the_time_to_a_loss_lies_on_the_line_between_two_evaluations():
    run = run_of({10: 4.0, 20: 3.0}, 20, 0.1)
    assert [run.seconds_to(loss) for loss in (5.0, 4.0, 3.5, 3.0, 2.9)] == [1.0, 1.0, 1.5, 2.0, None]
    slower = run_of({10: 9.0, 20: 3.5}, 20, 0.1)
    assert baseline_of({"broken": Run(error="x"), "slower": slower, "run": run}) == ("slower", 3.5)
    assert baseline_of({}) == ("the first", None) and run.seconds_to(None) is None


def test_methods_are_compared_at_the_last_step_that_all_have_reached():
    fast = run_of({10: 3.0, 20: 2.5, 30: 2.2, 33: 2.1}, 33, 1.0)
    slow = run_of({10: 2.8, 20: 2.1}, 20, 1.6)
    runs = {"fast": fast, "slow": slow, "broken": Run(error="RuntimeError: out of memory")}
    assert common_step(runs) == 20
    head, _, first, second, third = table(runs).splitlines()
    assert "at step 20 (lr ×)" in head and "2.5000 (0.39)" in first and "2.1000 (0.00)" in second
    assert "seconds to fast's loss" in head and " 33.0 " in first and " 32.0 " in second and "out of memory" in third
    assert "peak memory" not in head  # nothing was measured


def test_evaluations_of_a_record_are_read_in_both_forms():
    evaluation = Evaluation(10, 1.5, 2.0, 2.1, 0.5)
    assert plot.points_of({"evaluations": [evaluation._asdict()]}) == [evaluation[:3]]
    held_out = {"held_out": [(20, 3.0, 1.0)]}
    assert plot.points_of(held_out) == held_out["held_out"] and plot.points_of({}) == []


def test_records_of_the_demo_can_be_drawn_and_one_without_a_course_is_refused(tmp_path, monkeypatch, capsys):
    for name in ("demo-2026-11-28", "demo-peers-2026-11-22", "demo-2026-11-22"):
        out = tmp_path / f"{name}.png"
        monkeypatch.setattr(sys, "argv", ["plot", str(RESULTS / f"{name}.json"), "--out", str(out)])
        if name != "demo-2026-11-22":
            plot.main()
            assert out.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        plot.main()
    assert "the record has no held-out losses over time" in capsys.readouterr().err
