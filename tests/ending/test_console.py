"""Lines and bars on stderr: none glued to another, one bar a pass on a terminal, few lines where there is none."""

from __future__ import annotations

import ast
import fcntl
import logging
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

import dataflex
from dataflex import console

SCRIPT = """
import logging, time
from tqdm.auto import tqdm
from dataflex import console
console._BAR_AFTER_SECONDS = 0.0
console.show_log()
log = logging.getLogger("dataflex.train.anything")
bar = tqdm(total=3, desc="training")
for step in range(3):
    bar.update(1)
    with console.progress("losses of rows", 40) as told:
        for done in range(10, 41, 10):
            time.sleep(0.11)
            told(done)
    log.info("interval %d decided", step)
console.tell("dataflex: last words")
bar.close()
"""


def on_a_terminal(code: str) -> str:
    """Run Python code with a pseudo-terminal as stderr and return what it wrote there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=theirs)
    os.close(theirs)
    written = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # Linux tells the end of a terminal this way
            break
        if not piece:
            break
        written += piece
    os.close(ours)
    assert process.wait(timeout=60) == 0
    return written.decode()


def visible(text: str) -> list[str]:
    """What stands on the lines of a terminal: the text after the last return to their beginning."""
    return [line.rstrip("\r").rpartition("\r")[2].strip() for line in text.replace("\x1b[A", "\n").split("\n")]


def test_lines_are_not_glued_to_bars_on_a_terminal():
    text = on_a_terminal(SCRIPT)
    shown = visible(text)
    for step in range(3):
        assert f"[dataflex] interval {step} decided" in shown
    assert "dataflex: last words" in shown
    assert text.count("losses of rows") >= 3  # drawn as a bar of its own
    assert "losses of rows: 100%" in text
    assert not [line for line in shown if line.startswith("[dataflex]") and "losses of rows" in line]


def test_lines_are_not_glued_to_bars_in_a_file():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True)
    shown = visible(done.stderr)
    for step in range(3):
        assert f"[dataflex] interval {step} decided" in shown
    assert "dataflex: last words" in shown
    assert "losses of rows" not in done.stderr  # short passes are told by nothing


@pytest.fixture
def shown(monkeypatch, capsys):
    """The log as it is shown, with a clock that the test sets."""
    ours = logging.getLogger("dataflex")
    before = ours.handlers[:], ours.level, ours.propagate
    ours.handlers[:] = []
    console.show_log()
    clock = [0.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: clock[0])
    yield clock, lambda: capsys.readouterr().err.splitlines()
    ours.handlers[:], ours.level, ours.propagate = before


def test_a_long_pass_is_told_by_few_lines(shown):
    clock, lines = shown
    with console.progress("losses", 100, 20) as told:
        for done in range(21, 101):
            clock[0] += 1.0
            told(done)
    assert lines() == [
        "[dataflex] losses: 50 of 100 rows, 30 s so far, 50 s left",
        "[dataflex] losses: 80 of 100 rows, 60 s so far, 20 s left",
        "[dataflex] losses: 100 of 100 rows, 80 s so far, 0 s left",
    ]


def test_lines_of_the_log_hold_no_secrets(shown):
    logging.getLogger("dataflex.x").info("kept \x1b[31m%s", "hub_token=s3cr3t")
    assert shown[1]() == [r"[dataflex] kept \x1b[31mhub_token=***"]


def test_nothing_is_told_of_a_pass_without_words_or_on_another_rank(shown, monkeypatch):
    clock, lines = shown
    for what, rank in ((None, "0"), ("losses", "1")):
        monkeypatch.setenv("RANK", rank)
        console.show_log()
        with console.progress(what, 10) as told:
            clock[0] += 100.0
            told(10)
    assert lines() == []


@pytest.mark.slow
def test_there_is_one_way_to_stderr():
    """No module but the console's makes handlers or bars, or writes to stderr."""
    found = []
    for path in Path(dataflex.__file__).parent.rglob("*.py"):
        if path.name in ("console.py", "ending.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            inside = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sys"
            if name == "StreamHandler" or module.startswith("tqdm") or (inside and name == "stderr"):
                found.append(f"{path.name}: {name or module}")
    assert found == []
