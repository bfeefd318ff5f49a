"""When the factors are updated."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def updates_due(frequency: int | Callable[[int], bool], counts: Sequence[int]) -> bool | tuple[bool, ...]:
    """Return whether the factors of parameters with these counts of steps are updated.

    One answer stands for all counts; if they disagree, there is one for each.
    """
    if callable(frequency):
        due = {count: bool(frequency(count)) for count in set(counts)}
    else:
        due = {count: count % frequency == 0 for count in set(counts)}
    return tuple([due[count] for count in counts]) if len(set(due.values())) > 1 else all(due.values())


class GrowingInterval:
    """Update at every step at first, then less and less often, but at least every `max_interval` steps.

    At step t = 0, 1, … the interval is min(max(⌊log₄(t + 1)⌋, 1), `max_interval`). Factors are updated if it divides t,
    as in the experiments of Lin et al. (ICML 2024). It depends on the step alone, so a resumed run needs no state.

    Args:
        max_interval: T, an integer, 1 or more.

    Raises:
        ValueError: `max_interval` is not an integer, or less than 1.
    """

    def __init__(self, max_interval: int) -> None:
        if not isinstance(max_interval, int) or max_interval < 1:
            raise ValueError(f"max_interval={max_interval!r}: pass a whole number of steps, 1 or more.")
        self.max_interval = max_interval

    def __call__(self, step: int) -> bool:
        log4 = ((step + 1).bit_length() - 1) // 2
        return step % min(max(log4, 1), self.max_interval) == 0

    def __repr__(self) -> str:
        return f"GrowingInterval({self.max_interval})"
