"""`python -m bench.gpu_run` and its bundle, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import textwrap
import time
from pathlib import Path

import pytest

from bench.common.paths import ROOT, link_kernels
from bench.common.peers import COMMIT, PEERS, Peer
from bench.gpu_run import __main__ as runner
from bench.gpu_run import bundle, machine, process, stages
from bench.gpu_run.process import INTERRUPTED, KILLED, Runner, pack_results
from bench.gpu_run.stages import STAGES, Limits, Stage

PATIENT = (
    "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('here', flush=True); time.sleep(600)"
)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run(tmp_path: Path, *commands: list[str], seconds: float = 60.0, **options: object) -> process.Outcome:
    return Runner(os.environ, tmp_path, **options).run(commands, tmp_path / "log", seconds)  # type: ignore[arg-type]


# ---- stages --------------------------------------------------------------------------------------------------------


def test_the_default_stages_take_12_minutes_at_most_and_the_listing_names_all() -> None:
    assert sum(stage.seconds for stage in STAGES.values() if stage.by_default) <= 720
    assert list(STAGES)[:3] == ["machine", "tests", "quick"]  # the most wanted first
    assert [line.split()[0] for line in runner.listing().splitlines()[:-1]] == [*STAGES]


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_s_commands_fit_its_limit(name: str, tmp_path: Path) -> None:
    """Benchmarks are told to end before the stage is."""
    for command in STAGES[name].commands(Limits(100, tmp_path)):
        given = [int(command[i + 1]) for i, word in enumerate(command) if word == "--seconds"]
        assert all(10 <= seconds <= 90 for seconds in given)


def test_the_stage_has_all_files_with_tests_for_a_gpu_and_no_others() -> None:
    folder = ROOT / "tests"
    texts = {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in folder.rglob("test_*.py")}
    marks = ("pytest.mark.gpu", "pytestmark = kernel_test")
    marked = {name for name, text in texts.items() if any(mark in text for mark in marks)} - {"bench/test_gpu_run.py"}
    assert marked <= {*stages.TESTS}
    assert all("mark.gpu" in texts[name] or "kernel_test" in texts[name] for name in stages.TESTS)


def test_the_command_line_chooses_stages_and_their_limits() -> None:
    assert [stage.name for stage in runner.chosen_stages([])] == [x.name for x in STAGES.values() if x.by_default]
    chosen = runner.chosen_stages(["quick:77", "machine"])
    assert [(stage.name, stage.seconds) for stage in chosen] == [("quick", 77), ("machine", STAGES["machine"].seconds)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quik", "stage 'quik' is unknown: choose from machine, tests"),
        ("quick:2m", r"write the limit as whole seconds"),
    ],
)
def test_a_wrong_stage_or_limit_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        runner.chosen_stages([text])


def test_failed_tests_are_run_again(tmp_path: Path) -> None:
    assert stages.again(Limits(60, tmp_path)) == []
    (tmp_path / stages.FAILED).write_text("tests/test_a.py::b\ntests/test_a.py::c[x y]\ntests/test_a.py::b\n")
    (command,) = stages.again(Limits(60, tmp_path))
    assert command[-2:] == ["tests/test_a.py::b", "tests/test_a.py::c[x y]"]


# ---- processes -----------------------------------------------------------------------------------------------------


def test_commands_run_one_after_the_other_even_if_one_fails(tmp_path: Path) -> None:
    outcome = run(tmp_path, python("print(1); raise SystemExit(7)"), ["no-such-command"], python("print('last')"))
    assert outcome.status == 127 and outcome.note == "last"
    log = (tmp_path / "log").read_text()
    assert log.count("$ ") == 3 and "No such file" in log


def test_a_command_is_interrupted_after_its_time(tmp_path: Path) -> None:
    code = "import time\ntry: time.sleep(600)\nexcept KeyboardInterrupt: print('saved', flush=True); raise"
    outcome = run(tmp_path, python(code), seconds=3.0)
    assert outcome.note == INTERRUPTED and outcome.status != 0 and outcome.seconds < 10
    assert "saved" in (tmp_path / "log").read_text()


def test_a_command_that_ignores_the_interrupt_is_killed_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "PATIENCE", 1.0)
    child = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {PATIENT!r}]); print(p.pid, flush=True)"
    )
    outcome = run(tmp_path, python(f"{child}; {PATIENT}"), seconds=4.0)
    assert outcome.note == KILLED
    number = int((tmp_path / "log").read_text().split("\n")[1])
    for _ in range(50):  # until init has reaped it
        if not Path(f"/proc/{number}").exists() or " Z " in Path(f"/proc/{number}/stat").read_text():
            return
        time.sleep(0.1)
    raise AssertionError("a process was left behind")


def test_no_command_is_started_after_the_time(tmp_path: Path) -> None:
    outcome = run(tmp_path, python("import time; time.sleep(600)"), python("print('never')"), seconds=2.0)
    assert outcome.note.startswith("no time was left for: ") and "never\n" not in (tmp_path / "log").read_text()


def test_results_are_packed_while_a_command_runs(tmp_path: Path) -> None:
    calls: list[float] = []
    run(tmp_path, python("import time; time.sleep(1)"), while_running=lambda: calls.append(0.0), every=0.1)
    assert len(calls) >= 3


def test_an_archive_holds_everything_but_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "LARGEST_PACKED", 100)
    folder = tmp_path / "gpu"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "small").write_text("x")
    (folder / "large").write_text("x" * 101)
    archive = tmp_path / "out" / "gpu-run.tgz"
    pack_results(folder, archive)
    with tarfile.open(archive) as tar:
        assert sorted(tar.getnames()) == ["gpu/deep/small", "gpu/left_out.txt"]
    assert (folder / "left_out.txt").read_text() == "large: 101 bytes\n"


def test_a_failing_stage_stops_no_other_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, archive = tmp_path / "gpu", tmp_path / "gpu-run.tgz"
    folder.mkdir()
    chosen = [
        Stage("one", 30, "", lambda limits: [python("raise SystemExit(2)")]),
        Stage("two", 30, "", lambda limits: [python("print('fine')")]),
        Stage("none", 30, "", lambda limits: []),
    ]
    assert not runner.run_all(chosen, folder, dict(os.environ), archive)
    lines = (folder / "summary.txt").read_text().splitlines()
    assert ["status 2" in lines[0], "status 0: fine" in lines[1], "status 0" in lines[2]] == [True] * 3
    assert capsys.readouterr().out.splitlines() == lines
    with tarfile.open(archive) as tar:
        assert {"gpu/one.log", "gpu/two.log", "gpu/summary.txt"} <= {*tar.getnames()}


# ---- the bundle ----------------------------------------------------------------------------------------------------


def test_a_moved_triton_cache_names_its_new_folder(tmp_path: Path) -> None:
    made, moved = tmp_path / "made" / "KEY", tmp_path / "moved" / "KEY"
    made.mkdir(parents=True)
    (made / "kernel.cubin").write_text("x")
    group = {"child_paths": {"kernel.cubin": str(made / "kernel.cubin")}}
    (made / "__grp__kernel.json").write_text(json.dumps(group))
    bundle.pack_folder(tmp_path / "made", tmp_path / "cache.tgz")
    bundle.unpack(tmp_path / "cache.tgz", tmp_path / "moved")
    bundle.relocate(tmp_path / "moved")
    found = json.loads((moved / "__grp__kernel.json").read_text())
    assert found == {"child_paths": {"kernel.cubin": str(moved / "kernel.cubin")}}


def test_a_bundle_needs_the_extension_of_its_python_with_a_cuda_part(monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"left_out": {"cuda": "no CUDA toolkit"}}
    monkeypatch.setattr(bundle, "build_record", lambda: record)
    with pytest.raises(SystemExit, match=r"no CUDA part: no CUDA toolkit\. Install it with ROOTFREE_BUILD=cuda\."):
        bundle.extension()
    record["left_out"]["cuda"] = None  # type: ignore[assignment]
    tag = bundle.python_tag()
    assert [path.name for path in bundle.extension()] == [f"_C{tag}", f"_build{tag.removesuffix('.so')}.json"]


def test_a_bundle_for_another_environment_is_recognized() -> None:
    assert bundle.unfit(bundle.versions()) == []
    (difference,) = bundle.unfit({**bundle.versions(), "torch": "1.0"})
    assert difference.startswith("torch is ") and difference.endswith("the bundle's 1.0")


def test_a_copied_peer_has_no_history_but_its_commit(tmp_path: Path) -> None:
    checkout = tmp_path / "peers" / PEERS["dion"].checkout.name
    checkout.mkdir(parents=True)
    (checkout / "dion.py").write_text("")
    git = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "copy").mkdir()
    assert bundle.copy_peers(tmp_path / "peers", tmp_path / "copy") == [PEERS["dion"].title]
    copy = tmp_path / "copy" / checkout.name
    assert {path.name for path in copy.iterdir()} == {"dion.py", COMMIT}
    assert Peer.version_of(copy) == Peer.version_of(checkout) and Peer.version_of(copy).startswith("git ")


def test_a_tree_that_is_not_installed_finds_its_kernels(tmp_path: Path) -> None:
    (tmp_path / "rootfree_kernels").mkdir()
    (tmp_path / "triton_kernels").mkdir()
    for _ in range(2):  # the second time it is there already
        link_kernels(tmp_path)
    assert (tmp_path / "rootfree_kernels" / "triton_kernels").resolve() == tmp_path / "triton_kernels"


# ---- the plugin of the tests ---------------------------------------------------------------------------------------

SOME_TESTS = """
import hypothesis, pytest

def test_good(): pass
def test_wrong(): assert 1 == 2
def test_cuda(): raise RuntimeError("CUDA error: an illegal memory access was encountered")

@pytest.fixture
def broken(): raise ValueError("no")
def test_broken(broken): pass

def test_examples_are_not_shrunk():
    settings = hypothesis.settings()
    assert hypothesis.Phase.shrink not in settings.phases and settings.derandomize and settings.deadline is None
"""


def test_failures_are_written_to_files(tmp_path: Path) -> None:
    pytest.importorskip("hypothesis", reason="hypothesis is not installed")
    (tmp_path / "test_some.py").write_text(textwrap.dedent(SOME_TESTS))
    failed, errors = tmp_path / "failed", tmp_path / "errors"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ROOTFREE_FAILED": str(failed)}
    environment |= {"ROOTFREE_CUDA_ERRORS": str(errors)}
    options = ["-q", "-p", "bench.gpu_run.pytest_plugin", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", "."]
    subprocess.run([sys.executable, "-m", "pytest", *options, "."], cwd=tmp_path, env=environment, capture_output=True)
    assert failed.read_text().split() == [f"test_some.py::test_{name}" for name in ("wrong", "cuda", "broken")]
    assert errors.read_text().startswith("test_some.py::test_cuda\n") and "illegal memory access" in errors.read_text()
    assert "test_wrong" not in errors.read_text()


# ---- the machine ---------------------------------------------------------------------------------------------------


def test_tests_of_a_missing_package_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "missing", lambda names: [name for name in names if name == "rich"])
    assert Path("tests/bench/test_demo.py") in machine.ignored()
    monkeypatch.setattr(machine, "missing", lambda names: [])
    assert machine.ignored() == []


def test_the_machine_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "sees no GPU here" in machine.problem()
    monkeypatch.setattr(machine, "missing", lambda names: ["triton"])
    assert "has no triton: choose another one" in machine.problem()


def test_an_installed_tree_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "triton_folder", lambda: str(machine.ROOT / "triton_kernels"))
    assert machine.install() is None
    monkeypatch.setattr(machine, "triton_folder", lambda: "")
    monkeypatch.setattr(machine, "version", lambda name: "65.5.0")
    assert machine.install() == "setuptools 65.5.0 cannot install this tree: it needs 77 or later."
