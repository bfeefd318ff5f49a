"""`bench.make_dispatch_table`: from records to a dispatch table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import make_dispatch_table as dispatch
from bench.kernels import __main__ as kernels
from rootfree_kernels.ops.backends import why_not
from rootfree_kernels.ops.dispatch import TABLES, device_name, read, slug
from tests.calls.device import DEVICE
from tests.calls.dispatch_files import GPU

SHAPE = {"side": 768, "blocks": 48}
VERSIONS = {"date": "2026-12-01", "commit": "abc1234", "driver": "580.1"}
VERSIONS |= {"cuda": "13.0", "torch": "2.13", "triton": "3.7"}


def timing(median: float, spread: float = 0.01, **changes: Any) -> dict[str, Any]:
    quantiles = {"median": median, "p10": median * (1 - spread), "p90": median * (1 + spread)}
    return {**quantiles, "samples": 50, "queued": True, **changes}


def row(operation: str = "matrices", sizes: Any = SHAPE, **times: dict[str, Any]) -> dict[str, Any]:
    alternatives = {"operation": operation, "sizes": sizes, "times": times}
    return {"table": "T", "case": "a case", "values": {}, "alternatives": alternatives}


def record(*rows: Any, **changes: Any) -> dict[str, Any]:
    return {"device": GPU, **VERSIONS, **changes, "rows": [*rows]}


def choices(*rows: Any) -> list[Any]:
    made = dispatch.table({"r.json": record(*rows)})
    return [entry["choice"] for entries in made["operations"].values() for entry in entries]


# ---- the rule ------------------------------------------------------------------------------------------------------

CASES = [
    ("faster", [(timing(100), timing(96))], "eager"),
    ("faster by 3% and no more", [(timing(103, 0.001), timing(100, 0.001))], None),
    ("the other one is", [(timing(96), timing(100))], "triton"),
    ("percentiles overlap", [(timing(110, 0.1), timing(100, 0.1))], None),
    ("with gaps of the host", [(timing(100, queued=False), timing(50))], None),
    ("too few times", [(timing(100), timing(50, samples=9))], None),
    ("in one case, the same in another", [(timing(100), timing(90)), (timing(100), timing(100))], "eager"),
    ("in one case, slower in another", [(timing(100), timing(50)), (timing(100), timing(100.1))], None),
    ("in one case, with gaps in another", [(timing(100), timing(50)), (timing(100), timing(50, queued=False))], None),
]


@pytest.mark.parametrize(("pairs", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_choice_is_clearly_faster_in_one_case_and_slower_in_none(pairs: Any, expected: str | None) -> None:
    assert choices(*(row(triton=triton, eager=eager) for triton, eager in pairs)) == [expected]


def test_one_of_three_must_beat_both_others() -> None:
    three = {"triton": timing(100), "cuda": timing(90), "eager": timing(500)}
    sizes = {"numbers": 1000, "tensors": 10}
    assert choices(row("diagonal", sizes, **three)) == ["cuda"]
    assert choices(row("diagonal", sizes, **{**three, "eager": timing(91)})) == [None]


def test_cases_of_a_class_are_judged_together_and_those_of_two_apart() -> None:
    times = {"triton": timing(100), "eager": timing(50)}
    slower = {"triton": timing(50), "eager": timing(100)}
    within, beyond = {"side": 1024, "blocks": 33}, {"side": 1025, "blocks": 33}
    assert choices(row(**times), row(sizes=within, **slower)) == [None]
    assert choices(row(**times), row(sizes=beyond, **slower)) == ["eager", "triton"]


# ---- the table -----------------------------------------------------------------------------------------------------


def test_a_table_has_provenance_and_all_that_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Dispatch can read it. Other rows, and records of other modules, are passed over."""
    others = [{"table": "U", "case": "c", "values": {}}, {"alternatives": [1]}, "text", 3]
    files = {
        "one.json": record(row(triton=timing(100), eager=timing(80)), *others),
        "two.json": record(row("symmetric", SHAPE, triton=timing(70), bmm=timing(71)), date="2026-12-02"),
        "three.json": {"device": GPU, "results": []},
    }
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value))
    out = tmp_path / "new" / "table.json"
    assert dispatch.main([*(str(tmp_path / name) for name in files), "--out", str(out)]) == 0
    made = json.loads(out.read_text(encoding="utf-8"))
    assert made["device"] == GPU and made["records"][0] == {"record": "one.json", **VERSIONS}
    assert [x["date"] for x in made["records"]] == ["2026-12-01", "2026-12-02", None]
    (entry,) = made["operations"]["matrices"]
    assert (entry["side"], entry["blocks"], entry["choice"]) == (1024, 64, "eager")
    triton, eager = ({"median": x, "p10": 0.99 * x, "p90": 1.01 * x} for x in (100, 80))
    (measured,) = entry["measured"]
    assert measured.pop("µs") == {"triton": pytest.approx(triton), "eager": pytest.approx(eager)}
    assert measured == {"case": "T, a case", "record": "one.json", "fastest": "eager", "ratio": 1.25}
    found = read(out)
    assert found.choice("matrices", SHAPE) == "eager" and found.choice("symmetric", SHAPE) is None
    text = capsys.readouterr().out
    assert "matrices, side ≤ 1024, blocks ≤ 64: eager (eager by 1.25)" in text
    assert "symmetric, side ≤ 1024, blocks ≤ 64: order of preference (triton by 1.01)" in text and str(out) in text


def test_by_default_the_table_is_written_where_the_package_finds_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "TABLES", tmp_path / TABLES.name)
    path = tmp_path / "r.json"
    path.write_text(json.dumps(record(row(triton=timing(100), eager=timing(80)))))
    assert dispatch.main([str(path)]) == 0
    assert read(tmp_path / TABLES.name / "nvidia-h100-80gb-hbm3.json").device == GPU


GOOD = record(row(triton=timing(1), eager=timing(1)))
WRONG = [
    ([record()], "no alternatives in 0.json: pass records of this version's bench.kernels"),
    ([GOOD, {**GOOD, "device": "NVIDIA A100"}], f"records of {GPU} and NVIDIA A100: a table is that of one device"),
    ([{"rows": []}], "names no device: pass a record of bench.kernels"),
    (["{"], "Expecting property name"),
    ([record(row("products", triton=timing(1)))], "0.json, T, a case: operation 'products' is unknown"),
    ([record(row(triton=timing(9), cutlass=timing(1)))], "choice 'cutlass' is unknown"),
]


@pytest.mark.parametrize(("records", "message"), WRONG, ids=[message[:30] for _, message in WRONG])
def test_wrong_records_are_an_error_and_nothing_is_written(records, message, tmp_path: Path, capsys) -> None:
    paths = [tmp_path / f"{index}.json" for index in range(len(records))]
    for path, value in zip(paths, records, strict=True):
        path.write_text(value if isinstance(value, str) else json.dumps(value))
    assert dispatch.main([*map(str, paths), "--out", str(tmp_path / "table.json")]) == 1
    assert message in capsys.readouterr().out and not (tmp_path / "table.json").exists()


def test_two_records_of_one_name_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch.main([str(tmp_path / "r.json"), str(tmp_path / "more" / "r.json")]) == 1
    assert "several records are called r.json" in capsys.readouterr().out


@pytest.mark.skipif(DEVICE.type != "cpu", reason="`python -m bench.kernels` runs all of it on a GPU")
def test_a_record_of_bench_kernels_has_every_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one sample of each, in Triton's interpreter: every class is there, and none has a choice."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    try:
        only = "RF-RMSProp, GPT-2 124M's vectors|n = 16|24, T = 1"
        kernels.main(["--device", "cpu", "--tiny", "--only", only, "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    (path,) = tmp_path.glob("*.json")
    made = dispatch.table({path.name: dispatch.read(path)})
    assert slug(made["device"]) == slug(device_name(DEVICE))
    entries = {name: [x["choice"] for x in listed] for name, listed in made["operations"].items()}
    compiled = {} if why_not("cpp", DEVICE, torch.float32) else {"diagonal": [None]}
    assert entries == {**compiled, "matrices": [None], "symmetric": [None]}
    assert all(case["unusable"] for case in made["operations"]["matrices"][0]["measured"])
