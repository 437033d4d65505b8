"""Domains against plain Python lists."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex.errors import ComponentError, DataError
from dataflex.plan.domains import Domains, check_proportions


@given(st.lists(st.sampled_from(["code", "math", "web"]), min_size=1, max_size=60), st.data())
def test_labels_equal_a_python_loop(labels, data):
    lengths = data.draw(st.lists(st.integers(0, 99), min_size=len(labels), max_size=len(labels)))
    domains = Domains.from_labels(labels, lengths=lengths)
    assert domains.names == tuple(dict.fromkeys(labels))
    assert [domains.names[k] for k in domains.domain_of.tolist()] == labels
    for k, name in enumerate(domains.names):
        mine = [row for row, label in enumerate(labels) if label == name]
        assert domains.rows(k).tolist() == mine
        assert domains.num_rows[k] == len(mine)
        assert domains.num_tokens[k] == sum(lengths[row] for row in mine)
    rows = data.draw(st.lists(st.integers(-1, len(labels) - 1), max_size=40))
    expected = [sum(row >= 0 and labels[row] == name for row in rows) for name in domains.names]
    assert domains.counts(np.array(rows, dtype=np.int64)).tolist() == expected


def test_sizes_are_consecutive_ranges():
    domains = Domains.from_sizes(["a", "b", "c"], [3, 1, 2], lengths=[10, 10, 10, 4, 5, 7])
    assert domains.domain_of.tolist() == [0, 0, 0, 1, 2, 2]
    assert domains.domain_of.dtype == np.int32
    assert [domains.rows(k).tolist() for k in range(3)] == [[0, 1, 2], [3], [4, 5]]
    assert domains.rows(1).dtype == np.int64
    assert domains.sizes("sequences").tolist() == [3.0, 1.0, 2.0]
    assert domains.sizes("tokens").tolist() == [30.0, 4.0, 12.0]
    assert domains.rows(0) is domains.rows(0)


def test_arrays_cannot_be_written_to():
    domains = Domains.from_sizes(["a", "b"], [3, 1], lengths=[1, 1, 1, 1])
    for values in (domains.domain_of, domains.lengths, domains.rows(0), domains.num_rows, domains.num_tokens):
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 0


def test_many_domains_take_the_wide_path():
    count = (1 << 16) + 3
    labels = np.random.default_rng(0).permutation(np.arange(count, dtype=np.int32))
    domains = Domains(names=tuple(map(str, range(count))), domain_of=labels)
    assert domains.rows(count - 1).tolist() == np.flatnonzero(labels == count - 1).tolist()


def test_document_proportions_divide_by_the_mean_number_in_a_row():
    # Rows of 1, 2 and 4 documents: equal shares of documents need rows as 4 : 2 : 1, whatever their tokens.
    domains = Domains(
        names=("a", "b", "c"),
        domain_of=np.array([0, 0, 1, 2], dtype=np.int32),
        documents_per_row=np.array([1.0, 2.0, 4.0]),
    )
    third = [1 / 3, 1 / 3, 1 / 3]
    assert domains.sequence_proportions(third, "documents") == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert domains.sizes("documents").tolist() == [2.0, 2.0, 4.0]
    single = Domains.from_sizes(["a", "b"], [2, 1])  # a row is a document
    assert single.sequence_proportions([0.6, 0.4], "documents").tolist() == [0.6, 0.4]
    assert single.sizes("documents").tolist() == [2.0, 1.0]


def test_token_proportions_divide_by_mean_length():
    # Rows of 10, 20 and 40 tokens on average: equal shares of tokens need rows as 4 : 2 : 1.
    domains = Domains.from_sizes(["a", "b", "c"], [2, 2, 1], lengths=[5, 15, 20, 20, 40])
    third = [1 / 3, 1 / 3, 1 / 3]
    assert domains.sequence_proportions(third, "tokens") == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert domains.sequence_proportions([0.6, 0.3, 0.1], "sequences").tolist() == [0.6, 0.3, 0.1]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 500)), min_size=1, max_size=5), st.data())
def test_expected_tokens_follow_token_proportions(parts, data):
    lengths = [length + i for rows, length in parts for i in range(rows)]
    domains = Domains.from_sizes([f"d{k}" for k in range(len(parts))], [rows for rows, _ in parts], lengths=lengths)
    raw = np.array(data.draw(st.lists(st.integers(0, 9), min_size=len(parts), max_size=len(parts)))) + 1e-3
    wanted = raw / raw.sum()
    shares = domains.sequence_proportions(wanted, "tokens")
    tokens = shares * domains.num_tokens / domains.num_rows
    assert tokens / tokens.sum() == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: Domains.from_sizes(["a", "b", "c"], [3, 0, 2]), "domain 'b' has no rows"),
        (lambda: Domains.from_sizes(["a", "b", "c"], [0, 2, 0]), r"domain 'a' has no rows \(nor have \['c'\]\)"),
        (lambda: Domains.from_sizes(["a", "a"], [3, 2]), "domain 'a' is given twice"),
        (lambda: Domains.from_sizes(["a"], [3], lengths=[1, 2]), "2 row lengths for 3 rows"),
        (lambda: Domains.from_labels([]), "the training set is empty"),
        (lambda: Domains.from_labels(["a", None]), "row 1 has no domain: its label is None"),
        (lambda: Domains.from_labels(["a", 3]), "row 1 has no domain: its label is 3"),
        (lambda: Domains.from_sizes(["a"], [3]).sizes("tokens"), "token count of every row"),
        (
            lambda: Domains.from_sizes(["a", "b"], [1, 1], lengths=[0, 4]).sequence_proportions([0.5, 0.5], "tokens"),
            "domain 'a' has no tokens",
        ),
    ],
)
def test_what_cannot_be_is_refused(build, told):
    with pytest.raises(DataError, match=told):
        build()


def test_a_domain_without_tokens_may_have_no_share():
    domains = Domains.from_sizes(["a", "b"], [1, 1], lengths=[0, 4])
    assert domains.sequence_proportions([0.0, 1.0], "tokens").tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("given_", "told"),
    [
        ([1.0], r"1 numbers for 2 domains \(a, b\)"),
        ([1.5, -0.5], "'b' is -0.5; must be finite"),
        ([float("nan"), 1.0], "'a' is nan; must be finite"),
        ([0.5, 0.6], "sum is 1.1, must be 1"),
    ],
)
def test_malformed_proportions(given_, told):
    with pytest.raises(ComponentError, match=told):
        check_proportions(given_, ("a", "b"))


def test_proportions_are_kept_to_the_last_bit_unless_the_sum_is_off():
    assert check_proportions([0.6, 0.3, 0.1], "abc").tolist() == [0.6, 0.3, 0.1]
    assert check_proportions([0.5, 0.5 + 1e-7], "ab").sum() == pytest.approx(1.0, abs=1e-15)
