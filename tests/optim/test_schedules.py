"""Schedules of the update interval."""

from __future__ import annotations

import pytest

from rootfree_kernels import GrowingInterval
from tests.calls import reference as ref


@pytest.mark.parametrize("max_interval", [1, 2, 3, 10])
def test_growing_interval_matches_its_documentation(max_interval):
    due = GrowingInterval(max_interval)
    assert [due(t) for t in range(5000)] == [ref.growing_interval_updates(t, max_interval) for t in range(5000)]
    with pytest.raises(ValueError, match="max_interval=0"):
        GrowingInterval(0)
