"""`python -m bench.compare` as a whole, at tiny sizes: what it writes, whatever is missing, fails or is cut short."""

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
from bench.common.workloads import WORKLOADS, Workload
from bench.compare import __main__ as run
from bench.compare import contest, scaling, training
from bench.compare.contest import OTHER, UPDATE
from bench.compare.options import SECTIONS, chosen_entries, chosen_workloads, parse_arguments
from bench.compare.plans import TINY, TINY_WORKLOADS
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


@pytest.fixture(autouse=True, scope="module")
def everything_else_left_alone():
    with undisturbed():
        yield


def run_tiny(folder, *arguments):
    """The exit status and what was written to the folder."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = run.main(["--tiny", "--device", "cpu", "--out", str(folder), *arguments])
    record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return status, record, (folder / "README.md").read_text(encoding="utf-8"), said.getvalue()


@pytest.fixture
def none_here(tmp_path, monkeypatch):
    """A folder for checkouts of peers, where nobody has any; no plots are drawn."""
    no_matplotlib(monkeypatch)
    folder = tmp_path / "peers"
    folder.mkdir()
    with without_peers(folder):
        yield folder


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """With the peers that there are."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, *run_tiny(folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """As on a new machine: no peers and no matplotlib."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch, without_peers(tmp_path_factory.mktemp("peers")):
        no_matplotlib(patch)
        return folder, *run_tiny(folder)


# ---- a run that is not disturbed -----------------------------------------------------------------------------------


def test_a_run_writes_its_record_its_page_and_the_plots_that_the_page_shows(whole_run):
    folder, status, record, text, said = whole_run
    assert status == 0 and record["errors"] == {}
    assert {path.name for path in folder.iterdir()} == {"results.json", "README.md", *record["plots"]}
    assert all(f"({name})" in text for name in record["plots"])
    assert "## Targets" in said and str(folder / "README.md") in said
    assert "--tiny" in record["command"] and record["device_type"] == "cpu"
    for part in ("## Targets", "## Steps", "## Training steps", "## Scaling", "## Peers", "### By T"):
        assert part in text


def test_every_optimizer_that_is_at_hand_is_measured_on_every_workload_without_an_error(whole_run):
    _, _, record, text, _ = whole_run
    here = [x for x in ENTRIES.values() if x.on_cpu and "cpu" in x.devices and not (x.peer and why_missing(x.peer))]
    for workload in TINY_WORKLOADS:
        rows = [row for row in record["steps"] if row["workload"] == workload.name]
        assert [row.get("error") for row in rows] == [None] * len(rows)
        assert [row["optimizer"] for row in rows] == [entry.name for entry in here]
        assert all(row[UPDATE]["median"] > 0 and row["peak_bytes"] > 0 for row in rows)
        assert all(row[f"launches of {UPDATE}"] >= row[f"launches of {OTHER}"] > 0 for row in rows)
    assert all(f"| {name} |" in text or f"| **{name}** |" in text for name in (entry.name for entry in here))


def test_training_and_scaling_have_their_rows_without_an_error(whole_run):
    _, _, record, _, _ = whole_run
    here = {name for name, entry in ENTRIES.items() if "cpu" in entry.devices and entry.on_cpu}
    here -= {name for name in here if ENTRIES[name].peer and why_missing(ENTRIES[name].peer)}
    trained = [row["optimizer"] for row in record["training"]]
    assert trained == [name for name, (entry, _, _) in training.ROWS.items() if entry in here]
    assert all(row["tokens_per_second"] > 0 for row in record["training"])
    for of, sizes in (("width", TINY.widths), ("layers", TINY.layer_counts)):
        expected = {(size, name) for size in sizes for name in scaling.SERIES if name in here}
        assert {(row["size"], row["optimizer"]) for row in record["scaling"][of] if UPDATE in row} == expected
    assert [row["T"] for row in record["scaling"]["T"]] == [*TINY.periods]


def test_only_second_order_optimizers_of_ours_say_what_they_keep_at_t_1(whole_run):
    _, _, record, _, _ = whole_run
    told = {row["optimizer"] for row in record["steps"] if "state_bytes at T = 1" in row}
    assert told == {name for name in ENTRIES if name.startswith("IFShampoo") and ENTRIES[name].on_cpu}
    (row,) = (row for row in record["steps"] if (row["optimizer"], row["workload"]) == ("IFShampoo", "16²"))
    products = 2 * matmul_dtype(torch.bfloat16, torch.device("cpu")).itemsize  # CCᵀ and KKᵀ
    assert row["state_bytes"] - row["state_bytes at T = 1"] == pytest.approx(products, abs=0.1)


def test_fractions_of_the_roofline_are_those_of_the_ceilings_in_the_record(whole_run):
    _, _, record, _, _ = whole_run
    (row,) = (row for row in record["steps"] if (row["optimizer"], row["workload"]) == ("SGD, fused", "16²"))
    least = 20 * 256 / record["roofline"]["bandwidth"] * 1e6
    assert row[f"roofline of {UPDATE}"] == pytest.approx(least / row[UPDATE]["median"])


def test_without_a_single_peer_the_page_has_their_commands_and_nothing_has_failed(alone):
    folder, status, record, text, _ = alone
    assert status == 0 and record["errors"] == {}
    for peer in PEERS.values():
        assert f"- {peer.title}: not installed: {peer.how_to_install()}\n" in text
    assert not [row for row in record["steps"] if ENTRIES[row["optimizer"]].peer]
    assert {row["optimizer"] for row in record["steps"]} >= {"IFShampoo", "RFRMSProp", "AdamW, fused", "Muon of torch"}
    assert record["peers"] == {} and "Here: none." in text
    assert {path.name for path in folder.iterdir()} == {"results.json", "README.md"} and ".png" not in text


# ---- what is broken ------------------------------------------------------------------------------------------------


def test_a_peer_that_cannot_be_imported_is_reported_and_stops_nothing(none_here, tmp_path):
    (none_here / "SOAP").mkdir()
    (none_here / "SOAP" / "soap.py").write_text("raise RuntimeError('this Python is too old')")
    del sys.modules["soap"]
    status, record, text, _ = run_tiny(tmp_path / "out", *STEPS_ONLY, "--optimizers", "SOAP|SGD")
    assert status == 0 and [row["optimizer"] for row in record["steps"]] == ["SGD, fused"]
    assert "- SOAP, the authors' own: cannot be imported: RuntimeError: this Python is too old\n" in text


@pytest.fixture
def with_fakes(none_here, monkeypatch):
    """Two optimizers, of which one breaks; nothing else."""
    clock = stopped_clock(monkeypatch)
    with in_place_of_all(fake_entry("good", clock, has_period=False), fake_entry("bad", clock, cost=failing_at(4))):
        yield


def test_an_optimizer_that_fails_is_on_the_page_with_its_error_and_in_the_exit_status(with_fakes, tmp_path):
    status, record, text, _ = run_tiny(tmp_path, *STEPS_ONLY)
    good, bad = record["steps"]
    assert status == 1 and bad["error"] == "RuntimeError: broken in step 4" and UPDATE in good
    assert "- bad, whole: RuntimeError: broken in step 4\n" in text and "| good |" in text
    assert run_tiny(tmp_path, *STEPS_ONLY, "--optimizers", "good")[0] == 0


def test_after_an_error_that_spoils_the_device_another_process_measures_the_others(with_fakes, tmp_path, monkeypatch):
    """It leaves out the one that is to blame, and no row of the process before is there twice."""
    monkeypatch.setattr(contest, "is_spoiled", lambda device: True)
    progress = Progress(tmp_path / "progress", time.time() + 60)
    progress.save()
    options = ("--tiny", "--device", "cpu", "--out", str(tmp_path), *STEPS_ONLY, "--worker", str(progress.path))
    assert run.main(options) == RESTART
    again = Progress.load(progress.path)
    assert again.done == ["roofline"] and again.running == "steps, 16²"
    again.focus(f"16², bad, {WHOLE}")
    again.blame("an error")
    assert run.main(options) == 1
    record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [(row["optimizer"], row.get("error")) for row in record["steps"]] == [("bad", "an error"), ("good", None)]
    assert "--worker" not in record["command"]


@pytest.mark.parametrize("extension", ["left out", "broken"])
def test_an_entry_whose_backend_was_not_built_is_a_line_and_no_failure(extension, none_here, tmp_path, monkeypatch):
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


@pytest.mark.parametrize("part", ["steps", "training", "scaling"])
def test_every_failure_is_in_the_exit_status_but_not_what_was_left_out(part):
    record = {"steps": [], "training": [], "scaling": {"width": [], "T": []}, "errors": {}}
    rows = record["scaling"]["width"] if part == "scaling" else record[part]
    rows.append({"error": "TimeoutError: left out: the run's time was over"})
    assert not run.has_failed(record)
    rows.append({"error": "RuntimeError: no"})
    assert run.has_failed(record)
    assert run.has_failed({"steps": [], "training": [], "scaling": {}, "errors": {"roofline": "RuntimeError: no"}})


def test_a_piece_that_breaks_is_recorded_and_the_others_are_measured(none_here, tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("no oneDNN")

    monkeypatch.setattr(run.roofline, "measure", broken)
    monkeypatch.setattr(run.training, "measure", broken)
    status, record, text, _ = run_tiny(tmp_path, "--only", "16²", "--optimizers", "^(SGD|IFShampoo$)")
    assert status == 1
    assert record["errors"] == dict.fromkeys(("roofline", "training, tiny GPT"), "RuntimeError: no oneDNN")
    assert len(record["steps"]) == 2 and set(record["scaling"]) == {"width", "layers", "T"}
    assert "- roofline: RuntimeError: no oneDNN\n" in text and "ceilings not measured" in text


# ---- cut short -----------------------------------------------------------------------------------------------------


def test_what_does_not_fit_into_the_time_is_left_out_and_is_no_failure(none_here, tmp_path):
    status, record, text, _ = run_tiny(tmp_path, "--seconds", "0", "--optimizers", "^(SGD|IFShampoo$)")
    rows = [*record["steps"], *record["training"], *record["scaling"]["width"], *record["scaling"]["layers"]]
    assert status == 0 and len(rows) == 2 * 2 + 4 + 1 + 1
    assert {row["error"] for row in rows} == {"TimeoutError: left out: the run's time was over"}
    assert record["scaling"]["T"] == [] and "left out" in text


@pytest.mark.parametrize(
    ("module", "function", "kept"),
    [(run.roofline, "measure", 0), (training, "measure", 1), (scaling, "measure", 2), (scaling, "periods", 4)],
    ids=["roofline", "training", "scaling", "T"],
)
def test_an_interrupted_run_leaves_what_it_had_measured(none_here, tmp_path, monkeypatch, module, function, kept):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, function, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path, "--optimizers", "^(SGD|IFShampoo$)")
    record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert bool(record["roofline"]) == (kept > 0)
    assert {row["workload"] for row in record["steps"]} == ({"16²"} if kept else set())
    assert (bool(record["training"]), len(record["scaling"])) == (kept > 1, max(0, kept - 2))
    assert run.main(["--page", str(tmp_path)]) == 0
    assert ("### 16²" in (tmp_path / "README.md").read_text(encoding="utf-8")) == (kept > 0)


def test_the_record_on_disk_is_whole_even_where_it_could_not_be_written(tmp_path):
    half = run.Run(tmp_path, torch.device("cpu"), TINY, 0.0, {"steps": [1]}, [])
    half.save()
    half.record["steps"].append(object())
    with pytest.raises(TypeError):
        half.save()
    assert json.loads((tmp_path / "results.json").read_text())["steps"] == [1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use")
def test_a_run_on_a_gpu_has_no_errors_and_the_host_s_times_beside_the_device_s(none_here, tmp_path):
    status, record, text, _ = run_tiny(tmp_path, "--device", "cuda", "--optimizers", "^(IFShampoo|RFRMSProp|AdamW|SGD)")
    assert status == 0 and record["errors"] == {} and record["device_type"] == "cuda"
    assert all(row[f"host of {kind}"] > 0 for row in record["steps"] for kind in (UPDATE, OTHER))
    assert all(row["peak_bytes"] > 0 for row in record["training"]) and "host, µs" in text


# ---- choosing ------------------------------------------------------------------------------------------------------


def test_only_optimizers_and_sections_choose_and_nothing_else_is_measured(none_here, tmp_path):
    _, record, text, _ = run_tiny(tmp_path, "--only", "pair", "--optimizers", "^(SGD|Adam)", "--sections", "steps")
    assert [(row["workload"], row["optimizer"]) for row in record["steps"]] == [
        ("pair", "AdamW, fused"),
        ("pair", "AdamW, fused, BF16 weights"),
        ("pair", "SGD, fused"),
    ]
    assert record["training"] == [] and record["scaling"] == {} and "## Scaling" not in text
    _, record, _, _ = run_tiny(tmp_path, "--optimizers", "SGD|^RFRMSProp$", "--sections", "training", "scaling")
    assert record["steps"] == [] and set(record["scaling"]) == {"width", "layers"}  # T is IFShampoo's
    assert [row["optimizer"] for row in record["training"]] == ["SGD, fused", "RFRMSProp"]
    assert {row["optimizer"] for row in record["scaling"]["width"]} == {"RFRMSProp"}


def options_of(*arguments):
    return parse_arguments([*arguments, "--device", "cpu"], "")


def test_on_a_cpu_a_part_is_measured_and_with_all_every_optimizer_that_can_run_on_it():
    part, every = options_of(), options_of("--all")
    assert {x.name for x in chosen_entries(part)} == {
        name for name, entry in ENTRIES.items() if entry.on_cpu and "cpu" in entry.devices
    }
    assert {x.name for x in chosen_entries(every)} == {name for name, x in ENTRIES.items() if "cpu" in x.devices}
    assert [x.name for x in chosen_workloads(part)] == [name for name, x in WORKLOADS.items() if x.on_cpu]
    names = [x.name for x in chosen_workloads(every)]
    assert names[0] == "GPT-2 124M" and sorted(names) == sorted(WORKLOADS)


def test_the_record_goes_to_a_folder_of_the_device_and_the_day(none_here, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        run.main(["--tiny", "--device", "cpu", *STEPS_ONLY, "--optimizers", "SGD"])
    (folder,) = tmp_path.glob("*-20??-??-??")
    assert json.loads((folder / "results.json").read_text())["date"] == folder.name[-10:]


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
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_measured_is_refused_with_the_option_its_value_and_the_remedy(capsys, arguments, parts):
    with pytest.raises(SystemExit) as exit_:
        run.main(["--device", "cpu", *arguments])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert not [part for part in parts if part not in error]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit):
        run.main(["--device", "cuda"])
    assert "--device cuda" in capsys.readouterr().err


# ---- rounds of what fits into a GPU's memory -----------------------------------------------------------------------

HUNDRED = Workload("hundred", ((10, 10),))


def rounds_of(monkeypatch, count, free, reference="IFShampoo"):
    wanted = [(ENTRIES[name], block) for name in [*ENTRIES][:count] for block in (1024, WHOLE)]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10 * free))
    found = [*run.rounds(wanted, HUNDRED, torch.device("cuda"), budget=0.5)]
    return wanted, [[(entry.name, block) for entry, block in round_] for round_ in found]


@pytest.mark.parametrize(("free", "size"), [(80_000, 10), (32_000, 4), (8000, 2), (10, 2)])
def test_every_round_has_ours_for_comparison_and_what_fits_beside_it_once(monkeypatch, free, size):
    wanted, found = rounds_of(monkeypatch, 6, free)  # 40 bytes a weight of half of what is free
    reference = ("IFShampoo", 1024)
    assert all(round_[0] == reference and len(round_) <= size for round_ in found)
    others = [pair for round_ in found for pair in round_[1:]]
    assert others == [(entry.name, block) for entry, block in wanted if (entry.name, block) != reference]
    assert max(map(len, found)) == min(size, len(wanted))


def test_ours_alone_is_a_round_and_so_is_everyone_on_a_cpu(monkeypatch):
    ours = [(ENTRIES["IFShampoo"], 1024)]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80_000, 80_000))
    assert [*run.rounds(ours, HUNDRED, torch.device("cuda"), 0.5)] == [ours]
    wanted = ours * 50
    assert [*run.rounds(wanted, HUNDRED, torch.device("cpu"), 0.5)] == [wanted]


def test_rows_say_in_which_round_they_were_measured(none_here, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "rounds", lambda wanted, *args: [wanted[:2], wanted[1:]])
    arguments = (*STEPS_ONLY, "--optimizers", "^(SGD|RFRMSProp$|RMSprop)")
    _, record, text, _ = run_tiny(tmp_path, *arguments)
    assert [(row["optimizer"], row["round"]) for row in record["steps"]] == [
        ("RFRMSProp", 0),
        ("RMSprop, foreach", 0),
        ("RMSprop, foreach", 1),
        ("SGD, fused", 1),
    ]
    assert text.count("| RMSprop, foreach |") == 1
