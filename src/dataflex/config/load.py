"""Reads a configuration file and its ``key=value`` overrides, as LLaMA-Factory does.

LLaMA-Factory reads YAML with OmegaConf, merges the command line into it and takes the container
without resolving interpolations; so do we, for YAML and JSON alike. What it does not do: say where
a file is malformed in one line. Nothing is validated here beyond "it is a mapping".
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex.config.args import path_problem
from dataflex.config.mappings import shown
from dataflex.errors import ConfigError
from dataflex.printable import PASSED_ON
from dataflex.registry import KINDS

if TYPE_CHECKING:
    from omegaconf import DictConfig

MOST_LEVELS = 50
_STILL_TO_GIVE = "'???' stands for a value that is still to be given"


ENDINGS: tuple[str, ...] = (".yaml", ".yml", ".json")


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
    problems: list[str] = []
    for text in overrides:
        try:
            config = _merged(config, text)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    from omegaconf import OmegaConf

    container = OmegaConf.to_container(config)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def without_oddities(mapping: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return ``mapping`` with null for every value that nothing can take, and one line per such value."""
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
    if path.suffix.lower() not in ENDINGS:
        raise ConfigError(f"{path}: a configuration ends in {', '.join(ENDINGS)}")
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; name the configuration file inside it")
    if not path.is_file():
        raise ConfigError(f"{path}: no such file{_nearest_file(path)}")
    try:
        config = _read_json(path) if path.suffix.lower() == ".json" else _read_yaml(path)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    from omegaconf import DictConfig

    if not isinstance(config, DictConfig):
        raise ConfigError(f"{path}: the top level must be a mapping (key: value), found a list or a single value")
    if not config:
        raise ConfigError(f"{path}: is empty")
    return config


def _read_yaml(path: Path) -> Any:
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        config = OmegaConf.load(path)
        # OmegaConf takes a document that is a single text for a key without a value.
        single = isinstance(yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader), yaml.ScalarNode)
        return None if single else config
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: malformed YAML{_yaml_place(error)}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_of_key(error)}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        raise ConfigError(f"{path}: {_too_large(error, path.read_text(encoding='utf-8'))}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        # OmegaConf says so without an errno when the document is a single value.
        raise ConfigError(
            f"{path}: the top level must be a mapping (key: value), found a list or a single value"
        ) from error


def _read_json(path: Path) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ConfigError(f"{path}: malformed JSON: found duplicate key {twice}")
        return mapping

    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}: malformed JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        ) from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        raise ConfigError(f"{path}: {_too_large(error, text)}") from error
    if not isinstance(content, dict):
        return None
    try:
        return OmegaConf.create(content)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_of_key(error)}") from error


def _merged(config: DictConfig, text: str) -> DictConfig:
    """Return ``config`` with one ``key=value`` merged into it."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

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
    except yaml.YAMLError as error:
        what = getattr(error, "problem", None) or _first_line(error)
        raise ConfigError(f"override {text!r}: malformed value: {what}") from error
    except (OmegaConfBaseException, ValueError, RecursionError) as error:
        told = _first_line(error) if isinstance(error, OmegaConfBaseException) else _too_large(error, text)
        raise ConfigError(f"override {shown(text)}: {told}") from error
    assert not isinstance(merged, list)
    return merged  # type: ignore[return-value]


def _lift_name(config: DictConfig, keys: Sequence[str]) -> None:
    """Turn ``selector: loss`` into ``selector: {name: loss}`` where an override goes below it, and its parts alike."""
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


def _yaml_place(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or _first_line(error)
    return f": {what}" if mark is None else f" at line {mark.line + 1}, column {mark.column + 1}: {what}"


def _first_line(error: Exception) -> str:
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"'${{' begins an interpolation that cannot be read: {first}" if "Grammar" in type(error).__name__ else first


def _of_key(error: Exception) -> str:
    key = getattr(error, "full_key", None)
    return f"{key}: {_first_line(error)}" if key else _first_line(error)


def _too_large(error: Exception, text: str) -> str:
    """Return what is wrong with a text that Python itself refuses to read, with the key where it can be told."""
    if isinstance(error, RecursionError):
        deep = re.search(rf"^[\s{{]*\"?([\w.-]+)\"?\s*[:=][^\n]*?(?:[\[{{][^\[\]{{}}\n]*){{{MOST_LEVELS}}}", text, re.M)
        return f"{deep[1] + ': ' if deep else ''}lists or mappings are nested more than {MOST_LEVELS} levels deep"
    number = re.search(r"""([\w.-]+)["']?\s*[:=]\s*[+-]?[\d_]{4000}""", text)
    return f"{number[1]}: the number has too many digits" if number else _first_line(error)


def _nearest_file(path: Path) -> str:
    from dataflex.errors import did_you_mean

    if not path.parent.is_dir():
        return f" (nor a folder {path.parent})"
    return did_you_mean(path.name, [file.name for file in path.parent.iterdir() if file.suffix in ENDINGS])
