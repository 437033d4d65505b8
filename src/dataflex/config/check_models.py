"""Checks that the other models that methods name (encoders, scorers, references) are there, before anything loads."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from dataflex.config.needs import parameters
from dataflex.config.schema import DynamicConfig
from dataflex.config.values import env_enabled
from dataflex.errors import did_you_mean
from dataflex.method import Params

__all__ = ["other_model_problems"]

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_DESCRIPTIONS = ("config.json", "adapter_config.json", "modules.json")


def other_model_problems(dynamic: DynamicConfig) -> Iterator[str]:
    """Yield the models named in parameters marked ``model`` that are neither a folder nor, perhaps, on a hub.

    So are encoders of sentence-transformers where that package is not installed.
    """
    for method in dynamic.methods:
        for path, _, params in parameters(method):
            yield from _in_params(params, path)


def _in_params(params: Params, path: str) -> Iterator[str]:
    for field in fields(type(params)):
        value = getattr(params, field.name)
        if not field.metadata.get("model"):
            continue
        names = value if isinstance(value, tuple) else () if value is None else (value,)
        for i, name in enumerate(names):
            place = f"[{i}]" if isinstance(value, tuple) else ""
            problem = _problem(str(name)) or (_package_problem(str(name)) if field.name == "encoder" else "")
            if problem:
                yield f"{path}.{field.name}{place}: {problem}"


def _problem(name: str) -> str:
    if not name.strip():
        return "is empty; give a model's folder or its name on a hub"
    folder = Path(name).expanduser()
    if folder.is_dir():
        if any((folder / file).is_file() for file in _DESCRIPTIONS):
            return ""
        return f"{name} holds no model (none of {', '.join(_DESCRIPTIONS)})"
    beside = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    near = did_you_mean(folder.name, beside)
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        return f"no such folder: {name}{near}"
    if (env_enabled("HF_HUB_OFFLINE") or env_enabled("TRANSFORMERS_OFFLINE")) and not _cached(name):
        return f"no such folder: {name}{near}; nor is it in the local cache of the hub, and HF_HUB_OFFLINE is set"
    return ""


def _package_problem(name: str) -> str:
    if not (Path(name).expanduser() / "modules.json").is_file():
        return ""
    if importlib.util.find_spec("sentence_transformers") is not None:
        return ""
    return (
        f"{name} is a model of sentence-transformers, which is not installed; install the extra: "
        "pip install 'dataflex[encoders]'"
    )


def _cached(name: str) -> bool:
    """Return whether a hub's model was downloaded before."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or home / "hub")
    return (cache / f"models--{name.replace('/', '--')}").is_dir()
