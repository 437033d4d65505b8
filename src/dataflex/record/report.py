"""``dataflex report``: what one run did, or several beside each other, as a page, a text, pictures and JSON.

Works on a run that is still going on or was killed. Every file is written aside and renamed, so a
report can be renewed while somebody looks at it, which ``watch`` does.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex.console import tell
from dataflex.errors import ConfigError, DataError, UnsupportedError
from dataflex.printable import Answer, printable
from dataflex.record.read import ENDING, EVENTS
from dataflex.record.recorded import Recorded, recorded
from dataflex.record.serve import PORT, Served, serving
from dataflex.record.summary import summary
from dataflex.record.text import without_prefix
from dataflex.state import read_json, replacing
from dataflex.storage import place_problem
from dataflex.version import install

if TYPE_CHECKING:
    from dataflex.record.chart import Chart, Json

PAGE, DATA, TEXT = "report.html", "report.json", "summary.txt"
TITLE = "<title>DataFlex run "
"""What tells a page of ours, within its first characters."""
_HEAD = 2000
_EVERY = 10.0
"""Seconds between two looks at a run that goes on; longer where a page takes more than a tenth of that."""
_QUIET = 60.0
"""Seconds after which a run that has finished training, and does not tell its end, is over."""

_SILENT = 600.0
"""Seconds without news after which a run is given up whose process cannot be looked for; longer where it has been
silent for more than a fifth of that before."""


def require_drawing() -> None:
    """Raise UnsupportedError if what draws pages and pictures is not installed; imports nothing."""
    missing = [name for name in ("bokeh", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise UnsupportedError(f"a report needs {' and '.join(missing)}; install the extra: {install('report')}")


def report(
    run_dirs: Sequence[Path | str],
    out: Path | None = None,
    *,
    watched: bool = False,
    served: bool = False,
    host: str | None = None,
    port: int | None = None,
) -> Answer:
    """Write the page and, in the folder ``report``, the summary, the page's values and its pictures.

    Pictures of an earlier report that have no data any more are removed. The first run is the one that is told of;
    the others are what it is compared with.

    Args:
        run_dirs: The runs' ``output_dir``, or the ``dataflex`` folders in them.
        out: Folder for all files; None: the page in the first run's ``<output_dir>/dataflex``, the rest in ``report``.
        watched: Renew the page while the first run goes on, and write the rest once it has ended.
        served: The same until Ctrl-C, and serve the page on this machine.
        host: Loopback address to serve at; None: 127.0.0.1.
        port: Port to serve at; None: 8765.

    Returns:
        The summary and the files' paths, and what the page says.

    Raises:
        DataError: A folder has neither a record nor logs, nothing of it can be read, or ``out`` cannot be written.
        ConfigError: The page cannot be served at this address.
        UnsupportedError: The extra ``report`` is not installed.
    """
    require_drawing()
    from dataflex.record.charts import CHARTS
    from dataflex.record.plots import draw

    if out is not None:
        _refuse_place(Path(out), [PAGE, DATA, TEXT, *(f"{name}.png" for name in CHARTS)])
    if served:
        with serving(host or "127.0.0.1", PORT if port is None else port) as server:
            _watch(run_dirs, out, server)
    elif host is not None or port is not None:
        raise ConfigError("--host and --port say where the page is served; add --serve")
    elif watched:
        _watch(run_dirs, out)
    view, folder, made, told, content = _page(run_dirs, out)
    pictures = draw(made)
    values = json.dumps(told, allow_nan=False) + "\n"
    contents = {
        (view.folder if out is None else folder) / PAGE: content,
        folder / DATA: values.encode(),
        **{folder / name: picture for name, picture in pictures.items()},
    }
    files = [folder / TEXT, *contents]
    text = summary(view.run, view.title, view.weighed, view.found, view.left_out)
    text = printable(text + "\nFiles\n" + "".join(f"  {file}\n" for file in files))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in CHARTS:
            if f"{name}.png" not in pictures:
                (folder / f"{name}.png").unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot write the report to {folder}: {error.strerror or error}; name another folder with --out"
        ) from error
    for path, content in {**contents, folder / TEXT: text.encode("utf-8", "backslashreplace")}.items():
        with replacing(path) as file:
            file.write(content)
    return Answer(text, told)


def _refuse_place(out: Path, names: Sequence[str]) -> None:
    """Raise DataError where no report can be written, or files of its names are there that no report wrote."""
    problem = f"{out} is a file, not a folder" if out.is_file() else place_problem(out / PAGE)
    if problem:
        raise DataError(f"--out: {problem}")
    there = [name for name in names if os.path.lexists(out / name)]
    if there and not _wrote(out):
        raise DataError(
            f"--out: {out / there[0]} is there, and no report wrote it; name another folder, or move it away"
        )


def _wrote(folder: Path) -> bool:
    """Whether a folder holds a report's page, which is written first, or its values."""
    try:
        with open(folder / PAGE, encoding="utf-8", errors="replace") as file:
            if TITLE in file.read(_HEAD):
                return True
    except OSError:
        pass
    try:
        told = read_json(folder / DATA)
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and {"dataflex", "sections"} <= told.keys()


def _page(
    run_dirs: Sequence[Path | str], out: Path | None, renewed_after: float | None = None
) -> tuple[Recorded, Path, dict[str, Chart], Json, bytes]:
    """Return the first run, the folder for files, all charts, what the page says, and the page."""
    from dataflex.record.charts import charts
    from dataflex.record.page import page
    from dataflex.record.samples import rows_section
    from dataflex.record.sections import report_of

    runs = _titled([recorded(run_dir) for run_dir in run_dirs])
    view = runs[0]
    folder = _inside(view.folder, Path(run_dirs[0])) if out is None else Path(out)
    made = charts(runs)
    told = report_of(runs, made, rows_section(view))
    return view, folder, made, told, page(told, made, renewed_after).encode("utf-8", "backslashreplace")


def _watch(run_dirs: Sequence[Path | str], out: Path | None, server: Served | None = None) -> None:
    """Write the page anew whenever the first run has recorded something, until it is over or Ctrl-C is pressed.

    With a ``server`` only Ctrl-C ends it. What cannot be read at a moment, such as the record of a run that begins
    anew, is told and tried again.
    """
    first, every = Path(run_dirs[0]), _EVERY
    seen: list[tuple[int, int]] | None = None
    files = [folder / name for folder in (first / "dataflex", first) for name in (EVENTS, ENDING)]
    try:
        while True:
            began = time.monotonic()
            now = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
            try:
                if now != seen:
                    view, folder, _, _, content = _page(run_dirs, out, every)
                    folder.mkdir(parents=True, exist_ok=True)
                    place = (view.folder if out is None else folder) / PAGE
                    with replacing(place) as file:
                        file.write(content)
                    if server is not None:
                        server.page = content
                    tell(f"step {view.run.steps_done}: {place if server is None else server.address}")
                    changed = began
                if server is None and _is_over(view, began - changed):
                    return
                if server is None and began - changed >= (limit := _patience(view)):
                    told = f"no news for {limit / 60:.0f} minutes of a process that is not on this machine"
                    tell(f"{told}: the run seems to have been killed, and is not watched any more")
                    return
            except (DataError, OSError) as error:
                if not seen:
                    raise
                tell(f"cannot be read now: {error}")
            seen, every = now, max(_EVERY, 10 * (time.monotonic() - began))
            time.sleep(every)
    except KeyboardInterrupt:
        tell("the page is not renewed any more")


def _is_over(view: Recorded, quiet_seconds: float) -> bool:
    """Whether nothing more will come of a run: its process ended or is gone, or it is finished and has been quiet."""
    finished = view.run.finished is not None and quiet_seconds >= _QUIET
    return finished or (view.folder / ENDING).is_file() or _is_gone(view.run.started.get("process") or {})


def _patience(view: Recorded) -> float:
    """Return the seconds without news after which a run is given up: none where its process can be looked for."""
    if _is_here(view.run.started.get("process") or {}):
        return math.inf
    times = [[event["time"] for event in process] for process in view.run.processes]
    longest = max((after - before for each in times for before, after in pairwise(each)), default=0.0)
    return max(_SILENT, 5 * longest)


def _is_here(process: Mapping[str, Any]) -> bool:
    return process.get("pid") is not None and process.get("host") == socket.gethostname()


def _is_gone(process: Mapping[str, Any]) -> bool:
    """Whether a process is not there any more; False for one of another machine, of which that is not known."""
    if not _is_here(process):
        return False
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # of another user
        return False
    return False


def _titled(runs: Sequence[Recorded]) -> list[Recorded]:
    """Return the runs without what all of their titles begin with.

    Raises:
        DataError: The same run is given twice.
    """
    titles = [each.title for each in runs]
    twice = next((title for at, title in enumerate(titles) if title in titles[:at]), None)
    if twice is not None:
        raise DataError(f"{twice} is given twice; a run is compared with other ones")
    return [replace(each, title=title) for each, title in zip(runs, without_prefix(titles, "/"), strict=True)]


def _inside(folder: Path, run_dir: Path) -> Path:
    """Return the report's place in a record's folder.

    Raises:
        DataError: A link there leads out of the run's folder, where nothing is the report's to replace.
    """
    out = folder / "report"
    try:
        leads, home = out.resolve(), run_dir.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise DataError(f"cannot write the report to {out}: {error}; name another folder with --out") from error
    if not leads.is_relative_to(home):
        raise DataError(f"{out} is a link that leads out of the run's folder, to {leads}; name a folder with --out")
    return out
