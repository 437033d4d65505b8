"""``dataflex report`` on damaged and hostile folders: no traceback, what cannot be read is named."""

from __future__ import annotations

import json
import random

import pytest

from dataflex.cli import main
from dataflex.errors import DataFlexError
from dataflex.record.read import load_plan, read_events, read_weights
from dataflex.record.recorder import RunRecorder
from dataflex.record.report import report
from tests.record.synthetic import MIXTURE, SELECTION, WEIGHTING, simulate

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.exe\u2066\x00\x7f\r\u2028\ud800end"
VALUES = [
    None,
    True,
    -1,
    10**400,
    2**63,
    1e308,
    -1e308,
    float("nan"),
    float("inf"),
    "text",
    ESCAPES,
    "x" * 100_000,
    [],
    [1, "a", None],
    {},
    {"": 0},
    {"a": {"b": [1e308]}},
    [[[[]]]],
    {"\x1b[31m": 1e308, "\ud800": -5},
    "2024-01-01",
    0.5,
]
RAW = [
    b"",
    b"\x00" * 50,
    b"\xff\xfe\xfa",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"null",
    b"[]",
    b'"event"',
    b"{}",
    b"x" * 9,
]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Lines of three records that are whole."""
    found = []
    for at, case in enumerate((SELECTION, MIXTURE, WEIGHTING)):
        folder = tmp_path_factory.mktemp("record") / str(at)
        simulate(folder, **{**case, "total_steps": 40, "interval_steps": 20, "warmup_steps": 0})
        RunRecorder(folder, 40).weighed(
            40, most=[{"row": 3, "weight": 2.0, "times": 1, "domain": "a", "text": "x => y"}], least=[], rows=9
        )
        lines = (folder / "events.jsonl").read_bytes().splitlines()
        found.append(([json.loads(line) for line in lines], json.loads((folder / "weights.json").read_bytes())))
    return found


def places(value, path=()):
    """Every place of a JSON value."""
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


def mutate(rng, value):
    """Put something else at one place of a JSON value, or take it away."""
    value = json.loads(json.dumps(value))
    *above, last = rng.choice([path for path in places(value) if path])
    holder = value
    for key in above:
        holder = holder[key]
    if rng.random() < 0.3:
        del holder[last]
    else:
        holder[last] = rng.choice(VALUES)
    return value


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_mutated_records_have_a_report_or_are_refused(tmp_path, records, monkeypatch, seed):
    """25 folders a seed; all have a page, the first one pictures, and of every fifth the figures are made."""
    rng = random.Random(seed)
    reports = 0
    for number in range(25):
        folder = tmp_path / str(number) / "dataflex"
        (folder / "plans").mkdir(parents=True)
        events, weights = rng.choice(records)
        lines = [json.dumps(event).encode() for event in events]
        for _ in range(rng.choice([1, 1, 3, 10, 40])):
            at = rng.randrange(len(lines)) if rng.random() < 0.7 else rng.randrange(min(3, len(lines)))
            kind = rng.random()
            if kind < 0.75:
                lines[at] = json.dumps(mutate(rng, events[at % len(events)])).encode()
            elif kind < 0.85:
                lines[at] = rng.choice(RAW)
            elif kind < 0.9:
                lines.insert(at, lines[rng.randrange(len(lines))])
            else:
                lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
        content = b"\n".join(lines) + rng.choice([b"\n", b"", b"\n\n", b"\x00"])
        (folder / "events.jsonl").write_bytes(content)
        told = rng.choice([json.dumps(weights).encode(), json.dumps(mutate(rng, weights)).encode(), *RAW])
        (folder / "weights.json").write_bytes(told)
        if number:
            monkeypatch.setattr("dataflex.record.plots.png", lambda figure: b"\x89PNG")
        if number % 5:
            monkeypatch.setattr("dataflex.record.plots.draw", lambda charts: {})
        try:
            text = report([folder.parent])
        except DataFlexError:
            continue
        finally:
            monkeypatch.undo()
        reports += 1
        assert (folder / "report" / "summary.txt").read_text(encoding="utf-8") == text
        assert text.isprintable() or set(filter(lambda char: not char.isprintable(), text)) <= {"\n", "\xa0", "\u3000"}
        assert max(map(len, text.partition("\nFiles\n")[0].splitlines())) <= 100
        for read in (read_events, read_weights):
            try:
                read(folder)
            except DataFlexError:
                pass
    assert reports > 15


def lines_of(folder, *lines):
    (folder / "dataflex").mkdir(parents=True, exist_ok=True)
    (folder / "dataflex" / "events.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    return folder


def line(event, **fields):
    return json.dumps({"event": event, "step": 1, "time": 1.7e9, **fields}).encode()


def test_what_cannot_be_read_is_named_by_line_and_key(tmp_path):
    folder = lines_of(
        tmp_path,
        line("run_started", world="two", global_batch=8),
        line("stepped", loss="low"),
        b"[" * 100_000,
        line("planned", interval=0, kind="dynamic", start_step=0, rows=3),
        line("stepped", loss=2.0),
        b'{"event": "stepp',
    )
    text = report([folder])
    part = text[text.index("Left out") : text.index("\nFiles")]
    assert "line 1 (run_started): the values of world\n" in part
    assert "line 2 (stepped): the values of loss\n" in part
    assert "line 3 is not an event: it is nested without end\n" in part
    assert "line 4 is not an event: " in part
    assert "stop_step" in part
    assert "line 6 is not an event: " in part
    assert "line 5" not in part
    assert "ranks       global batch 8\n" in text
    assert "2.0000" in text


def test_no_line_at_all_is_an_error(tmp_path, capsys):
    assert main(["report", str(lines_of(tmp_path, b"\x00\x01", b"{}"))]) == 2
    assert "none of its lines is an event" in capsys.readouterr().err
    assert main(["report", str(lines_of(tmp_path))]) == 2
    assert "no event yet" in capsys.readouterr().err
    (tmp_path / "dataflex" / "events.jsonl").unlink()
    (tmp_path / "dataflex" / "events.jsonl").mkdir()
    assert main(["report", str(tmp_path)]) == 2


@pytest.mark.slow
def test_terminal_escapes_of_data_are_written_out(tmp_path, capsys):
    simulate(tmp_path / "dataflex", **{**SELECTION, "sources": {ESCAPES: 900, "b": 300}}, stop_step=20)
    row = {"row": 0, "weight": 2.0, "times": 1, "domain": ESCAPES, "text": f"{ESCAPES} => {ESCAPES}"}
    RunRecorder(tmp_path / "dataflex", 20).weighed(20, most=[row], least=[], rows=9)
    assert main(["report", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    written = (tmp_path / "dataflex" / "report" / "summary.txt").read_text(encoding="utf-8")
    for text in (printed, written):
        assert not set("\x1b\x07\x9b\u202e\u2066\x00\x7f\r\u2028\ud800") & set(text)
        assert r"\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp" in text


@pytest.mark.slow
def test_a_report_folder_that_leads_elsewhere_is_not_written(tmp_path, capsys):
    simulate(tmp_path / "run" / "dataflex", **SELECTION, stop_step=20)
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "loss.png").write_text("mine")
    (tmp_path / "victim" / "weights.png").write_text("mine")
    (tmp_path / "run" / "dataflex" / "report").symlink_to(tmp_path / "victim")
    assert main(["report", str(tmp_path / "run")]) == 2
    assert "is a link that leads out of the run's folder" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in (tmp_path / "victim").iterdir()} == {
        "loss.png": "mine",
        "weights.png": "mine",
    }
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "here")]) == 0


@pytest.mark.slow
def test_a_link_in_place_of_a_file_is_replaced_not_followed(tmp_path):
    simulate(tmp_path / "dataflex", **SELECTION, stop_step=20)
    (tmp_path / "victim.txt").write_text("mine")
    (tmp_path / "dataflex" / "report").mkdir()
    (tmp_path / "dataflex" / "report" / "summary.txt").symlink_to(tmp_path / "victim.txt")
    (tmp_path / "dataflex" / "report" / "weights.png").mkdir()
    with pytest.raises(DataFlexError, match="cannot write the report"):
        report([tmp_path])
    (tmp_path / "dataflex" / "report" / "weights.png").rmdir()
    report([tmp_path])
    assert (tmp_path / "victim.txt").read_text() == "mine"


@pytest.mark.slow
def test_twenty_thousand_domains_fit_on_a_page(tmp_path):
    names = [f"domain-{at}" for at in range(20_000)]
    counts = {name: at % 7 for at, name in enumerate(names)}
    plans = [
        line(
            "planned",
            interval=at,
            kind="dynamic",
            start_step=10 * at,
            stop_step=10 * at + 10,
            rows=sum(counts.values()),
            domain_counts={name: rows + (at and number == 7) for number, (name, rows) in enumerate(counts.items())},
            proportions=dict.fromkeys(names, 1 / 20_000),
        )
        for at in range(10)
    ]
    start = line("run_started", config={}, row_space={"domains": dict.fromkeys(names, 10)})
    text = report([lines_of(tmp_path, start, *plans, line("finished", metrics={}))])
    assert (tmp_path / "dataflex" / "report.html").stat().st_size < 3e6
    assert "200,000 rows in 20000 domains" in text


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00\xff\xff{", b"PK\x05\x06" + bytes(18)])
def test_a_plan_that_is_no_file_of_arrays_is_told(tmp_path, content):
    simulate(tmp_path, **SELECTION, stop_step=20)
    (tmp_path / "plans" / "plan-000xx.npz").write_bytes(b"")
    with pytest.raises(DataFlexError, match="it has 0 to 2"):
        load_plan(tmp_path, 7)
    (tmp_path / "plans" / "plan-00001.npz").write_bytes(content)
    with pytest.raises(DataFlexError, match="is damaged"):
        load_plan(tmp_path, 1)
