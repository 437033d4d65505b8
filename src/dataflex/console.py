"""What a run writes to stderr: lines that go beside progress bars, and how far a pass over rows is.

The Trainer's bars are tqdm's, so lines are written through it and passes are told by its bars; where stderr is no
terminal, by a line now and then.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dataflex.printable import LogFormatter, shown

logger = logging.getLogger(__name__)

_LINE_SECONDS = 30.0
_BAR_AFTER_SECONDS = 1.0


def tell(text: str) -> None:
    """Write lines to stderr, above progress bars if there are any, as ``shown`` has them."""
    text = shown(text, sys.stderr)
    tqdm = sys.modules.get("tqdm")
    if tqdm is None:
        sys.stderr.write(text + "\n")
    else:
        tqdm.tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            tell(self.format(record))
        except Exception:  # noqa: BLE001 (as every handler: a log line ends no run)
            self.handleError(record)


def show_log() -> None:
    """Show our own log lines on stderr, on rank 0; of other ranks warnings."""
    ours = logging.getLogger("dataflex")
    if not any(isinstance(handler, _Lines) for handler in ours.handlers):
        handler = _Lines()
        handler.setFormatter(LogFormatter("[dataflex] %(message)s"))
        ours.addHandler(handler)
        ours.propagate = False
    ours.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)


@contextmanager
def progress(what: str | None, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Tell how far a pass is, if the log is shown; takes the number of rows done so far.

    Args:
        what: What the pass is for; None tells nothing.
        total: Rows in all.
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
        yield _told_in_lines(what, total, done)


def _told_in_lines(what: str, total: int, first: int) -> Callable[[int], None]:
    started = told = time.perf_counter()
    several = False

    def report(done: int) -> None:
        nonlocal told, several
        now = time.perf_counter()
        if now - told < _LINE_SECONDS and not (done >= total and several):
            return
        told, several = now, True
        left = (now - started) / max(done - first, 1) * (total - done)
        logger.info("%s: %d of %d rows, %.0f s so far, %.0f s left", what, done, total, now - started, left)

    return report
