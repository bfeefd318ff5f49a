"""When the factors are updated."""

from __future__ import annotations


class GrowingInterval:
    """Updates at every step at first, then ever more seldom, at least every `max_interval` steps.

    At step t = 0, 1, … the interval is min(max(⌊log₄(t + 1)⌋, 1), `max_interval`), and an update takes place where it
    divides t, as in the experiments of Lin et al. (ICML 2024). A function of the step alone, so it resumes by itself.

    Args:
        max_interval: T, a whole number, 1 or more.

    Raises:
        ValueError: `max_interval` is no whole number, or less than 1.
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
