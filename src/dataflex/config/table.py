"""LLaMA-Factory's keys with types, defaults and choices, read from the source of the installed version.

Nothing of LLaMA-Factory or transformers is imported: their source is parsed. ``table.json`` holds what was found for
one pair of versions (``python -m dataflex.config.table`` writes it); any other pair is read when it is asked for, in
about half a second.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from dataflex.state import read_json
from dataflex.version import version_of

FILE = Path(__file__).with_name("table.json")

_CLASSES = (
    "transformers/training_args.py",
    "transformers/training_args_seq2seq.py",
    "llamafactory/hparams/training_args.py",
    "llamafactory/hparams/model_args.py",
    "llamafactory/hparams/data_args.py",
    "llamafactory/hparams/finetuning_args.py",
    "llamafactory/hparams/generating_args.py",
)
"""Files whose dataclasses LLaMA-Factory parses; a later one's fields replace an earlier one's."""

_V1_CLASSES = tuple(f"llamafactory/v1/config/{name}_args.py" for name in ("model", "data", "training", "sample"))
_CHOICES = ("transformers/trainer_utils.py", "transformers/training_args.py", "llamafactory/extras/constants.py")
_TYPES = {"bool": "bool", "int": "int", "float": "float", "str": "str", "dict": "dict", "list": "list", "Path": "str"}


@dataclass(frozen=True, kw_only=True)
class Key:
    """The values that LLaMA-Factory's parser and Trainer accept for one key."""

    types: tuple[str, ...]  # some of "bool", "int", "float", "str", "list", "dict"; empty where anything may be given
    nullable: bool = False  # whether null may be given
    default: Any = None  # value without the key; None also where it is not a constant
    choices: tuple[str, ...] | None = None  # texts that may be given, also in lists; None where any may


def installed() -> dict[str, str]:
    """Return the versions that the keys depend on."""
    return {package: version_of(package) or "missing" for package in ("llamafactory", "transformers")}


def _stored() -> tuple[dict[str, str], dict[str, Key]]:
    """Return the versions and the keys of ``table.json``."""
    stored = read_json(FILE) if FILE.is_file() else {"versions": {}, "keys": {}}
    lists = ("types", "choices")
    keys = {
        name: Key(**{**entry, **{key: tuple(entry[key]) for key in lists if key in entry}})
        for name, entry in stored["keys"].items()
    }
    return stored["versions"], keys


@lru_cache(maxsize=1)
def table() -> Mapping[str, Key]:
    """Return all keys of the installed version; an empty mapping where its source cannot be read."""
    versions, keys = _stored()
    if versions == installed():
        return keys
    try:
        return read_source()
    except (OSError, SyntaxError, UnicodeDecodeError, ImportError):
        return {}


@lru_cache(maxsize=1)
def defaults() -> Mapping[str, Any]:
    """Return the value of each key without one; for keys that the installed version lacks, that of ``table.json``."""
    return {name: key.default for name, key in {**_stored()[1], **table()}.items()}


@lru_cache(maxsize=1)
def v1_table() -> Mapping[str, Key]:
    """Return all keys of LLaMA-Factory v1, as the installed source says; those of 0.9.5 are expected to be there."""
    try:
        choices = dict(_enumerations(_parsed("llamafactory/v1/config/arg_utils.py")))
        trees = [_parsed(file) for file in _V1_CLASSES]
    except (OSError, SyntaxError, UnicodeDecodeError, ImportError):
        return {}
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    return {name: key for node in classes for name, key in _fields(node, choices)}


@lru_cache(maxsize=1)
def accelerator_keys() -> tuple[str, ...]:
    """Return the keys of ``accelerator_config``, as the installed source says; none where it cannot be read."""
    try:
        tree = _parsed("transformers/trainer_pt_utils.py")
    except (OSError, SyntaxError, UnicodeDecodeError, ImportError):
        return ()
    found = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "AcceleratorConfig"]
    return tuple(name for node in found for name, _ in _fields(node, {}))


def read_source() -> dict[str, Key]:
    """Return all keys as the installed source says.

    Raises:
        ImportError: A package is not installed.
        OSError, SyntaxError, UnicodeDecodeError: A file cannot be read or parsed.
    """
    choices: dict[str, tuple[str, ...]] = {}
    for file in _CHOICES:
        choices.update(_enumerations(_parsed(file)))
    found: dict[str, Key] = {}
    also_lists: set[str] = set()
    for file in _CLASSES:
        tree = _parsed(file)
        # Texts that split_arg cuts at commas may be lists as they are.
        cut = (call.args[0] for call in _calls(tree, "split_arg"))
        also_lists.update(node.attr for node in cut if isinstance(node, ast.Attribute))
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and any(_name(each) == "dataclass" for each in node.decorator_list):
                found.update(_fields(node, choices))
    for name in also_lists & set(found):
        found[name] = replace(found[name], types=(*found[name].types, "list"))
    trackers = _keys_of("transformers/integrations/integration_utils.py", "INTEGRATION_TO_CALLBACK")
    named = {
        "template": _templates(),
        "tool_format": _keys_of("llamafactory/data/tool_utils.py", "TOOLS"),
        "report_to": trackers and ("none", "all", *trackers),
    }
    for name, known in named.items():
        if known and name in found:
            found[name] = replace(found[name], choices=known)
    if "report_to" in found:
        found["report_to"] = replace(found["report_to"], nullable=False)  # the Trainer ends with a ValueError
    return dict(sorted(found.items()))


def _parsed(file: str) -> ast.Module:
    package, _, rest = file.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(f"{package} is not installed")
    return ast.parse((Path(spec.origin).parent / rest).read_text(encoding="utf-8"))


def _name(node: ast.expr) -> str:
    """Return the last name of ``a.b`` or ``a.b(...)``; an empty text for anything else."""
    if isinstance(node, ast.Call):
        node = node.func
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _enumerations(tree: ast.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the names of enumerations of texts, and these texts."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and any("Enum" in _name(base) for base in node.bases):
            values = [each.value for each in node.body if isinstance(each, ast.Assign)]
            yield node.name, tuple(v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str))


def _fields(node: ast.ClassDef, choices: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, Key]]:
    for each in node.body:
        if not isinstance(each, ast.AnnAssign) or not isinstance(each.target, ast.Name):
            continue
        options: dict[str, ast.expr | None] = {"default": each.value}
        if isinstance(each.value, ast.Call) and _name(each.value) == "field":
            options = {str(word.arg): word.value for word in each.value.keywords}
        if _constant(options.get("init")) is False or "ClassVar" in ast.unparse(each.annotation):
            continue
        types, texts = _types(each.annotation, choices)
        metadata = options.get("metadata")
        for key, value in zip(metadata.keys, metadata.values, strict=True) if isinstance(metadata, ast.Dict) else ():
            if _constant(key) == "choices":
                texts = tuple(_constant(value) or ()) or None
        yield (
            each.target.id,
            Key(
                types=tuple(name for name in types if name != "null"),
                nullable="null" in types or not types,
                default=_constant(options.get("default")),
                choices=texts,
            ),
        )


def _constant(node: ast.expr | None) -> Any:
    """Return the value of a literal or of a product of numbers, such as 768 * 768; None for anything else."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        factors = [_constant(side) for side in (node.left, node.right)]
        return factors[0] * factors[1] if all(isinstance(factor, int | float) for factor in factors) else None
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None


def _types(hint: ast.expr, choices: Mapping[str, tuple[str, ...]]) -> tuple[list[str], tuple[str, ...] | None]:
    """Return the types of an annotation ("null" for None; none at all where one is not known), and its texts."""
    types: list[str] = []
    texts: list[str] = []
    for member in _members(hint):
        name = _name(member.value if isinstance(member, ast.Subscript) else member)
        if isinstance(member, ast.Constant) and member.value is None:
            types.append("null")
        elif name == "Literal" and isinstance(member, ast.Subscript):
            given = _constant(member.slice)
            for value in given if isinstance(given, tuple) else (given,):
                types.append(type(value).__name__)
                texts += [value] if isinstance(value, str) else []
        elif name in choices:
            types.append("str")
            texts += choices[name]
        elif name in _TYPES:
            types.append(_TYPES[name])
        else:
            return [], None
    return list(dict.fromkeys(types)), tuple(texts) or None


def _members(hint: ast.expr) -> Iterator[ast.expr]:
    """Yield the members of a union."""
    if isinstance(hint, ast.BinOp):
        yield from _members(hint.left)
        yield from _members(hint.right)
    elif isinstance(hint, ast.Subscript) and _name(hint.value) in ("Optional", "Union"):
        inner: Sequence[ast.expr] = hint.slice.elts if isinstance(hint.slice, ast.Tuple) else [hint.slice]
        for each in inner:
            yield from _members(each)
        if _name(hint.value) == "Optional":
            yield ast.Constant(None)
    else:
        yield hint


def _calls(tree: ast.Module, name: str) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call) and _name(node) == name)


def _templates() -> tuple[str, ...]:
    calls = _calls(_parsed("llamafactory/data/template.py"), "register_template")
    named = [word.value for call in calls for word in call.keywords[:1]]
    return tuple(sorted({str(node.value) for node in named if isinstance(node, ast.Constant)}))


def _keys_of(file: str, name: str) -> tuple[str, ...]:
    """Return the keys of a mapping that a file defines."""
    for node in _parsed(file).body:
        if isinstance(node, ast.Assign) and _name(node.targets[0]) == name and isinstance(node.value, ast.Dict):
            return tuple(str(_constant(key)) for key in node.value.keys)
    return ()


def _text() -> str:
    usual = asdict(Key(types=()))
    keys = {
        name: {each: value for each, value in asdict(key).items() if each == "types" or value != usual[each]}
        for name, key in read_source().items()
    }
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in keys.items())
    return f'{{\n "versions": {json.dumps(installed())},\n "keys": {{\n{lines}\n }}\n}}\n'


if __name__ == "__main__":
    FILE.write_text(_text(), encoding="utf-8")
