"""Files that are whole or absent: states without pickle, directories with a manifest.

A state is nested dictionaries of JSON values and numpy arrays, saved as one ``.json`` and one ``.npz``.
A directory is written aside, its manifest last, and renamed, so that a kill at any moment leaves the
old directory, the new one, or none; never a broken one that looks whole.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import CheckpointError, ComponentError, DataError, DataFlexError

State = dict[str, Any]
"""JSON values and numpy arrays only; saved without pickle."""

_HOST = f"{zlib.crc32(platform.node().encode()):08x}"
_OWNED = re.compile(r"\..+\.([0-9a-f]{8})-(\d+)(\.|$)")
_LEFT = re.compile(r"\..+(\.tmp|\.new-aside|\.old-aside|\.[0-9a-f]{8}\.(npy|ready))")


def owner() -> str:
    """Return the part of a name that tells this machine and process."""
    return f"{_HOST}-{os.getpid()}"


def aside(path: Path) -> Path:
    """Return the name under which ``path`` is written before it is renamed; leftovers of the same file go."""
    path = Path(path)
    with os.scandir(path.parent) as entries:
        left = [entry.path for entry in entries if entry.name.startswith(f".{path.name}.") and is_left(entry.name)]
    for name in left:
        Path(name).unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{owner()}.tmp")


def is_left(name: str) -> bool:
    """Whether a name is that of something unfinished whose process on this machine is gone."""
    owned = _OWNED.match(name)
    if owned is None or owned[1] != _HOST or int(owned[2]) == os.getpid():
        return False
    try:
        os.kill(int(owned[2]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def is_unfinished(name: str) -> bool:
    """Whether a name is one that we give to what is not finished, whoever writes it."""
    return _LEFT.fullmatch(name) is not None


def clear_left(folder: Path) -> None:
    """Remove everything unfinished below a folder that nobody else writes into."""
    for path in sorted(Path(folder).rglob(".*")):
        if is_unfinished(path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


MANIFEST = "manifest.json"

_ARRAY = "__array__"
_FORMAT = 1


def _encode(value: Any, path: str, arrays: dict[str, NDArray[Any]]) -> Any:
    """Turn a state into JSON values; arrays are put into ``arrays`` and referred to by name."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str) or key == _ARRAY:
                raise ComponentError(f"state {path}: key {key!r} cannot be saved; keys must be text, not {_ARRAY!r}")
        return {key: _encode(item, f"{path}.{key}", arrays) for key, item in value.items()}
    if isinstance(value, list):
        return [_encode(item, f"{path}[{i}]", arrays) for i, item in enumerate(value)]
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        name = f"a{len(arrays)}"
        arrays[name] = value
        return {_ARRAY: name}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ComponentError(
        f"state {path}: a {type(value).__name__} cannot be saved; use dicts, lists, numbers, text and numpy arrays"
    )


def refuse_state(state: State, path: str) -> None:
    """Refuse what ``save_state`` could not save.

    Raises:
        ComponentError: The first such value, with its path.
    """
    _encode(state, path, {})


def _decode(value: Any, arrays: dict[str, NDArray[Any]]) -> Any:
    if isinstance(value, list):
        return [_decode(item, arrays) for item in value]
    if isinstance(value, dict):
        if set(value) == {_ARRAY}:
            return arrays[value[_ARRAY]]
        return {key: _decode(item, arrays) for key, item in value.items()}
    return value


def saved_form(value: Any) -> Any:
    """Return an attribute as a state holds it: tuples as lists, lists as arrays, objects as their ``state_dict``."""
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, list):
        return np.array(value)
    return value.state_dict() if hasattr(value, "state_dict") else copy.copy(value)


def restored(value: Any, like: Any) -> Any:
    """Return a value of a state as the attribute that it was: of the type and data type of ``like``."""
    if isinstance(like, np.ndarray):
        return np.array(value, dtype=like.dtype)
    if isinstance(like, tuple | list | dict | bool | int | float):
        return type(like)(value)
    if hasattr(like, "load_state_dict"):
        like.load_state_dict(value)
        return like
    return value


def save_state(directory: Path, name: str, state: State) -> None:
    """Write ``directory/name.json`` and ``directory/name.npz``.

    Integers and floats come back exactly, NaN and infinities included; numpy scalars come back as
    Python numbers, arrays with their dtype and shape.

    Raises:
        ComponentError: A value that is neither JSON nor an array, with its path (tuples and keys that
            are not text would come back as something else, so they are refused).
    """
    arrays: dict[str, NDArray[Any]] = {}
    encoded = _encode(state, name, arrays)
    text = json.dumps({"format": _FORMAT, "num_arrays": len(arrays), "state": encoded}, indent=1)
    (Path(directory) / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    with open(Path(directory) / f"{name}.npz", "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def load_state(directory: Path, name: str) -> State:
    """Read what ``save_state`` wrote.

    Raises:
        CheckpointError: A file is missing, broken, or of another format.
    """
    path = Path(directory) / f"{name}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise CheckpointError(f"{path} has format {content['format']!r}; this version reads {_FORMAT}")
        path = path.with_name(f"{name}.npz")
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        state: State = _decode(content["state"], arrays)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is broken: {type(error).__name__}: {error}") from error
    return state


def fsync(path: Path) -> None:
    """Bring a file or directory to the disk; directories only where the system can."""
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _blake2b(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


@contextmanager
def replacing(path: Path, error: type[DataFlexError] | None = DataError) -> Iterator[IO[bytes]]:
    """Open a file beside ``path`` that takes its place when the block ends well, and vanishes otherwise.

    Readers see the old content or the new, never a part.

    Args:
        path: The file.
        error: What an error of the operating system becomes; None: it stays as it is.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        temporary = aside(path)
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # never through a link that lies there
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync(path.parent)
    except OSError as problem:
        if error is None:
            raise
        raise error(f"cannot write {path}: {problem.strerror or problem}") from problem
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, body: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all.

    Raises:
        DataError: The place cannot be written.
    """
    with replacing(path) as file:
        file.write(json.dumps(body, indent=1).encode() + b"\n")


def write_directory(final: Path, fill: Callable[[Path], None]) -> None:
    """Write a directory as a whole or not at all, replacing what was there.

    ``fill`` writes into a temporary sibling; a manifest with size and hash of every file comes last;
    everything is brought to the disk before the rename. An existing directory is moved aside first: a
    kill between the two renames leaves none, and what is left aside is removed by the next write.

    Args:
        final: Path of the directory.
        fill: Writes the files into the path that it is given.

    Raises:
        CheckpointError: The operating system refused (read-only, full disk), with its reason.
    """
    final = Path(final)
    temporary, old = (final.with_name(f".{final.name}.{what}-aside") for what in ("new", "old"))
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        for left in (temporary, old):
            if left.exists():  # of a write that was killed
                shutil.rmtree(left)
        temporary.mkdir()
        try:
            fill(temporary)
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            entries = {
                path.relative_to(temporary).as_posix(): {"size": path.stat().st_size, "blake2b": _blake2b(path)}
                for path in files
            }
            assert MANIFEST not in entries, f"{MANIFEST} is written here, not by fill"
            manifest = temporary / MANIFEST
            manifest.write_text(json.dumps({"format": _FORMAT, "files": entries}, indent=1) + "\n", encoding="utf-8")
            for path in [*files, manifest, *(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
                fsync(path)
            if final.exists():
                os.rename(final, old)
            os.rename(temporary, final)
            fsync(final.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"cannot write {final}: {error}") from error


def verify_directory(directory: Path) -> dict[str, Any]:
    """Check a directory against its manifest.

    Returns:
        The manifest: ``{"format": 1, "files": {path: {"size": bytes, "blake2b": hex}}}``.

    Raises:
        CheckpointError: The file that is missing or broken.
    """
    path = Path(directory) / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            raise CheckpointError(f"{path} has format {manifest['format']!r}; this version reads {_FORMAT}")
        for name, entry in manifest["files"].items():
            path = Path(directory) / name
            size = path.stat().st_size
            if size != entry["size"]:
                raise CheckpointError(f"{path} is broken: {size:,} bytes, {entry['size']:,} were written")
            if _blake2b(path) != entry["blake2b"]:
                raise CheckpointError(f"{path} is broken: its content is not what was written")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: the directory was not written to the end") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is broken: {type(error).__name__}: {error}") from error
    return manifest
