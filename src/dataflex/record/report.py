"""``dataflex report``: one run's summary and plots, written beside its record.

Works on a run that is still going on or was killed. Every file is written aside and renamed, so a
report can be renewed while somebody looks at it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dataflex.errors import DataError
from dataflex.printable import printable
from dataflex.record.digest import digest
from dataflex.record.read import EVENTS, read_ending, read_found, read_record, read_weights, record_dir
from dataflex.record.summary import summary
from dataflex.state import replacing


def report(run_dir: Path, out: Path | None = None) -> str:
    """Write ``summary.txt`` and the plots that there is data for; return the summary and the files' paths.

    Plots of an earlier report that have no data any more are removed.

    Args:
        run_dir: The run's ``output_dir``, or the ``dataflex`` folder in it.
        out: Folder for the files; ``<output_dir>/dataflex/report`` when None.

    Raises:
        DataError: The folder has no record, nothing of it can be read, or ``out`` cannot be written.
    """
    from dataflex.record.plots import PLOTS, draw

    folder = record_dir(run_dir)
    events, left_out = read_record(folder)
    if left_out and not events:
        raise DataError(f"{folder / EVENTS} is damaged: none of its lines is an event, such as {left_out[0]}")

    def readable(read: Callable[..., Any], *arguments: str) -> Any:
        try:
            return read(folder, *arguments)
        except DataError as error:
            left_out.append(str(error).removeprefix(f"{folder}/"))
            return None

    run = digest([*events, *(readable(read_ending) or [])])
    weighed = readable(read_weights)
    found = readable(read_found, run.methods["mixer"][0]) if "mixer" in run.methods else None
    out = _inside(folder, Path(run_dir)) if out is None else Path(out)
    title = str(folder.parent if folder.name == "dataflex" else folder)
    pictures = draw(run)
    files = [out / "summary.txt", *(out / name for name in pictures)]
    told = summary(run, title, weighed, found, left_out)
    text = printable(told + "\nFiles\n" + "".join(f"  {file}\n" for file in files))
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in PLOTS:
            if name not in pictures:
                (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot write the report to {out}: {error.strerror or error}; name another folder with --out"
        ) from error
    for name, picture in {**pictures, "summary.txt": text.encode("utf-8", "backslashreplace")}.items():
        with replacing(out / name) as file:
            file.write(picture)
    return text


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
