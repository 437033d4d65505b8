"""Lines and progress bars on stderr.

The Trainer's bars are tqdm's, so lines are written through it, and passes over rows are shown by its bars; where
stderr is no terminal, by a line now and then.
"""

from __future__ import annotations

import logging
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout, suppress
from typing import IO

from dataflex.ending import to_nowhere
from dataflex.errors import chain
from dataflex.printable import shown

logger = logging.getLogger(__name__)

VERBOSE = "DATAFLEX_VERBOSE"
"""Environment variable that makes the log of every rank tell more; ``dataflex train --verbose`` sets it."""
_LINE_SECONDS = 30.0
_BAR_AFTER_SECONDS = 1.0


def tell(text: str) -> None:
    """Write lines to stderr, above progress bars if there are any, without secrets and control characters."""
    text = shown(text, sys.stderr)
    tqdm = sys.modules.get("tqdm")
    with suppress(OSError):  # nobody reads it: what is told ends nothing, and changes no exit code
        if tqdm is None:
            sys.stderr.write(text + "\n")
        else:
            tqdm.tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()


def write(text: str) -> None:
    """Write an answer to stdout, or as much of it as its reader wants."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        to_nowhere(sys.stdout.fileno())


def flush_streams() -> None:
    """Write out stdout and stderr, or let one that refuses it lead nowhere: else Python's own exit code is 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            to_nowhere(stream.fileno())


def lost_reader(error: BaseException) -> bool:
    """Return whether the command failed since what reads its stdout or stderr has closed it; both then lead nowhere."""
    if not any(isinstance(one, BrokenPipeError) for one in chain(error)):
        return False
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        poll.register(stream.fileno(), 0)
    lost = [number for number, event in poll.poll(0) if event & select.POLLERR]
    for stream in (sys.stdout, sys.stderr):
        if stream.fileno() in lost:
            to_nowhere(stream.fileno())
    return bool(lost)


def open_closed_streams() -> None:
    """Let stdin, stdout and stderr that were closed (``>&-``) lead nowhere, for this process and its children.

    Else the next file that is opened would be the one that children, and libraries in C, print into.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            with suppress(OSError):
                os.fstat(number)
                continue
            nowhere = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            os.set_inheritable(nowhere, True)
            setattr(sys, name, open(nowhere, "w" if number else "r", encoding="utf-8", closefd=False))


def answers() -> bool:
    """Return whether somebody at a terminal can answer questions."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def ask(question: str) -> str:
    """Return the line that is typed in answer to a question on stderr."""
    sys.stderr.write(question)
    sys.stderr.flush()
    return sys.stdin.readline().strip()


def others_aside() -> AbstractContextManager[object]:
    """Send what other code prints to stderr, so that stdout has only what was asked for."""
    return redirect_stdout(sys.stderr)


def child_stdout() -> IO[str] | None:
    """Return where a child's stdout goes: stderr inside ``others_aside``, else None, which is the same as ours."""
    return sys.stderr if sys.stdout is sys.stderr else None


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            tell(self.format(record))
        except Exception:  # noqa: BLE001 (as every handler: a log line ends no run)
            self.handleError(record)


def verbose() -> bool:
    """Whether more than the short lines is asked for."""
    return os.environ.get(VERBOSE, "0") not in ("", "0")


def show_log() -> None:
    """Show our own log lines on stderr, on rank 0, with details if asked for; of other ranks warnings."""
    ours = logging.getLogger("dataflex")
    if not any(isinstance(handler, _Lines) for handler in ours.handlers):
        handler = _Lines()
        handler.setFormatter(logging.Formatter("[dataflex] %(message)s"))
        ours.addHandler(handler)
        ours.propagate = False
    level = logging.DEBUG if verbose() else logging.INFO
    ours.setLevel(level if os.environ.get("RANK", "0") == "0" else logging.WARNING)


@contextmanager
def progress(what: str | None, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show the progress of a pass, if the log is shown; return a function that takes the number of finished rows.

    Args:
        what: Purpose of the pass; None shows nothing.
        total: Number of rows.
        done: Rows that an earlier try has finished.
    """
    if what is None or not logger.isEnabledFor(logging.INFO):
        yield lambda _: None
    elif sys.stderr.isatty():
        from tqdm.auto import tqdm

        with tqdm(
            desc=what, total=total, initial=done, delay=_BAR_AFTER_SECONDS, unit="row", leave=False, dynamic_ncols=True
        ) as bar:

            def draw(count: int) -> None:
                bar.update(count - bar.n)

            yield draw
    else:
        yield _in_lines(what, total, done)


def _in_lines(what: str, total: int, first: int) -> Callable[[int], None]:
    started = last = time.perf_counter()
    several = False

    def report(done: int) -> None:
        nonlocal last, several
        now = time.perf_counter()
        if now - last < _LINE_SECONDS and not (done >= total and several):
            return
        last, several = now, True
        left = (now - started) / max(done - first, 1) * (total - done)
        logger.info("%s: %d of %d rows, %.0f s so far, %.0f s left", what, done, total, now - started, left)

    return report
