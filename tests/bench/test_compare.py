"""`python -m bench.compare` as a whole at tiny sizes: what it writes, also after failures and if it is cut short."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from dataclasses import replace

import pytest
import torch

from bench.common.optimizers import ENTRIES, WHOLE
from bench.common.peers import PEERS, why_missing
from bench.common.restarts import RESTART, Progress
from bench.common.roofline import Roofline
from bench.common.workloads import WORKLOADS, Workload
from bench.compare import __main__ as compare
from bench.compare import contest, scaling, sections, training
from bench.compare.contest import OTHER, UPDATE, Case
from bench.compare.settings import SECTIONS, TINY, TINY_WORKLOADS, chosen_entries, chosen_workloads, parse_arguments
from rootfree_kernels import backend as backend_module
from rootfree_kernels import native
from rootfree_kernels.eager import cpu_matmul_dtype as matmul_dtype
from rootfree_kernels.native import CPP
from tests.bench.fakes import (
    failing_at,
    fake_entry,
    in_place_of_all,
    no_matplotlib,
    stopped_clock,
    undisturbed,
    without_peers,
)
from tests.calls.backends import forget_import

STEPS_ONLY = ("--only", "16²", "--sections", "steps")
TWO = ("--optimizers", "^(SGD|IFShampoo$)")
LEFT_OUT = "TimeoutError: left out: the run's time was over"


@pytest.fixture(autouse=True, scope="module")
def everything_else_left_alone():
    with undisturbed():
        yield


def run_tiny(folder, *arguments):
    """Return the exit status, the record, the page, and what was printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = compare.main(["--tiny", "--device", "cpu", "--out", str(folder), *arguments])
    record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return status, record, (folder / "README.md").read_text(encoding="utf-8"), printed.getvalue()


@pytest.fixture
def none_here(tmp_path, monkeypatch):
    """A folder for checkouts of peers on a machine without peers and matplotlib."""
    no_matplotlib(monkeypatch)
    folder = tmp_path / "peers"
    folder.mkdir()
    with without_peers(folder):
        yield folder


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run with all peers of this machine."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, *run_tiny(folder)


def row_of(record, optimizer):
    (row,) = (row for row in record["steps"] if (row["optimizer"], row["workload"]) == (optimizer, "16²"))
    return row


# ---- a whole run ---------------------------------------------------------------------------------------------------


def test_a_run_writes_its_record_its_page_and_the_plots_of_the_page(whole_run):
    folder, status, record, text, printed = whole_run
    assert status == 0 and record["errors"] == {}
    assert {path.name for path in folder.iterdir()} == {"results.json", "README.md", *record["plots"]}
    assert all(f"({name})" in text for name in record["plots"])
    assert "## Targets" in printed and str(folder / "README.md") in printed
    assert "--tiny" in record["command"] and record["device_type"] == "cpu"
    for part in ("## Targets", "## Steps", "## Training steps", "## Scaling", "## Peers", "### By T"):
        assert part in text
    assert record["muon_is_fp32"] == ("Muon of torch iterates in FP32" in text)


def test_every_optimizer_is_measured_in_every_section_without_an_error(whole_run):
    _, _, record, text, _ = whole_run
    here = [x for x in ENTRIES.values() if x.on_cpu and "cpu" in x.devices and not (x.peer and why_missing(x.peer))]
    names = [entry.name for entry in here]
    for workload in TINY_WORKLOADS:
        rows = [row for row in record["steps"] if row["workload"] == workload.name]
        assert [(row["optimizer"], row.get("error")) for row in rows] == [(name, None) for name in names]
        assert all(row[UPDATE]["median"] > 0 and row["peak_bytes"] > 0 for row in rows)
        assert all(row[f"launches of {UPDATE}"] >= row[f"launches of {OTHER}"] > 0 for row in rows)
    assert all(f"| {name} " in text or f"| **{name}** " in text for name in names)
    trained = [row["optimizer"] for row in record["training"]]
    assert trained == [name for name, (entry, *_) in training.ROWS.items() if entry in names]
    assert all(row["tokens_per_second"] > 0 for row in record["training"])
    for of, sizes in (("width", TINY.widths), ("layers", TINY.layer_counts)):
        expected = {(size, name) for size in sizes for name in scaling.SERIES if name in names}
        assert {(row["size"], row["optimizer"]) for row in record["scaling"][of] if UPDATE in row} == expected
    assert [row["T"] for row in record["scaling"]["T"]] == [*TINY.periods]


def test_ours_record_their_state_at_t_1_and_the_fraction_of_the_roofline(whole_run):
    _, _, record, _, _ = whole_run
    found = {row["optimizer"] for row in record["steps"] if "state_bytes at T = 1" in row}
    assert found == {name for name in ENTRIES if name.startswith("IFShampoo") and ENTRIES[name].on_cpu}
    row = row_of(record, "IFShampoo")
    products = 2 * matmul_dtype(torch.bfloat16, torch.device("cpu")).itemsize  # CCᵀ and KKᵀ
    assert row["state_bytes"] - row["state_bytes at T = 1"] == pytest.approx(products, abs=0.1)
    row = row_of(record, "SGD, fused")
    least = 20 * 256 / record["roofline"]["bandwidth"] * 1e6
    assert row[f"roofline of {UPDATE}"] == pytest.approx(least / row[UPDATE]["median"])


def test_without_peers_and_matplotlib_the_page_says_how_to_install_peers_and_nothing_fails(none_here, tmp_path):
    folder = tmp_path / "out"
    status, record, text, _ = run_tiny(folder, "--only", "16²", "--optimizers", "^(IFShampoo|RFRMSProp|.*SOAP|Muon)")
    assert status == 0 and record["errors"] == {} and record["peers"] == {} and "Here: none." in text
    for peer in PEERS.values():
        assert f"- {peer.title}: not installed: {peer.how_to_install()}\n" in f"{text}\n"
    names = {row["optimizer"] for row in record["steps"]}
    assert names >= {"IFShampoo", "IFShampoo, recipe", "Muon of torch"} and not any(ENTRIES[x].peer for x in names)
    assert {path.name for path in folder.iterdir()} == {"results.json", "README.md"} and ".png" not in text


# ---- failures ------------------------------------------------------------------------------------------------------


def test_a_peer_that_cannot_be_imported_is_reported_and_stops_nothing(none_here, tmp_path):
    (none_here / "SOAP").mkdir()
    (none_here / "SOAP" / "soap.py").write_text("raise RuntimeError('this Python is too old')")
    del sys.modules["soap"]
    status, record, text, _ = run_tiny(tmp_path / "out", *STEPS_ONLY, "--optimizers", "SOAP|SGD")
    assert status == 0 and [row["optimizer"] for row in record["steps"]] == ["SGD, fused"]
    assert "- SOAP, the authors' own: cannot be imported: RuntimeError: this Python is too old\n" in text


@pytest.fixture
def with_fakes(none_here, monkeypatch):
    """Two optimizers, of which one fails."""
    clock = stopped_clock(monkeypatch)
    monkeypatch.setattr(sections.roofline, "measure", lambda *args: Roofline(1.0, 1.0, 1.0))  # by that clock: no time
    with in_place_of_all(fake_entry("good", clock, family="Muon"), fake_entry("bad", clock, cost=failing_at(4))):
        yield


def test_an_optimizer_that_fails_is_on_the_page_and_in_the_exit_status(with_fakes, tmp_path):
    status, record, text, _ = run_tiny(tmp_path, *STEPS_ONLY)
    good, bad = record["steps"]
    assert status == 1 and bad["error"] == "RuntimeError: broken in step 4" and UPDATE in good
    assert "- bad, whole: RuntimeError: broken in step 4\n" in text and "| good " in text
    assert run_tiny(tmp_path, *STEPS_ONLY, "--optimizers", "good")[0] == 0


def test_after_an_error_that_spoils_the_device_another_process_measures_the_others(with_fakes, tmp_path, monkeypatch):
    """It leaves out the optimizer that is to blame, and repeats no row of the process before."""
    monkeypatch.setattr(contest, "is_spoiled", lambda device: True)
    progress = Progress(tmp_path / "progress", time.time() + 60)
    progress.save()
    options = ("--tiny", "--device", "cpu", "--out", str(tmp_path), *STEPS_ONLY, "--worker", str(progress.path))
    assert compare.main(options) == RESTART
    again = Progress.load(progress.path)
    assert again.done == ["roofline"] and again.running == "steps, 16²"
    again.focus(f"16², bad, {WHOLE}")
    again.blame("an error")
    assert compare.main(options) == 1
    record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [(row["optimizer"], row.get("error")) for row in record["steps"]] == [("bad", "an error"), ("good", None)]
    assert "--worker" not in record["command"]


@pytest.mark.parametrize("extension", ["left out", "broken"])
def test_an_entry_without_its_backend_is_left_out_and_fails_only_if_the_backend_is_broken(
    extension, none_here, tmp_path, monkeypatch
):
    def broken(name):
        raise ImportError("undefined symbol")

    if extension == "broken":
        monkeypatch.setattr(backend_module, "import_module", broken)
        forget_import(monkeypatch, CPP)
    left_out = None if extension == "broken" else "ROOTFREE_BUILD=none"
    built = {"extension": not left_out, "left_out": {"cpp": left_out, "cuda": left_out}}
    monkeypatch.setattr(native, "build_record", lambda: built)
    monkeypatch.setenv("ROOTFREE_BACKEND", "eager")  # for all but the entry itself
    cpp = replace(ENTRIES["RFRMSProp, CUDA"], name="RFRMSProp, C++", backend="cpp", devices=("cpu",))
    with in_place_of_all(cpp, ENTRIES["SGD, fused"]):
        status, record, text, _ = run_tiny(tmp_path, *STEPS_ONLY)
    rows = {row["optimizer"]: row for row in record["steps"]}
    if extension == "left out":
        assert status == 0 and [*rows] == ["SGD, fused"]
        assert "- RFRMSProp, C++: left out: backend cpp: it was not built: ROOTFREE_BUILD=none\n" in text
    else:
        assert status == 1 and "undefined symbol" in rows["RFRMSProp, C++"]["error"]
        assert "left out" not in text


@pytest.mark.parametrize("part", ["steps", "training", "width"])
def test_every_error_but_a_lack_of_time_is_in_the_exit_status(part):
    for error in (LEFT_OUT, "RuntimeError: no"):
        rows = {"steps": [], "training": [], "width": [], part: [{"error": error}]}
        record = {**rows, "scaling": {"width": rows["width"], "T": []}, "errors": {}}
        assert compare.has_failed(record) == (error != LEFT_OUT)


def test_a_piece_that_fails_is_recorded_and_the_others_are_measured(none_here, tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("no oneDNN")

    monkeypatch.setattr(sections.roofline, "measure", broken)
    monkeypatch.setattr(training, "measure", broken)
    status, record, text, _ = run_tiny(tmp_path, "--only", "16²", *TWO)
    assert status == 1
    assert record["errors"] == dict.fromkeys(("roofline", "training, tiny GPT"), "RuntimeError: no oneDNN")
    assert len(record["steps"]) == 2 and set(record["scaling"]) == {"width", "layers", "T"}
    assert "- roofline: RuntimeError: no oneDNN\n" in text and "ceilings not measured" in text


# ---- cut short -----------------------------------------------------------------------------------------------------


def test_a_piece_that_does_not_fit_into_the_time_is_left_out_and_is_no_failure(none_here, tmp_path):
    status, record, text, _ = run_tiny(tmp_path, "--seconds", "0", *TWO)
    rows = [*record["steps"], *record["training"], *record["scaling"]["width"], *record["scaling"]["layers"]]
    assert status == 0 and len(rows) == 2 * 2 + 4 + 1 + 1 and {row["error"] for row in rows} == {LEFT_OUT}
    assert record["scaling"]["T"] == [] and "left out" in text


@pytest.mark.parametrize(
    ("module", "function", "kept"),
    [(sections.roofline, "measure", 0), (training, "measure", 1), (scaling, "measure", 2), (scaling, "periods", 4)],
    ids=["roofline", "training", "scaling", "T"],
)
def test_an_interrupted_run_keeps_its_measurements(none_here, tmp_path, monkeypatch, module, function, kept):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, function, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path, *TWO)
    record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert bool(record["roofline"]) == (kept > 0)
    assert {row["workload"] for row in record["steps"]} == ({"16²"} if kept else set())
    assert (bool(record["training"]), len(record["scaling"])) == (kept > 1, max(0, kept - 2))
    assert compare.main(["--page", str(tmp_path)]) == 0
    assert ("### 16²" in (tmp_path / "README.md").read_text(encoding="utf-8")) == (kept > 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use")
def test_a_run_on_a_gpu_has_no_errors_and_the_host_s_times_beside_the_device_s(none_here, tmp_path):
    status, record, text, _ = run_tiny(tmp_path, "--device", "cuda", "--optimizers", "^(IFShampoo|RFRMSProp|AdamW|SGD)")
    assert status == 0 and record["errors"] == {} and record["device_type"] == "cuda"
    assert all(row[f"host of {kind}"] > 0 for row in record["steps"] for kind in (UPDATE, OTHER))
    assert all(row["peak_bytes"] > 0 for row in record["training"]) and "host, µs" in text


# ---- choosing ------------------------------------------------------------------------------------------------------


def test_nothing_but_the_chosen_workloads_optimizers_and_sections_is_measured(none_here, tmp_path):
    _, record, text, _ = run_tiny(tmp_path, "--only", "pair", "--optimizers", "^(SGD|Adam)", "--sections", "steps")
    names = ["AdamW, fused", "AdamW, fused, BF16 weights", "SGD, fused"]
    assert [(row["workload"], row["optimizer"]) for row in record["steps"]] == [("pair", name) for name in names]
    assert record["training"] == [] and record["scaling"] == {} and "## Scaling" not in text
    _, record, _, _ = run_tiny(tmp_path, "--optimizers", "SGD|^RFRMSProp$", "--sections", "training", "scaling")
    assert record["steps"] == [] and set(record["scaling"]) == {"width", "layers"}  # T is IFShampoo's
    assert [row["optimizer"] for row in record["training"]] == ["SGD, fused", "RFRMSProp"]
    assert {row["optimizer"] for row in record["scaling"]["width"]} == {"RFRMSProp"}


def test_a_cpu_measures_a_part_and_with_all_everything_that_can_run_on_it():
    part, every = (parse_arguments([*options, "--device", "cpu"], "") for options in ([], ["--all"]))
    on_cpu = [entry for entry in ENTRIES.values() if "cpu" in entry.devices]
    assert chosen_entries(every) == on_cpu
    assert chosen_entries(part) == [entry for entry in on_cpu if entry.on_cpu]
    assert [x.name for x in chosen_workloads(part)] == [name for name, x in WORKLOADS.items() if x.on_cpu]
    names = [x.name for x in chosen_workloads(every)]
    assert names[0] == "GPT-2 124M" and sorted(names) == sorted(WORKLOADS)


def test_the_record_goes_to_a_folder_of_the_device_and_the_day(none_here, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        compare.main(["--tiny", "--device", "cpu", *STEPS_ONLY, "--optimizers", "SGD"])
    (folder,) = tmp_path.glob("*-20??-??-??")
    assert json.loads((folder / "results.json").read_text())["date"] == folder.name[-10:]


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--sections", "stepps"], ["stepps", *SECTIONS]),
        (["--only", "[1024"], ["--only", "'[1024'", "regular expression"]),
        (["--only", "4096²"], ["--only '4096²'", "--all"]),
        (["--only", "5096²", "--all"], ["--only '5096²'", "no workload"]),
        (["--optimizers", "Sophia"], ["--optimizers 'Sophia'", "no optimizer"]),
        (["--page", "nowhere"], ["--page nowhere", "results.json"]),
        (["--seconds", "ten"], ["--seconds", "'ten'"]),
        pytest.param(["--device", "cuda"], ["--device cuda", "--device cpu"], marks=NO_GPU),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_an_error_names_the_option_its_value_and_the_remedy(capsys, arguments, parts):
    with pytest.raises(SystemExit) as exit_:
        compare.main(["--device", "cpu", *arguments])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert not [part for part in parts if part not in error]


# ---- rounds on a GPU, by its memory --------------------------------------------------------------------------------

HUNDRED = Workload("hundred", ((10, 10),))


@pytest.mark.parametrize(("free", "size"), [(80_000, 10), (32_000, 4), (8000, 2), (10, 2)])
def test_every_round_has_our_default_and_every_other_case_is_in_one_round(monkeypatch, free, size):
    cases = [Case(entry, HUNDRED, block) for entry in [*ENTRIES.values()][:6] for block in (1024, WHOLE)]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10 * free))
    found = [*sections.rounds(cases, HUNDRED, torch.device("cuda"), budget=0.5)]  # 40 bytes a weight
    assert all(round_[0] == cases[0] and len(round_) <= size for round_ in found)
    assert [case for round_ in found for case in round_[1:]] == cases[1:]
    assert max(map(len, found)) == min(size, len(cases))
    for device, together in (("cuda", cases[:1]), ("cpu", cases)):
        assert [*sections.rounds(together, HUNDRED, torch.device(device), 0.5)] == [together]


def test_rows_record_their_round_and_the_page_shows_a_repeated_case_once(none_here, tmp_path, monkeypatch):
    monkeypatch.setattr(sections, "rounds", lambda wanted, *args: [wanted[:2], wanted[1:]])
    _, record, text, _ = run_tiny(tmp_path, *STEPS_ONLY, "--optimizers", "^(SGD|RFRMSProp$|RMSprop)")
    names = [("RFRMSProp", 0), ("RMSprop, foreach", 0), ("RMSprop, foreach", 1), ("SGD, fused", 1)]
    assert [(row["optimizer"], row["round"]) for row in record["steps"]] == names
    assert text.count("| RMSprop, foreach ") == 1
