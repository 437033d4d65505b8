"""Commands whose stdin, stdout or stderr is closed, full, or a pipe that nobody reads to its end."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

DATAFLEX = "import sys; from dataflex_llm import main; sys.exit(main())"


def code_of(command: str, redirected: str, unbuffered: str = "") -> tuple[int, str]:
    """Exit code and stderr of a command, as a shell starts it; ``unbuffered``: 1 where Python keeps nothing back."""
    line = f"{sys.executable} -c '{DATAFLEX}' {command} {redirected}"
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, env=env)
    return done.returncode, done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("command", "redirected", "code"),
    [
        ("methods", ">&-", 0),
        ("methods --json", ">&- 2>&-", 0),
        ("init", "<&-", 2),
        ("nosuch", "2>&-", 2),
        ("nosuch", "2>/dev/full", 2),
        ("methods", ">/dev/full", 2),
        ("methods", "> >(true)", 0),
        ("schema", "| head -1; exit ${PIPESTATUS[0]}", 0),
        ("nosuch", "2>&1 | true; exit ${PIPESTATUS[0]}", 2),
    ],
)
def test_streams_that_lead_nowhere_change_no_exit_code(command, redirected, code, unbuffered):
    found, told = code_of(command, redirected, unbuffered)
    assert found == code
    assert "Traceback" not in told


ENDS = """
import sys, time
from dataflex.cli import guarded
from dataflex.errors import DataError

def act():
    try:
        while True:
            print("a line of a run")
            sys.stdout.flush()
            time.sleep(0.01)
    except OSError as error:
        raise DataError("what a loader makes of it") from error

sys.exit(guarded(act))
"""
BROKEN_ELSEWHERE = """
import sys
from dataflex.cli import guarded

def act():
    raise BrokenPipeError(32, "Broken pipe")  # of a server, say

sys.exit(guarded(act))
"""


def test_work_that_loses_its_reader_has_not_succeeded():
    run = subprocess.Popen([sys.executable, "-c", ENDS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert run.stderr is not None
    run.stdout.readline()
    run.stdout.close()
    assert run.stderr.read() == "dataflex: ended, since the reader of its output has closed it\n"
    assert run.wait() == 1


def test_a_pipe_that_broke_elsewhere_is_a_failure_with_its_trace():
    done = subprocess.run([sys.executable, "-c", BROKEN_ELSEWHERE], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "BrokenPipeError" in done.stderr
    assert "reader" not in done.stderr


def test_children_do_not_print_into_files_that_are_opened_later(tmp_path):
    code = (
        "import subprocess, sys; from dataflex.cli import guarded\n"
        f"act = lambda: open({str(tmp_path / 'file')!r}, 'w') and subprocess.call(['echo', 'into a file'])\n"
        "sys.exit(guarded(act))"
    )
    command = ["bash", "-c", f'{sys.executable} -c "$1" >&-', "bash", code]
    assert subprocess.run(command, check=False, env=os.environ).returncode == 0
    assert (tmp_path / "file").read_text() == ""


def test_ctrl_c_while_modules_are_imported(tmp_path):
    (tmp_path / "numpy.py").write_text("raise KeyboardInterrupt")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", DATAFLEX], capture_output=True, text=True, check=False, env=env)
    assert (done.returncode, done.stderr) == (1, "dataflex: interrupted\n")
