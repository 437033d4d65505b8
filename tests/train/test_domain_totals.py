"""Rows and tokens trained on by domain, however often and wherever they are counted."""

from __future__ import annotations

import numpy as np
import pytest

from dataflex.plan.domains import Domains
from dataflex.plan.live import Served
from dataflex.plan.plan import DataPlan
from dataflex.plan.schedule import Interval
from dataflex.train.counts import DomainTotals


def plans():
    rng = np.random.default_rng(0)
    found = []
    for index, (start, stop) in enumerate([(0, 3), (3, 8)]):
        rows = rng.integers(0, 10, (stop - start) * 4)
        rows[len(rows) - 2 * index :] = -1  # the second one ends with a short step
        interval = Interval(index=index, kind="dynamic", start_step=start, stop_step=stop)
        found.append(DataPlan(interval=interval, rows=rows, global_batch=4, row_space="x"))
    return found


@pytest.mark.parametrize("looks", [(), (2,), (1, 1, 2, 4, 7), (3, 8)])
def test_counts_do_not_depend_on_when_they_are_looked_at(looks):
    domains = Domains.from_sizes(["a", "b"], [6, 4], np.arange(10) + 1)
    counts = DomainTotals(domains, Served(domains))
    for plan in plans():
        interval = plan.interval
        for step in (
            *(look for look in looks if interval.start_step <= look <= interval.stop_step),
            interval.stop_step,
        ):
            counts.count(plan, step)
            again = DomainTotals(domains, Served(domains))
            again.load_state_dict(counts.state_dict())
            counts = again
    rows = np.concatenate([plan.rows for plan in plans()])
    rows = rows[rows >= 0]
    assert counts.rows.tolist() == [int((rows < 6).sum()), int((rows >= 6).sum())]
    assert counts.tokens.tolist() == [int((rows[rows < 6] + 1).sum()), int((rows[rows >= 6] + 1).sum())]
