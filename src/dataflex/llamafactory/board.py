"""``dataflex webui``: LLaMA-Factory's web UI, whose runs are trained by ``dataflex train``.

A run is a DataFlex run where its extra arguments hold a ``dynamic`` block. Upstream facts relied upon: the UI starts
the ``llamafactory-cli train FILE`` that is found on PATH, sets ``LLAMABOARD_ENABLED`` and ``LLAMABOARD_WORKDIR`` for
it, and shows ``running_log.txt`` of that folder; ``tests/llamafactory/test_board.py`` starts a run as the UI does.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import WatchedFileHandler
from pathlib import Path

from dataflex.config.args import env_enabled

_COMMAND = """#!/bin/sh
if [ "$1" = train ]; then exec {python} -m dataflex "$@"; fi
exec {python} -c 'import sys; from llamafactory.cli import main; sys.argv[0] = "llamafactory-cli"; main()' "$@"
"""


@contextmanager
def our_command() -> Iterator[Path]:
    """Put a ``llamafactory-cli`` on PATH whose ``train`` is ours; gives its folder."""
    before = os.environ.get("PATH", "")
    with tempfile.TemporaryDirectory(prefix="dataflex-") as folder:
        command = Path(folder) / "llamafactory-cli"
        command.write_text(_COMMAND.format(python=shlex.quote(sys.executable)), encoding="utf-8")
        command.chmod(0o755)
        os.environ["PATH"] = f"{folder}{os.pathsep}{before}"
        try:
            yield Path(folder)
        finally:
            os.environ["PATH"] = before


def webui() -> int:
    """Serve LLaMA-Factory's web UI until it is stopped, and return 0."""
    from llamafactory.webui.interface import run_web_ui

    with our_command():
        run_web_ui()
    return 0


@contextmanager
def lines_shown() -> Iterator[None]:
    """Write our log where the web UI shows it, in a run that it started."""
    folder = os.environ.get("LLAMABOARD_WORKDIR")
    if not env_enabled("LLAMABOARD_ENABLED") or not folder:
        yield
        return
    # LLaMA-Factory removes the file when training begins, which this handler notices.
    handler = WatchedFileHandler(Path(folder) / "running_log.txt", encoding="utf-8", delay=True)
    handler.setLevel(logging.INFO)
    handler.setFormatter(logging.Formatter("[%(levelname)s|%(asctime)s] %(name)s >> %(message)s", "%Y-%m-%d %H:%M:%S"))
    ours = logging.getLogger("dataflex")
    ours.addHandler(handler)
    try:
        yield
    finally:
        ours.removeHandler(handler)
        handler.close()
