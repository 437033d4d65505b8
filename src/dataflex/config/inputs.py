"""What a run is made of beside its settings, by content: data sets with their entries, and files and models.

Runs that were made before are known by it: of anything else they are not taken.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import xxhash

from dataflex import checkpoints
from dataflex.config.args import LlamaFactoryArgs
from dataflex.config.data import files_of, find_entries, find_sources

_ENDS = 1 << 20  # bytes at each end of a file above HASHED_BYTES that are hashed
_MODEL = ("config.json", "adapter_config.json")
_OF_A_MODEL = (
    "*.safetensors *.bin *.pt *.pth *.index.json *config.json *token*.json vocab* merges.txt *.model *.jinja *.py"
).split()
_WRITTEN = ("output_dir", "logging_dir")


def inputs_of(mapping: Mapping[str, Any], names: Sequence[str], lf: LlamaFactoryArgs) -> dict[str, Any]:
    """Return hashes of all that a configuration reads, as JSON values.

    Of a data set that is not in local files the entry alone is known; of a hub's model its name, which ``mapping`` has.

    Args:
        mapping: Settings; each text in them, or part of one between commas, that is the path of a file or of a model's
            folder is an input, whatever its key. Of a plugin ``__init__.py`` the modules of its package are.
        names: Data sets.
        lf: Where these are looked for.
    """
    entries = find_entries(names, lf)
    sources, _ = find_sources(names, lf, "", Path(), skip=True)
    paths = {source.name: source.path for source in sources if source.path is not None}
    data = {
        name: {
            "entry": entries.get(name),
            "files": [[file.name, hash_of(file)] for file in files_of(paths[name])] if name in paths else None,
        }
        for name in dict.fromkeys(names)
    }
    read = {key: value for key, value in mapping.items() if key not in _WRITTEN}
    files = {text: [[file.name, hash_of(file)] for file in _files(text)] for text in sorted(set(_texts(read)))}
    return {"data": data, "files": {text: found for text, found in files.items() if found}}


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in JSON values, and the parts of each between commas."""
    if isinstance(value, str):
        yield from (part.strip() for part in value.split(","))
    elif isinstance(value, Mapping):
        yield from _texts(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)


def _files(text: str) -> list[Path]:
    """Return the files that a text names: one, a package's modules, or what a model's folder is loaded from."""
    path = Path(text).expanduser()
    if os.path.isfile(path):
        return sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]
    if not any(os.path.isfile(path / name) for name in _MODEL):
        return []
    return sorted({file for pattern in _OF_A_MODEL for file in path.glob(pattern) if file.is_file()})


@cache
def hash_of(file: Path) -> str:
    """Return a hash of a file; above ``HASHED_BYTES`` of its size, time of change and both ends. Kept until cleared."""
    state = file.stat()
    if state.st_size <= checkpoints.HASHED_BYTES:
        return checkpoints.hash_of(file)
    digest = xxhash.xxh3_128(f"{state.st_size} {state.st_mtime_ns}".encode())
    with file.open("rb") as opened:
        digest.update(opened.read(_ENDS))
        opened.seek(-_ENDS, os.SEEK_END)
        digest.update(opened.read())
    return digest.hexdigest()
