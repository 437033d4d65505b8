"""Floors of proportions: against bisection for the scale, and what they leave alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex.errors import ConfigError
from dataflex.plan.proportions import apply_min_proportion, floors_by_domain


def by_bisection(proportions, floors):
    """Return max(f, s p) with the s in 0..1 that makes the sum 1."""
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        if sum(max(f, middle * p) for p, f in zip(proportions, floors, strict=True)) > 1.0:
            high = middle
        else:
            low = middle
    return [max(f, low * p) for p, f in zip(proportions, floors, strict=True)]


@given(st.data())
def test_floors_against_bisection(data):
    count = data.draw(st.integers(1, 8))
    numbers = st.lists(st.integers(0, 50), min_size=count, max_size=count)
    weights = np.array(data.draw(numbers.filter(any)), dtype=np.float64)
    floors = np.array(data.draw(numbers), dtype=np.float64)
    floors = floors / max(floors.sum(), 1.0) * data.draw(st.floats(0.0, 1.0))
    proportions = weights / weights.sum()
    found = apply_min_proportion(proportions, floors)
    assert found.sum() == pytest.approx(1.0, abs=1e-12)
    assert (found >= floors - 1e-12).all()
    if not (proportions < floors).any():
        assert found is proportions
    assert found == pytest.approx(by_bisection(proportions.tolist(), floors.tolist()), abs=1e-8)


def test_by_hand():
    # a is raised to .2; b and c share .8 as 3 to 1, which leaves c at .2, below .25; so b has what is left.
    assert apply_min_proportion(np.array([0.0, 0.75, 0.25]), np.array([0.2, 0.0, 0.25])).tolist() == pytest.approx(
        [0.2, 0.55, 0.25]
    )
    assert apply_min_proportion(np.array([1.0, 0.0]), np.array([0.5, 0.5])).tolist() == [0.5, 0.5]
    given_ = np.array([0.9, 0.1])
    assert apply_min_proportion(given_, None) is given_
    assert apply_min_proportion(given_, np.array([0.5, 0.1])) is given_


def test_floors_as_written():
    names = ("web", "code")
    assert floors_by_domain(None, names) is None
    assert floors_by_domain(0.1, names).tolist() == [0.1, 0.1]
    assert floors_by_domain({"code": 0.3}, names).tolist() == [0.0, 0.3]
    assert floors_by_domain(0.1, tuple(map(str, range(10)))).tolist() == [0.1] * 10  # sums to 1 up to rounding
    with pytest.raises(ConfigError, match=r"sum to 1\.2 \(0\.6 for each of 2 domains\)"):
        floors_by_domain(0.6, names)
    with pytest.raises(ConfigError, match=r"the floors sum to 1\.1, and proportions to 1; lower them"):
        floors_by_domain({"web": 0.8, "code": 0.3}, names)
    with pytest.raises(ConfigError, match=r"min_proportion\.wbe: no such domain; did you mean 'web'\? \(domains"):
        floors_by_domain({"wbe": 0.3}, names)
