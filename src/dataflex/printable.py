"""Text that may be printed and written: without secrets, control characters escaped, names fit for files."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, TextIO

from dataflex.errors import ConfigError

# C0 and C1 controls and DEL, marks that turn the direction of what follows, line separators, lone surrogates.
_CONTROLS = "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
_UNSAFE = re.compile(f"[{_CONTROLS}\U000e0000-\U000e007f]")


def printable(text: str) -> str:
    """Return ``text`` with control characters as Python's escapes; line ends and tabs stay."""
    return _UNSAFE.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def on_one_line(text: str) -> str:
    """Return ``text`` as ``printable`` does, with line ends and tabs as escapes too, for data inside a message."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


HIDDEN = "***"
PASSED_ON = "DATAFLEX_PASSED_ON"
"""Environment variable with the secrets, as a JSON mapping, for the process of a run whose file leaves them out."""

_SECRET_WORDS = frozenset(
    "apikey apitoken auth authorization bearer cookie cookies credential credentials headers header passphrase "
    "passwd password passwords pat pwd secret secrets".split()
)
_KEYS = frozenset({"access", "account", "api", "auth", "encryption", "master", "private", "secret", "signing", "ssh"})
# A key that ends in one of these names the place of a secret, not the secret.
_PLACES = frozenset({"env", "environment", "file", "files", "path", "var", "variable"})
# Before "token": tokens of a text, not of an account.
_OF_TEXT = frozenset(
    "add assistant audio begin bos by class cls decoder end eos eot extra first generated image last mask max mean "
    "media min new next num object of pad per placeholder prefix prompt previous sep single special start stop suffix "
    "system target think unk user video vision weight".split()
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_ASSIGNED = re.compile(r"""(?P<quote>["']?)(?P<name>\b\w[\w.-]{0,80})(?P=quote)\s*(?P<sign>=(?!=)|:(?!//))\s*""")
_VALUE = re.compile(
    r"""(?P<told>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|\[[^\]\n]*\]|\{[^}\n]*\}|(?:Bearer|Basic)\s+\S+|[^\s,;&"'()\]}]+)"""
)
_LOGIN = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]*://)(?P<user>[^\s/?#@:]*:)?[^\s/?#@]*@", re.IGNORECASE)
_BEARER = re.compile(r"\b(?P<kind>Bearer|Basic)\s+[\w.~+/=-]{6,}")


class Answer(str):
    """What a command prints, and the same as ``values`` for ``--json``; docs/json.md lists their keys."""

    values: Mapping[str, Any]

    def __new__(cls, text: str, values: Mapping[str, Any]) -> Answer:
        """Return the text with its values."""
        answer = super().__new__(cls, text)
        answer.values = values
        return answer


def plain(value: Any, path: str = "", nonfinite: list[str] | None = None) -> Any:
    """Return a value as JSON can hold it; the dotted keys of NaN and infinities are added to ``nonfinite``.

    Numpy and torch scalars and arrays become numbers and lists, sets become sorted lists, and objects of other types
    (paths, dtypes, parts of a configuration) become their text.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        if nonfinite is not None:
            nonfinite.append(path)
        return None
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{path}.{key}" if path else str(key), nonfinite) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        value = sorted(value, key=str)
    if isinstance(value, list | tuple):
        return [plain(item, f"{path}.{number}", nonfinite) for number, item in enumerate(value)]
    as_list = getattr(value, "tolist", None)  # numpy's and torch's own way; torch itself is not imported here
    if callable(as_list):
        return plain(as_list(), path, nonfinite)
    return str(value)


def is_secret(key: str) -> bool:
    """Whether the value of a key of that name is a secret: of ``hub_token``, and not of ``max_new_tokens``."""
    words = [word for word in re.split(r"[^a-z0-9]+", _CAMEL.sub("_", key.rpartition(".")[2]).lower()) if word]
    if not words or words[-1] in _PLACES:
        return False
    if _SECRET_WORDS & set(words):
        return True
    if any(first in _KEYS and second in ("key", "keys") for first, second in pairwise(words)):
        return True
    return words[-1] == "token" and not (len(words) > 1 and words[-2] in _OF_TEXT)


def redacted(value: Any, *, secret: bool = False) -> Any:
    """Return a configuration with every secret in it replaced by ``***``, at any depth; addresses lose their login.

    Switches, nulls and shares of a domain are no secrets, whatever their key is. ``secret``: all of ``value`` is one.
    """
    if isinstance(value, Mapping):
        return {key: redacted(item, secret=secret or is_secret(str(key))) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [redacted(item, secret=secret) for item in value]
        return tuple(items) if type(value) is tuple else items
    if secret:
        return value if value is None or isinstance(value, bool | float) or value == "" else HIDDEN
    return redacted_text(value) if isinstance(value, str) else value


def without_secrets(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that is to be read again, without the keys that hold secrets.

    Raises:
        ConfigError: A secret further down, without which the configuration would mean something else.
    """
    kept = {key: value for key, value in mapping.items() if key not in _secret_keys(mapping)}
    deep = [key for key, value in kept.items() if redacted(value) != value]
    if deep:
        raise ConfigError([f"{key}: holds a secret, which would be written into files; take it out" for key in deep])
    return kept


def _secret_keys(mapping: Mapping[str, Any]) -> list[str]:
    return [key for key, value in mapping.items() if is_secret(key) and redacted(value, secret=True) != value]


@contextmanager
def passing_on(mapping: Mapping[str, Any]) -> Iterator[None]:
    """Give the processes started inside the block the secrets that ``without_secrets`` left out of their files."""
    left_out = {key: mapping[key] for key in _secret_keys(mapping)}
    before = os.environ.get(PASSED_ON)
    if left_out:
        os.environ[PASSED_ON] = json.dumps(left_out)
    try:
        yield
    finally:
        if left_out:
            os.environ.pop(PASSED_ON)
            os.environ.update({} if before is None else {PASSED_ON: before})


def left_out_note(mapping: Mapping[str, Any]) -> list[str]:
    """Return a note about keys that were left out, for users who run the files themselves, or nothing."""
    keys = _secret_keys(mapping)
    told = f"note: {', '.join(keys)} left out of the runs' files; runs started by this command are given it, others"
    return [f"{told} need it again: dataflex train FILE {keys[0]}=..."] if keys else []


def redacted_text(text: str) -> str:
    """Return a message or a command line without the values of secret keys, logins in addresses, and bearer tokens."""
    if "://" in text:
        text = _LOGIN.sub(lambda found: f"{found['scheme']}{found['user'] or ''}{HIDDEN}@", text)
    parts, last = [], 0
    for found in _ASSIGNED.finditer(text) if "=" in text or ":" in text else ():
        value = _in_quotes(text, found) or _VALUE.match(text, found.end())
        if found.start() < last or value is None or not is_secret(found["name"]) or not _assigns(found, value):
            continue
        parts += [text[last : found.end()], _blotted(value["told"])]
        last = value.end()
    return _BEARER.sub(lambda bearer: f"{bearer['kind']} {HIDDEN}", "".join([*parts, text[last:]]))


def _in_quotes(text: str, found: re.Match[str]) -> re.Match[str] | None:
    """Return the value of an assignment that is quoted as a whole, as messages quote overrides."""
    opening = text[found.start() - 1 : found.start()]
    if opening not in ("'", '"') or found["sign"] != "=":
        return None
    return re.compile(rf"(?P<told>[^{opening}]+)(?={opening})").match(text, found.end())


def _assigns(found: re.Match[str], value: re.Match[str]) -> bool:
    """Whether a sign assigns a value: in a message, a colon may also come before what is said about a key."""
    if found["sign"] == "=" or found["quote"] or value["told"][0] in "\"'[{":
        return True
    return "." not in found["name"] and not value.string[value.end() :].partition("\n")[0].strip()


def _blotted(told: str) -> str:
    if told.strip("\"'").lower() in ("", "true", "false", "null", "none"):
        return told
    return f"{told[0]}{HIDDEN}{told[0]}" if told[0] in "\"'" else HIDDEN


def shown(text: str, stream: TextIO | None = None) -> str:
    """Return ``text`` without secrets; control characters, and what ``stream`` cannot encode, become escapes."""
    text = printable(redacted_text(text))
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


_MOST_BYTES = 200  # of a name: most file systems take 255, with an ending and that of a temporary file
_FORBIDDEN = re.compile(r'[/\\:*?"<>|]')
_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


def file_name_problem(name: object) -> str:
    """Return why a name that was read from a file cannot be a file's name on every system, or an empty text."""
    if not isinstance(name, str):
        return f"is not text but {type(name).__name__}"
    if not name.strip(". "):
        return "is empty, or dots alone"
    if found := _FORBIDDEN.search(name):
        return f"holds {found.group()!r}"
    if on_one_line(name) != name:
        return "holds a control character"
    if name[0] in ".~-" or name[-1] in ". " or name[0] == " ":
        return f"begins or ends with {name[0] if name[0] in '.~- ' else name[-1]!r}"
    if _DEVICES.fullmatch(name):
        return "is the name of a device"
    if len(name.encode()) > _MOST_BYTES:
        return f"has {len(name.encode())} bytes, more than {_MOST_BYTES}"
    return ""
