"""Times of `bench.compare` by several backends, from which a dispatch table is made."""

from __future__ import annotations

import json

import pytest
import torch

from bench import make_dispatch_table as dispatch
from bench.common.timing import Timing
from bench.common.workloads import Workload
from bench.compare.__main__ import main
from bench.compare.alternatives import alternatives, backend_of
from bench.compare.contest import OTHER, UPDATE
from rootfree_kernels import IFShampoo
from rootfree_kernels.ops.dispatch import parse

SQUARES = Workload("squares", ((512, 1024),) * 3)
MIXED = Workload("mixed", ((512, 1024), (512, 512)))


def row(optimizer, backend, update, other, block=1024, uncut=True):
    figures = {"optimizer": optimizer, "block": block, "uncut": uncut, "backend": backend}
    times = Timing(update, 0.98 * update, 1.01 * update, 30), Timing(other, 0.98 * other, 1.01 * other, 30)
    return {**figures, UPDATE: times[0]._asdict(), OTHER: times[1]._asdict()}


ROWS = [
    row("IFShampoo", "triton", 50.0, 20.0),
    row("IFShampoo, eager", "eager", 80.0, 40.0),
    row("IFShampoo, compensated", "triton", 1.0, 1.0),
    row("RFRMSProp", "triton", 12.0, 12.0),
    row("RFRMSProp, CUDA", "cuda", 10.0, 10.0),
    row("RFRMSProp, eager", "eager", 99.0, 99.0),
    {"optimizer": "AdamW, fused", "block": 1024, "uncut": True, "error": "RuntimeError: no"},
]


def test_backends_of_the_same_work_become_a_table():
    record = {"device": "A GPU", "rows": [*alternatives(SQUARES, ROWS)]}
    found = parse(dispatch.table({"a.json": record}), "a table")
    sizes = {"numbers": SQUARES.num_weights, "tensors": 3}
    assert found.choice("diagonal", sizes) == "cuda"
    assert found.choice("matrices", {"side": 1024, "blocks": 3}) == "triton"


def test_blocks_of_several_shapes_are_not_compared():
    operations = [x["alternatives"]["operation"] for x in alternatives(MIXED, ROWS)]
    assert operations == ["diagonal"]


@pytest.mark.parametrize(
    "rows",
    [ROWS[:1], [ROWS[0], row("IFShampoo, eager", "eager", 8.0, 4.0, block=1 << 20, uncut=False)], [ROWS[3], ROWS[6]]],
    ids=["alone", "other blocks", "failed"],
)
def test_a_backend_alone_is_no_alternative(rows):
    assert [*alternatives(SQUARES, rows)] == []


def test_the_backend_is_that_of_the_plans():
    weight = torch.nn.Parameter(torch.eye(4))
    weight.grad = torch.eye(4)
    ours = IFShampoo([weight], lr=1e-3, batch_size=1, fused=False)
    assert backend_of(ours) is None  # nothing is planned before the first step
    ours.step()
    assert backend_of(ours) == "eager"
    assert backend_of(torch.optim.SGD([weight], lr=1e-3)) is None


def test_a_run_records_alternatives_and_their_table_can_be_read(tmp_path):
    arguments = ["--tiny", "--sections", "steps", "--only", "16²", "--optimizers", "^IFShampoo(, eager)?$"]
    assert main([*arguments, "--device", "cpu", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    backends = {frozenset(x["alternatives"]["times"]) for x in rows}
    if len(next(iter(backends), ())) < 2:
        pytest.skip("eager is the only backend here")
    assert [x["alternatives"]["sizes"] for x in rows] == [{"side": 16, "blocks": 1}] * 2
    assert dispatch.main([str(tmp_path / "results.json"), "--out", str(tmp_path / "table.json")]) == 0
    table = parse(json.loads((tmp_path / "table.json").read_text()), "table.json")
    assert table.choice("matrices", {"side": 16, "blocks": 1}) is None  # one sample decides nothing
