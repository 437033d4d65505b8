"""Target rows that lie in the training pool, against comparing every pair."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.train import row_space
from dataflex.train.row_space import find_leaks

ROWS = st.lists(st.lists(st.integers(0, 3), max_size=4), max_size=12)


def tokens(rows, name="input_ids"):
    import datasets

    features = datasets.Features({name: datasets.Sequence(datasets.Value("int32"))})
    return Dataset.from_dict({name: rows}, features=features)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(train=ROWS, targets=st.dictionaries(st.sampled_from("abc"), ROWS.filter(bool), min_size=1))
def test_the_same_as_every_pair(train, targets):
    found = find_leaks(tokens(train), {name: tokens(rows) for name, rows in targets.items()})
    for name, rows in targets.items():
        pairs = [(i, j) for j, row in enumerate(train) for i, other in enumerate(rows) if row == other]
        leak = found[name]
        assert leak.target_rows.tolist() == sorted({i for i, _ in pairs})
        assert leak.pool_rows.tolist() == sorted({j for _, j in pairs})
        assert list(leak.examples) == pairs[:5]
        assert leak.of == len(rows)


def test_chunks_and_slices(monkeypatch):
    """Rows keep their numbers across chunks, and in a data set whose arrays start in the middle of a buffer."""
    monkeypatch.setattr(row_space, "_CHUNK_ROWS", 3)
    train = tokens([[i, i + 1] for i in range(20)]).select(range(5, 20))
    found = find_leaks(train, {"goal": tokens([[9, 9], [11, 12], [7, 8], [8, 7]])})["goal"]
    assert found.target_rows.tolist() == [1, 2]
    assert found.pool_rows.tolist() == [2, 6]
    assert found.tell() == (
        "2 of its 4 rows also lie in the training pool (row 2 = training row 2, row 1 = training row 6)"
    )
    assert found.describe()["examples"][0] == {"target_row": 2, "training_row": 2}


def test_preference_rows_and_no_targets():
    train, target = tokens([[1, 2]], "chosen_input_ids"), tokens([[1, 2]], "chosen_input_ids")
    assert find_leaks(train, {"goal": target})["goal"].num_rows == 1
    assert find_leaks(train, {}) == {}


def test_equal_length_and_sum_is_not_enough():
    assert find_leaks(tokens([[1, 4], [2, 3]]), {"goal": tokens([[3, 2]])})["goal"].num_rows == 0


@pytest.mark.slow
def test_twenty_million_tokens():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 32_000, size=20_000_000, dtype=np.int32)
    import pyarrow as pa

    offsets = pa.array(np.arange(0, len(values) + 1, 100, dtype=np.int32))
    train = Dataset(pa.table({"input_ids": pa.ListArray.from_arrays(offsets, pa.array(values))}))
    target = tokens([values[100 * i : 100 * i + 100].tolist() for i in range(0, 200_000, 400)])
    assert find_leaks(train, {"goal": target})["goal"].num_rows == 500
