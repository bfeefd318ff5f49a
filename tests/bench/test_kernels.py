"""`python -m bench.kernels` without a GPU: every section at tiny sizes in Triton's interpreter, and its record."""

from __future__ import annotations

import json
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.common.gpt import GPT2
from bench.common.report import Row, Target
from bench.common.restarts import Progress
from bench.common.roofline import recipe_step_stages, recipe_update_stages, row_sum_stages, step_stages, update_stages
from bench.common.timing import HostClock, Timer
from bench.kernels import __main__ as kernels
from bench.kernels import kron, optimizers, rf_rmsprop, symmetric
from bench.kernels.blocks import PAPER, RECIPE, STEP, UPDATE, Blocks
from bench.kernels.cases import TINY, Case, CheckFailed, Context, check, poisoned_memory
from rootfree_kernels.eager import EAGER
from tests.calls.backends import stand_in
from tests.calls.device import DEVICE

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="`python -m bench.kernels` runs all of it on a GPU")


# ---- checks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [1.01, torch.nan])
def test_a_wrong_result_is_an_error(wrong: float):
    expected = [torch.ones(3, dtype=torch.float64), torch.full((2,), 2.0, dtype=torch.float64)]
    assert check("x", [x.float() for x in expected], expected) == 0
    with pytest.raises(CheckFailed, match=r"x: relative error .* against FP64, 3e-05 allowed"):
        check("x", [expected[0].float(), expected[1].float() * wrong], expected)


def test_memory_is_poisoned_only_within_the_context():
    before = torch.empty
    x = torch.ones(2, 2)
    with poisoned_memory():
        made = [torch.empty(3), torch.empty_like(x), x.new_empty(2), torch.empty_strided((2,), (1,))]
        assert all(y.isnan().all() for y in made)
        assert (torch.empty(3, dtype=torch.int16) == -(2**15)).all() and torch.empty(3, dtype=torch.bool).numel() == 3
    assert torch.empty is before and "new_empty" not in vars(torch.Tensor)


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    def slightly_wrong(c: torch.Tensor, k: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        return tuple((x @ x.mT * 1.1).to(dtype) for x in (c, k))

    timer = SimpleNamespace(measure=lambda *args: pytest.fail("it was timed"))
    context = Context(DEVICE, TINY, timer)
    stand_in(monkeypatch, context.backend.name, kron_products=slightly_wrong)
    (row,) = kernels.run(symmetric.symmetric_cases(context)[0], context)
    assert row.error.startswith("CheckFailed: products: relative error") and not row.cells


def test_a_wrong_step_of_the_recipe_is_an_error(context: Context, monkeypatch: pytest.MonkeyPatch):
    """Here a step of the paper's rule is in its place."""
    step = Blocks.step

    def wrong_step(self: Blocks, backend: Any) -> None:
        self.rule = self.rule if self.c.dtype == torch.float64 else PAPER
        step(self, backend)

    monkeypatch.setattr(Blocks, "step", wrong_step)
    with pytest.raises(CheckFailed, match="W of 16 × 24: relative error"):
        kron.check_step((1, 16, 24), context, RECIPE)


# ---- the sections, at tiny sizes -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def context() -> Iterator[Context]:
    """Use one thread: starting others takes longer than the measurements."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    timer = Timer(HostClock(), warmups=1, repeats=1, min_repeats=1, seconds=0.0)
    made = Context(DEVICE, TINY, timer)
    kernels.ceiling_rows("at the start", made)
    yield made
    torch.set_num_threads(threads)


def rows_of(cases: list[Case], context: Context) -> dict[str, dict[str, Row]]:
    """Return the rows of cases by table and case. None may have failed."""
    tables: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in [row for case in cases for row in kernels.run(case, context)]:
        assert not row.error
        tables[row.table][row.case] = row
    return tables


def assert_alternatives(row: Row, columns: dict[str, str], operation: str, **sizes: int) -> None:
    """Check the alternatives of a row, given the columns that show their times."""
    assert row.alternatives.operation == operation
    assert row.alternatives.times == {choice: row.cells[column] for choice, column in columns.items()}
    assert not sizes or row.alternatives.sizes == sizes


def test_the_first_ceilings_are_kept(context: Context):
    before = context.roofline
    assert before and before.bandwidth > 0 and before.bf16 > 0
    (row,) = kernels.ceiling_rows("at the end", context)
    assert context.roofline is before
    assert row.cells["copy, TB/s read and written"] == pytest.approx(8 * 100 / row.cells["copy µs"].median * 1e-6)
    assert row.cells["BF16 32³, TFLOP/s"] == pytest.approx(2 * 32**3 / row.cells["product µs"].median * 1e-6)


def test_diagonal_steps(context: Context):
    cases = rf_rmsprop.diagonal_cases(rf_rmsprop.DiagonalLists, context)
    rows = rows_of(cases, context)[rf_rmsprop.DIAGONAL]
    assert len(rows) == 4 * (3 + 3)  # lists × (precisions and peers)
    other = context.other_backend.name if context.other_backend else None
    names = ("1 GB", "GPT-2 124M", "10 tensors of 10", "GPT-2 124M's vectors")
    for name, of_copy in zip(names, (0.92, 0.85, None, None), strict=True):
        fp32, mixed, bf16 = (rows[f"{name}, {precision.name}"] for precision in rf_rmsprop.PRECISIONS)
        of_copy_target = {"of copy": Target("≥", of_copy)} if of_copy else {}
        assert fp32.targets == {**of_copy_target, "AdamW / ours": Target("≥", 1.0)}
        bounds = (1.27, 2.0) if of_copy else (1.0, 1.0)
        assert mixed.targets == {"AdamW / ours": Target("≥", bounds[0])}
        assert bf16.targets == {"AdamW / ours": Target("≥", bounds[1]), "AdamW in BF16 / ours": Target("≥", 1.0)}
        assert [row.cells["bytes a number"] for row in (fp32, mixed, bf16)] == [28, 22, 14]
        theirs = rows[f"{name}, AdamW of PyTorch"].cells["µs"].median
        assert fp32.cells["AdamW / ours"] == pytest.approx(theirs / fp32.cells["µs"].median)
        assert (f"{other} / ours" in fp32.cells) is (other is not None)
        if other:
            assert_alternatives(fp32, {"triton": "µs", other: f"{other} µs"}, "diagonal")
    row, numbers = rows["1 GB, FP32"], TINY.numbers // rf_rmsprop.NUM_LARGE * rf_rmsprop.NUM_LARGE
    assert row.cells["GB"] == pytest.approx(28e-9 * numbers)
    assert not other or row.alternatives.sizes == {"numbers": numbers, "tensors": rf_rmsprop.NUM_LARGE}


@pytest.mark.parametrize("precision", [rf_rmsprop.FP32, rf_rmsprop.BF16], ids=lambda x: x.name)
def test_the_diagonal_step_of_the_recipe(precision: Any, context: Context, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rf_rmsprop, "PRECISIONS", [precision])
    case = rf_rmsprop.diagonal_cases(rf_rmsprop.ScaledLists, context)[3]
    row = rows_of([case], context)[rf_rmsprop.SCALED][f"GPT-2 124M's vectors, {precision.name}"]
    assert {"µs", "of copy", "AdamW / ours", "eager / ours"} <= set(row.cells)
    assert not row.targets and not row.alternatives


def test_a_failing_peer_is_recorded_and_the_others_are_measured(context: Context, monkeypatch: pytest.MonkeyPatch):
    def no_fused(*args: Any, **options: Any) -> None:
        raise RuntimeError("no fused kernels")

    monkeypatch.setattr(torch.optim, "AdamW", no_fused)
    context = Context(DEVICE, TINY, context.timer, context.roofline, EAGER)
    rows = kernels.run(rf_rmsprop.diagonal_cases(rf_rmsprop.DiagonalLists, context)[1], context)
    assert [row.case for row in rows if row.error] == ["GPT-2 124M, AdamW", "GPT-2 124M, AdamW BF16"]
    assert "RMSprop / ours" in {row.case: row for row in rows}["GPT-2 124M, FP32"].cells


def test_clipped_momentum(context: Context):
    rows = rows_of(rf_rmsprop.momentum_cases(context), context)[rf_rmsprop.MOMENTUM].values()
    others = {f"{context.other_backend.name} / ours"} if context.other_backend else set()
    assert len(rows) == 2 and all({"µs", "of copy", "eager / ours", *others} <= set(row.cells) for row in rows)


def test_symmetric_products(context: Context):
    rows = rows_of(symmetric.symmetric_cases(context), context)[symmetric.SYMMETRIC]
    assert [*rows] == [f"{name}, L = 1, n = 16" for name in ("P", "P, X copied", "m")]
    assert all({"µs", "bmm / ours", "of limit"} <= set(row.cells) for row in rows.values())
    product, kept, _ = rows.values()
    assert product.cells["TFLOP/s"] == pytest.approx(2 * 16**3 / product.cells["µs"].median * 1e-6)  # two products
    assert_alternatives(kept, {"triton": "µs", "bmm": "bmm µs"}, "symmetric", side=16, blocks=1)


@pytest.mark.parametrize("wrong", ["products", "factors"])
def test_wrong_products_are_no_alternative(wrong: str, context: Context, monkeypatch: pytest.MonkeyPatch):
    def by_bmm(c: torch.Tensor, k: torch.Tensor, product_c: torch.Tensor, product_k: torch.Tensor, kept: Any) -> None:
        for x, product, old in zip((c, k), (product_c, product_k), kept, strict=True):
            torch.bmm(x, x if wrong == "products" else x.mT, out=product)
            old.copy_(x if wrong == "products" else -x)

    monkeypatch.setattr("rootfree_kernels.triton_kernels.products.products_by_bmm", by_bmm)
    with pytest.raises(CheckFailed, match=r"products by bmm|factors were not kept by bmm"):
        symmetric._kept_row(1, 16, context)


def test_updates_and_steps_show_every_launch(context: Context):
    """A launch without a name here would have no limit in the record."""
    rows = rows_of(kron.block_cases(context), context)
    shape = "1 × 16×24"
    updates, steps, launches = rows[UPDATE], rows[STEP], rows[kron.LAUNCHES]
    endings = ("", ", T = 1", ", recipe", ", recipe, T = 1", ", row sums")
    assert [*updates] == [f"{shape}{ending}" for ending in endings] and [*steps] == [shape, f"{shape}, recipe"]
    for row in (updates[shape], updates[f"{shape}, T = 1"], steps[shape]):
        assert_alternatives(row, {"triton": "µs", "eager": "eager µs"}, "matrices", side=24, blocks=1)
    assert all(row.alternatives is None for case, row in updates.items() if "recipe" in case or "sums" in case)
    whole = [*(row for case, row in updates.items() if "T = 1" not in case), *steps.values()]
    assert all({"of roofline", "of least bytes", "eager / ours"} <= set(row.cells) for row in whole)
    recipe = [x for x in recipe_update_stages(1, 1) if x != "copy"]  # which is PyTorch's
    stages = {" update": update_stages(1, 1), " step": step_stages(1, 1)}
    stages |= {", recipe update": recipe, ", recipe step": recipe_step_stages(1, 1)}
    stages |= {", row sums update": row_sum_stages(1, 1)}
    expected = [f"{shape}{kind}: {name}" for kind, names in stages.items() for name in names]
    assert [*launches] == expected
    assert all({"of limit", "µs above limit"} <= set(row.cells) for row in launches.values())


def test_only_large_updates_of_the_paper_s_rule_have_a_target(context: Context, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kron, "check_update", lambda *args: None)
    monkeypatch.setattr(kron, "_block_rows", lambda *args: [Row(UPDATE, "case")])
    targets = [kron.update_rows((1, n, n), PAPER, context)[0].targets.get("of roofline") for n in (512, 1024, 4096)]
    assert targets == [None, Target("≥", 0.6), Target("≥", 0.7)]
    assert not kron.update_rows((1, 4096, 4096), RECIPE, context)[0].targets


def test_whole_steps(context: Context):
    rows = rows_of(optimizers.optimizer_cases(context, [])[:-1], context)
    host, device = rows[optimizers.HOST], rows[optimizers.DEVICE]
    assert [*host] == [*optimizers.OURS, *optimizers.PEERS]
    assert [name for name, row in host.items() if row.targets] == [*optimizers.OURS]
    for name in optimizers.OURS:
        assert {"of roofline", "eager / ours", "ours / fused AdamW"} <= set(device[name].cells)
    assert {*device["IFShampoo T=10, one update and nine other steps"].cells} == {"mean µs"}


def test_gradients_move_to_addresses_of_their_own():
    model = optimizers.Model(GPT2(1, 8, 50, 4), DEVICE)
    addresses = []
    for _ in range(20):
        addresses.append([param.grad.data_ptr() for param in model.params])
        model.move_gradients()
    ends = sorted((x.grad.data_ptr(), x.grad.data_ptr() + 4 * x.numel()) for x in model.params)
    assert len({param.grad.data_ptr() % 256 for param in model.params}) == 1  # aligned alike
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    assert all(len(set(of_one)) == 20 for of_one in zip(*addresses, strict=True))


def test_a_replayed_graph_is_compared_with_plain_steps(context: Context, monkeypatch: pytest.MonkeyPatch):
    """The graph here calls the step."""

    def captured(step: Callable[[], Any], warmups: int, replays: int = 1) -> Any:
        for _ in range(warmups):
            step()
        return SimpleNamespace(replay=lambda: [step() for _ in range(replays)])

    make = optimizers.OURS["RFRMSProp"]
    monkeypatch.setattr(optimizers, "captured", captured)
    assert optimizers.graph_cases(context) == []
    on_gpu = optimizers.graph_cases(Context(torch.device("cuda"), TINY, context.timer))
    assert [case.name for case in on_gpu] == ["IFShampoo T=1", "RFRMSProp"]
    (row,) = optimizers.graph_rows("RFRMSProp", make, context)
    assert {"replayed, device µs", "plain, device µs", "replay, host µs"} == set(row.cells)
    monkeypatch.setattr(optimizers, "captured", partial(captured, replays=2))
    with pytest.raises(CheckFailed, match="a replay is not the step"):
        optimizers.graph_rows("RFRMSProp", make, context)


def test_first_steps_run_in_processes_with_an_empty_and_a_warm_cache(context: Context, monkeypatch: pytest.MonkeyPatch):
    runs = []

    def run(command: list[str], env: dict[str, str], **options: Any) -> Any:
        runs.append((command, env["TRITON_CACHE_DIR"]))
        steps = optimizers.first_steps(context)
        return SimpleNamespace(returncode=len(runs) > 2, stdout=f"loading\n{json.dumps(steps)}\n", stderr="a\nb\n")

    monkeypatch.setattr(subprocess, "run", run)
    rows = optimizers.first_rows(["--tiny"])
    assert [row.case for row in rows[::3]] == ["IFShampoo T=1, cache empty", "IFShampoo T=1, cache warm"]
    assert all(row.cells["first step, s"] > 0 for row in rows)
    assert runs[0] == runs[1] and runs[0][0][-2:] == ["--first-step", "--tiny"]
    with pytest.raises(RuntimeError, match=r"^b$"):
        optimizers.first_rows(["--tiny"])


# ---- the run -------------------------------------------------------------------------------------------------------


def failing() -> list[Row]:
    raise ValueError("a\nmessage")


GOOD = partial(list, [Row("t", "good", {"x": 1.0})])


@pytest.fixture
def progress(tmp_path: Path) -> Progress:
    return Progress(tmp_path / "progress", until=time.time() + 60)


def test_errors_and_cases_without_time_are_recorded_and_stop_nothing(context: Context, progress: Progress):
    saved: list[int] = []
    cases = [Case("t", "bad", failing), Case("t", "good", GOOD)]
    rows = kernels.run_all(cases, context, progress, lambda rows: saved.append(len(rows)))
    assert [(row.case, row.error) for row in rows] == [("bad", "ValueError: a\nmessage"), ("good", "")]
    assert saved == [1, 2, 2] and progress.done == ["t, bad", "t, good"]
    progress.until = 0.0
    rows = kernels.run_all([*cases, Case("t", "late", GOOD)], context, progress, lambda rows: None)
    assert [row.error for row in rows[2:]] == ["left out: the run's time was over"]


def test_a_new_process_goes_on_after_a_cuda_error(context: Context, progress: Progress, monkeypatch: Any):
    """The new process keeps rows and roofline, repeats nothing, and blames the case that broke the first one."""
    cases = [Case("t", "good", GOOD), Case("t", "bad", failing), Case("t", "hung", failing), Case("t", "last", GOOD)]
    monkeypatch.setattr(kernels, "is_spoiled", lambda device: True)
    bandwidth = context.roofline.bandwidth
    assert kernels.run_all(cases, context, progress, lambda rows: None) is None
    again = Progress.load(progress.path)
    again.begin("t, hung")
    again.blame("it hung")
    context.roofline = None
    rows = kernels.run_all(cases, context, Progress.load(progress.path), lambda rows: None)
    assert context.roofline.bandwidth == bandwidth
    found = [(row.case, row.error) for row in rows]
    assert found == [("good", ""), ("bad", "ValueError: a\nmessage"), ("hung", "it hung"), ("good", "")]


def test_a_run_writes_its_record(context: Context, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--device", "cpu", "--tiny", "--only", "RMSprop", "--out", str(tmp_path)]
    assert kernels.main(arguments) == 0
    table, found = sorted(tmp_path.iterdir(), key=lambda path: path.suffix, reverse=True)
    assert found.suffix == ".json" and table.suffix == ".md" and found.stem.endswith("-tiny-part")
    written = json.loads(found.read_text(encoding="utf-8"))
    assert {"device", "driver", "torch", "triton", "python", "commit", "date"} <= set(written)
    assert written["command"].startswith("python -m bench.kernels --device cpu --tiny --only RMSprop")
    assert [row["case"] for row in written["rows"]] == ["at the start", "RMSprop, foreach"]
    assert set(written["rows"][0]["values"]["copy µs"]) == {"median", "p10", "p90", "samples", "queued"}
    assert written["commit"] in table.read_text(encoding="utf-8")
    assert str(table) in capsys.readouterr().out
    assert {case.table for case in kernels.cases(context, [])} <= {*kernels.NOTES}


@pytest.mark.parametrize(
    ("device", "has_gpu", "interpret", "message"),
    [
        ("cuda", False, "", "bench.kernels needs a GPU that PyTorch can use: torch"),
        ("cuda", True, "1", "unset it"),
        ("cpu", False, "", "set TRITON_INTERPRET=1"),
    ],
)
def test_what_cannot_be_measured_is_explained(
    device: str, has_gpu: bool, interpret: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    assert kernels.main(["--device", device]) == 1
    assert message in capsys.readouterr().out
