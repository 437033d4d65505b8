"""Messages for writes that the operating system refused: the disk, the reason, and the checkpoint that is complete.

torch, safetensors and Arrow wrap the system's error into their own, some without its number, so all exceptions of
a chain are examined, texts included.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

from dataflex.errors import DataFlexError, chain
from dataflex.state import meant

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (*_FULL, errno.EROFS, errno.EFBIG, errno.EIO)

_NUMBERED = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]|errno: (\d+)")
_WITHOUT_NUMBER = ("PytorchStreamWriter failed", "iostream error", "No space left", "Disk quota exceeded")
"""Texts of torch's writer, which does not give the reason; of C++ streams; of the system, wherever it is quoted."""


class StorageError(DataFlexError):
    """A file could not be written: the disk is full, read-only, or out of quota."""


def storage_problem(error: BaseException, output_dir: Path | None = None) -> str | None:
    """Return a message about the refused write that led to an error, or None where the error has another reason.

    Args:
        error: The exception; those that it was raised from, or during, are examined too.
        output_dir: The run's folder, whose newest complete checkpoint is named.
    """
    reasons = []
    for one in chain(error):
        number, path = _reason(one)
        # A file that may not be read is reported where it is opened; a mistake of the user's has its own text.
        refused = number != errno.EACCES or not (path is None or isinstance(error, DataFlexError))
        if number is not None and refused:
            reasons.append((number, path))
    if not reasons:
        return None
    number, path = next((reason for reason in reasons if reason[1] is not None), reasons[0])
    lines = [_told(number, output_dir if path is None else meant(Path(path)))]
    if isinstance(error, DataFlexError):
        lines.insert(0, str(error))
    if output_dir is not None:
        lines.append(_intact(output_dir))
    return "\n".join(lines)


def place_problem(path: Path) -> str | None:
    """Return why nothing can be written at ``path``, as far as the folders that are there tell, or None."""
    try:
        above = next(folder for folder in path.absolute().parents if folder.exists())
    except OSError as error:
        return f"{path} cannot be written: {error.strerror or error}"
    if not above.is_dir():
        return f"{above} is a file, not a folder"
    if not os.access(above, os.W_OK | os.X_OK):
        return f"{above} cannot be written to; choose another folder or change its permissions"
    return None


def _reason(error: BaseException) -> tuple[int | None, str | None]:
    """Return the system's number of a refused write (0: unknown; None: no refused write) and the path if known."""
    if isinstance(error, OSError) and error.errno in (*_REFUSED, errno.EACCES):
        path = error.filename if error.filename2 is None else error.filename2
        return error.errno, os.fspath(path) if isinstance(path, str | os.PathLike) else None
    text = str(error)
    for match in _NUMBERED.finditer(text):
        number = int(next(group for group in match.groups() if group))
        if number in _REFUSED:
            return number, None
    if isinstance(error, RuntimeError | OSError) or type(error).__module__.startswith(("safetensors", "pyarrow")):
        if any(known in text for known in _WITHOUT_NUMBER):
            return 0, None
    return None, None


def _told(number: int, place: Path | None) -> str:
    free, where = (None, "a file") if place is None else (_free(place), str(place))
    left = "" if free is None else f"; {free / 1e6:,.1f} MB are free on its disk"
    if number in _FULL or (number == 0 and free is not None and free < 2**20):
        return f"the disk is full: {where} cannot be written ({os.strerror(number or errno.ENOSPC)}{left})"
    if number == 0:
        return f"{where} cannot be written: a full disk, a quota, or a limit on the size of files{left}"
    return f"{where} cannot be written: {os.strerror(number)}{left}"


def _free(place: Path) -> int | None:
    for folder in (place, *place.absolute().parents):
        try:
            return shutil.disk_usage(folder).free
        except OSError:
            continue
    return None


def _intact(output_dir: Path) -> str:
    from dataflex.checkpoints import find_resumable

    try:
        newest, passed_over = find_resumable(output_dir)
    except OSError:
        return f"what is left in {output_dir} cannot be read"
    cut = ", ".join(line.partition(":")[0] for line in passed_over)
    left = f"; not written to the end: {cut}" if cut else ""
    if newest is None:
        return f"{output_dir} holds no complete checkpoint{left}"
    return (
        f"{newest} is complete{left}. Make room, then go on from it with 'resume_from_checkpoint={newest}' "
        "(or 'true': the newest complete one)"
    )
