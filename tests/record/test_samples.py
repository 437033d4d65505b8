"""Single rows in a report: which, why, their text, and what a raw column says of the choice."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dataflex.plan.domains import Domains
from dataflex.record import samples
from dataflex.record.recorded import recorded
from dataflex.record.recorder import RunRecorder
from dataflex.record.report import report
from dataflex.record.samples import rows_section
from dataflex.record.warnings import warnings
from tests.record.synthetic import simulate
from tests.record.test_chosen import plan, space
from tests.record.test_page import Page

SIZE = 40


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr("dataflex.record.plots.draw", lambda charts: {})


def planted(folder):
    """Forty rows whose longer half is of wrong answers, which a selector that goes by length keeps, twice."""
    wrong = np.arange(SIZE) >= SIZE // 2
    domains = Domains.from_labels(["right"] * 20 + ["wrong"] * 20, np.arange(1, SIZE + 1))
    columns = {"checked": np.where(wrong, "no", "yes"), "grade": np.arange(SIZE) / 4}
    columns["rewards"] = np.array([[0.5], [0.5, 1.0]] * (SIZE // 2), dtype=object)
    recorder = RunRecorder(folder / "run" / "dataflex")
    told = {"fingerprint": "f" * 16, "domains": {"right": 20, "wrong": 20}}
    config = {"dynamic": {"selector": {"name": "longest"}}}
    recorder.run_started(config=config, schedule={"total_steps": 6}, row_space=told, global_batch=2)
    recorder.rows_known(space(folder, SIZE, domains=domains, columns=columns))
    scores, kept = np.arange(SIZE, dtype=np.float32), np.array([39, 38, 37, 36])
    plan(recorder, 0, (0, 2), [0, 1, 2, 3])
    recorder.stepped(2, {"loss": 1.0})
    for index, first in ((1, 2), (2, 4)):
        plan(recorder, index, (first, first + 2), kept, scores=scores - index, kept=kept)
        recorder.stepped(first + 2, {"loss": 1.0})
    return recorded(folder / "run")


def tables(section):
    return {table["caption"]: table for table in section["tables"]}


def cells(table, name):
    at = [column["name"] for column in table["columns"]].index(name)
    return [row[at] for row in table["rows"]]


def test_rows_are_told_with_text_reason_and_scores(tmp_path):
    found = tables(rows_section(planted(tmp_path)))
    assert list(found) == ["Most served", "Never served (32)", "Just above the cut", "Just below the cut", "By checked"]
    most = found["Most served"]
    assert cells(most, "row") == [36, 37, 38, 39, 2, 3, 0, 1]
    assert cells(most, "text")[:1] == ["text: item 16"]
    assert cells(most, "text")[6] == "id: 0 | text: line 0"
    assert cells(most, "from")[6] == "a.jsonl:1 (id 0)"
    assert cells(most, "from")[0] == "b.json, row 16"
    assert cells(most, "why")[3] == (
        "kept in 2 of 2 decisions; in that of step 4 kept, rank 1 of 40, the cut is at 34.0000 and high scores are kept"
    )
    assert cells(most, "why")[6].endswith("high scores are kept; served beside the selection")
    assert cells(most, "percentile")[3] == 1.0
    assert cells(most, "percentile")[6] == pytest.approx(1 / 40)
    assert cells(most, "scores over time")[3] == [38.0, 37.0]
    assert cells(most, "checked")[0] == "no"
    assert cells(most, "rewards")[:2] == ["[0.5]", "[0.5, 1.0]"]
    assert cells(found["Just above the cut"], "row") == [36, 37, 38, 39]
    assert cells(found["Just below the cut"], "row")[:2] == [35, 34]
    assert len(found["Never served (32)"]["rows"]) == 30
    assert found["By checked"]["rows"] == [
        ["yes", 4.0, 4 / 12, 20, 0.5, pytest.approx(2 / 3), 16 / 20],
        ["no", 8.0, 8 / 12, 20, 0.5, pytest.approx(4 / 3), 16 / 20],
    ]


def test_a_selection_by_length_is_warned_of_and_the_cut_is_drawn(tmp_path):
    view = planted(tmp_path)
    assert "longer rows have higher ones (rank correlation with tokens 1.00)" in "\n".join(warnings([view]))
    report([tmp_path / "run"])
    told = json.loads((tmp_path / "run" / "dataflex" / "report" / "report.json").read_text())
    histogram = next(chart for chart in told["sections"][3]["charts"] if chart["key"] == "histogram")
    assert histogram["panels"][0]["series"][2]["name"] == "cut"
    assert histogram["panels"][0]["series"][2]["x"] == [34.0, 34.0]
    assert histogram["headline"].endswith("high scores are kept")
    page = Page((tmp_path / "run" / "dataflex" / "report.html").read_text(encoding="utf-8"))
    roles = [attributes.get("role") for _, attributes in page.elements]
    assert roles.count("tab") == roles.count("tabpanel") == 5
    assert {each["aria-label"] for each in page.all("select")} >= {"checked", "domain"}


def test_duplicates_and_a_choice_by_length_without_scores_are_warned_of(tmp_path):
    told = "Duplicates: 2 of 40 rows (5.0 %) have the tokens and labels of an earlier row; they are 33.3 % of what was"
    assert told in "\n".join(warnings([planted(tmp_path)]))
    (tmp_path / "other").mkdir()
    recorder = RunRecorder(tmp_path / "other" / "run" / "dataflex")
    recorder.run_started(config={}, schedule={"total_steps": 2}, row_space={"fingerprint": "f" * 16}, global_batch=25)
    recorder.rows_known(space(tmp_path / "other", 60, keys=np.arange(60)))
    kept = np.arange(59, 34, -1)
    kept[-3:] = 1, 3, 5
    plan(recorder, 0, (0, 2), [*kept, *kept], kept=kept)
    recorder.stepped(2, {"loss": 1.0})
    (found,) = (each for each in warnings([recorded(tmp_path / "other" / "run")]) if "had not" not in each)
    pairs = sum((a > b) for a in kept + 1 for b in range(1, 61) if b - 1 not in kept) / (25 * 35)
    assert (
        found
        == f"Rows are chosen by length: of a kept row and another one the longer is kept in {pairs:.0%}.".replace(
            "%", " %"
        )
    )


def test_hostile_texts_stay_text(tmp_path):
    planted(tmp_path)
    content = (tmp_path / "b.json").read_text()
    assert content.count("item 19") == 1
    (tmp_path / "b.json").write_text(content.replace("item 19", "<img s>"))
    report([tmp_path / "run"])
    text = (tmp_path / "run" / "dataflex" / "report.html").read_text(encoding="utf-8")
    assert "text: &lt;img s&gt;" in text
    assert Page(text).all("img") == []


def test_texts_are_not_looked_up_in_huge_files_and_old_records_say_so(tmp_path, monkeypatch):
    view = planted(tmp_path)
    monkeypatch.setattr(samples, "_READ_BYTES", 10)
    told = rows_section(view)
    assert told["notes"][0].startswith("Texts are not looked up in files of 0.0 GiB")
    assert "text" not in [column["name"] for column in told["tables"][0]["columns"]]
    simulate(tmp_path / "old" / "dataflex", sources={"a": 99}, total_steps=20, warmup_steps=0)
    told = rows_section(recorded(tmp_path / "old"))
    assert "tables" not in told
    assert told["notes"][0].startswith("Single rows cannot be shown: ")
