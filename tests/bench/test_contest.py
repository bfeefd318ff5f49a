"""Contests between optimizers, with a clock that moves only when an optimizer steps."""

from __future__ import annotations

from math import inf

import pytest
import torch

from bench.common.optimizers import ENTRIES, WHOLE
from bench.common.restarts import Spoiled
from bench.common.timing import MAX_LEAD, Timing
from bench.common.workloads import Workload
from bench.compare.contest import OTHER, UPDATE, Case, Contestant, Gradients, Limits, cases_of, mean_step, run_contest
from tests.bench.fakes import FakeClock, failing_at, fake_entry, stopped_clock, two_costs

CPU = torch.device("cpu")
PAIR = Workload("pair", ((3, 4), (2, 5)))
LIMITS = Limits(most=3, least=1, seconds=100.0)


class Contest:
    """Makes contestants of one workload with a fake clock."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.gradients = Gradients(PAIR.num_weights, CPU)

    def enter(self, entry=None, period=2, block=WHOLE, **options):
        case = Case(entry or fake_entry("fake", self.clock, **options), PAIR, block)
        return Contestant(case, self.gradients, self.clock, CPU, period)


@pytest.fixture
def contest(monkeypatch):
    return Contest(stopped_clock(monkeypatch))


# ---- the time of a step --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("period", [2, 3, 5])
@pytest.mark.parametrize("update_at", [0, -1])
def test_updates_and_other_steps_get_their_own_times(contest, update_at, period):
    one = contest.enter(update_at=update_at, period=period)
    assert run_contest([one], LIMITS, inf) == {}
    update, other = (one.timings()[kind] for kind in (UPDATE, OTHER))
    assert update == (700.0, 700.0, 700.0, 3, True)
    assert other._replace(samples=0) == (100.0, 100.0, 100.0, 0, True)
    assert other.samples >= 2 * (period - 1)
    measured = {kind: timing._asdict() for kind, timing in one.timings().items()}
    assert [mean_step(measured, T) for T in (1, 2, 10, 100)] == [700.0, 400.0, 160.0, 106.0]


def test_a_kind_of_step_that_is_queued_too_late_is_marked(contest):
    one = contest.enter(cost=two_costs(700.0, 100.0, 0, 2))
    one.prepare()
    for number in range(8):
        contest.clock.late = number % 2 == 0
        one.sample()
    timings = one.timings()
    assert (timings[UPDATE].queued, timings[OTHER].queued) == (False, True)
    assert (timings[UPDATE].samples, timings[OTHER].samples) == (4, 4)


def test_without_a_period_all_samples_count_for_both_kinds_but_a_few_with_gaps(contest):
    times = iter([*[1.0] * 4, 100.0, 900.0, 101.0, 102.0])
    one = contest.enter(cost=lambda number: next(times), family="Muon")
    one.prepare()
    for late in (False, True, False, False):
        contest.clock.late = late
        one.sample()
    assert one.timings()[UPDATE] == one.timings()[OTHER] == Timing.of([100.0, 101.0, 102.0])


@pytest.mark.parametrize("update_at", [0, -1])
def test_the_device_sleeps_longer_than_the_host_needs_for_the_longer_kind_of_step(contest, update_at):
    def cost(number):  # the first two steps compile, and do not count
        return 1e6 if number < 2 else two_costs(700.0, 100.0, update_at, 2)(number)

    run_contest([contest.enter(cost=cost, update_at=update_at)], LIMITS, inf)
    assert contest.clock.leads == pytest.approx([2 * 700.0 + 20.0] * 6)
    endless = contest.enter(cost=lambda number: 1e6)
    endless.prepare()
    assert endless.stopwatch.lead == MAX_LEAD


# ---- turns and limits ----------------------------------------------------------------------------------------------


def test_the_order_of_turns_is_reversed_every_time(contest):
    log = []
    three = [contest.enter(fake_entry(name, contest.clock, log=log)) for name in "abc"]
    run_contest(three, Limits(most=2, least=1, seconds=100.0), inf)
    assert "".join(log) == "aaaabbbbcccc" + "cba" + "abc" + "cba" + "abc"


def test_a_contestant_with_its_samples_stops_and_the_others_go_on(contest):
    slow = contest.enter(cost=lambda number: 1e6)
    fast = contest.enter(cost=lambda number: 1e6 if number < 4 else 1.0)
    run_contest([slow, fast], Limits(most=50, least=2, seconds=2.5), inf)
    assert slow.num_steps == 4 + 4  # warm-up, and four seconds for the least of two a kind
    assert fast.num_steps == 4 + 100 and fast.spent < 1.0  # warm-up does not count


@pytest.mark.parametrize(
    ("cost", "limits", "seconds"),
    [(60e6, Limits(most=50, least=10, seconds=2.0, all_seconds=40.0), inf), (1e6, Limits(50, 10, seconds=1e3), 4.5)],
    ids=["too slow", "deadline"],
)
def test_one_sample_of_each_kind_is_enough_after_all_seconds_and_after_the_deadline(contest, cost, limits, seconds):
    one = contest.enter(cost=lambda number: cost)
    assert not run_contest([one], limits, contest.clock.seconds() + seconds)
    assert [len(samples) for samples in one.samples.values()] == [1, 1]


def test_no_contestant_begins_after_the_deadline(contest):
    first, second = contest.enter(cost=lambda number: 1e6), contest.enter()
    problems = run_contest([first, second], LIMITS, contest.clock.seconds() + 3.5)
    assert problems == {1: "TimeoutError: left out: the run's time was over"}
    assert first.timings()[UPDATE].median == 1e6 and second.num_steps == 0


# ---- failures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 3, 4, 6], ids=["first step", "warm-up", "first sample", "later"])
def test_an_error_is_recorded_frees_the_memory_and_stops_no_other_contestant(contest, number):
    one, broken, other = contest.enter(), contest.enter(cost=failing_at(number)), contest.enter()
    assert run_contest([one, broken, other], LIMITS, inf) == {1: f"RuntimeError: broken in step {number}"}
    assert broken.params == [] and broken.optimizer is None
    assert one.timings()[UPDATE].samples == other.timings()[UPDATE].samples == 3


def test_an_error_that_spoils_the_device_ends_the_contest(contest, monkeypatch):
    one, broken, other = contest.enter(), contest.enter(cost=failing_at(4)), contest.enter()
    monkeypatch.setattr("bench.compare.contest.is_spoiled", lambda device: True)
    turns = []
    with pytest.raises(Spoiled, match="broken in step 4"):
        run_contest([one, broken, other], LIMITS, inf, turns.append)
    assert turns[:3] == [one, broken, other] and turns[-1] is broken


# ---- cases and gradients -------------------------------------------------------------------------------------------


def test_block_sizes_that_cut_a_workload_alike_are_measured_once():
    small, long = Workload("small", ((512, 512),)), Workload("long", ((1024, 4096),))

    def blocks(name, workload, device="cuda"):
        return [case.block for case in cases_of(ENTRIES[name], workload, torch.device(device))]

    assert blocks("IFShampoo", small) == blocks("AdamW, fused", long) == [WHOLE]
    assert blocks("IFShampoo", long) == blocks("SOAP", long) == [1024, WHOLE]
    assert blocks("SOAP", long, "cpu") == [1024]  # whole it would take too long


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_that_does_not_cut_gets_the_blocks_as_weights(name):
    case = Case(ENTRIES[name], Workload("long", ((24, 100), (64, 8))), 32)
    assert sum(rows * columns for rows, columns in case.shapes) == case.workload.num_weights
    assert case.shapes == case.workload.shapes if case.entry.cuts else max(map(max, case.shapes)) == 32


def test_gradients_change_from_step_to_step_and_keep_their_addresses():
    gradients = Gradients(PAIR.num_weights, CPU)
    places, values = set(), []
    for step in range(4):
        gradients.refresh(PAIR.shapes, step)
        now = gradients.of(PAIR.shapes)
        places.add(tuple(x.data_ptr() for x in now))
        values.append(torch.cat([x.flatten() for x in now]))
    assert len(places) == 1
    assert not any(torch.equal(values[a], values[b]) for a, b in ((0, 1), (1, 2), (0, 2)))
    assert torch.equal(values[0], values[3])  # three sets, in turn
    assert all(0.05 < x.std() < 0.2 for x in values)


def test_a_cut_weight_gets_the_gradient_of_the_uncut_one_and_a_bf16_weight_its_rounded_values():
    gradients = Gradients(24, CPU)
    whole, cut = ((4, 6),), ((2, 6), (2, 3), (2, 3))
    for step in range(3):
        for shapes in (whole, cut):
            gradients.refresh(shapes, step)
        gradients.refresh(whole, step, torch.bfloat16)
        numbers = gradients.of(whole)[0].flatten()
        assert torch.equal(numbers, torch.cat([x.flatten() for x in gradients.of(cut)]))
        assert torch.equal(numbers.bfloat16(), gradients.of(whole, torch.bfloat16)[0].flatten())


def test_all_contestants_step_the_same_gradients(contest):
    early, cut = contest.enter(), contest.enter(block=4, cuts=False)
    assert cut.shapes == ((3, 4), (2, 3), (2, 2))
    run_contest([early], LIMITS, inf)
    late = [contest.enter() for _ in range(3)]
    run_contest([cut, *late], LIMITS, inf)
    seen = [one.optimizer.seen for one in (early, cut, *late)]
    assert len(seen[0]) == 10
    assert all(other == seen[0] for other in seen[1:])
    assert seen[0][4] != seen[0][5] != seen[0][6]


# ---- rows ----------------------------------------------------------------------------------------------------------


def test_the_figures_of_a_contestant_are_bytes_by_weight_and_times_and_launches_by_kind(contest):
    diagonal, matrices = contest.enter(ENTRIES["SGD, fused"]), contest.enter(ENTRIES["IFShampoo, eager"])
    run_contest([diagonal, matrices], LIMITS, inf)
    measured = diagonal.measured()
    assert set(measured[UPDATE]) == {"median", "p10", "p90", "samples", "queued"}
    assert measured["state_bytes"] == 4.0 and measured["peak_bytes"] >= 4.0
    assert measured[f"launches of {UPDATE}"] == measured[f"launches of {OTHER}"] > 0
    assert not any(name.startswith("host") for name in measured), "the host's time in a step is that of a GPU's queue"
    measured = matrices.measured()
    assert measured[f"launches of {UPDATE}"] > 2 * measured[f"launches of {OTHER}"] > 0


def test_weights_and_gradients_have_the_dtype_of_the_entry_and_the_same_values(contest):
    two = [contest.enter(fake_entry("fake", contest.clock, weights=x)) for x in (torch.float32, torch.bfloat16)]
    for one in two:
        one.prepare()
    assert [{x.dtype for p in one.params for x in (p, p.grad)} for one in two] == [{torch.float32}, {torch.bfloat16}]
    wide, narrow = (torch.cat([p.detach().flatten() for p in one.params]) for one in two)
    assert torch.equal(wide.bfloat16(), narrow) and wide.abs().max() > 0
