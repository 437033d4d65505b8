"""Where a subset goes, and what lies there: only what an earlier subset wrote is replaced, and other data sets stay."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataflex.config.data import INFO_FILE
from dataflex.core.printable import on_one_line
from dataflex.errors import ConfigError
from dataflex.offline.files import FileRecord

__all__ = ["Place"]

_PROVENANCE = "provenance.json"


@dataclass(frozen=True, kw_only=True)
class Place:
    """A file, or a folder that takes a file for each data set.

    Attributes:
        out: As asked for.
        in_folder: Whether it is a folder.
    """

    out: Path
    in_folder: bool

    @property
    def info(self) -> Path:
        """Entries for ``dataset_info.json``: the folder's own, or a file beside the rows."""
        return self._beside(INFO_FILE)

    @property
    def provenance(self) -> Path:
        """Where the rows are from."""
        return self._beside(_PROVENANCE)

    def _beside(self, name: str) -> Path:
        return self.out / name if self.in_folder else self.out.with_name(f"{self.out.stem}.{name}")

    def entries(self, ours: Mapping[str, Any], files: Sequence[Path], *, overwrite: bool) -> dict[str, Any]:
        """Return what the file of entries is to hold: ``ours``, and those of other data sets that are there.

        Args:
            ours: Entries of the subset.
            files: Files of rows that are to be written.
            overwrite: Whether what is not an earlier subset's may be replaced.

        Raises:
            ConfigError: Everything in the way that is not an earlier subset's.
        """
        before = self._earlier()
        foreign = [str(path) for path in files if os.path.lexists(path) and not _is(path, before.get(path.name))]
        if os.path.lexists(self.provenance) and not before:
            foreign.append(str(self.provenance))
        there = _mapping(self.info)
        if there is None:
            foreign.append(str(self.info))
        kept = {}
        for name, entry in (there or {}).items():
            file = entry.get("file_name") if isinstance(entry, Mapping) else None
            if name in ours and not (isinstance(file, str) and file in before):
                foreign.append(f"{name!r} in {self.info}")
            elif not (isinstance(file, str) and file in before):
                kept[name] = entry
        if foreign and not overwrite:
            raise ConfigError(
                [f"--out: {on_one_line(what)} is there, and no earlier subset wrote it so" for what in foreign]
                + ["--out: name another place, or add --overwrite to replace them"]
            )
        return {**kept, **ours}

    def _earlier(self) -> dict[str, tuple[Any, Any]]:
        """Return size and hash of the files that an earlier subset wrote here, by name."""
        told = _mapping(self.provenance) or {}
        files = told.get("files") if "dataflex" in told else None
        found = [file for file in files if isinstance(file, Mapping)] if isinstance(files, list) else []
        return {str(file.get("path")): (file.get("size"), file.get("blake2b")) for file in found}


def _is(path: Path, known: tuple[Any, Any] | None) -> bool:
    if known is None or path.is_symlink() or not path.is_file():
        return False
    found = FileRecord.of(path)
    return (found.size, found.blake2b) == known


def _mapping(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, an empty one where there is no file; None for anything else, links too."""
    if not os.path.lexists(path):
        return {}
    if path.is_symlink() or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
