"""Training of the demo's larger models: data, the loop and the command line, at a tiny size on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from bench.demo import __main__ as demo
from bench.demo import report
from bench.demo.__main__ import attempt, logger, parse
from bench.demo.data import Corpus, batches, choose, read_corpus
from bench.demo.report import common_step, table
from bench.demo.settings import AT_LARGE, SIZES, settings_of
from bench.demo.train import Session, Trainee, round_number, warmup_cosine

TINY = replace(SIZES["tiny"], steps=6)


@pytest.fixture(autouse=True)
def one_thread():
    """Leave threads and the global generator as they were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)


def corpus():
    """Return text in which every byte is the one before plus one, in pieces that start anywhere."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(256, (200, 1), generator=generator)
    text = ((starts + torch.arange(50)) % 256).to(torch.uint8).flatten()
    return Corpus(text[:8000], text[8000:], "made up", 200)


def session(steps=6, **changes):
    """Return a session, and the list that gets its rows."""
    rows = []
    return Session(replace(TINY, steps=steps), corpus(), log=rows.append, **changes), rows


def trained(method, where, **changes):
    return attempt(method, settings_of(method, "tiny", changes), where)


# ---- the data ------------------------------------------------------------------------------------------------------


def package(folder):
    """Write 400 sources to a folder: each of 40 bytes that no other file has."""
    for index in range(400):
        path = folder / f"package{index % 7}" / f"module{index}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{index:039d}\n")
    return folder


def files_of(side):
    return {*bytes(side.tolist()).decode().split("\n")} - {""}


def test_whole_files_are_held_out_and_copies_tables_and_other_files_are_not_read(tmp_path):
    package(tmp_path)
    (tmp_path / "package0" / "copy.py").write_text(f"{0:039d}\n")
    (tmp_path / "package0" / "table.py").write_text("x" * (1 << 21))
    (tmp_path / "package0" / "notes.txt").write_text("x" * 40)
    (tmp_path / "package0" / "link.py").symlink_to(tmp_path / "package0" / "module0.py")
    assert len(choose([tmp_path], 20_000)[0]) == 401
    found = read_corpus(20_000, [tmp_path])
    train_side, held_out = files_of(found.train), files_of(found.held_out)
    assert not train_side & held_out
    assert train_side | held_out == {f"{index:039d}" for index in range(400)}
    assert found.num_files == 400 and 20 <= len(held_out) <= 60


def test_the_data_depend_on_the_files_alone_and_small_site_packages_give_way_to_the_standard_library(tmp_path):
    here, there = (read_corpus(8000, [package(tmp_path / name)]) for name in ("here", "there"))
    assert torch.equal(here.train, there.train) and torch.equal(here.held_out, there.held_out)
    assert 7900 <= len(here.train) + len(here.held_out) <= 8000
    found = read_corpus(1 << 20, [tmp_path])
    assert found.source == "the standard library" and len(found.train) == 1 << 20


# ---- training ------------------------------------------------------------------------------------------------------


def test_every_method_learns_from_the_same_weights_and_batches(monkeypatch):
    seen = {}
    monkeypatch.setattr(Session, "warms_up", True)
    step = Trainee.step

    def noted(self, batch, marks):
        if self.run.planned:  # not in the throw-away steps
            seen.setdefault(self.method, []).append(batch[0].clone())
        return step(self, batch, marks)

    monkeypatch.setattr(Trainee, "step", noted)
    where, _ = session(steps=30)
    runs = {method: trained(method, where) for method in AT_LARGE}
    first = next(batches(where.corpus.train, 1, TINY, seed=1))
    torch.manual_seed(0)
    loss = TINY.model().loss(*first).item()
    for method, run in runs.items():
        assert run.is_complete and run.train[0] == pytest.approx(loss, rel=1e-6)  # throw-away steps left no trace
        assert run.evaluations[-1].held_out_loss < run.evaluations[0].held_out_loss
        assert run.state_bytes > 0 and 0 < run.optimizer_seconds < run.seconds and run.step_seconds > 0
        assert len(seen[method]) == 30 and all(map(torch.equal, seen[method], seen["adamw"]))
    assert not torch.equal(*seen["adamw"][:2])


def test_the_schedule_is_the_same_for_all_and_ends_at_its_minimum():
    where, rows = session(steps=40)
    for method in ("adamw", "rfrmsprop"):
        trained(method, where)
    adamw, rfrmsprop = ([x["lr_factor"] for x in rows if x["optimizer"] == name] for name in ("adamw", "rfrmsprop"))
    factors = [warmup_cosine(step, replace(TINY, steps=40)) for step in range(40)]
    assert adamw == rfrmsprop == factors[3::4]
    assert factors[-1] == min(factors) < 0.01 and max(factors) == 1


def test_with_seconds_the_steps_are_what_fits_and_the_first_method_sets_the_interval():
    where, _ = session(seconds=60.0)
    assert [where.plan(seconds).steps for seconds in (0.05, 0.1, 100.0)] == [1200, 600, 1]
    assert where.every == 100
    assert [round_number(x) for x in (0.2, 1, 2.9, 4.7, 9.9, 49, 299, 1000)] == [1, 1, 2, 3, 5, 30, 200, 1000]


def test_a_method_whose_steps_were_measured_too_fast_is_stopped(monkeypatch):
    where, _ = session(seconds=0.01)
    monkeypatch.setattr(Trainee, "warm_up", lambda self: setattr(self.run, "step_seconds", 1e-6))
    where.every = 5
    run = trained("rfrmsprop", where)
    assert not run.is_complete and not run.error and 5 <= len(run.train) < run.planned == 10_000
    assert "out of time" in table({"rfrmsprop": run})


@pytest.mark.parametrize("steps", [8, 80])
def test_divergence_and_errors_are_recorded_and_do_not_stop_the_others(steps, monkeypatch):
    step = Trainee.step

    def broken(self, batch, marks):
        loss, self.number = step(self, batch, marks), getattr(self, "number", 0) + 1
        if self.number == 3 and self.method == "adamw":
            self.model.norm.weight.detach().fill_(torch.nan)
        if self.number == 3 and self.method == "muon":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss

    monkeypatch.setattr(Trainee, "step", broken)
    where, rows = session(steps)
    runs = {method: trained(method, where) for method in ("adamw", "muon", "rfrmsprop")}
    # There is an evaluation after every step of 8, and after every eighth of 80.
    message = "the held-out loss is nan after step 3" if steps == 8 else "the loss is nan at step 4"
    assert runs["adamw"].diverged == message and len(runs["adamw"].train) == 3
    assert runs["muon"].error == "OutOfMemoryError: CUDA out of memory"
    assert runs["rfrmsprop"].is_complete and common_step(runs) == steps
    assert any("diverged" in row for row in rows) and any("out of memory" in row.get("error", "") for row in rows)
    json.dumps([rows, [run.as_json(1.0) for run in runs.values()]], allow_nan=False)
    page = table(runs)
    assert f"diverged, {message}" in page and "OutOfMemoryError" in page


# ---- the command ---------------------------------------------------------------------------------------------------


def test_a_run_by_time_writes_as_it_goes_and_needs_no_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    options = ["--device", "cpu", "--tiny", "--seconds", "0.3", "--max-bytes", "300000", "--out", str(tmp_path)]
    assert demo.main([*options, "--optimizers", "adamw", "ifshampoo"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert {*rows[0]} == {"optimizer", "step", "steps", "seconds", "lr_factor", "train_loss", "held_out_loss"}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {"commit", "device", "torch", "settings", "task", "data", "same_steps"} <= set(summary)
    assert summary["settings"]["ifshampoo"]["batch_size"] == 1
    page, printed = (tmp_path / "README.md").read_text(), capsys.readouterr().out
    assert not [*tmp_path.glob("*.png")] and "png" not in page
    for method in ("adamw", "ifshampoo"):
        losses = [row["held_out_loss"] for row in rows if row["optimizer"] == method]
        assert [loss for _, _, loss in summary["results"][method]["held_out"]] == losses
        assert f"{losses[-1]:.4f}" in page and f"{losses[-1]:.4f}" in printed


def test_rows_are_on_the_disk_before_the_next_step(tmp_path):
    with (tmp_path / "progress.jsonl").open("w") as file:
        logger(file, 0.0)({"optimizer": "adamw", "step": 1})
        assert json.loads((tmp_path / "progress.jsonl").read_text()) == {"optimizer": "adamw", "step": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "7b"], "argument --size: invalid choice: '7b'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--device", "cuda"], "--device cuda: torch"),
        (["--seconds", "0"], "--seconds 0.0: choose a number above 0"),
        (["--size", "tiny"], "argument --size: invalid choice: 'tiny'"),
        (["--optimizers", "soap"], "argument --optimizers: invalid choice: 'soap'"),
        (["--optimizers", "shampoo"], "--optimizers shampoo: no settings at size 30m: choose from adamw, muon"),
        (["--set", "adamw.lr"], "is not METHOD.OPTION=VALUE"),
        (["--set", "sgd.lr=1"], "--set sgd.lr: 'sgd' is not one of --optimizers adamw muon recipe"),
        (["--set", "adamw.beta2=1"], "adamw has no option 'beta2': choose one of lr, betas"),
        (["--set", "rfrmsprop.damping=-1"], "--set for rfrmsprop: ValueError: "),
        (["--optimizers", "adamw", "--set", "muon.lr=.1"], "'muon' is not one of --optimizers adamw"),
    ],
)
def test_a_mistake_is_reported_before_anything_is_trained(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(demo.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        parse(["--device", "cpu", "--size", "30m", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ("small", "cpu", None, "demo")),
        (["--steps", "6"], ("small", "cpu", None, "demo")),
        (["--device", "cpu"], ("small", "cpu", None, "demo")),
        (["--device", "cuda"], ("30m", "cuda", 60.0, "language-model")),
        (["--size", "124m"], ("124m", "cuda", 60.0, "language-model")),
        (["--size=30m", "--steps", "6", "--seconds", "5"], ("30m", "cuda", None, "language-model")),
    ],
)
def test_size_and_device_decide_what_is_trained_and_for_how_long(arguments, expected, monkeypatch):
    monkeypatch.setattr(demo.torch.cuda, "is_available", lambda: True)
    options, _ = parse(arguments)
    assert (options.size, options.device, options.seconds, options.out.name) == expected
    assert [*options.settings] == (["adamw", "muon", "recipe"] if options.size == "small" else [*AT_LARGE])


def test_settings_and_sizes_can_be_changed_from_outside():
    changes = ("adamw.lr=2e-3", "adamw.betas=(.9,.99)", "ifshampoo.clip=row_sum", "recipe.factor_dtype=torch.float32")
    sets = [argument for change in changes for argument in ("--set", change)]
    options, task = parse(["--device", "cpu", "--size", "124m", "--batch", "8", *sets])
    assert task == replace(SIZES["124m"], batch=8)
    adamw, ifshampoo, recipe = (options.settings[name] for name in ("adamw", "ifshampoo", "recipe"))
    assert adamw["lr"] == 2e-3 and adamw["betas"] == (0.9, 0.99) and adamw["weight_decay"] == 0.1
    assert ifshampoo["clip"] == "row_sum" and recipe["factor_dtype"] is torch.float32
    assert settings_of("adamw", "124m", {})["lr"] == 6e-4 and settings_of("adamw", "30m", {})["lr"] == 1e-3
