"""The page of a report: whole, self-contained, accessible, and of the same values as its JSON."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex.cli import main
from dataflex.record import report as report_module
from dataflex.record.chart import thin
from dataflex.record.curves import seconds_at, tokens_at
from dataflex.record.digest import digest
from dataflex.record.read import read_events
from dataflex.record.recorded import recorded
from dataflex.record.recorder import RunRecorder
from dataflex.record.report import report
from dataflex.record.text import middle, without_prefix
from dataflex.record.warnings import warnings
from tests.record.synthetic import MIXTURE, SELECTION, WEIGHTING, Spent, simulate, started
from tests.record.test_hostile import line, lines_of

VOID = {"meta", "input", "br", "link", "img", "path", "rect"}
HOSTILE = "</script><img src=x onerror=alert(1)>\"'&$$x$$\x1b[2J\u202e"


class Page(HTMLParser):
    """The elements of a page; fails where they are not nested."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.open[-1:] == ["script"] else self.texts).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    monkeypatch.setattr("dataflex.record.plots.draw", lambda charts: {})


def page_of(*folders) -> tuple[Page, dict]:
    report(folders)
    text = (folders[0] / "dataflex" / "report.html").read_text(encoding="utf-8")
    assert len(text.encode()) < 3_000_000
    return Page(text), json.loads((folders[0] / "dataflex" / "report" / "report.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("case", [SELECTION, MIXTURE, WEIGHTING])
def test_the_page_is_whole_loads_nothing_and_can_be_read_aloud(tmp_path, case):
    simulate(tmp_path / "dataflex", **case)
    page, told = page_of(tmp_path)
    for _, attributes in page.elements:
        assert not {"src", "srcset", "action", "formaction", "poster", "data"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    (style,) = re.findall(r"<style>(.*?)</style>", (tmp_path / "dataflex" / "report.html").read_text(), re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style
    policy = next(each["content"] for each in page.all("meta") if "http-equiv" in each)
    assert policy.startswith("default-src 'none';")
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for key in ("aria-labelledby", "aria-controls", "for"):
            assert attributes.get(key, ids[0]) in ids
    assert page.all("html") == [{"lang": "en"}]
    for landmark in ("header", "nav", "main", "footer", "h1"):
        assert len(page.all(landmark)) == 1
    assert {each["href"] for each in page.all("a")} <= {f"#{each}" for each in ids}
    assert all(each.get("scope") for each in page.all("th"))
    assert len(page.all("caption")) + len([each for each in page.all("table") if "aria-labelledby" in each]) == len(
        page.all("table")
    )
    pictures = [attributes for _, attributes in page.elements if attributes.get("role") == "img"]
    assert pictures
    assert all(each["aria-label"] for each in pictures)
    assert [each["id"] for each in page.all("section") if "id" in each] == [each["id"] for each in told["sections"]]
    shown = " ".join(page.texts)
    for text in [*told["sentences"], *(chart["headline"] for each in told["sections"] for chart in each["charts"])]:
        assert text in shown
    assert "BSD-3-Clause" in shown
    assert "Redistribution and use in source and binary forms" in shown


@pytest.mark.slow
def test_the_json_is_what_the_page_shows(tmp_path, capsys):
    simulate(tmp_path / "dataflex", **SELECTION)
    page, told = page_of(tmp_path)
    assert json.loads(page.scripts[0]) == told
    assert main(["report", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == told
    assert set(told) == {"format", "dataflex", "title", "runs", "sentences", "missing", "sections"}
    assert told["format"] == 1
    for section in told["sections"]:
        assert {"id", "title", "notes", "charts", "tables", "texts"} <= set(section)
    rows = sum(len(table["rows"]) for section in told["sections"] for table in section["tables"])
    bars = sum(len(chart["names"]) for section in told["sections"] for chart in section["charts"])
    heads = len(page.all("table"))
    assert len(page.all("tr")) == rows + bars + heads
    plots = json.loads(page.scripts[1])
    panels = [panel for section in told["sections"] for chart in section["charts"] for panel in chart["panels"]]
    assert len(plots) == len([panel for panel in panels if panel["series"][0]["x"]])
    for plot in plots:
        section, chart, panel = plot["of"]
        drawn = told["sections"][section]["charts"][chart]["panels"][panel]["series"]
        assert len(drawn) == len(plot["names"]) == len(plot["colours"])
    assert plots[0]["names"] == [series["name"] for series in told["sections"][0]["charts"][0]["panels"][0]["series"]]


@pytest.mark.slow
def test_hostile_names_and_texts_stay_text(tmp_path):
    simulate(tmp_path / "dataflex", **{**SELECTION, "sources": {HOSTILE: 900, "b": 300}}, stop_step=40)
    row = {"row": 0, "weight": 2.0, "times": 1, "domain": HOSTILE, "text": HOSTILE}
    recorder = RunRecorder(tmp_path / "dataflex", 40, clock=Spent(train=1.0))
    recorder.weighed(40, most=[row], least=[], rows=9)
    recorder.stepped(41, {"loss": 1.0, f"dataflex/loss/{HOSTILE}": 1.0, f"dataflex/tokens/{HOSTILE}": 5})
    recorder.evaluated(41, {f"eval_{HOSTILE}_loss": 1.0, "eval_loss": 2.0})
    recorder.evaluated(42, {f"eval_{HOSTILE}_loss": 1.0, "eval_loss": 2.0})
    page, _ = page_of(tmp_path)
    assert page.all("img") == []
    assert len(page.all("script")) == 4
    text = (tmp_path / "dataflex" / "report.html").read_text(encoding="utf-8")
    assert not {"\x1b", "\u202e"} & set(text)
    assert "onerror=alert(1)>" not in text
    assert any("onerror=alert(1)>" in told for told in page.texts)
    assert "$$" not in page.scripts[1]


@pytest.mark.slow
def test_several_runs_are_compared_and_one_without_a_record_has_its_losses(tmp_path):
    simulate(tmp_path / "a" / "dataflex", **SELECTION)
    simulate(
        tmp_path / "b" / "dataflex", **{**SELECTION, "dynamic": {"selector": {"name": "random"}}, "total_steps": 80}
    )
    logs = [{"loss": 2.0, "step": 10}, {"eval_loss": 1.9, "step": 40}, {"eval_loss": 1.5, "step": 80}, {"loss": 1.0}]
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "trainer_state.json").write_text(json.dumps({"log_history": logs, "global_step": 90}))
    (tmp_path / "c" / "eval_results.json").write_text(json.dumps({"epoch": 1.0, "eval_loss": 1.4}))
    _, told = page_of(*(tmp_path / name for name in "abc"))
    assert [run["title"] for run in told["runs"]] == ["a", "b", "c"]
    assert told["missing"] == [
        "c: dataflex/events.jsonl: there is no record; losses and metrics are those of trainer_state.json, "
        "nothing else is known"
    ]
    sections = {section["id"]: section for section in told["sections"]}
    compared = sections["loss"]["charts"][0]
    assert compared["key"] == "compared"
    assert [panel["title"] for panel in compared["panels"]] == ["at equal steps", "at equal compute"]
    named = [[series["name"] for series in panel["series"]] for panel in compared["panels"]]
    assert named == [["a", "b", "c"], ["a", "b"]]
    assert (
        "c has no seconds of all its steps in its record, so that it is not compared at equal seconds."
        in sections["loss"]["notes"]
    )
    assert compared["panels"][0]["series"][2] == {
        **compared["panels"][0]["series"][2],
        "x": [40, 80, 90],
        "y": [1.9, 1.5, 1.4],
    }
    differ = next(table for table in sections["repeat"]["tables"] if table["caption"] == "Differences in configuration")
    assert ["dynamic.selector.name", "loss", "random", "-"] in differ["rows"]
    assert "b ended at" in told["sentences"][2]
    _, told = page_of(tmp_path / "a", tmp_path / "b")
    assert compared["panels"][1]["series"][0]["x"][0] == pytest.approx(20 * 0.8 + 3 * 0.25 + 1 * 3.2 + 3.2, abs=4)
    overlap = next(chart for chart in told["sections"][3]["charts"] if chart["key"] == "overlap")
    assert overlap["names"] == ["a", "b"]
    assert overlap["cells"][0][0] == 1.0
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "a")]) == 2


def test_a_run_that_is_better_at_equal_steps_alone_is_told_so(tmp_path):
    for run, seconds, losses in (("slow", 10.0, (3.0, 2.0, 1.0)), ("quick", 1.0, (3.0, 2.5, 1.5))):
        events = [line("run_started", row_space={"domains": {"x": 9}}), plan(0, {"x": 9})]
        for at, loss in enumerate(losses):
            told = {"event": "evaluated", "metrics": {"eval_loss": loss}, "spent": {"train": 5 * at * seconds}}
            events.append(json.dumps({"step": 5 * at, "time": 1.7e9 + at, **told}).encode())
        lines_of(tmp_path / run, *events)
    _, told = page_of(tmp_path / "slow", tmp_path / "quick")
    (compared, *_) = told["sections"][0]["charts"]
    assert compared["headline"] == (
        "eval_loss ends lowest in slow, at 1.000; at equal compute (10.0 s) it is lowest in quick, at 1.500"
    )
    assert told["sentences"][2].endswith(
        "quick ended at 1.5000 (step 10), so this run is 0.5000 lower, at equal compute (10.0 s) 1.3000 higher."
    )


def test_a_run_that_was_not_measured_by_then_is_not_compared_at_equal_compute(tmp_path):
    """The first evaluation of "slow" comes after 50 seconds, when "quick" had ended after 10."""
    for run, points in (("slow", ((5, 50.0, 2.0), (10, 100.0, 1.0))), ("quick", ((5, 5.0, 2.5), (10, 10.0, 1.5)))):
        events = [line("run_started", row_space={"domains": {"x": 9}}), plan(0, {"x": 9})]
        for step, seconds, loss in points:
            told = {"event": "evaluated", "metrics": {"eval_loss": loss}, "spent": {"train": seconds}}
            events.append(json.dumps({"step": step, "time": 1.7e9 + step, **told}).encode())
        lines_of(tmp_path / run, *events)
    _, told = page_of(tmp_path / "slow", tmp_path / "quick")
    (compared, *_) = told["sections"][0]["charts"]
    late = "not known at equal compute: slow was first measured after 10.0 s"
    assert compared["headline"] == f"eval_loss ends lowest in slow, at 1.000; {late}"
    assert told["sentences"][2].endswith(f"so this run is 0.5000 lower, {late}.")


def test_a_baseline_is_beside_each_set_and_domain(tmp_path):
    for run, offset in (("a", 0.0), ("b", 0.5)):
        start = line("run_started", row_space={"domains": {"x": 9, "y": 9}})
        events = [start, plan(0, {"x": 5, "y": 5})]
        for step in (5, 10):
            sets = {"eval_m_token_loss": 2 - step / 10 + offset, "eval_n_token_loss": 3.0, "eval_macro_loss": 2.0}
            told = {"loss": 2.0, "dataflex/loss/x": 2.0 + offset, "dataflex/loss/y": 3.0}
            for event in ({"event": "evaluated", "metrics": sets}, {"event": "stepped", **told}):
                events.append(json.dumps({"step": step, "time": 1.7e9, **event}).encode())
        lines_of(tmp_path / run, *events)
    _, told = page_of(tmp_path / "a", tmp_path / "b")
    charts = {chart["key"]: chart for chart in told["sections"][0]["charts"]}
    heldout = charts["heldout"]
    assert heldout["headline"] == "Held-out loss fell most on m (-0.500), least on n (+0.000)"
    assert [panel["title"] for panel in heldout["panels"]] == ["all sets", "m", "n"]
    assert [series["y"] for series in heldout["panels"][1]["series"]] == [[1.5, 1.0], [2.0, 1.5]]
    domains = charts["domain_loss"]["panels"]
    assert [[series["name"] for series in panel["series"]] for panel in domains] == [["a", "b"]] * 2
    assert [series["y"] for series in domains[0]["series"]] == [[2.0, 2.0], [2.5, 2.5]]


def test_phases_add_up_and_tell_the_steps_they_would_have_bought(tmp_path):
    simulate(tmp_path / "dataflex", **SELECTION)
    _, told = page_of(tmp_path)
    cost = next(section for section in told["sections"] if section["id"] == "cost")
    *phases, whole = cost["tables"][0]["rows"]
    assert sum(row[1] for row in phases) == pytest.approx(whole[1])
    bought = 10 * (3.2 + 0.25) / 0.8  # decisions of 3.2 s of signals and 0.25 s, at 0.8 s a step
    assert cost["notes"][0].startswith(f"Deciding would have bought {bought:.1f} training steps")


def test_a_resumed_run_has_cost_what_all_of_its_processes_took(tmp_path):
    """The second process has more seconds at its first log than the first one had at its last."""

    def of(event, step, train, **more):
        return line(event, step=step, spent={"train": float(train), "decide": 0.5, "startup": 9.0}, **more)

    lines = [of("run_started", 0, 0), of("evaluated", 0, 0, metrics={"eval_loss": 4.0}), of("stepped", 10, 10)]
    lines += [of("checkpointed", 10, 11), of("run_started", 10, 0), of("resumed", 10, 0, checkpoint="checkpoint-10")]
    lines += [of("stepped", 30, 20), of("evaluated", 40, 29, metrics={"eval_loss": 2.0}), of("finished", 40, 30)]
    run = recorded(lines_of(tmp_path, *lines)).run
    assert seconds_at(run) == [(0, 0.5), (10, 10.5), (30, 11.5 + 20.5), (40, 11.5 + 30.5)]
    assert seconds_at(run)[-1][1] == run.spent["train"] + run.spent["decide"]


def test_caps_of_single_domains_are_drawn_and_warned_of(tmp_path):
    config = {"dynamic": {"max_epochs": {"a": 2, "b": 0.5, "c": 4}}}
    start = line("run_started", config=config, row_space={"domains": {"a": 5, "b": 20, "c": 5, "d": 1}})
    folder = lines_of(tmp_path, start, plan(0, {"a": 10, "b": 10, "c": 2, "d": 5}), line("stepped", step=10, loss=1.0))
    _, told = page_of(folder)
    assert [each for each in told["sections"][6]["notes"] if "epochs" in each or "times over" in each] == [
        "b reached the cap of 0.5 epochs.",
        "a reached the cap of 2 epochs.",
        "d: served more than 4 times over, d 5.0 times; repeats teach less each time.",
    ]
    chart = next(each for each in told["sections"][1]["charts"] if each["key"] == "epochs")
    caps = {each["name"]: (each["y"], each["colour"]) for each in chart["panels"][0]["series"] if "cap" in each["name"]}
    assert caps == {"a, cap": ([2.0, 2.0], 0), "b, cap": ([0.5, 0.5], 1), "c, cap": ([4.0, 4.0], 2)}
    assert chart["level"] is None


MODEL = {"model_name_or_path": "m", "resume_from_checkpoint": "c"}


@pytest.mark.parametrize(
    ("config", "text", "told"),
    [
        (MODEL, "model_name_or_path: m\n", "dataflex train FILE output_dir=DIR, with the configuration below"),
        ({"stage": "sft"}, "stage: sft\n", "made by a script (dataflex.wrap, or a loop of its own), which is needed"),
        ({**MODEL, "v1": {"model": "m"}}, "model: m\ndynamic: null\n", "dataflex train FILE output_dir=DIR"),
    ],
)
def test_how_to_repeat_a_run_is_told_as_it_works(tmp_path, config, text, told):
    start = line("run_started", config=config, row_space={"domains": {"a": 5}})
    mine = lines_of(
        tmp_path / "runs" / "a b", start, line("resumed", step=1, checkpoint="c"), line("stepped", loss=1.0)
    )
    other = lines_of(tmp_path / "runs" / "c", start, line("stepped", loss=1.0))
    _, found = page_of(mine, other)
    repeat = found["sections"][7]
    assert repeat["texts"][0]["text"] == text
    assert told in repeat["notes"][0]
    assert repeat["notes"][0].endswith(f"; dataflex report '{mine}' {other}")
    assert repeat["notes"][1:] == ["Resumed at step 1 from c."]


def test_a_record_that_begins_at_a_resume_says_so_and_claims_nothing_of_before(tmp_path):
    start = line("run_started", step=0, config={}, row_space={"domains": {"a": 60, "b": 60}})
    lines = [line("resumed", step=20, checkpoint="elsewhere/checkpoint-20"), plan(2, {"a": 10}, step=20)]
    lines += [line("evaluated", step=step, metrics={"eval_loss": 50 / step}, spent={"train": 1.0}) for step in (20, 30)]
    lines += [line("stepped", step=30, loss=1.0, spent={"train": 5.0, "decide": 2.0}, **{"dataflex/tokens/a": 90})]
    lines_of(tmp_path / "part", start, *lines)
    simulate(tmp_path / "whole" / "dataflex", **SELECTION)
    _, told = page_of(tmp_path / "part", tmp_path / "whole")
    missing, sections = "\n".join(told["missing"]), {each["id"]: each for each in told["sections"]}
    assert "part: events.jsonl begins at step 20, where the run was resumed into this folder; losses and" in missing
    assert told["sentences"][0].startswith("What was decided since step 20: no rows; 10 sequences were served")
    assert "since step 20" in told["sentences"][1]
    assert "bought 4 more training steps beside the 10 done" in told["sentences"][1]
    assert "at 0.5 s each, 40.0 % of the 10 that were done since step 20" in sections["cost"]["notes"][0]
    assert sections["mixture"]["tables"][0]["note"].startswith("Rows are those served since step 20")
    headlines = [chart["headline"] for each in told["sections"] for chart in each["charts"]]
    assert any(each.endswith("times over since step 20") for each in headlines)
    assert "part has no seconds of all its steps in its record" in "\n".join(sections["loss"]["notes"])
    assert all("equal compute" not in each for each in (*told["sentences"], *headlines))
    assert digest(read_events(tmp_path / "whole")).first_step == 0


def plan(index, counts, **more):
    return line(
        "planned", interval=index, kind="dynamic", start_step=10 * index, stop_step=10 * index + 10, rows=10,
        domain_counts=counts, **more,
    )  # fmt: skip


def test_warnings_say_what_the_record_shows(tmp_path):
    space = {"domains": {"a": 50, "b": 50}, "rows_without_labels": 3}
    space["leaks"] = {"goal": {"target_rows": 2, "of": 8, "training_rows": 2, "examples": []}}
    start = line(
        "run_started", config={"dynamic": {"max_epochs": None}}, row_space=space, versions={"dataflex": "99.0"}
    )
    reason = "by loss; trust 1, correlation 0.02; 30% of the rows were served more than 4 times by now, up to 9"
    plans = [plan(0, {"a": 5, "b": 5}), plan(1, {"a": 0, "b": 300}, reason=reason)]
    logs = [
        json.dumps(
            {"event": "stepped", "step": 5 * at, "time": 1.7e9, "loss": 2.0, "dataflex/weight_ess": 0.05}
        ).encode()
        for at in range(1, 5)
    ]
    evals = [
        json.dumps({"event": "evaluated", "step": 5 * at, "time": 1.7e9, "metrics": {"eval_loss": loss}}).encode()
        for at, loss in enumerate((2.0, 1.0, 1.5), 1)
    ]
    folder = lines_of(tmp_path, start, *plans, *logs, *evals)
    found = "\n".join(warnings([report_module.recorded(folder)]))
    for told in (
        "is of dataflex 99.0",
        "had not finished",
        "Leak: 2 of the 8 rows of the target goal",
        "3 rows of the pool have no label",
        "rose after step 10",
        "collapsed: b is 100 % of the last interval (50 % of the pool)",
        "b: served more than 4 times over",
        "Repeats: 30% of the rows",
        "Weights collapsed",
        "In 1 of 1 decisions the predicted scores hardly ranked",
    ):
        assert told in found
    quiet = lines_of(
        tmp_path / "quiet", line("run_started", row_space={"domains": {"a": 9}}), line("finished", metrics={})
    )
    assert warnings([report_module.recorded(quiet)]) == []


def test_repeats_that_are_memorized_and_a_pool_used_up_are_told(tmp_path):
    start = line("run_started", row_space={"domains": {"a": 10, "b": 90}})
    reason = "loss: high; 3 rows are unseen and 9 are wanted: every row is in the pool again"
    plans = [plan(0, {"a": 15, "b": 9}), plan(1, {"a": 15, "b": 9}, reason=reason)]
    logs = [
        json.dumps({"event": "stepped", "step": at, "time": 1.7e9, "dataflex/loss/a": 2 - at / 10}) for at in (9, 19)
    ]
    evals = [
        json.dumps({"event": "evaluated", "step": at, "time": 1.7e9, "metrics": {"eval_a_token_loss": loss}})
        for at, loss in ((5, 2.0), (10, 1.5), (20, 1.8))
    ]
    folder = lines_of(
        tmp_path, start, *plans, *(each.encode() for each in (*logs, *evals)), line("finished", metrics={})
    )
    assert [told for told in warnings([report_module.recorded(folder)]) if "rose" not in told] == [
        "The pool is exhausted: at step 10 too few rows were left that had not been served, "
        "and every row may be chosen again.",
        "Memorized repeats: a was served 3.0 times over; its training loss is 0.600, the held-out loss "
        "(eval_a_token_loss) 1.800, up from 1.500.",
    ]


def test_a_domain_whose_loss_is_noisy_is_not_judged(tmp_path):
    start = line("run_started", row_space={"domains": {"a": 50, "b": 50}})
    plans = [plan(at, {"a": 10 - 3 * at, "b": 3 * at}) for at in range(3)]
    logs = [
        json.dumps(
            {"event": "stepped", "step": at, "time": 1.7e9, "dataflex/loss/b": 2.0 + at % 2, "dataflex/loss/a": 1}
        )
        for at in range(1, 31)
    ]
    folder = lines_of(tmp_path, start, *plans, *(each.encode() for each in logs), line("finished", metrics={}))
    assert warnings([report_module.recorded(folder)]) == []


def test_what_was_forecast_is_beside_what_it_took(tmp_path):
    passes = {"training": {"forward": 160, "backward": 160}, "selector loss": {"forward": 240, "backward": 0.0}}
    passes["mixer odm"] = {"forward": 0.0, "backward": 0.0}
    start = line(
        "run_started",
        row_space={"domains": {"a": 99}},
        forecast=passes,
        config={"dynamic": {"selector": {"name": "loss"}}},
    )
    spent = {"train": 4.0, "signals": 1.5, "decide": 0.5}
    folder = lines_of(
        tmp_path, start, plan(0, {"a": 80}, scores={"scored": 99}), line("finished", step=10, spent=spent)
    )
    _, told = page_of(folder)
    cost = next(section for section in told["sections"] if section["id"] == "cost")
    assert cost["notes"][1] == (
        "Forecast: passes beside training come to 50 % of those of training, a B counted as two F; "
        "in seconds it was 50 %."
    )
    assert [row[:5] for row in cost["tables"][1]["rows"]] == [
        ["training", 160, 160, 80, 80],
        ["selector loss", 240, 0, 99, 0],
    ]


def test_loss_by_domain_is_told_in_numbers(tmp_path):
    start = line("run_started", row_space={"domains": {"a": 50, "b": 50}})
    logs = [
        json.dumps({"event": "stepped", "step": at, "time": 1.7e9, "dataflex/loss/b": 3.0 - at, "dataflex/loss/a": 1.0})
        for at in range(1, 4)
    ]
    _, told = page_of(lines_of(tmp_path, start, plan(0, {"a": 3, "b": 7}), *(each.encode() for each in logs)))
    found = next(each for each in told["sections"][0]["tables"] if each["caption"] == "Training loss by domain")
    assert [column["name"] for column in found["columns"]][:4] == ["domain", "first", "last", "change"]
    assert [row[:6] for row in found["rows"]] == [["b", 2.0, 0.0, -2.0, 0.0, 2.0], ["a", 1.0, 1.0, 0.0, 1.0, 1.0]]


def test_a_domain_that_does_not_learn_while_its_share_rises_is_told(tmp_path):
    recorder = RunRecorder(tmp_path / "dataflex", clock=Spent(train=3.0))
    started(recorder, dynamic={}, sources={"a": 50, "b": 50}, schedule={"total_steps": 30})
    for step in range(1, 31):
        losses = {"dataflex/loss/a": 3.0 - step / 20, "dataflex/loss/b": 2.0}
        recorder.stepped(step, {"loss": 2.0, **losses})
    events = (tmp_path / "dataflex" / "events.jsonl").read_bytes().splitlines()
    plans = [plan(at, {"a": 10 - 3 * at, "b": 3 * at}) for at in range(3)]
    view = report_module.recorded(lines_of(tmp_path, *events, *plans))
    assert [told for told in warnings([view]) if "learn" in told] == [
        "b does not learn while its share rises: share 0 % -> 60 %, training loss 2.000 -> 2.000."
    ]


@pytest.mark.parametrize(
    "content", [b"{}", b"[]", b"\x00", b'{"log_history": 3}', b'{"log_history": [[], {"step": "x"}]}']
)
def test_a_trainer_log_that_says_nothing_is_told(tmp_path, content, capsys):
    (tmp_path / "trainer_state.json").write_bytes(content)
    assert main(["report", str(tmp_path)]) == 2
    assert "trainer_state.json" in capsys.readouterr().err


def test_plans_that_are_not_rows_of_the_pool_are_left_out_and_named(tmp_path):
    simulate(tmp_path / "dataflex", **SELECTION, stop_step=60)
    plans = tmp_path / "dataflex" / "plans"
    np.savez(plans / "plan-00001.npz", rows=np.array([2**62, 1]), scores=np.zeros(3, np.float32))
    np.savez(plans / "plan-00002.npz", rows=np.array([["a"]]), scores=np.zeros((2, 2)))
    (plans / "plan-00003.npz").unlink()
    _, told = page_of(tmp_path)
    missing = "\n".join(told["missing"])
    for number in (1, 2, 3):
        assert f"plan of interval {number}" in missing


@pytest.mark.parametrize(
    "dynamic", ["text", {"signals": "text", "selector": {"name": "loss", "band": []}}, {"selector": 3}]
)
def test_a_configuration_that_is_none_is_shown_as_it_stands(tmp_path, dynamic):
    start = line("run_started", config={"dynamic": dynamic}, row_space={"domains": {"a": 9}})
    _, told = page_of(lines_of(tmp_path, start, plan(0, {"a": 9}, scores={"scored": 9}, spent={"train": 1.0})))
    assert "dynamic" in told["sections"][7]["texts"][0]["text"]
    assert told["sections"][5]["tables"][1]["rows"][0][:4] == ["training", None, None, 1]


@pytest.mark.slow
def test_five_thousand_intervals_fit(tmp_path):
    names = [f"common/prefix/domain-{at}" for at in range(40)]
    start = line("run_started", config={}, row_space={"domains": dict.fromkeys(names, 1000)})
    plans, steps = [], []
    for at in range(5000):
        counts = {name: 1 + (at * place) % 7 for place, name in enumerate(names)}
        plans.append(plan(at, counts, proportions=dict.fromkeys(names, 1 / 40)))
        losses = {f"dataflex/loss/{name}": 2.0 + place / at if at else 3.0 for place, name in enumerate(names)}
        tokens = {f"dataflex/tokens/{name}": 100 * (at + 1) for name in names}
        event = {"event": "stepped", "step": 10 * at + 10, "time": 1.7e9, "loss": 2.0, **losses, **tokens}
        steps.append(json.dumps(event).encode())
    folder = lines_of(tmp_path, start, *plans, *steps)
    _, told = page_of(folder)
    mixture = next(chart for chart in told["sections"][1]["charts"] if chart["key"] == "mixture")
    assert mixture["panels"][0]["title"] == "2"
    assert len(mixture["panels"]) == 24


def test_tokens_of_a_domain_that_a_log_lacks_are_those_it_had(tmp_path):
    """Of many domains a log has those trained on since the last one, and a data set may leave the run."""
    start = line("run_started", config={}, row_space={"domains": {"a": 9, "b": 9}})
    counts = [{"a": 20}, {"b": 10, "gone": 10}]
    logs = [
        line("stepped", step=step, **{f"dataflex/tokens/{name}": tokens for name, tokens in of.items()})
        for step, of in ((10, {"a": 60}), (20, {"gone": 10}), (30, {"b": 30}), (40, {"a": 100}))
    ]
    folder = lines_of(tmp_path, start, plan(0, counts[0]), plan(1, counts[1]), *logs)
    assert tokens_at(recorded(folder).run) == [(10, 60.0), (20, 70.0), (30, 100.0), (40, 140.0)]
    _, told = page_of(folder)
    mixture, composition = (
        next(chart for chart in told["sections"][1]["charts"] if chart["key"] == key)
        for key in ("mixture", "composition")
    )
    shares = [next(each for each in panel["series"] if each["name"] == "tokens") for panel in mixture["panels"]]
    assert [each["y"] for each in shares] == [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    assert composition["panels"][0]["series"][1]["y"] == pytest.approx([100 / 140, 30 / 140, 10 / 140], abs=1e-5)
    rows = told["sections"][1]["tables"][0]["rows"]
    assert [row[3] for row in rows] == [100, 30, 10]


@given(values=st.lists(st.floats(-10, 10), min_size=1, max_size=300), most=st.integers(2, 50))
def test_thinning_keeps_ends_and_extremes(values, most):
    curve = list(enumerate(values))
    kept = thin(curve, most)
    assert kept[0] == curve[0]
    assert kept[-1] == curve[-1]
    assert max(value for _, value in kept) == max(values)
    assert min(value for _, value in kept) == min(values)
    assert kept == sorted(set(kept))
    assert len(kept) <= most + 3


def test_labels_lose_what_they_share_and_are_cut_in_the_middle():
    assert without_prefix(["web/en/a", "web/en/b"]) == ["a", "b"]
    assert without_prefix(["web_a", "wet_b"]) == ["web_a", "wet_b"]
    assert without_prefix(["web/", "web/a"]) == ["web/", "a"]
    assert without_prefix(["alone/x"]) == ["alone/x"]
    assert without_prefix(["llama-3.1", "llama-3.2"]) == ["3.1", "3.2"]
    assert without_prefix(["v3.a", "v3.b"]) == ["a", "b"]
    assert middle("abcdefghij", 6) == "ab..ij"
    assert middle("abcdef", 6) == "abcdef"
    assert len(middle("x" * 9999, 20)) == 20
