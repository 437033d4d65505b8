"""What a tokenized copy (``tokenized_path``) was made of, so that one of other data is told before it is used.

A copy is a ``DatasetDict`` as LLaMA-Factory saves it. Ours has a folder ``dataflex`` beside the rows, in which
``copy.json`` says what it was made of; one without it is LLaMA-Factory's own, of which nothing is known.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from dataflex.config.args import LlamaFactoryArgs
from dataflex.config.data import files_of, find_sources
from dataflex.config.mappings import shown
from dataflex.state import read_json

SIDECAR = "dataflex/copy.json"
SETTINGS = (
    "stage template cutoff_len packing neat_packing train_on_prompt mask_history ignore_pad_token_for_loss "
    "default_system enable_thinking tool_format max_samples val_size image_max_pixels image_min_pixels "
    "video_max_pixels video_min_pixels video_fps video_maxlen"
).split()
"""Keys that decide which rows of the data there are, held-out ones too, and what tokens they become."""


def described(lf: LlamaFactoryArgs) -> dict[str, Any] | None:
    """Return what is written beside the rows of a copy; None where there is no copy, or nothing that can be read."""
    if not lf.tokenized or lf.bare_copy:
        return None
    try:
        found: dict[str, Any] = read_json(Path(lf.tokenized_path) / SIDECAR)
    except (OSError, ValueError):
        return None
    return found if {"made_of", "columns"} <= found.keys() else None


def made_of(lf: LlamaFactoryArgs, base_dir: Path) -> dict[str, Any]:
    """Return settings, data sets and files that a copy is made of, as JSON values.

    A data set that is not in local files, or whose files are gone, has no files.
    """
    settings = {key: getattr(lf, key, None) for key in SETTINGS}
    settings["packing"] = lf.packed
    settings["seed"] = lf.seed if lf.val_size > 1e-6 else None
    sources, _ = find_sources(lf.train_sets, lf, "dataset", base_dir)
    found = {source.name: source for source in sources}
    data = {}
    for name in lf.train_sets:
        source = found.get(name)
        files = None if source is None or source.path is None else files_of(source.path)
        data[name] = {
            "entry": None if source is None else dict(source.entry),
            "files": None if files is None else {file.name: _state(file) for file in files},
        }
    made: dict[str, Any] = json.loads(json.dumps({"settings": settings, "data": data}, default=str))
    return made


def _state(file: Path) -> dict[str, Any]:
    state = file.stat()
    return {"path": str(file.absolute()), "size": state.st_size, "changed": state.st_mtime_ns}


def with_hashes(made: dict[str, Any]) -> dict[str, Any]:
    """Return the same with a hash of each file, by which one that was copied or touched is known."""
    for entry in made["data"].values():
        for state in (entry["files"] or {}).values():
            state["xxh3"] = _hash(state["path"])
    return made


def _hash(path: str) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Yield how what a copy was made of differs from what it would be made of now; files that are gone do not."""
    for key, value in now["settings"].items():
        was = before["settings"].get(key)
        if was != value:
            yield f"{key} changed ({_said(was)} -> {_said(value)})"
    names, named = list(before["data"]), list(now["data"])
    if names != named:
        yield f"dataset changed ({', '.join(names)} -> {', '.join(named)})"
        return
    for name in names:
        was, value = before["data"][name], now["data"][name]
        if value["entry"] is not None and was["entry"] != value["entry"]:
            yield f"the entry of {name!r} in dataset_info.json changed"
        if value["files"] is None or was["files"] is None:
            continue
        for file in dict.fromkeys([*was["files"], *value["files"]]):
            old, new = was["files"].get(file), value["files"].get(file)
            if old is None or new is None:
                yield f"file {file} of {name!r} {'is new' if old is None else 'is gone'}"
            elif old["size"] != new["size"] or (old["changed"] != new["changed"] and old["xxh3"] != _hash(new["path"])):
                yield f"file {file} of {name!r} changed"


def _said(value: Any) -> str:
    return "not given" if value is None else shown(value)


def stale(lf: LlamaFactoryArgs, base_dir: Path) -> Iterator[str]:
    """Yield one problem where a copy was made of other data or settings."""
    if lf.bare_copy:
        return
    copy = described(lf)
    if copy is None:
        yield f"tokenized_path: {lf.tokenized_path}/{SIDECAR} cannot be read; remove the copy to make it again"
        return
    lines = list(differences(copy["made_of"], made_of(lf, base_dir)))
    if lines:
        yield told(str(lf.tokenized_path), lines)


def told(path: str, lines: list[str]) -> str:
    """Return differences as one problem."""
    return (
        f"tokenized_path: the copy in {path} was made of something else: {'; '.join(lines)}. Restore that, or name "
        "another folder (or remove this one) to tokenize anew."
    )
