"""The language model of `bench.demo.language`, in a version of seconds on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench.common.gpt2 import GPT2
from bench.demo import language as language_model
from bench.demo import language_options, language_settings
from bench.demo.data import Corpus, read_corpus, sources
from bench.demo.language import Session, round_number, train
from bench.demo.language_options import is_asked_for, parse
from bench.demo.language_report import Course, common_step, seconds_to, table, write_report
from bench.demo.language_settings import METHODS, SIZES, parse_change, settings_of
from bench.demo.model import batches, warmup_cosine

TINY = SIZES["tiny"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Leave threads and the global generator as they were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)


def corpus() -> Corpus:
    """Text of which every byte is the one before plus one, from places of its own."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(256, (200, 1), generator=generator)
    text = ((starts + torch.arange(50)) % 256).to(torch.uint8).flatten()
    return Corpus(text[:8000], text[8000:], "made up", None)


def session(steps: int | None = 6, seconds: float = 60.0, **changes: Any) -> tuple[Session, list[dict[str, Any]]]:
    """A session, and the list that gets its lines."""
    lines: list[dict[str, Any]] = []
    return Session(TINY, CPU, corpus(), seconds, steps, lines.append, **changes), lines


def trained(method: str, where: Session, **changes: Any) -> Course:
    return train(method, settings_of(method, "tiny", TINY, changes), where)


# ---- the data ------------------------------------------------------------------------------------------------------


def package(folder: Path, num_files: int = 400) -> Path:
    """A folder of sources: each 40 bytes that no other file has."""
    for index in range(num_files):
        path = folder / f"package{index % 7}" / f"module{index}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{index:039d}\n")
    return folder


def files_of(side: torch.Tensor) -> set[str]:
    return {*bytes(side.tolist()).decode().split("\n")} - {""}


def test_whole_files_are_held_out_and_none_is_on_both_sides(tmp_path: Path) -> None:
    found = read_corpus(400 * 40, [package(tmp_path)])
    train_side, held_out = files_of(found.train), files_of(found.held_out)
    assert not train_side & held_out
    assert train_side | held_out == {f"{index:039d}" for index in range(400)}
    assert found.num_files == 400 and 20 <= len(held_out) <= 60


def test_the_data_depend_on_the_files_alone(tmp_path: Path) -> None:
    package(tmp_path / "here")
    package(tmp_path / "there")
    here, there = (read_corpus(8000, [tmp_path / name]) for name in ("here", "there"))
    assert torch.equal(here.train, there.train) and torch.equal(here.held_out, there.held_out)
    assert 7900 <= len(here.train) + len(here.held_out) <= 8000


def test_a_copy_of_a_file_is_left_out_and_tables_and_other_files_are_not_read(tmp_path: Path) -> None:
    package(tmp_path)
    (tmp_path / "package0" / "copy.py").write_text(f"{0:039d}\n")
    (tmp_path / "package0" / "table.py").write_text("x" * (1 << 21))
    (tmp_path / "package0" / "notes.txt").write_text("x" * 40)
    assert len(sources([tmp_path])) == 401
    assert read_corpus(20_000, [tmp_path]).num_files == 400


def test_the_standard_library_takes_the_place_of_small_site_packages(tmp_path: Path) -> None:
    found = read_corpus(1 << 20, [package(tmp_path)])
    assert found.source == "the standard library" and len(found.train) == 1 << 20


def test_batches_are_drawn_alike_for_every_method(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    step = language_model.Trainee.step

    def noted(self: Any, batch: Any, marks: Any = None) -> torch.Tensor:
        if marks is None:  # not of the throw-away steps
            seen.setdefault(self.method, []).append(batch[0].clone())
        return step(self, batch, marks)

    monkeypatch.setattr(language_model.Trainee, "step", noted)
    where, _ = session(steps=5)
    for method in METHODS:
        trained(method, where)
    first, *others = seen.values()
    assert len(seen) == len(METHODS) and len(first) == 5
    assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))
    assert not torch.equal(first[0], first[1])


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_starts_from_the_same_weights(method: str) -> None:
    where, lines = session(steps=30)
    course = trained(method, where)
    assert course.is_complete and not course.error
    first = [*batches(where.corpus.train, 1, TINY, seed=1)]
    torch.manual_seed(0)
    model = language_model.GPT(TINY, language_settings.HEAD_WIDTH)
    assert course.train[0] == pytest.approx(model.loss(*first[0]).item(), rel=1e-6)  # throw-away steps left no trace
    assert lines[-1]["held_out_loss"] < lines[0]["held_out_loss"]
    assert course.state_bytes > 0 and 0 < course.share < 1


def test_the_schedule_is_the_same_function_and_ends_at_its_minimum() -> None:
    where, lines = session(steps=40)
    for method in ("adamw", "rfrmsprop"):
        trained(method, where)
    factors = {x["optimizer"]: [y["lr_factor"] for y in lines if y["optimizer"] == x["optimizer"]] for x in lines}
    assert factors["adamw"] == factors["rfrmsprop"]
    task = replace(TINY, steps=40)
    every = [warmup_cosine(step, task) for step in range(40)]
    assert factors["adamw"][-1] == every[-1] == min(every) < 0.01 and max(every) == 1


@pytest.mark.parametrize(("step_seconds", "steps"), [(0.05, 1200), (0.1, 600), (100.0, 1)])
def test_with_seconds_the_number_of_steps_is_what_fits(step_seconds: float, steps: int) -> None:
    where, _ = session(steps=None, seconds=60.0)
    assert where.plan(step_seconds).steps == steps


def test_all_methods_are_evaluated_at_multiples_of_the_first_ones_interval() -> None:
    where, _ = session(steps=None, seconds=60.0)
    where.plan(0.05)
    assert where.every == 100
    where.plan(0.5)
    assert where.every == 100
    assert [round_number(x) for x in (0.2, 1, 2.9, 4.7, 9.9, 49, 299, 1000)] == [1, 1, 2, 3, 5, 30, 200, 1000]


def test_a_method_whose_steps_were_measured_too_fast_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    where, lines = session(steps=None, seconds=0.01)
    monkeypatch.setattr(language_model.Trainee, "_measure", lambda self: setattr(self.course, "step_seconds", 1e-6))
    where.every = 5
    course = trained("rfrmsprop", where)
    assert not course.is_complete and not course.error and 5 <= len(course.train) < course.planned == 10_000
    assert "out of time" in table({"rfrmsprop": course}) and lines


class Breaking(torch.optim.SGD):
    """Sets the weights to NaN, or raises, in its third step of the run; throw-away steps have a smaller lr."""

    def __init__(self, params: Any, lr: float = 1.0, problem: Exception | None = None) -> None:
        super().__init__(params, lr=lr)
        self.problem, self.number = problem, 0
        self.lr = lr

    def step(self, closure: Any = None) -> None:
        self.number += self.param_groups[0]["lr"] > 0.05
        if self.number == 3 and self.problem:
            raise self.problem
        if self.number == 3:
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(torch.nan)


@pytest.fixture
def with_breaking(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
        return Breaking(model.parameters(), **settings)

    monkeypatch.setitem(METHODS, "breaking", (make, Breaking))
    monkeypatch.setitem(language_settings.SETTINGS, "breaking", {})


@pytest.mark.usefixtures("with_breaking")
def test_divergence_and_errors_are_recorded_and_do_not_stop_the_others(tmp_path: Path) -> None:
    where, lines = session(steps=8)
    memory = torch.OutOfMemoryError("CUDA out of memory")
    courses = {
        "diverged": trained("breaking", where),
        "failed": trained("breaking", where, problem=memory),
        "rfrmsprop": trained("rfrmsprop", where),
    }
    assert courses["diverged"].diverged == "the held-out loss is nan after step 3"
    assert courses["failed"].error == "OutOfMemoryError: CUDA out of memory"
    assert courses["rfrmsprop"].is_complete
    assert any("diverged" in line for line in lines) and any("out of memory" in line.get("error", "") for line in lines)
    json.dumps(lines, allow_nan=False)
    assert common_step(courses) == 8
    page = table(courses)
    assert "diverged, the held-out loss" in page and "OutOfMemoryError" in page


# ---- the report ----------------------------------------------------------------------------------------------------


def course_of(held_out: dict[int, float], planned: int, step_seconds: float) -> Course:
    seconds = {step: step * step_seconds for step in held_out}
    last = max(held_out)
    return Course(
        [3.0] * last,
        held_out,
        seconds,
        last * step_seconds,
        planned=planned,
        lr_factors={step: 1 - step / planned for step in held_out},
    )


def test_methods_are_compared_at_the_last_step_that_all_have_reached() -> None:
    fast = course_of({10: 3.0, 20: 2.5, 30: 2.2, 33: 2.1}, 33, 1.0)
    slow = course_of({10: 2.8, 20: 2.1}, 20, 1.6)
    courses = {"fast": fast, "slow": slow}
    assert common_step(courses) == 20
    assert seconds_to(courses) == {"fast": 33.0, "slow": 32.0}
    rows = table(courses).splitlines()
    assert "at step 20 (lr ×)" in rows[0] and "2.5000 (0.39)" in rows[2] and "2.1000 (0.00)" in rows[3]


ABOUT = {
    **{"weights": 1e6, "device": "a device", "torch": "2", "commit": "abc", "date": "today", "command": "python"},
    "task": {"steps": None, "seconds": 60.0, "batch": 4, "length": 32, "seed": 0},
    "data": {"source": "site-packages", "train": 100, "held_out": 10},
}


def test_without_matplotlib_there_are_no_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_report(tmp_path, ABOUT, {"adamw": course_of({10: 3.0}, 10, 1.0)})
    assert not [*tmp_path.glob("*.png")] and "png" not in (tmp_path / "README.md").read_text()


def test_the_whole_writes_as_it_goes_and_sums_up(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--size", "tiny", "--seconds", "0.3", "--max-bytes", "300000"]
    command = [sys.executable, "-m", "bench.demo", *options, "--optimizers", "adamw", "ifshampoo"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    wanted = {"optimizer", "step", "steps", "seconds", "lr_factor", "train_loss", "held_out_loss"}
    assert all(set(line) == wanted for line in lines)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {"commit", "device", "torch", "settings", "task", "data"} <= set(summary)
    assert set(summary["results"]) == {"adamw", "ifshampoo"}
    for method, result in summary["results"].items():
        assert [x["held_out_loss"] for x in result["evaluations"]] == [
            line["held_out_loss"] for line in lines if line["optimizer"] == method
        ]
        assert method in (tmp_path / "README.md").read_text()
    drawn = {"loss-by-seconds.png", "loss-by-steps.png"} if find_spec("matplotlib") else set()
    assert {path.name for path in tmp_path.glob("*.png")} == drawn


def test_lines_are_on_the_disk_before_the_next_step(tmp_path: Path) -> None:
    with (tmp_path / "progress.jsonl").open("w") as file:
        log = language_model.logger(file, 0.0)
        log({"optimizer": "adamw", "step": 1})
        assert json.loads((tmp_path / "progress.jsonl").read_text()) == {"optimizer": "adamw", "step": 1}


# ---- the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "7b"], "no size '7b': choose one of 30m, 124m"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--seconds", "0"], "0 is not above 0"),
        (["--set", "adamw.lr"], "is not METHOD.OPTION=VALUE"),
        (["--set", "sgd.lr=1"], "no method 'sgd': choose one of adamw, muon, recipe, ifshampoo, rfrmsprop"),
        (["--set", "adamw.beta2=1"], "adamw has no option 'beta2': choose one of lr, betas"),
        (["--set", "rfrmsprop.damping=-1"], "--set for rfrmsprop: ValueError: "),
        (["--optimizers", "adamw", "--set", "muon.lr=.1"], "muon is not among --optimizers"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(["--device", "cpu", *arguments], "")
    assert message in capsys.readouterr().err


def test_a_machine_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(language_options.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        parse(["--device", "cuda"], "")
    assert "--device cuda: PyTorch" in (message := capsys.readouterr().err) and "sees no GPU here" in message


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        ([], False),
        (["--steps", "6", "--out", "cuda"], False),
        (["--device", "cpu"], False),
        (["--device", "cuda"], True),
        (["--size=30m"], True),
        (["--steps", "6", "--size", "wrong"], True),
    ],
)
def test_the_demo_is_asked_for_the_larger_model_by_size_or_device(arguments: list[str], asked: bool) -> None:
    assert is_asked_for(arguments) is asked


def test_settings_can_be_changed_from_outside() -> None:
    assert parse_change("adamw.lr=1e-3") == ("adamw", "lr", 1e-3)
    assert parse_change("adamw.betas=(.9,.99)") == ("adamw", "betas", (0.9, 0.99))
    assert parse_change("ifshampoo.clip=row_sum") == ("ifshampoo", "clip", "row_sum")
    assert parse_change("rfrmsprop.state_dtype=torch.bfloat16")[2] is torch.bfloat16
    options, task = parse(["--device", "cpu", "--size", "124m", "--set", "adamw.lr=2e-3", "--batch", "8"], "")
    assert task.batch == 8
    assert settings_of("adamw", "124m", task, options.changes["adamw"])["lr"] == 2e-3
    assert settings_of("adamw", "124m", task, {})["lr"] == 6e-4


@pytest.mark.parametrize(("size", "millions"), [("30m", 29), ("124m", 121)])
def test_sizes_are_what_they_are_called(size: str, millions: float) -> None:
    with torch.device("meta"):
        model = language_model.GPT(SIZES[size], language_settings.HEAD_WIDTH)
    assert sum(x.numel() for x in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.5)
    assert size == "30m" or SIZES[size].width == GPT2().width
