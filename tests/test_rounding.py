"""What tests take for granted about numbers: the bound on rounding holds, and processes have equally many threads."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.rounding import sums_apart

TESTS = Path(__file__).resolve().parent


@given(seed=st.integers(0, 10_000), terms=st.integers(1, 300), dtype=st.sampled_from([np.float32, np.float64]))
def test_two_orders_of_a_sum_of_products_lie_within_the_bound(seed, terms, dtype):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=terms).astype(dtype), rng.normal(size=terms).astype(dtype)
    size = float(np.abs(a.astype(np.float64)) @ np.abs(b.astype(np.float64)))
    one_by_one = dtype(0)
    for x, y in zip(a, b, strict=True):
        one_by_one += x * y
    assert abs(float(a @ b) - float(one_by_one)) <= sums_apart(terms, size, dtype)
    assert abs(float(a[::-1].copy() @ b[::-1].copy()) - float(a @ b)) <= sums_apart(terms, size, dtype)


def test_processes_that_tests_start_have_as_many_threads():
    import torch

    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])
    given = re.compile(r"""["']OMP_NUM_THREADS["']: """)
    assert [path.name for path in TESTS.rglob("*.py") if given.search(path.read_text(encoding="utf-8"))] == []
