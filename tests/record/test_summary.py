"""The text of a small run, word for word, and that no run makes it wider than a terminal."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.plan.schedule import Interval
from dataflex.record.digest import digest
from dataflex.record.read import read_events
from dataflex.record.recorder import RunRecorder
from dataflex.record.summary import summary
from dataflex.record.text import WIDTH, cut, duration, number, short, width
from tests.record.synthetic import MIXTURE, SELECTION, WEIGHTING, Plan, Spent, simulate, started, tick

EXPECTED = """\
DataFlex run out/small
======================
selector    loss, targets [gsm8k, math], band 0.5
mixer       uniform
settings    model_name_or_path models/base-4m, stage sft, finetuning_type lora, dataset alpaca,code,
            learning_rate 0.0001, per_device_train_batch_size 4, gradient_accumulation_steps 2,
            seed 42
schedule    warmup_steps 2, interval_steps 2, total_steps 6
data        40 rows in 2 domains, 1,234,567 tokens, fingerprint 9f86d081884c7d65
ranks       2, global batch 16
versions    dataflex 0.1.0, llamafactory 0.9.5, transformers 5.6.0
started     2023-11-14 22:13:20 UTC, again 2023-11-14 22:14:10 UTC
state       finished at step 6 of 6
resumed     at step 2 from out/checkpoint-2

Loss and evaluation
                   first  at step    last  at step    best  at step
  train loss      3.0000        2  2.0000        6  2.0000        6
  eval_loss       2.5000        4  2.7500        6  2.5000        4
  eval_accuracy   0.2500        4  0.5000        6  0.5000        6
  eval_length    12.0000        4  9.0000        6
  train loss was not finite in 1 of 3 logs, first at step 4

Time: 1 min 40 s
  training    50.0 s  50.0 %  ###############
  signals     20.0 s  20.0 %  ######
  decide       4.0 s   4.0 %  #
  evaluation   6.0 s   6.0 %  ##
  checkpoint   2.5 s   2.5 %  #
  other       17.5 s  17.5 %  #####

Intervals: 3
  #  kind     steps  rows  score p50  served p50  most served domains
  0  warmup     1-2    32          -           -  code 75 %, alpaca 25 %
  1  dynamic    3-4    32      1.500       3.000  alpaca 100 %
  2  dynamic    5-6    32      0.500       1.000  alpaca 50 %, code 50 %

Composition of the served rows
  domain  rows served   share  pool rows   share   times  epochs
  alpaca           56  58.3 %         10  25.0 %  2.33 x    5.60
  code             40  41.7 %         30  75.0 %  0.56 x    1.33

Weights
  effective sample size  mean 75.0 % of the sequences, lowest 50.0 % (step 6)
  largest weight         4.00 (step 4)
"""


def small(folder) -> None:
    """Three intervals of two steps, 10 seconds an event; stopped after step 2 and resumed."""
    dynamic = {
        "selector": {"name": "loss", "targets": ["gsm8k", "math"], "band": 0.5, "boost": None},
        "mixer": {"name": "uniform"},
        "weighter": None,
    }

    def plan(index: int, kind: str, counts: dict, scores=None) -> None:
        interval = Interval(index=index, kind=kind, start_step=2 * index, stop_step=2 * index + 2)
        recorder.planned(
            plan=Plan(interval=interval, rows=np.array([1] * 32)), domain_counts=counts, seconds={}, scores=scores
        )

    clock = Spent()
    recorder = RunRecorder(folder, clock=clock)
    schedule = {"warmup_steps": 2, "interval_steps": 2, "total_steps": 6, "cycle_steps": None}
    started(recorder, dynamic=dynamic, sources={"alpaca": 10, "code": 30}, schedule=schedule)
    plan(0, "warmup", {"alpaca": 8, "code": 24})
    clock.add(train=10.0, decide=1.0, checkpoint=2.5)
    recorder.stepped(2, {"loss": 3.0, "dataflex/weight_ess": 1.0, "dataflex/weight_max": 1.0})
    recorder.checkpointed(2, "out/checkpoint-2", 2.5)
    recorder.stepped(4, {"loss": 99.0})
    clock = Spent()
    recorder = RunRecorder(folder, 2, clock=clock)
    recorder.resumed(2, "out/checkpoint-2")
    plan(1, "dynamic", {"alpaca": 32, "code": 0}, np.array([0.0, 3.0, np.nan]))
    recorder.stepped(4, {"loss": np.nan, "dataflex/weight_ess": 0.75, "dataflex/weight_max": 4.0})
    recorder.evaluated(4, {"eval_loss": 2.5, "eval_accuracy": 0.25, "eval_length": 12.0, "eval_runtime": 2.0})
    plan(2, "dynamic", {"code": 16, "alpaca": 16}, np.array([0.0, 1.0, np.nan]))
    recorder.stepped(6, {"loss": 2.0, "dataflex/weight_ess": 0.5, "dataflex/weight_max": 3.0})
    recorder.evaluated(6, {"eval_loss": 2.75, "eval_accuracy": 0.5, "eval_length": 9.0, "eval_runtime": 4.0})
    clock.add(train=40.0, signals=20.0, decide=3.0, evaluate=6.0, save=0.0, other=17.5)
    recorder.finished(6, {"train_loss": 2.5})


def test_the_text_of_a_small_run(tmp_path, monkeypatch):
    tick(monkeypatch, 10.0)
    small(tmp_path)
    assert summary(digest(read_events(tmp_path)), "out/small") == EXPECTED


def test_a_run_that_has_hardly_begun(tmp_path):
    recorder = RunRecorder(tmp_path, clock=Spent())
    started(recorder, dynamic={"selector": "all"}, sources={"a": 3}, schedule={"total_steps": 8})
    text = summary(digest(read_events(tmp_path)), "x")
    assert "state       still running, or stopped, at step 0 of 8\n" in text
    assert text.endswith("Loss and evaluation\n  nothing logged yet\n\nIntervals\n  none decided yet\n")
    recorder = RunRecorder(tmp_path, 0, clock=Spent())
    recorder.resumed(4, "elsewhere/checkpoint-4")
    (tmp_path / "events.jsonl").write_text((tmp_path / "events.jsonl").read_text().splitlines(keepends=True)[-1])
    assert "resumed     at step 4 from elsewhere/checkpoint-4\n" in summary(digest(read_events(tmp_path)), "x")


def test_long_runs_show_their_first_and_last_intervals(tmp_path):
    simulate(tmp_path, **{**MIXTURE, "interval_steps": 10})
    lines = summary(digest(read_events(tmp_path)), "x").splitlines()
    at = lines.index("Intervals: 56")
    table = lines[at + 2 : at + 18]
    assert [line.split()[0] for line in table] == [*map(str, range(10)), "...", *map(str, range(51, 56))]
    assert table[10] == "  ... 41 more"
    assert lines[at + 18] == ""


@pytest.mark.parametrize("case", [SELECTION, MIXTURE, WEIGHTING])
def test_every_kind_of_run_fits_a_terminal(tmp_path, case):
    simulate(tmp_path, **case)
    text = summary(digest(read_events(tmp_path)), "some/where/" * 20)
    assert max(map(width, text.splitlines())) <= WIDTH
    assert text == summary(digest(read_events(tmp_path)), "some/where/" * 20)


names = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=60)


@settings(max_examples=25, deadline=None)
@given(
    sources=st.dictionaries(names, st.integers(1, 10**9), min_size=1, max_size=50),
    setting=names,
    value=st.floats() | names | st.lists(names, max_size=30),
    loss=st.floats(allow_nan=False, width=32),
)
def test_no_name_or_number_makes_it_wider(tmp_path_factory, sources, setting, value, loss):
    folder = tmp_path_factory.mktemp("run")
    recorder = RunRecorder(folder, clock=Spent(**{setting: 1.0}))
    dynamic = {"selector": {"name": setting, "key": value}}
    started(recorder, dynamic=dynamic, sources=sources, schedule={"total_steps": 10**7})
    recorder.planned(
        plan=Plan(
            interval=Interval(index=12345, kind="dynamic", start_step=10**6, stop_step=10**6 + 5000), rows=np.arange(10)
        ),
        domain_counts=dict.fromkeys(sources, 7),
        seconds={},
        scores=np.full(10, loss),
    )
    recorder.stepped(10**6 + 100, {"loss": loss})
    recorder.evaluated(10**6 + 100, {f"eval_{setting}_loss": loss, f"eval_{setting}": 1e-9})
    text = summary(digest(read_events(folder)), setting)
    assert max(map(width, text.split("\n"))) <= WIDTH


def test_methods_are_found_in_the_configuration():
    block = {
        "selector": {"name": "all"},
        "mixer": {"name": "odm", "eta": 0.1, "floor": None, "targets": ["x"]},
        "weighter": None,
        "interval_steps": 5,
    }
    event = {"event": "run_started", "step": 0, "time": 1.0}
    expected = {"selector": ("all", {}), "mixer": ("odm", {"eta": 0.1, "targets": ["x"]})}
    assert digest([{**event, "config": {"stage": "sft", "dynamic": block}}]).methods == expected
    assert digest([event]).methods == {}


def test_numbers_and_times_as_people_read_them():
    assert [number(value) for value in (None, 0.0, 1.23456, 1e-5, -0.5, 1234567.0)] == [
        "-",
        "0.0000",
        "1.2346",
        "1e-05",
        "-0.5000",
        "1.23e+06",
    ]
    assert [duration(value) for value in (0.04, 59.94, 59.96, 125.4, 3599.6, 7500.0)] == [
        "0.0 s",
        "59.9 s",
        "1 min 00 s",
        "2 min 05 s",
        "1 h 00 min",
        "2 h 05 min",
    ]
    assert short({"a": [1, 0.1, "b"], "c": True, "d": None}) == "{a: [1, 0.1, b], c: true, d: null}"
    assert cut("a \n b", 9) == "a b"
    assert cut("\u6570\u5b66\u9898", 5) == "\u6570.."
    assert width("\u6570\u5b66e\u0301") == 5


def test_rows_that_weigh_most_and_least_are_shown_with_their_text():
    from dataflex.record.summary import _weighed

    text = "what is it " * 12
    rows = [{"row": i, "weight": 2.5 - i, "times": 1 + i, "domain": "web", "text": f"{text}=> that"} for i in range(2)]
    lines = _weighed({"step": 7, "rows": 1234, "most": rows[:1], "least": rows[1:]})
    assert lines[0] == "Rows that weighed most and least, of 1,234 up to step 7"
    assert [lines[1], lines[4]] == ["  2.500  row 0 of web, once", "  1.500  row 1 of web, 2 times"]
    assert lines[2].startswith("    what is it what")
    assert lines[3] == "    => that"
    assert max(map(len, lines)) <= 100
    assert _weighed(None) == []


HELPED = """\
What helped: change of the targets' losses up to step 6, 4 looks
  goal                           change  per million tokens  tokens
    code                        -0.4000            -40.0000  10,000
    none                        +0.0000                   -       0
    web                         +0.1000           +100.0000   1,000
    weight decay                +0.0020
    unexplained                 -0.0020             (0.7 %)
    measured: 3.0000 -> 2.7000  -0.3000
  Clipping took +0.5000 off the domains' changes.
  Rows' credits, which are of first order, add up to -1.5000.
"""


def test_what_helped_is_a_table(tmp_path):
    recorder = RunRecorder(tmp_path)
    started(recorder, dynamic={"ledger": {"targets": ["goal"]}}, sources={"web": 5, "code": 5}, schedule={})
    account = {
        "before": 3.0,
        "now": 2.7,
        "domains": {"web": 0.1, "code": -0.4, "none": 0.0},
        "others": {"weight decay": 0.002, "before": 0.0, "other": 0.0},
        "unexplained": -0.002,
        "clipping": 0.5,
        "rows": -1.5,
    }
    told = {"looked_at": 6, "looks": 4, "tokens": {"web": 1000, "code": 10_000, "none": 0}}
    recorder.credited(4, {**told, "targets": {}})
    recorder.credited(6, {**told, "targets": {"goal": account}}, b"rows")
    assert (tmp_path / "ledger.parquet").read_bytes() == b"rows"
    text = summary(digest(read_events(tmp_path)), "out")
    assert HELPED in text
    assert "ledger      targets [goal]" in text
    RunRecorder(tmp_path)
    assert not (tmp_path / "ledger.parquet").exists()


def test_losses_by_domain_are_a_table_and_a_stock_run_has_a_composition(tmp_path):
    recorder = RunRecorder(tmp_path)
    recorder.run_started(
        config={"dynamic": {"record": True}}, schedule={}, row_space={"domains": {"a": 6, "b": 2}}, versions={},
        world=1, global_batch=4, run="r",
    )  # fmt: skip
    for step, losses in ((1, {"a": 3.0}), (2, {"a": 2.0, "b": 4.0}), (3, {"a": 2.5})):
        of = {f"dataflex/loss/{name}": loss for name, loss in losses.items()}
        recorder.stepped(step, {"loss": 1.0, **of, "dataflex/sequences/a": 3.0 * step, "dataflex/sequences/b": 1.0})
    told = summary(digest(read_events(tmp_path)), "x")
    assert "Intervals" not in told
    table = told.partition("Training loss by domain, before any weights\n")[2].splitlines()
    assert [line.split() for line in table[1:3]] == [
        ["a", "3.0000", "1", "2.5000", "3", "2.0000", "2"],
        ["b", "4.0000", "2", "4.0000", "2", "4.0000", "2"],
    ]
    composition = told.partition("Composition of the served rows\n")[2].splitlines()
    assert [line.split()[:2] for line in composition[1:3]] == [["a", "9"], ["b", "1"]]
    recorder.stepped(4, {"loss": 1.0, "no_loss_by_domain": "a fused kernel"})
    assert "not known: a fused kernel" in summary(digest(read_events(tmp_path)), "x")
