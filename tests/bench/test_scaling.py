"""The cost of a step over sizes and T, and whole training steps, with a clock that only optimizers move."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import inf, log

import pytest
import torch

from bench.common.gpt import GPT, GPT2
from bench.common.optimizers import ENTRIES
from bench.common.together import Together
from bench.common.workloads import WORKLOADS, Workload
from bench.compare import scaling, training
from bench.compare.contest import OTHER, UPDATE, Limits
from bench.compare.settings import TINY
from bench.compare.training import GPT2_124M, ROWS, SELDOM, SMALL, Trainee, batches
from tests.bench.fakes import FakeOptimizer, failing_at, fake_entry, stopped_clock, undisturbed

CPU = torch.device("cpu")
RECIPE = "IFShampoo, recipe"
LIMITS = Limits(most=1, least=1, seconds=0.0)


@pytest.fixture
def clock(monkeypatch):
    return stopped_clock(monkeypatch)


@pytest.fixture(autouse=True, scope="module")
def everything_else_left_alone():
    with undisturbed():
        yield


# ---- exponents -----------------------------------------------------------------------------------------------------


def rows_of(sizes, cost, name="IFShampoo"):
    return [{"size": n, "optimizer": name, UPDATE: {"median": cost(n)}, OTHER: {"median": 5.0}} for n in sizes]


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0, -0.5])
def test_the_exponent_of_a_power_law_is_its_power(power):
    rows = rows_of((128, 256, 512, 1024, 2048), lambda n: 0.3 * n**power)
    assert scaling.exponent(rows, "IFShampoo", UPDATE) == pytest.approx(power)
    assert scaling.exponent(rows, "IFShampoo", OTHER) == pytest.approx(0.0)


@pytest.mark.parametrize(("count", "used"), [(3, 3), (4, 3), (5, 3), (6, 3), (7, 4), (8, 4), (9, 5)])
def test_only_the_larger_half_of_the_sizes_counts_but_at_least_three(count, used):
    sizes = [2**k for k in range(count)]
    bend = sizes[count - used]
    rows = rows_of(sizes, lambda n: float(n**3) if n >= bend else 1e9)
    assert scaling.exponent(rows[::-1], "IFShampoo", UPDATE) == pytest.approx(3.0)
    if count > used:
        rows = rows_of(sizes, lambda n: float(n**3) if n > bend else 1e9)
        assert scaling.exponent(rows, "IFShampoo", UPDATE) != pytest.approx(3.0)


def test_there_is_no_exponent_of_fewer_than_three_sizes():
    rows = [*rows_of((1, 2), float), *rows_of((1, 2, 4), float, "SOAP")]
    rows.append({"size": 4, "optimizer": "IFShampoo", "error": "out of memory"})
    assert scaling.exponent(rows, "IFShampoo", UPDATE) is None
    assert scaling.exponent(rows, "SOAP", UPDATE) == pytest.approx(1.0)


def test_the_theory_is_3_in_the_width_2_for_a_diagonal_step_and_1_in_the_layers():
    names = ("IFShampoo", "SOAP", "RFRMSProp", "AdamW, fused")
    assert [scaling.theory(name, UPDATE, "width") for name in names] == [3.0, 3.0, 2.0, 2.0]
    assert {scaling.theory(name, kind, "layers") for name in scaling.SERIES for kind in (UPDATE, OTHER)} == {1.0}


# ---- series --------------------------------------------------------------------------------------------------------


def test_a_series_has_a_row_for_each_size_and_optimizer(clock):
    entries = [fake_entry("a", clock), fake_entry("b", clock, family="Muon")]
    rows = scaling.measure(scaling.widths((4, 8)), entries, clock, CPU, LIMITS, inf)
    assert [(row["size"], row["optimizer"]) for row in rows] == [(4, "a"), (4, "b"), (8, "a"), (8, "b")]
    assert (rows[0][UPDATE]["median"], rows[0][OTHER]["median"]) == (700.0, 100.0)
    assert rows[1][UPDATE] == rows[1][OTHER] and rows[1][UPDATE]["samples"] == 2
    clock.late = True
    assert not scaling.measure(scaling.widths((4,)), entries, clock, CPU, LIMITS, inf)[0][UPDATE]["queued"]


def test_a_series_ends_after_an_error_or_a_size_that_takes_too_long(clock):
    calls = iter(range(100))

    def slower_each_time(number):
        return scaling.TOO_LONG / 4 * 10 ** (next(calls) // 6)  # each size takes four steps of warm-up and two more

    entries = [
        fake_entry("quick", clock),
        fake_entry("slow", clock, cost=slower_each_time),
        fake_entry("broken", clock, cost=failing_at(5)),
    ]
    rows = scaling.measure(scaling.widths((4, 8, 16)), entries, clock, CPU, LIMITS, inf)
    by_name = {name: [row for row in rows if row["optimizer"] == name] for name in ("quick", "slow", "broken")}
    assert [row["size"] for row in by_name["quick"]] == [4, 8, 16]
    assert [row[UPDATE]["median"] for row in by_name["slow"]] == [scaling.TOO_LONG / 4, scaling.TOO_LONG * 2.5]
    assert [row.get("error") for row in by_name["broken"]] == ["RuntimeError: broken in step 5"]


def test_after_the_deadline_a_series_ends_with_a_row_that_says_so(clock):
    entries, sizes = [fake_entry("a", clock)], scaling.widths((4, 8, 16))
    rows = scaling.measure(sizes, entries, clock, CPU, LIMITS, clock.seconds() - 1)
    assert [row["error"] for row in rows] == ["TimeoutError: left out: the run's time was over"]


def test_layers_are_many_of_one_shape_and_widths_one_square():
    assert [(n, x.shapes) for n, x in scaling.layers((1, 3), 8)] == [(1, ((8, 8),)), (3, ((8, 8),) * 3)]
    assert [(n, x.shapes) for n, x in scaling.widths((2, 8))] == [(2, ((2, 2),)), (8, ((8, 8),))]


SQUARE = Workload("square", ((4, 4),))


def test_the_mean_step_at_each_t_is_beside_the_formula(clock, monkeypatch):
    monkeypatch.setitem(ENTRIES, "IFShampoo", fake_entry("IFShampoo", clock))
    rows = scaling.periods((1, 2, 5), SQUARE, clock, CPU, 3, inf)
    assert [row["T"] for row in rows] == [1, 2, 5]
    expected = [700.0, 400.0, (700.0 + 4 * 100.0) / 5]
    assert [row["formula"] for row in rows] == pytest.approx(expected)
    assert [row["measured"]["median"] for row in rows] == pytest.approx(expected)
    assert [row["measured"]["samples"] for row in rows] == [3, 3, 3] and rows[0]["measured"]["queued"]
    assert scaling.periods((1,), SQUARE, clock, CPU, 2, inf) == []
    assert scaling.periods((1, 2), SQUARE, clock, CPU, 2, clock.seconds()) == []
    clock.late = True
    assert not scaling.periods((2,), SQUARE, clock, CPU, 3, inf)[0]["measured"]["queued"]


def test_the_formula_takes_the_steps_of_the_largest_t(clock, monkeypatch):
    def make(params, period, block):
        costs = {2: (350.0, 50.0), 4: (700.0, 100.0)}[period]
        return FakeOptimizer(params, clock, lambda number: costs[number % period != 0])

    monkeypatch.setitem(ENTRIES, "IFShampoo", replace(fake_entry("IFShampoo", clock), make=make))
    rows = scaling.periods((2, 4), SQUARE, clock, CPU, 2, inf)
    assert [(row["measured"]["median"], row["formula"]) for row in rows] == [(200.0, 400.0), (250.0, 250.0)]


# ---- training ------------------------------------------------------------------------------------------------------


def test_the_model_is_gpt2_and_its_matrices_are_those_of_the_workload():
    with torch.device("meta"):
        model, small = GPT(GPT2_124M.model), GPT(SMALL.model)
    assert sum(x.numel() for x in model.parameters()) == 124_439_808 and GPT2_124M.tokens == 32 * 1024
    for name, built in (("GPT-2 124M", model), ("small GPT", small)):
        assert sum(x.numel() for x in built.matrices()) == WORKLOADS[name].num_weights
        assert Counter(map(id, [*built.matrices(), *built.rest()])) == Counter(map(id, built.parameters()))


def test_the_loss_is_that_of_the_next_token_and_begins_at_that_of_guessing(clock, monkeypatch):
    torch.manual_seed(0)
    task = training.Task("tiny", GPT2(1, 8, 50, 6, head_width=4), batch=64, bf16=False)
    trainee, tokens = (
        Trainee(task, CPU, lambda model: torch.optim.SGD(model.parameters(), lr=0.0)),
        next(batches(task, CPU)),
    )
    trainee.prepare()
    seen = []
    monkeypatch.setattr(trainee.model, "loss", lambda *batch: seen.append(GPT.loss(trainee.model, *batch)) or seen[-1])
    trainee.step(tokens, clock)
    guesses = trainee.model(tokens[:, :-1]).log_softmax(-1)
    of_next = [guesses[row, place, tokens[row, place + 1]] for row in range(64) for place in range(6)]
    assert len(of_next) == task.tokens
    torch.testing.assert_close(seen, [-torch.stack(of_next).mean()])
    assert seen[0].item() == pytest.approx(log(50), abs=0.05)


def test_together_steps_both_parts_and_a_scheduler_reaches_both():
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    parts = torch.optim.SGD(params[:1], lr=0.5), torch.optim.Adam(params[1:], lr=0.25)
    both = Together(*parts)
    for param in params:
        param.grad = torch.ones(3)
    both.step()
    assert params[0].tolist() == [0.5] * 3 and params[1].tolist() == pytest.approx([0.75] * 3)
    assert {id(param) for param in both.state} >= {id(params[1])}
    torch.optim.lr_scheduler.LambdaLR(both, lambda step: 0.0)
    assert [part.param_groups[0]["lr"] for part in parts] == [0.0, 0.0]
    both.zero_grad()
    assert all(param.grad is None for param in params)


@pytest.mark.parametrize(("make", "name"), [(training.in_groups, "IFShampoo"), (training.by_recipe, RECIPE)])
def test_embeddings_and_vectors_take_the_diagonal_step_and_matrices_have_factors(make, name):
    model = GPT(TINY.task.model)
    optimizer = make(ENTRIES[name], model, 2)
    tokens = next(batches(TINY.task, CPU))
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer.step()
    matrices, *rest = (group["params"] for group in optimizer.param_groups)
    others = [param for params in rest for param in params]
    for params, expected in ((matrices, model.matrices()), (others, model.rest())):
        assert {id(x) for x in params} == {id(x) for x in expected}
        for param in params:
            factors = [x for x in optimizer.state[param].values() if x.ndim > 1 and x.shape != param.shape]
            assert bool(factors) == (params is matrices)
    assert {group["precondition_frequency"] for group in optimizer.param_groups} == {2}


def test_beside_adamw_theirs_gets_the_matrices_and_adamw_the_rest():
    model = GPT(TINY.task.model)
    theirs, adamw = training.beside_adamw(ENTRIES["Muon of torch"], model, 1).parts
    assert isinstance(adamw, torch.optim.AdamW) and isinstance(theirs, torch.optim.Muon)
    for part, params in ((theirs, model.matrices()), (adamw, model.rest())):
        assert [id(x) for x in part.param_groups[0]["params"]] == [id(x) for x in params]


@pytest.fixture
def trainee():
    found = Trainee(TINY.task, CPU, lambda model: torch.optim.SGD(model.parameters(), momentum=0.9))
    found.prepare()
    return found


def test_a_row_is_the_mean_of_whole_cycles(trainee):
    trainee.steps = [1000.0] + [100.0] * 9
    trainee.in_optimizer = [950.0] + [0.0] * 9
    row = trainee.row()
    assert row["mean"] == 190.0 and row["in_optimizer"] == 95.0 and row["optimizer_share"] == 0.5
    assert row["tokens_per_second"] == pytest.approx(TINY.task.tokens / 190e-6)
    assert row["spread"]["samples"] == 10 and row["spread"]["p90"] == 100.0
    assert row["state_bytes"] == 0


def test_the_warm_up_measures_memory_and_leaves_no_times(trainee, clock):
    tokens = next(batches(TINY.task, CPU))
    weights = sum(x.nbytes for x in trainee.model.parameters())
    trainee.warm_up(tokens, clock, 1)
    assert trainee.peak == 0  # no update of any T
    for number in (9, 10):
        trainee.peak = 0
        trainee.warm_up(tokens, clock, number)
        assert trainee.peak > 3 * weights  # weights, momentum and gradients, and the memory of the model
    assert trainee.steps == [] and trainee.in_optimizer == []


def fake_rows(monkeypatch, *entries):
    """Make these entries the only rows."""
    for entry in entries:
        monkeypatch.setitem(ENTRIES, entry.name, entry)
    monkeypatch.setattr(training, "ROWS", {entry.name: (entry.name, SELDOM, training.whole) for entry in entries})


def test_training_takes_the_time_of_the_steps_and_records_errors(clock, monkeypatch):
    def slow_forward(self, tokens, forward=GPT.forward):
        clock.now += 280.0
        return forward(self, tokens)

    monkeypatch.setattr(GPT, "forward", slow_forward)
    fake_rows(monkeypatch, fake_entry("good", clock), fake_entry("bad", clock, cost=failing_at(3)))
    good, bad = training.measure(TINY.task, clock, CPU, ["good", "bad"], (1, 2), inf)
    assert bad == {"optimizer": "bad", "task": "tiny GPT", "error": "RuntimeError: broken in step 3"}
    assert good["in_optimizer"] == pytest.approx((700.0 + 9 * 100.0) / 10)
    assert good["mean"] == pytest.approx(280.0 + 160.0) and good["spread"]["samples"] == 20
    assert good["optimizer_share"] == pytest.approx(160.0 / 440.0)
    (late,) = training.measure(TINY.task, clock, CPU, ["good"], (0, 1), clock.seconds() - 1)
    assert late["error"] == "TimeoutError: left out: the run's time was over"


def test_all_trainees_see_the_same_tokens_and_begin_with_the_same_weights(clock, monkeypatch):
    fake_rows(monkeypatch, fake_entry("a", clock), fake_entry("b", clock))
    trainees = training.contestants(TINY.task, CPU, ["a", "b"])
    assert training._train(trainees, TINY.task, clock, CPU, (0, 1), inf) == {}
    first, second = (trainee.optimizer.seen for trainee in trainees.values())
    assert first == second and len(first) == 10


def test_every_row_names_an_entry_and_only_rows_of_chosen_entries_are_trained():
    assert training.BASELINE in ROWS
    assert all(entry in ENTRIES and period in (1, SELDOM) for entry, period, _ in ROWS.values())
    assert training.names_of(CPU, [ENTRIES[RECIPE], ENTRIES["Muon of Dion, Triton"]]) == [RECIPE]
