"""When the factors are updated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress

Frequency = int | Callable[[int], bool]
"""T, or a callable that decides by a parameter's step."""


class Answers:
    """What callables answered in the present step: each is asked once for a step of a parameter.

    A callable may remember when it is next due, so a second question could change its answer. Answers are kept until
    the step has been taken, so that a step that raised an error can be repeated.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], bool] = {}

    def ask(self, frequency: Callable[[int], bool], step: int) -> bool:
        """Return whether the factors of parameters that have taken `step` steps are updated."""
        key = id(frequency), step
        if key not in self._kept:
            self._kept[key] = bool(frequency(step))
        return self._kept[key]

    def forget(self) -> None:
        """Forget the answers: the step has been taken."""
        if self._kept:
            self._kept.clear()


def updates_due(
    frequency: Frequency, counts: Sequence[int], present: Sequence[bool], answers: Answers
) -> bool | tuple[bool, ...]:
    """Return whether the factors of parameters with these counts of steps are updated.

    Only parameters that are `present`, which have a gradient, are asked about. One answer stands for all parameters; if
    answers disagree, there is one for each.
    """
    steps = set(counts if all(present) else compress(counts, present))
    if callable(frequency):
        due = {step: answers.ask(frequency, step) for step in sorted(steps)}
    else:
        due = {step: step % frequency == 0 for step in steps}
    if len(set(due.values())) < 2:
        return all(due.values())
    return tuple([takes_part and due[count] for count, takes_part in zip(counts, present, strict=True)])


def _check_most(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}: pass a whole number of steps, 1 or more.")


def _interval(step: int, most: int) -> int:
    """Return min(max(⌊log₄(t + 1)⌋, 1), most) for step t."""
    log4 = ((step + 1).bit_length() - 1) // 2
    return min(max(log4, 1), most)


class GrowingInterval:
    """Update at the steps that a growing interval divides: at every step at first, then less and less often.

    At step t = 0, 1, … the interval is min(max(⌊log₄(t + 1)⌋, 1), `max_interval`), and factors are updated if it
    divides t. It depends on the step alone. When the interval grows, two updates can be closer or farther apart than
    it: `GrowingGap` is the rule of the paper's authors.

    Args:
        max_interval: T, an integer, 1 or more.

    Raises:
        ValueError: `max_interval` is not an integer, or less than 1.
    """

    def __init__(self, max_interval: int) -> None:
        _check_most("max_interval", max_interval)
        self.max_interval = max_interval

    def __call__(self, step: int) -> bool:
        return step % _interval(step, self.max_interval) == 0

    def __repr__(self) -> str:
        return f"GrowingInterval({self.max_interval})"


class GrowingGap:
    """Update with growing gaps, by the rule of the code of Lin et al. (ICML 2024).

    After an update at step t the next one is at t + min(max(⌊log₄(t + 1)⌋, 1), `max_gap`), from t = 0 on. It depends on
    the step alone, so a resumed run needs no state.

    Args:
        max_gap: T, an integer, 1 or more.

    Raises:
        ValueError: `max_gap` is not an integer, or less than 1.
    """

    def __init__(self, max_gap: int) -> None:
        _check_most("max_gap", max_gap)
        self.max_gap = max_gap

    def __call__(self, step: int) -> bool:
        first, gap = 0, 1  # the first update with this gap
        for longer in range(1, self.max_gap + 1):
            begin = 4**longer - 1  # an update from here on is followed by a gap of `longer`
            if step < begin:
                break
            first, gap = begin + (first - begin) % gap, longer
        return step >= first and (step - first) % gap == 0

    def __repr__(self) -> str:
        return f"GrowingGap({self.max_gap})"
