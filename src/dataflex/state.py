"""Files that are whole or absent, and states without pickle.

A state is nested dictionaries of JSON values and numpy arrays, saved as one ``.json`` and one ``.npz`` file.
A file is written under another name and renamed, so that a kill leaves the old file or the new one.
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
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import CheckpointError, ComponentError, DataError, DataFlexError

State = dict[str, Any]
"""JSON values and numpy arrays only; saved without pickle."""

_HOST = f"{zlib.crc32(platform.node().encode()):08x}"
_OWNED = re.compile(r"\.(?P<meant>.+)\.(?P<host>[0-9a-f]{8})-(?P<process>\d+)(\.|$)")
_UNFINISHED = re.compile(r"\..+(\.tmp|\.[0-9a-f]{8}\.(npy|ready))")


def owner() -> str:
    """Return the part of a temporary name that identifies this machine and process."""
    return f"{_HOST}-{os.getpid()}"


def aside(path: Path) -> Path:
    """Return the name under which ``path`` is written before it is renamed; what a kill left of it is removed."""
    for name in os.listdir(path.parent):
        if name.startswith(f".{path.name}.") and is_left(name):
            path.with_name(name).unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{owner()}.tmp")


def meant(path: Path) -> Path:
    """Return what a file is written for, where its own name is a temporary one."""
    owned = _OWNED.match(path.name)
    return path if owned is None else path.with_name(owned["meant"])


def is_left(name: str) -> bool:
    """Whether a name is that of an unfinished file of a process of this machine that has ended."""
    owned = _OWNED.match(name)
    if owned is None or owned["host"] != _HOST or int(owned["process"]) == os.getpid():
        return False
    try:
        os.kill(int(owned["process"]), 0)
    except (OSError, OverflowError) as error:
        return isinstance(error, ProcessLookupError)
    return False


def is_unfinished(name: str) -> bool:
    """Whether a name is that of an unfinished file or folder of any process."""
    return _UNFINISHED.fullmatch(name) is not None


def clear_left(folder: Path) -> None:
    """Remove everything unfinished below a folder into which no other process writes."""
    for path in sorted(Path(folder).rglob(".*")):
        if is_unfinished(path.name):
            with suppress(FileNotFoundError):
                remove(path)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


_ARRAY = "__array__"
_FORMAT = 1


def _encode(value: Any, path: str, arrays: dict[str, NDArray[Any]]) -> Any:
    """Return a state as JSON values; its arrays are put into ``arrays`` and referred to by name."""
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
    """Raise ComponentError for the first value that ``save_state`` cannot save, with its path."""
    _encode(state, path, {})


def _decode(value: Any, arrays: dict[str, NDArray[Any]]) -> Any:
    if isinstance(value, list):
        return [_decode(item, arrays) for item in value]
    if isinstance(value, dict):
        if set(value) == {_ARRAY}:
            return arrays[value[_ARRAY]]
        return {key: _decode(item, arrays) for key, item in value.items()}
    return value


def is_absent(value: Any) -> bool:
    """Whether an attribute holds nothing yet: it is None or empty; a number, 0 too, is something."""
    if isinstance(value, np.ndarray):
        return not value.size
    return value is None or (isinstance(value, Sized) and not len(value))


def saved_form(value: Any) -> Any:
    """Return an attribute as a state holds it: tuples as lists, lists as arrays."""
    if isinstance(value, tuple):
        return list(value)
    return np.array(value) if isinstance(value, list) else copy.copy(value)


def restored(value: Any, like: Any) -> Any:
    """Return a value of a state as the attribute that it was: of the type and data type of ``like``."""
    if value is None:
        return None
    if isinstance(like, np.ndarray):
        return np.array(value, dtype=like.dtype)
    if isinstance(like, tuple | list | dict | bool | int | float):
        return type(like)(value)
    return value


def save_state(directory: Path, name: str, state: State) -> None:
    """Write ``directory/name.json`` and ``directory/name.npz``.

    Integers and floats are read back exactly, NaN and infinities included; numpy scalars become Python numbers.

    Raises:
        ComponentError: A value that is neither JSON nor an array, with its path. Tuples, and keys that are not text,
            would be read back as something else and are refused too.
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
        content = read_json(path)
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


def blake2b(*parts: bytes, size: int = 16) -> bytes:
    """Return the BLAKE2b hash, of ``size`` bytes, of bytes one after the other."""
    digest = hashlib.blake2b(digest_size=size)
    for part in parts:
        digest.update(part)
    return digest.digest()


def fsync(path: Path) -> None:
    """Bring a file or directory to the disk; directories only where the system can."""
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def refusals(what: object, error: type[DataFlexError] = CheckpointError, *, key: str = "") -> Iterator[None]:
    """Turn an error of the operating system into ``error``: ``KEY: cannot write WHAT: reason``."""
    try:
        yield
    except OSError as problem:
        raise error(f"{key and f'{key}: '}cannot write {what}: {problem.strerror or problem}") from problem


@contextmanager
def replacing(path: Path, error: type[DataFlexError] | None = DataError) -> Iterator[IO[bytes]]:
    """Open a file beside ``path`` that takes its place when the block ends well, and is removed otherwise.

    Readers see the old content or the new, never a part.

    Args:
        path: The file.
        error: What an error of the operating system becomes; None: it stays as it is.
    """
    with nullcontext() if error is None else refusals(path, error):
        temporary = aside(path)
        temporary.unlink(missing_ok=True)
        try:
            with temporary.open("xb") as file:  # never through a link that lies there
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no JSON, or nested deeper than Python reads.
    """
    return loads_json(path.read_text(encoding="utf-8"))


def loads_json(text: str) -> Any:
    """Return what a JSON text holds; ValueError where it is no JSON, or nested deeper than Python reads."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def write_json(path: Path, body: Mapping[str, Any]) -> None:
    """Write a JSON file as a whole; DataError where the operating system refuses."""
    with replacing(path) as file:
        file.write(json.dumps(body, indent=1).encode() + b"\n")
