"""The page of `bench.compare`, from records written by hand: every figure must follow from the record."""

from __future__ import annotations

import pytest

from bench.common.optimizers import WHOLE
from bench.common.peers import PEERS
from bench.compare.contest import UPDATE
from bench.compare.page import markdown, step_lines, target_lines
from bench.compare.targets import measured_rows, pick, targets
from tests.bench.records import SCALING, failed, record, row, timing, trained


def cells_of(lines, name):
    """Return the cells of the only row that begins with a name, by column."""
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    (found,) = [cells for cells in split if cells[0].strip("*") == name]
    return dict(zip(split[0], found, strict=True))


def row_of(text, name):
    """Return the only table row of a page that begins with a name, without the padding."""
    (found,) = (line for line in text.splitlines() if line.startswith(f"| {name} "))
    return " | ".join(cell.strip() for cell in found.strip("|").split("|"))


def figures(found):
    return {statement: figure for statement, figure, _ in targets(found)}


# ---- targets -------------------------------------------------------------------------------------------------------

ON_CPU = {
    "State of a 1024² weight, IFShampoo as it is (T = 1), bytes a weight: at most Meta's packed": "≤ 12.0078",
    "State of a 1024² weight, IFShampoo with the least memory, bytes a weight": "≤ 8.002",
    "1024×4096, FP32, blocks of 1024, T = 10: times as fast as Distributed Shampoo's fastest": "≥ 1.5",
    "1024×4096, FP32, whole, T = 10: times as fast as sirfshampoo": "≥ 1.5",
}
STATE, LEAST, META, SIRF = ON_CPU


def test_a_target_that_was_not_measured_is_not_missed():
    lines = target_lines(record())
    for statement, bound in ON_CPU.items():
        cells = cells_of(lines, statement)
        assert (cells["measured"], cells["target"], cells[""]) == ("–", bound, "not measured")


def test_the_speed_up_is_over_the_fastest_of_meta_s_with_the_same_blocks():
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
    found = figures(record(steps))
    assert found[META] == pytest.approx(2100 / 1000) and found[SIRF] == pytest.approx(640 / 400)
    lines = target_lines(record(steps))
    assert (cells_of(lines, META)["measured"], cells_of(lines, META)[""]) == ("2.100", "met")
    slower = [row(long, "IFShampoo, FP32 factors", 1900.0, 1900.0) if x is steps[1] else x for x in steps]
    assert cells_of(target_lines(record(slower)), META)[""] == "**missed**"


def test_a_block_size_is_replaced_only_by_one_that_cuts_alike():
    ours = row("1024×4096", "IFShampoo, FP32 factors", 10.0, 10.0)
    whole = row("1024×4096", "Distributed Shampoo, eigh, unpacked", 90.0, 90.0, block=WHOLE)
    broken = failed("1024×4096", "Distributed Shampoo, eigh, packed", "RuntimeError: no")
    assert figures(record([ours, whole, broken]))[META] is None
    square = row("1024²", "SOAP", 10.0, 10.0, block=WHOLE)
    assert pick(record([square]), "1024²", "SOAP", 1024) == square  # which neither size cuts
    assert pick(record([square]), "1024²", "SOAP", 512) is None


def test_the_memory_targets_are_the_state_at_t_1_and_the_least_memory():
    steps = [
        row("1024²", "IFShampoo", 9.0, 9.0, **{"state_bytes at T = 1": 12.005}),
        row("1024²", "IFShampoo, least memory", 9.0, 9.0, state_bytes=8.02),
    ]
    found = figures(record(steps))
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


def test_the_targets_of_a_gpu_are_ratios_of_its_rows():
    found = record(GPT2_STEPS, "cuda", training=GPT2_TRAINING)
    lines = [
        (figure, str(bound), bound.is_met(figure)) if bound else (figure, "none", None)
        for _, figure, bound in targets(found)[2:]
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
    assert [(pytest.approx(figure), *rest) for figure, *rest in expected] == lines
    muon = cells_of(target_lines(found), "GPT-2 124M, T = 1: time over Dion's Triton Muon")
    assert (muon["measured"], muon["target"], muon[""]) == ("0.800", "none", "")


def test_training_targets_need_gpt2():
    small = [{**x, "task": "tiny GPT"} for x in GPT2_TRAINING]
    assert [figure for _, figure, _ in targets(record((), "cuda", training=small))] == [None] * 11


def test_ratios_are_of_one_round_and_a_repeated_case_is_shown_once():
    name, eigh = "GPT-2 124M", "Distributed Shampoo, eigh, unpacked"
    steps = [
        row(name, "IFShampoo", 100.0, 100.0),
        row(name, "SOAP", 300.0, 300.0),
        row(name, "IFShampoo", 200.0, 200.0, round=1),  # the machine was slower
        row(name, eigh, 6000.0, 6000.0, round=1),
    ]
    found = record(steps, "cuda")
    assert targets(found)[2][1] == pytest.approx(30.0)
    lines = step_lines(found, name)
    assert cells_of(lines, "SOAP")["T = 10, × ours"] == "3.00 / –"
    assert cells_of(lines, eigh)["T = 10, × ours"] == "30.00 / –"
    assert cells_of(lines, "IFShampoo")["update, ms"].startswith("0.100 ")
    assert any("2 rounds" in line for line in lines) and len(measured_rows(found, name)) == 3


# ---- tables --------------------------------------------------------------------------------------------------------


def test_a_row_shows_its_figures_in_the_units_of_the_columns():
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
    assert (adamw["block"], adamw["launches"]) == ("–", "9")
    assert adamw["T = 10, × ours"] == f"{500 / 1300:.2f} / {500 / 2600:.2f}"
    order = [line.split("|")[1].strip(" *") for line in lines if line.startswith("|")][2:]
    assert order == ["AdamW, fused", "IFShampoo", "IFShampoo, FP32 factors", "SOAP"]
    assert "host, µs" not in ours and "1 matrix, 4,194,304 weights." in lines
    assert cells_of(step_lines(record(steps, "cuda"), "1024×4096"), "SOAP")["host, µs"] == "55.0"


def test_errors_are_listed_on_one_line_each():
    error = failed("16²", "SOAP", "RuntimeError: no\n  memory | left", WHOLE)
    text = markdown(
        record([row("16²", "IFShampoo", 1.0, 1.0), error], errors={"scaling, T": "RuntimeError: out of\nit"})
    )
    assert "- SOAP, whole: RuntimeError: no memory | left\n" in text
    assert "## Not measured\n\n- scaling, T: RuntimeError: out of it\n" in text
    text = markdown(record([failed("16²", "SOAP", "RuntimeError: no")]))
    assert "- SOAP, 1024: RuntimeError: no" in text and "| SOAP" not in text and "## Not measured" not in text


def test_training_has_a_row_or_an_error_for_each_optimizer():
    rows = [*GPT2_TRAINING, {"optimizer": "SOAP, T = 10", "task": "GPT-2 124M", "error": "RuntimeError: no"}]
    text = markdown(record((), "cuda", training=rows))
    assert row_of(text, "IFShampoo, T = 1") == "IFShampoo, T = 1 | 0.107 | 1.070 | 10.0% | 1,000,000 | 2.0 | 3,000"
    assert "- SOAP, T = 10: RuntimeError: no" in text and "One trains after the other" in text
    alone = markdown(record(training=rows[-1:]))
    assert "- SOAP, T = 10: RuntimeError: no" in alone and "One trains after" not in alone
    without = markdown(record(training=[trained("IFShampoo, T = 1", 107.0)]))
    assert row_of(without, "IFShampoo, T = 1").startswith("IFShampoo, T = 1 | 0.107 | – |")


def test_scaling_shows_times_exponents_and_errors():
    text = markdown(record(scaling=SCALING))
    assert row_of(text, "IFShampoo") == "IFShampoo | 1.00 | 8.00 | 64.0 | 3.00 (3) | 2.00 (3)"
    assert row_of(text, "RFRMSProp") == "RFRMSProp | 1.00 | 8.00 | – | – | the same"
    assert "- RFRMSProp, 40: RuntimeError: no" in text
    assert row_of(text, "2") == "2 | 0.150 (0.135–0.180) | 0.100 | 1.50"


def test_peers_have_versions_or_commands_that_install_them():
    missing = {peer.title: f"not installed: {peer.how_to_install()}" for peer in PEERS.values()}
    text = markdown(record(missing=missing, peers={"SOAP, the authors' own": "git a1e5535, 2024-12-02"}))
    assert all(f"- {title}: {why}\n" in text for title, why in missing.items())
    assert "Here: SOAP, the authors' own (git a1e5535, 2024-12-02)." in text
    assert "Here: none." in markdown(record())


def test_the_head_names_machine_versions_and_commit():
    roof = {"bandwidth": 20e9, "fp32": 150e9, "bf16": 300e9}
    text = markdown(record(roofline=roof, threads=1, muon_is_fp32=True))
    for part in ("A processor, 1 thread\n", "copy 20.0 GB/s", "150 GFLOP/s FP32", "300 GFLOP/s BF16", "Commit abc1234"):
        assert part in text
    assert "Muon of torch iterates in FP32" in text and "iterates in FP32" not in markdown(record())
    assert "A processor, 2 threads\n" in markdown(record()) and "ceilings not measured" in markdown(record())
    assert markdown(record((), "cuda")).startswith("# Side by side: A GPU\n")
