"""``dataflex report``: one run's summary and plots, written beside its record.

Works on a run that is still going on or was killed. Every file is written aside and renamed, so a
report can be renewed while somebody looks at it.
"""

from __future__ import annotations

from pathlib import Path

from dataflex.errors import DataError
from dataflex.record.digest import digest
from dataflex.record.plots import PLOTS, draw
from dataflex.record.read import read_ending, read_events, read_found, read_weights, record_dir
from dataflex.record.summary import mixer_of, summary
from dataflex.record.values import replacing

__all__ = ["report"]


def report(run_dir: Path, out: Path | None = None) -> str:
    """Write ``summary.txt`` and the plots that there is data for; return the summary and the files' paths.

    Plots of an earlier report that have no data any more are removed.

    Args:
        run_dir: The run's ``output_dir``, or the ``dataflex`` folder in it.
        out: Folder for the files; ``<output_dir>/dataflex/report`` when None.

    Raises:
        DataError: The folder has no record, the record is damaged or empty, or ``out`` cannot be written.
    """
    folder = record_dir(run_dir)
    run = digest([*read_events(folder), *read_ending(folder)])
    out = folder / "report" if out is None else Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot write the report to {out}: {error.strerror or error}; name another folder with --out"
        ) from error
    title = str(folder.parent if folder.name == "dataflex" else folder)
    pictures = draw(run)
    files = [out / "summary.txt", *(out / name for name in pictures)]
    text = (
        summary(run, title, read_weights(folder), read_found(folder, mixer_of(run)))
        + "\nFiles\n"
        + "".join(f"  {file}\n" for file in files)
    )
    for name in PLOTS:
        if name not in pictures:
            (out / name).unlink(missing_ok=True)
    for name, picture in {**pictures, "summary.txt": text.encode("utf-8", "backslashreplace")}.items():
        with replacing(out / name) as file:
            file.write(picture)
    return text
