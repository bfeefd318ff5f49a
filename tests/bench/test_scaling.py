"""The cost of a step over sizes and T, and whole training steps, with a clock that only optimizers move."""

from __future__ import annotations

from dataclasses import replace
from math import inf, log

import pytest
import torch

from bench.common.gpt import GPT2
from bench.common.optimizers import ENTRIES
from bench.common.workloads import WORKLOADS, Workload
from bench.compare import scaling, training
from bench.compare.contest import OTHER, UPDATE, Limits
from bench.compare.settings import TINY
from bench.compare.training import GPT2_124M, ROWS, SELDOM, SMALL, Trainee, Transformer, batches
from bench.demo.methods import Together
from tests.bench.fakes import FakeOptimizer, failing_at, fake_entry, stopped_clock, undisturbed
from tests.calls.tensors import assert_same_bits

CPU = torch.device("cpu")
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
        model = Transformer(GPT2_124M)
    assert sum(x.numel() for x in model.parameters()) == 124_439_808
    assert sum(x.numel() for x in model.matrices()) == WORKLOADS["GPT-2 124M"].num_weights
    assert GPT2_124M.tokens == 32 * 1024
    with torch.device("meta"):
        small = Transformer(SMALL)
    assert sum(x.numel() for x in small.matrices()) == WORKLOADS["small GPT"].num_weights


def test_matrices_and_the_rest_are_all_parameters_each_once():
    model = Transformer(TINY.task)
    parts = [*model.matrices(), *model.rest()]
    assert len(parts) == len({id(x) for x in parts}) == len([*model.parameters()])
    assert {id(x) for x in parts} == {id(x) for x in model.parameters()}
    assert not any(x is model.bytes.weight or x is model.places.weight for x in model.matrices())


def test_the_loss_begins_at_that_of_guessing_and_no_token_sees_a_later_one():
    torch.manual_seed(0)
    model = Transformer(training.Task("tiny", GPT2(1, 8, 50, 6, head_width=4), batch=2))
    tokens = next(batches(training.Task("tiny", GPT2(1, 8, 50, 6, head_width=4), batch=64), CPU))
    seen = []
    model.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 50
    losses = model(tokens), model(changed)
    assert losses[0].item() == pytest.approx(log(50), abs=0.05)
    guesses = (seen[0] @ model.bytes.weight.T).log_softmax(-1)
    of_next = [guesses[row, place, tokens[row, place + 1]] for row in range(64) for place in range(5)]
    torch.testing.assert_close(losses[0], -torch.stack(of_next).mean())
    assert torch.equal(seen[0][:, :3], seen[1][:, :3]) and not torch.equal(seen[0][:, 3], seen[1][:, 3])


def two_parts():
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    parts = torch.optim.SGD(params[:1], lr=0.5), torch.optim.Adam(params[1:], lr=0.25)
    for param in params:
        param.grad = torch.ones(3)
    return params, parts, Together(*parts)


def test_together_steps_both_and_a_scheduler_reaches_the_groups_of_both():
    params, parts, both = two_parts()
    both.step()
    assert params[0].tolist() == [0.5] * 3 and params[1].tolist() == pytest.approx([0.75] * 3)
    assert [id(group) for group in both.param_groups] == [id(part.param_groups[0]) for part in parts]
    schedule = torch.optim.lr_scheduler.LambdaLR(both, lambda step: 0.0)
    assert [part.param_groups[0]["lr"] for part in parts] == [0.0, 0.0]
    before = {str(index): param.detach().clone() for index, param in enumerate(params)}
    both.step(), schedule.step()
    assert_same_bits({str(index): param.detach() for index, param in enumerate(params)}, before)
    assert {id(param) for param in both.state} >= {id(params[1])}
    both.zero_grad()
    assert all(param.grad is None for param in params)


def test_in_groups_embeddings_and_vectors_take_the_diagonal_step_and_matrices_have_factors():
    model = Transformer(TINY.task)
    optimizer = training.in_groups(ENTRIES["IFShampoo"], model, 2)
    model(next(batches(TINY.task, CPU))).backward()
    optimizer.step()
    for group, has_factors in zip(optimizer.param_groups, (True, False), strict=True):
        for param in group["params"]:
            names = {name for name, x in optimizer.state[param].items() if x.ndim > 1 and x.shape != param.shape}
            assert bool(names) == has_factors, names
    assert {id(x) for x in optimizer.param_groups[1]["params"]} == {id(x) for x in model.rest()}


def test_beside_adamw_theirs_gets_the_matrices_and_adamw_the_rest():
    model = Transformer(TINY.task)
    theirs, adamw = training.beside_adamw(ENTRIES["Muon of torch"], model, 1).parts
    assert isinstance(adamw, torch.optim.AdamW) and isinstance(theirs, torch.optim.Muon)
    assert [id(x) for x in theirs.param_groups[0]["params"]] == [id(x) for x in model.matrices()]
    assert [id(x) for x in adamw.param_groups[0]["params"]] == [id(x) for x in model.rest()]


def test_a_row_is_the_mean_of_whole_cycles_after_the_warm_up():
    trainee = Trainee(TINY.task, CPU, lambda model: torch.optim.SGD(model.parameters(), momentum=0.9))
    trainee.prepare()
    trainee.steps = [1000.0] + [100.0] * 9
    trainee.in_optimizer = [950.0] + [0.0] * 9
    row = trainee.row()
    assert row["mean"] == 190.0 and row["in_optimizer"] == 95.0 and row["optimizer_share"] == 0.5
    assert row["tokens_per_second"] == pytest.approx(TINY.task.tokens / 190e-6)
    assert row["spread"]["samples"] == 10 and row["spread"]["p90"] == 100.0
    assert row["state_bytes"] == 0


def test_what_warms_up_shows_the_memory_and_leaves_no_times(clock):
    trainee = Trainee(TINY.task, CPU, lambda model: torch.optim.SGD(model.parameters(), momentum=0.9))
    trainee.prepare()
    tokens = next(batches(TINY.task, CPU))
    weights = sum(x.nbytes for x in trainee.model.parameters())
    trainee.warm_up(tokens, clock, 1)
    assert trainee.peak == 0  # no update of any T
    for number, kept in ((9, 2 * weights), (10, 2 * weights)):
        trainee.peak = 0
        trainee.warm_up(tokens, clock, number)
        assert trainee.peak > kept + weights  # weights and momentum, gradients, and what the model takes
    assert trainee.steps == [] and trainee.in_optimizer == []


def fake_rows(monkeypatch, **makers):
    """Rows of fakes, in place of the real ones: by name, an entry."""
    for name, entry in makers.items():
        monkeypatch.setitem(ENTRIES, name, entry)
    monkeypatch.setattr(training, "ROWS", {name: (name, SELDOM, training.whole) for name in makers})
    return list(makers.values())


def test_training_takes_the_time_of_the_steps_and_records_who_failed(clock, monkeypatch):
    forward = Transformer.forward

    def slow_forward(self, tokens):
        clock.now += 280.0
        return forward(self, tokens)

    monkeypatch.setattr(Transformer, "forward", slow_forward)
    entries = fake_rows(monkeypatch, good=fake_entry("good", clock), bad=fake_entry("bad", clock, cost=failing_at(3)))
    good, bad = training.measure(TINY.task, clock, CPU, training.names_of(CPU, entries), (1, 2), inf)
    assert bad == {"optimizer": "bad", "task": "tiny GPT", "error": "RuntimeError: broken in step 3"}
    assert good["in_optimizer"] == pytest.approx((700.0 + 9 * 100.0) / 10)
    assert good["mean"] == pytest.approx(280.0 + 160.0) and good["spread"]["samples"] == 20
    assert good["optimizer_share"] == pytest.approx(160.0 / 440.0)


def test_training_that_finds_no_time_says_so_and_who_is_not_chosen_has_no_row(clock, monkeypatch):
    entries = fake_rows(monkeypatch, good=fake_entry("good", clock), other=fake_entry("other", clock))
    rows = training.measure(TINY.task, clock, CPU, training.names_of(CPU, entries[:1]), (0, 1), clock.seconds() - 1)
    assert rows == [
        {"optimizer": "good", "task": "tiny GPT", "error": "TimeoutError: left out: the run's time was over"}
    ]


def test_all_trainees_see_the_same_tokens_and_begin_with_the_same_weights(clock, monkeypatch):
    entries = fake_rows(monkeypatch, a=fake_entry("a", clock), b=fake_entry("b", clock))
    trainees = training.contestants(TINY.task, CPU, training.names_of(CPU, entries))
    assert training._train(trainees, TINY.task, clock, CPU, (0, 1), inf) == {}
    first, second = (trainee.optimizer.seen for trainee in trainees.values())
    assert first == second and len(first) == 10


def test_the_baseline_and_every_row_name_an_entry_there_is():
    assert training.BASELINE in ROWS
    assert all(entry in ENTRIES and period in (1, SELDOM) for entry, period, _ in ROWS.values())
