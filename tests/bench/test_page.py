"""The page of `bench.compare`, from records that are written by hand: every figure on it must follow from the record."""

from __future__ import annotations

import pytest

from bench.common.optimizers import WHOLE
from bench.common.peers import PEERS
from bench.compare.contest import UPDATE
from bench.compare.page import markdown, step_lines, target_lines
from bench.compare.targets import measured_rows, pick, targets
from tests.bench.records import SCALING, failed, record, row, timing, trained


def cells_of(lines, name):
    """The cells of the table's line that begins with a name, by column."""
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    (found,) = [cells for cells in split if cells[0].strip("*") == name]
    return dict(zip(split[0], found, strict=True))


def verdicts(what):
    return {statement: figure for statement, figure, _ in targets(what)}


# ---- targets -------------------------------------------------------------------------------------------------------

ON_CPU = {
    "State of a 1024² weight, IFShampoo as it is (T = 1), bytes a weight: at most Meta's packed": "≤ 12.0078",
    "State of a 1024² weight, IFShampoo with the least memory, bytes a weight": "≤ 8.002",
    "1024×4096, FP32, blocks of 1024, T = 10: times as fast as Distributed Shampoo's fastest": "≥ 1.5",
    "1024×4096, FP32, whole, T = 10: times as fast as sirfshampoo": "≥ 1.5",
}
STATE, LEAST, META, SIRF = ON_CPU


def test_what_was_not_measured_is_called_so_and_not_missed():
    lines = target_lines(record())
    for statement, bound in ON_CPU.items():
        cells = cells_of(lines, statement)
        assert (cells["measured"], cells["target"], cells[""]) == ("–", bound, "not measured")


def test_the_speed_up_is_over_the_fastest_meta_at_blocks_of_the_same_size():
    long = "1024×4096"
    steps = [
        row(long, "IFShampoo", 1.0, 1.0),  # not the one with FP32 factors
        row(long, "IFShampoo, FP32 factors", 1900.0, 900.0),  # 1000 at T = 10
        row(long, "IFShampoo, FP32 factors", 400.0, 400.0, block=WHOLE),
        row(long, "Distributed Shampoo, eigh, unpacked", 12_000.0, 1000.0),  # 2100
        row(long, "Distributed Shampoo, eigh, packed", 9000.0, 1500.0),  # 2250, though its update is the fastest
        row(long, "Distributed Shampoo, Newton, unpacked", 30.0, 20.0, block=WHOLE),
        row(long, "sirfshampoo", 100.0, 100.0),
        row(long, "sirfshampoo", 1000.0, 600.0, block=WHOLE),  # 640
    ]
    found = verdicts(record(steps))
    assert found[META] == pytest.approx(2100 / 1000) and found[SIRF] == pytest.approx(640 / 400)
    lines = target_lines(record(steps))
    assert (cells_of(lines, META)["measured"], cells_of(lines, META)[""]) == ("2.100", "met")
    slower = [row(long, "IFShampoo, FP32 factors", 1900.0, 1900.0) if x is steps[1] else x for x in steps]
    assert cells_of(target_lines(record(slower)), META)[""] == "**missed**"


def test_a_block_size_that_was_not_measured_is_not_replaced_by_another_that_cuts_differently():
    ours = row("1024×4096", "IFShampoo, FP32 factors", 10.0, 10.0)
    whole = row("1024×4096", "Distributed Shampoo, eigh, unpacked", 90.0, 90.0, block=WHOLE)
    broken = failed("1024×4096", "Distributed Shampoo, eigh, packed", "RuntimeError: no")
    assert verdicts(record([ours, whole, broken]))[META] is None
    square = row("1024²", "SOAP", 10.0, 10.0, block=WHOLE)
    assert pick(record([square]), "1024²", "SOAP", 1024) == square  # which neither size cuts
    assert pick(record([square]), "1024²", "SOAP", 512) is None


def test_the_memory_targets_read_the_state_at_t_1_and_that_of_the_least_memory():
    steps = [
        row("1024²", "IFShampoo", 9.0, 9.0, **{"state_bytes at T = 1": 12.005}),
        row("1024²", "IFShampoo, least memory", 9.0, 9.0, state_bytes=8.02),
    ]
    found = verdicts(record(steps))
    assert (found[STATE], found[LEAST]) == (12.005, 8.02)
    lines = target_lines(record(steps))
    assert (cells_of(lines, STATE)[""], cells_of(lines, LEAST)[""]) == ("met", "**missed**")
    steps[1]["state_bytes"] = 8 + 2 / 1024  # what the setting's tensors come to
    assert cells_of(target_lines(record(steps)), LEAST)[""] == "met"


GPT2_STEPS = [
    row("GPT-2 124M", "IFShampoo", 2000.0, 1000.0),  # 1500 at T = 2, 1100 at T = 10
    row("GPT-2 124M", "Distributed Shampoo, eigh, unpacked", 99_000.0, 9000.0),
    row("GPT-2 124M", "Distributed Shampoo, Newton, packed", 80_000.0, 10_000.0),  # 45,000 and 17,000
    row("GPT-2 124M", "sirfshampoo", 10_000.0, 5000.0),
    row("GPT-2 124M", "sirfshampoo, BF16 factors", 9000.0, 7000.0),
    row("GPT-2 124M", "Muon of torch", 1.0, 1.0),
    row("GPT-2 124M", "Muon of Dion, Triton", 2500.0, 2500.0),
]
GPT2_TRAINING = [
    trained("AdamW, fused", 100.0),
    trained("IFShampoo, T = 1", 107.0),
    trained("IFShampoo, T = 10", 101.0),
    trained("IFShampoo, T = 10, embeddings too", 1.0),
]


def test_all_targets_of_a_gpu_are_the_ratios_they_name():
    what = record(GPT2_STEPS, "cuda", training=GPT2_TRAINING)
    found = [
        (figure, f"{bound.sign} {bound.bound:g}", bound.is_met(figure)) if bound else (figure, "none", None)
        for _, figure, bound in targets(what)[2:]
    ]
    expected = [
        (45_000 / 1500, "≥ 25", True),
        (17_000 / 1100, "≥ 10", True),
        (9000 / 2000, "≥ 4", True),
        (5000 / 1000, "≥ 6", False),
        (2000 / 2500, "none", None),
        (1500 / 2500, "≤ 1", True),
        (1100 / 2500, "≤ 0.7", True),
        (1.01, "≤ 1.02", True),
        (1.07, "≤ 1.06", False),
    ]
    assert [pytest.approx(figure) for figure, _, _ in expected] == [figure for figure, _, _ in found]
    assert [rest for _, *rest in expected] == [rest for _, *rest in found]
    muon = cells_of(target_lines(what), "GPT-2 124M, T = 1: time over Dion's Triton Muon")
    assert (muon["measured"], muon["target"], muon[""]) == ("0.800", "none", "")


def test_a_gpu_s_training_targets_are_those_of_gpt2_and_of_nothing_smaller():
    small = [{**x, "task": "tiny GPT"} for x in GPT2_TRAINING]
    assert [figure for _, figure, _ in targets(record((), "cuda", training=small))] == [None] * 11


def test_ratios_are_taken_within_a_round_and_what_is_in_every_round_is_shown_once():
    name, eigh = "GPT-2 124M", "Distributed Shampoo, eigh, unpacked"
    steps = [
        row(name, "IFShampoo", 100.0, 100.0),
        row(name, "SOAP", 300.0, 300.0),
        row(name, "IFShampoo", 200.0, 200.0, round=1),  # the machine was slower
        row(name, eigh, 6000.0, 6000.0, round=1),
    ]
    what = record(steps, "cuda")
    assert targets(what)[2][1] == pytest.approx(30.0)
    lines = step_lines(what, name)
    assert cells_of(lines, "SOAP")["T = 10, × ours"] == "3.00 / –"
    assert cells_of(lines, eigh)["T = 10, × ours"] == "30.00 / –"
    assert cells_of(lines, "IFShampoo")["update, ms"].startswith("0.100 ")
    assert any("2 rounds" in line for line in lines) and len(measured_rows(what, name)) == 3


# ---- tables --------------------------------------------------------------------------------------------------------


def test_a_line_shows_what_was_measured_in_the_units_that_it_says():
    steps = [
        row("1024×4096", "IFShampoo", 4000.0, 1000.0, **{"roofline of update": 0.5, "roofline of other": 0.25}),
        row("1024×4096", "IFShampoo, FP32 factors", 8000.0, 2000.0),
        row("1024×4096", "SOAP", 40_000.0, 2000.0, state_bytes=24.25),
        row("1024×4096", "AdamW, fused", 500.0, 500.0, block=WHOLE) | {UPDATE: timing(500.0, queued=False)},
    ]
    lines = step_lines(record(steps), "1024×4096")
    soap = cells_of(lines, "SOAP")
    assert soap["block"] == "1024" and soap["update, ms"] == "40.0 (36.0–48.0)"
    assert [soap[f"T = {T}"] for T in (1, 2, 10, 100)] == ["40.0", "21.0", "5.80", "2.38"]
    assert soap["T = 10, × ours"] == f"{5800 / 1300:.2f} / {5800 / 2600:.2f}"
    assert (soap["state, B"], soap["peak, B"], soap["launches"], soap["of roofline"]) == ("24.25", "30.0", "9 / 4", "–")
    ours, adamw = cells_of(lines, "IFShampoo"), cells_of(lines, "AdamW, fused")
    assert ours["of roofline"] == "0.50 / 0.25" and ours["optimizer"] == "**IFShampoo**"
    assert adamw["update, ms"].endswith("*") and adamw["other step, ms"] == "the same"
    assert (adamw["block"], adamw["launches"], adamw["T = 10, × ours"]) == (
        "–",
        "9",
        f"{500 / 1300:.2f} / {500 / 2600:.2f}",
    )
    order = [line.split("|")[1].strip(" *") for line in lines if line.startswith("|")][2:]
    assert order == ["AdamW, fused", "IFShampoo", "IFShampoo, FP32 factors", "SOAP"]
    assert "host, µs" not in ours
    assert cells_of(step_lines(record(steps, "cuda"), "1024×4096"), "SOAP")["host, µs"] == "55.0"


def test_one_matrix_is_one_matrix():
    what = record([row("16²", "IFShampoo", 1.0, 1.0)])
    assert "1 matrix, 16,384 weights." in step_lines(what, "16²")
    what["workloads"]["16²"]["num_matrices"] = 3
    assert "3 matrices, 16,384 weights." in step_lines(what, "16²")


def test_what_failed_is_listed_with_its_error_on_one_line():
    steps = [row("16²", "IFShampoo", 1.0, 1.0), failed("16²", "SOAP", "RuntimeError: no\n  memory | left", WHOLE)]
    text = markdown(record(steps))
    assert "- SOAP, whole: RuntimeError: no memory | left\n" in text
    only = markdown(record([failed("16²", "SOAP", "RuntimeError: no")]))
    assert "- SOAP, 1024: RuntimeError: no" in only and "| SOAP" not in only


def test_training_has_a_line_each_and_says_who_failed():
    rows = [*GPT2_TRAINING, {"optimizer": "SOAP, T = 10", "task": "GPT-2 124M", "error": "RuntimeError: no"}]
    text = markdown(record((), "cuda", training=rows))
    assert "| IFShampoo, T = 1 | 0.107 | 1.070 | 10.0% | 1,000,000 | 2.0 | 3,000 |" in text
    assert "- SOAP, T = 10: RuntimeError: no" in text and "One trains after the other" in text
    alone = markdown(record(training=rows[-1:]))
    assert "- SOAP, T = 10: RuntimeError: no" in alone and "One trains after" not in alone
    without = markdown(record(training=[trained("IFShampoo, T = 1", 107.0)]))
    assert "| IFShampoo, T = 1 | 0.107 | – |" in without


def test_scaling_shows_times_exponents_and_what_failed():
    text = markdown(record(scaling=SCALING))
    assert "| IFShampoo | 1.00 | 8.00 | 64.0 | 3.00 (3) | 2.00 (3) |" in text
    assert "| RFRMSProp | 1.00 | 8.00 | – | – | the same |" in text
    assert "- RFRMSProp, 40: RuntimeError: no" in text
    assert "| 2 | 0.150 (0.135–0.180) | 0.100 | 1.50 |" in text


def test_peers_that_are_here_have_versions_and_those_that_are_not_their_command():
    missing = {peer.title: f"not installed: {peer.how_to_install()}" for peer in PEERS.values()}
    text = markdown(record(missing=missing, peers={"SOAP, the authors' own": "git a1e5535, 2024-12-02"}))
    assert all(f"- {title}: {why}\n" in text for title, why in missing.items())
    assert "Here: SOAP, the authors' own (git a1e5535, 2024-12-02)." in text
    assert "Here: none." in markdown(record())


def test_the_head_says_where_the_figures_come_from():
    roof = {"bandwidth": 20e9, "fp32": 150e9, "bf16": 300e9}
    text = markdown(record(roofline=roof, threads=1))
    for part in ("A processor, 1 thread\n", "copy 20.0 GB/s", "150 GFLOP/s FP32", "300 GFLOP/s BF16", "Commit abc1234"):
        assert part in text
    assert "A processor, 2 threads\n" in markdown(record()) and "ceilings not measured" in markdown(record())
    assert markdown(record((), "cuda")).startswith("# Side by side: A GPU\n")


def test_a_piece_that_broke_is_named():
    text = markdown(record(errors={"scaling, T": "RuntimeError: out of\nmemory"}))
    assert "## Not measured\n\n- scaling, T: RuntimeError: out of memory\n" in text
    assert "## Not measured" not in markdown(record())
