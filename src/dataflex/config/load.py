"""Reads a configuration file and its ``key=value`` overrides, as LLaMA-Factory does.

LLaMA-Factory reads YAML with OmegaConf, merges the command line into it and takes the container
without resolving interpolations; so does this module, for YAML and JSON. In addition, it reports in one
line where a file is malformed. Keys and values are validated elsewhere.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex.config.args import path_problem
from dataflex.config.mappings import shown
from dataflex.errors import ConfigError, did_you_mean
from dataflex.printable import PASSED_ON
from dataflex.registry import KINDS

if TYPE_CHECKING:
    from omegaconf import DictConfig

MOST_LEVELS = 50
ENDINGS: tuple[str, ...] = (".yaml", ".yml", ".json")
_STILL_TO_GIVE = "'???' stands for a value that is still to be given"


def load_mapping(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the mapping of a YAML or JSON file with ``overrides`` merged into it, left to right.

    Nested keys are written with dots (``dynamic.interval_steps=20``). An override below a method
    that is written as a bare name keeps the name: ``dynamic.selector.focus=high`` over
    ``selector: loss`` gives ``selector: {name: loss, focus: high}``.

    Raises:
        ConfigError: The file is missing or malformed, its top level is not a mapping, or an
            override is not of the form ``key=value``; all malformed overrides are told at once.
    """
    passed_on: dict[str, Any] = json.loads(os.environ.get(PASSED_ON, "{}"))
    return {**passed_on, **_with_overrides(_read(Path(path)), overrides)}


def merged(mapping: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return ``mapping`` with ``key=value`` texts merged into it, as ``load_mapping`` does with those of a file.

    Raises:
        ConfigError: All malformed overrides.
    """
    from omegaconf import OmegaConf

    return _with_overrides(OmegaConf.create(dict(mapping)), overrides)


def _with_overrides(config: DictConfig, overrides: Sequence[str]) -> dict[str, Any]:
    from omegaconf import OmegaConf

    problems: list[str] = []
    for text in overrides:
        try:
            config = _merged(config, text)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    container = OmegaConf.to_container(config)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def without_oddities(mapping: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return ``mapping`` with null for every value that no key accepts, and one line for each of these values."""
    problems: list[str] = []

    def cleaned(value: Any, path: str, levels: int) -> Any:
        told = _oddity(value, path, levels)
        if told:
            problems.append(f"{path}: {told}")
            return None
        if isinstance(value, Mapping):
            return {
                key: cleaned(item, f"{path}.{key}" if path else str(key), levels + 1) for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [cleaned(item, f"{path}[{i}]", levels + 1) for i, item in enumerate(value)]
        return value

    return cleaned(mapping, "", 0), problems


def _oddity(value: Any, path: str, levels: int) -> str:
    if levels > MOST_LEVELS:
        return f"lists or mappings are nested more than {MOST_LEVELS} levels deep"
    if isinstance(value, int) and abs(value) >= 2**63:
        return "the number is too large (at most 2**63 - 1)"
    if not isinstance(value, str):
        return ""
    if value == "???":
        return _STILL_TO_GIVE
    if "\0" in value:
        return "holds a NUL character, which no text here may"
    single = path.startswith("dynamic.") and not any(letter.isspace() for letter in value)
    return path_problem(value) if single else ""


def _read(path: Path) -> DictConfig:
    from omegaconf import DictConfig

    if path.suffix.lower() not in ENDINGS:
        raise ConfigError(f"{path}: a configuration ends in {', '.join(ENDINGS)}")
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; name the configuration file inside it")
    if not path.is_file():
        near = f" (nor a folder {path.parent})"
        if path.parent.is_dir():
            near = did_you_mean(path.name, [file.name for file in path.parent.iterdir() if file.suffix in ENDINGS])
        raise ConfigError(f"{path}: no such file{near}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        config = _parsed_json(text) if path.suffix.lower() == ".json" else _parsed_yaml(text)
    except Exception as error:
        raise ConfigError(f"{path}: {_reason(error, text)}") from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{path}: the top level must be a mapping (key: value), found a list or a single value")
    if not config:
        raise ConfigError(f"{path}: is empty")
    return config


def _parsed_yaml(text: str) -> Any:
    import yaml
    from omegaconf import OmegaConf

    try:
        config = OmegaConf.load(StringIO(text))
    except OSError:  # what OmegaConf raises for a document that is a single value
        return None
    # It takes a document that is a single text for a key without a value.
    single = isinstance(yaml.compose(text, Loader=yaml.SafeLoader), yaml.ScalarNode)
    return None if single else config


def _parsed_json(text: str) -> Any:
    from omegaconf import OmegaConf

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"malformed JSON: found duplicate key {twice}")
        return mapping

    content = json.loads(text, object_pairs_hook=unique)
    return OmegaConf.create(content) if isinstance(content, dict) else None


def _merged(config: DictConfig, text: str) -> DictConfig:
    """Return ``config`` with one ``key=value`` merged into it."""
    from omegaconf import OmegaConf

    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {text!r}: expected key=value, such as dynamic.interval_steps=20")
    if key.startswith("-"):
        raise ConfigError(f"override {text!r}: after a configuration file write {text.lstrip('-')!r}, without dashes")
    if value.strip() == "???":
        raise ConfigError(f"{key}: {_STILL_TO_GIVE}")
    _lift_name(config, key.split("."))
    try:
        merged = OmegaConf.merge(config, OmegaConf.from_dotlist([text]))
    except Exception as error:
        raise ConfigError(f"override {shown(text)}: {_reason(error, text, place=False)}") from error
    assert not isinstance(merged, list)
    return merged  # type: ignore[return-value]


def _lift_name(config: DictConfig, keys: Sequence[str]) -> None:
    """Turn ``selector: loss`` into ``selector: {name: loss}`` where an override names a key below it; parts alike."""
    from omegaconf import DictConfig

    if len(keys) < 3 or keys[0] != "dynamic" or keys[1] not in KINDS:
        return
    block = config.get("dynamic")
    for key in keys[1:-1]:
        if not isinstance(block, DictConfig):
            return
        if isinstance(block.get(key), str):
            block[key] = {"name": block[key]}
        block = block.get(key)


def _reason(error: Exception, text: str, *, place: bool = True) -> str:
    """Return in one line why a text could not be parsed, with place or key; re-raise any other error."""
    import yaml
    from omegaconf.errors import OmegaConfBaseException

    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, json.JSONDecodeError):
        return f"malformed JSON at line {error.lineno}, column {error.colno}: {error.msg}"
    if isinstance(error, yaml.YAMLError):
        mark, told = getattr(error, "problem_mark", None), getattr(error, "problem", None) or first
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None and place else ""
        return f"malformed {'YAML' if place else 'value'}{where}: {told}"
    if isinstance(error, OmegaConfBaseException):
        if "Grammar" in type(error).__name__:
            first = f"'${{' begins an interpolation that cannot be read: {first}"
        key = getattr(error, "full_key", None)
        return f"{key}: {first}" if key and place else first
    if isinstance(error, RecursionError):
        deep = re.search(rf"^[\s{{]*\"?([\w.-]+)\"?\s*[:=][^\n]*?(?:[\[{{][^\[\]{{}}\n]*){{{MOST_LEVELS}}}", text, re.M)
        return f"{deep[1] + ': ' if deep else ''}lists or mappings are nested more than {MOST_LEVELS} levels deep"
    if isinstance(error, ValueError):  # such as a number of more digits than Python reads
        number = re.search(r"""([\w.-]+)["']?\s*[:=]\s*[+-]?[\d_]{4000}""", text)
        return f"{number[1]}: the number has too many digits" if number else first
    raise error
