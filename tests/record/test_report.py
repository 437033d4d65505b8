"""``dataflex report``: which files it leaves, for whole, killed and foreign runs."""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import matplotlib
import pytest

from dataflex.errors import ConfigError, DataError
from dataflex.record import report as report_module
from dataflex.record.read import load_plan
from dataflex.record.recorder import RunRecorder
from dataflex.record.report import report
from dataflex.record.serve import serving
from tests.record.synthetic import MIXTURE, SELECTION, WEIGHTING, Spent, simulate, started

BASE = {"summary.txt", "report.json"}
BASE |= {f"{name}.png" for name in ("loss", "mixture", "epochs", "composition", "coverage", "repeats", "seconds")}
SCORES = {"scores.png", "histogram.png", "ranking.png", "overlap.png"}


def png_size(path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", data[16:24])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "extra"), [(SELECTION, SCORES), (MIXTURE, {"overlap.png"}), (WEIGHTING, {"weights.png"})]
)
@pytest.mark.filterwarnings("error")
def test_every_kind_of_run_gets_its_pictures(tmp_path, case, extra):
    simulate(tmp_path / "dataflex", **case)
    before = dict(matplotlib.rcParams)
    text = report([tmp_path])
    folder = tmp_path / "dataflex" / "report"
    assert {path.name for path in folder.iterdir()} == BASE | extra
    assert (folder / "summary.txt").read_text(encoding="utf-8") == text
    listed = text[text.index("\nFiles\n") :].split()[1:]
    files = {folder / path.name for path in folder.iterdir()} | {folder.parent / "report.html"}
    assert files == {type(folder)(path) for path in listed}
    for path in folder.glob("*.png"):
        wide, high = png_size(path)
        assert 1000 <= wide <= 1200
        assert 250 <= high <= 1800
        assert 5_000 < path.stat().st_size < 400_000
    assert dict(matplotlib.rcParams) == before


@pytest.mark.slow
def test_a_run_that_was_killed_has_a_report(tmp_path):
    simulate(tmp_path / "dataflex", **MIXTURE, stop_step=130)
    with (tmp_path / "dataflex" / "events.jsonl").open("ab") as file:
        file.write(b'{"event": "stepp')
    text = report([tmp_path / "dataflex"], tmp_path / "elsewhere" / "deep")
    assert "still running, or stopped, at step 130 of 600" in text
    assert {path.name for path in (tmp_path / "elsewhere" / "deep").iterdir()} == BASE | {"overlap.png", "report.html"}
    assert not (tmp_path / "dataflex" / "report").exists()
    assert len(load_plan(tmp_path, 0).rows) == 800


@pytest.mark.slow
def test_a_run_that_has_hardly_begun_gets_text_only_and_old_pictures_go(tmp_path):
    simulate(tmp_path / "dataflex", **SELECTION)
    report([tmp_path])
    (tmp_path / "dataflex" / "report" / "mine.txt").write_text("kept")
    recorder = RunRecorder(tmp_path / "dataflex", clock=Spent())
    with pytest.raises(DataError, match="no event yet"):
        report([tmp_path])
    started(recorder, dynamic={"selector": "all"}, sources={"a": 3}, schedule={"total_steps": 8})
    report([tmp_path])
    assert {path.name for path in (tmp_path / "dataflex" / "report").iterdir()} == {
        "summary.txt",
        "report.json",
        "mine.txt",
    }


def test_losses_that_are_not_finite_leave_gaps_not_errors(tmp_path):
    recorder = RunRecorder(tmp_path, clock=Spent(train=3.0))
    started(recorder, dynamic={"selector": {"name": "all"}}, sources={"a": 3}, schedule={"total_steps": 8})
    for step in range(1, 4):
        recorder.stepped(step, {"loss": float("nan"), "grad_norm": float("inf")})
    text = report([tmp_path])
    assert "train loss was not finite in 3 of 3 logs, first at step 1" in text
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"summary.txt", "report.json", "seconds.png"}


@pytest.mark.slow
def test_foreign_folders_and_unwritable_places_are_told(tmp_path):
    with pytest.raises(DataError, match=r"has no dataflex/events\.jsonl; is it the output_dir of a run"):
        report([tmp_path])
    assert list(tmp_path.iterdir()) == []
    simulate(tmp_path / "dataflex", **SELECTION, stop_step=5)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"--out: .*file is a file, not a folder"):
        report([tmp_path], tmp_path / "file")
    with pytest.raises(DataError, match=r"--out: .*file is a file, not a folder"):
        report([tmp_path], tmp_path / "file" / "deep")
    (tmp_path / "mine").mkdir()
    # A picture that this report would remove, and one that it would write.
    for name in ("mixture.png", "scores.png"):
        (tmp_path / "mine" / name).write_text("kept")
        with pytest.raises(DataError, match=rf"--out: .*{name} is there, and no report wrote it"):
            report([tmp_path], tmp_path / "mine")
        assert [path.name for path in (tmp_path / "mine").iterdir()] == [name]
        assert (tmp_path / "mine" / name).read_text() == "kept"
        (tmp_path / "mine" / name).unlink()
    for _ in range(2):
        report([tmp_path], tmp_path / "mine")
    (tmp_path / "mine" / "report.json").unlink()  # as after a kill, between the page and it
    report([tmp_path], tmp_path / "mine")


@pytest.mark.slow
@pytest.mark.slow
def test_a_watched_run_has_a_page_at_every_moment_until_it_ends(tmp_path, monkeypatch, capsys):
    simulate(tmp_path / "whole" / "dataflex", **SELECTION)
    whole, folder = (tmp_path / name / "dataflex" for name in ("whole", "run"))
    lines = (whole / "events.jsonl").read_bytes().splitlines(keepends=True)
    (whole / "ended.json").write_bytes(lines[-1].replace(b'"finished"', b'"ended"'))
    (folder / "plans").mkdir(parents=True)
    moments = [lines[:1], [*lines[:3], lines[3][:50]], [*lines[:20], b'{"event": "ste'], [], lines[:60]]
    pages = []

    def moment() -> None:
        (folder / "events.jsonl").write_bytes(b"".join(moments.pop(0)))

    def wait(seconds: float) -> None:
        assert seconds >= 10
        pages.append((folder / "report.html").read_text())
        if moments:
            moment()
            return
        for path in ("events.jsonl", "ended.json", *(f"plans/{path.name}" for path in (whole / "plans").iterdir())):
            (folder / path).write_bytes((whole / path).read_bytes())

    moment()
    monkeypatch.setattr(report_module.time, "sleep", wait)
    text = report([tmp_path / "run"], watched=True)
    assert "finished at step" in text
    told = capsys.readouterr().err
    assert re.findall(r"^step (\d+): ", told, re.MULTILINE) == ["0", "1", "17", "50", "100"]
    assert "cannot be read now: the record holds no event yet" in told
    assert len(pages) == 5
    assert all("const renewed = 10;" in page for page in pages)
    assert "const renewed = 0;" in (folder / "report.html").read_text()
    assert (folder / "report" / "loss.png").is_file()


def get(address, host=None):
    request = urllib.request.Request(address, headers={} if host is None else {"Host": host})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_served_page_is_that_of_the_run_until_an_interrupt(tmp_path, monkeypatch, capsys):
    """Fetched from a thread between two looks at the run, which has logged more by then."""
    folder, found = tmp_path / "dataflex", []
    simulate(folder, **MIXTURE, stop_step=130)
    lines = (folder / "events.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "events.jsonl").write_bytes(b"".join(lines[:40]))

    def wait(_: float) -> None:
        address = re.findall(r"^step \d+: (http://127.0.0.1:\d+/)$", "".join(capsys.readouterr().err), re.MULTILINE)[0]
        asked = [
            (address, None),
            (address + "report.html?x", "localhost:1"),
            (address, "evil.example"),
            (address + "x", None),
        ]
        with ThreadPoolExecutor() as threads:
            found.append(list(threads.map(get, *zip(*asked, strict=True))))
        with pytest.raises(
            ConfigError, match=r"--port: \d+ on 127.0.0.1 cannot be used \(Address already in use\); name"
        ):
            report([tmp_path], served=True, port=int(address.rsplit(":", 1)[1].strip("/")))
        if len(found) == 2:
            raise KeyboardInterrupt
        (folder / "events.jsonl").write_bytes(b"".join(lines))

    monkeypatch.setattr(report_module.time, "sleep", wait)
    monkeypatch.setattr("dataflex.record.plots.draw", lambda charts: {})
    text = report([tmp_path], served=True, host="localhost", port=0)
    assert "still running, or stopped, at step 130" in text
    for answers in found:
        assert [code for code, _ in answers] == [200, 200, 403, 404]
        assert answers[0][1] == answers[1][1]
        assert "const renewed = 10;" in answers[0][1]
    assert found[0][0][1] != found[1][0][1]
    assert "step 130 of 600" in found[1][0][1]


def test_clients_that_are_none_or_go_away_print_nothing(capfd):
    with serving("127.0.0.1", 0) as server:
        server.page = b"x" * 10_000_000
        host, port = re.findall(r"//(.*):(\d+)/", server.address)[0]
        assert get(server.address, "[")[0] == 403
        for _ in range(3):
            with socket.create_connection((host, int(port))) as client:
                client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not an end
        assert get(server.address)[0] == 200
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"served": True, "host": "0.0.0.0"}, "--host: '0.0.0.0' is not of this machine alone; expected 127.0.0.1"),
        ({"served": True, "host": "example.org"}, "--host: 'example.org' is not of this machine alone"),
        ({"served": True, "port": 65536}, "--port: expected 0 \\(any that is free\\) to 65535, found 65536"),
        ({"port": 80}, "--host and --port say where the page is served; add --serve"),
    ],
)
def test_where_a_page_cannot_be_served_is_told(tmp_path, given, message):
    simulate(tmp_path / "dataflex", **MIXTURE, stop_step=130)
    with pytest.raises(ConfigError, match=message):
        report([tmp_path], **given)


def test_watching_ends_with_an_interrupt_or_at_once_where_there_is_no_run(tmp_path, monkeypatch):
    simulate(tmp_path / "dataflex", **MIXTURE, stop_step=130)

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report_module.time, "sleep", interrupt)
    assert "still running, or stopped, at step 130" in report([tmp_path], watched=True)
    monkeypatch.setattr(report_module.time, "sleep", None)
    with pytest.raises(DataError, match="is not a folder"):
        report([tmp_path / "none"], watched=True)


@pytest.mark.parametrize("how", ["killed", "finished", "goes on"])
def test_watching_ends_with_a_run_that_does_not_tell_its_end(tmp_path, monkeypatch, how):
    """That of a process that is gone at once, and that of a finished one after a minute without anything new."""
    simulate(tmp_path / "dataflex", **MIXTURE, **({} if how == "finished" else {"stop_step": 130}))
    path, slept = tmp_path / "dataflex" / "events.jsonl", []
    if how == "killed":
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        content = path.read_text()
        assert content.count(f'"pid": {os.getpid()}}}') == 1
        path.write_text(content.replace(f'"pid": {os.getpid()}}}', f'"pid": {gone.pid}}}'))
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        slept.append(seconds)
        if now[0] > 600:
            raise KeyboardInterrupt

    monkeypatch.setattr(report_module, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: now[0]))
    monkeypatch.setattr("dataflex.record.plots.draw", lambda charts: {})
    report([tmp_path], watched=True)
    assert len(slept) == {"killed": 0, "finished": 6, "goes on": 61}[how]


@pytest.mark.parametrize(("gap", "minutes"), [(0.0, 10), (240.0, 20)])
def test_watching_ends_with_a_run_elsewhere_that_tells_nothing_any_more(tmp_path, monkeypatch, capsys, gap, minutes):
    """After ten minutes, or five times its longest silence so far; a pause before a resume is none."""
    simulate(tmp_path / "dataflex", **MIXTURE, stop_step=130)
    path = tmp_path / "dataflex" / "events.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    events[0]["process"] = {"host": "elsewhere", "pid": 1}
    for number, event in enumerate(events):
        event["time"] = 1000.0 + number + (gap - 1 if number >= 5 and gap else 0.0)
    again = {**events[0], "time": events[-1]["time"] + 90000.0}
    path.write_text("".join(json.dumps(event) + "\n" for event in [*events, again]))
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        assert now[0] < 10000

    monkeypatch.setattr(report_module, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: now[0]))
    monkeypatch.setattr("dataflex.record.plots.draw", lambda charts: {})
    report([tmp_path], watched=True)
    assert now[0] == 60.0 * minutes
    assert f"no news for {minutes} minutes of a process that is not on this machine" in capsys.readouterr().err


def test_drawing_opens_no_pyplot_and_reading_needs_neither_torch_nor_matplotlib(tmp_path):
    simulate(tmp_path / "dataflex", **SELECTION)
    code = (
        "import sys, pathlib\n"
        "from dataflex.record.report import report\n"
        "assert not {'torch', 'matplotlib', 'bokeh'} & set(sys.modules)\n"
        "report([pathlib.Path(sys.argv[1])])\n"
        "assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code, tmp_path], check=True)
