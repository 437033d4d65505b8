"""Counting how often a selector has rows served, and the warning about it."""

from __future__ import annotations

import logging

import numpy as np

from dataflex.train.counts import Repeats


def intervals(repeats, rows, times):
    return [repeats.take(np.array(rows)) for _ in range(times)]


def test_it_warns_once_when_rows_come_back_too_often(caplog):
    repeats = Repeats(100, 4, "less")
    with caplog.at_level(logging.WARNING):
        told = intervals(repeats, [3, 5, 8, -1], 6)
    assert told[:4] == ["", "", "", ""], "four times each: as often as they may"
    assert told[4] == "100% of the rows were served more than 4 times by now, up to 5"
    assert told[5].endswith("up to 6")
    (record,) = caplog.records
    assert "dynamic.max_repeats: 4" in record.getMessage()
    assert "less" in record.getMessage()


def test_repeats_within_one_interval_count():
    assert Repeats(10, 4, "loss").take(np.array([1, 2] * 4)) == ""
    assert Repeats(10, 4, "loss").take(np.array([1, 2] * 5)).startswith("100% of the rows")


def test_a_few_rows_of_many_are_not_worth_a_word():
    repeats = Repeats(1000, 1, "less")
    repeats.take(np.arange(9))
    assert repeats.take(np.arange(100)) == "", "9 of 100"
    assert repeats.take(np.arange(90, 190)).startswith("10% of the rows were served more than 1 times")


def test_null_never_warns(caplog):
    with caplog.at_level(logging.WARNING):
        assert intervals(Repeats(4, None, "less"), [0, 1], 50) == [""] * 50
    assert not caplog.records


def test_a_resumed_run_goes_on_counting(caplog):
    first, second = Repeats(10, 2, "less"), Repeats(10, 2, "less")
    intervals(first, [0, 1], 2)
    second.load_state_dict(first.state_dict())
    assert second.take(np.array([0, 1])).startswith("100%")
    third = Repeats(10, 2, "less")
    third.load_state_dict(second.state_dict())
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert third.take(np.array([0, 1])).startswith("100%")
    assert not caplog.records, "it was told before the checkpoint"


def test_counts_do_not_wrap_around():
    repeats = Repeats(2, 4, "less")
    repeats.take(np.zeros(70_000, dtype=np.int64))
    assert repeats.take(np.array([0])).endswith("up to 65535")
