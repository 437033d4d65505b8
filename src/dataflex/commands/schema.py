"""``dataflex schema``: the JSON schema of a configuration, for editors, made of the classes that also check it.

What one key accepts is here; rules between keys, and whether files exist, are told by ``dataflex plan``.
LLaMA-Factory's keys are those of the installed version; unknown ones are let through at the top level, as there may be
newer ones.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from dataclasses import Field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin

from dataflex.commands.methods import default_of
from dataflex.config.build import cadence_keys, method_class
from dataflex.config.mappings import field_hints, key_of
from dataflex.config.schema import Cadence, DynamicConfig
from dataflex.config.table import Key, table
from dataflex.method import Method
from dataflex.parts import Part
from dataflex.printable import Answer
from dataflex.registry import KINDS, names

Schema = dict[str, Any]

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_SCALARS: Mapping[Any, str] = {bool: "boolean", int: "integer", float: "number", str: "string"}
_OF_TABLE = {"bool": "boolean", "int": "integer", "float": "number", "str": "string", "list": "array", "dict": "object"}
_LIMITS = {"minimum": "minimum", "above": "exclusiveMinimum", "maximum": "maximum"}
_TARGETS: Schema = {
    "description": "data sets of dataset_info.json to select towards, as a list or as text with commas",
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
}


def schema() -> Answer:
    """Return the JSON schema of a configuration file, as values: its key ``hf_hub_token`` hides no secret."""
    return Answer(_DIALECT, schema_of_a_configuration())


def schema_of_a_configuration() -> Schema:
    """Return the JSON schema (draft 2020-12) of a whole file: LLaMA-Factory's keys, and the ``dynamic`` block."""
    shared: dict[str, Schema] = {}
    block = _object(DynamicConfig, shared, skip=KINDS)
    for kind in KINDS:
        shared[kind] = _method(kind, shared)
        block["properties"][kind] = {"$ref": f"#/$defs/{kind}"}
    block["properties"]["plugins"] = _nullable(
        {**_TARGETS, "description": block["properties"]["plugins"]["description"]}
    )
    block["properties"]["ledger"]["anyOf"][0]["properties"]["targets"] = _TARGETS
    # A plugin adds names; without one, a name that is not known is a mistake.
    block |= {"if": {"not": {"required": ["plugins"]}}, "then": {"properties": {kind: _known(kind) for kind in KINDS}}}
    return {
        "$schema": _DIALECT,
        "title": "A configuration of LLaMA-Factory and DataFlex",
        "type": "object",
        "properties": {**{name: _of_table(key) for name, key in table().items()}, "dynamic": block},
        "$defs": shared,
    }


def _known(kind: str) -> Schema:
    """Return the schema of a method's block whose name, if there is one, is known."""
    listed = names(kind)
    return {"anyOf": [{"enum": listed}, {"type": ["null", "array"]}, _with_name({"enum": listed}, required=False)]}


def _with_name(name: Schema, required: bool = True) -> Schema:
    made: Schema = {"type": "object", "properties": {"name": name}}
    return {**made, "required": ["name"]} if required else made


def _by_name(known: Iterable[str], place: str) -> list[Schema]:
    """Return for each name the condition that a mapping of that name is as its own schema says."""
    return [{"if": _with_name({"const": name}), "then": {"$ref": f"#/$defs/{place}~1{name}"}} for name in known]


def _method(kind: str, shared: dict[str, Schema]) -> Schema:
    """Return the schema of a method's block in each of its forms."""
    found = {name: cls for name in names(kind) if (cls := method_class(kind, name, "", [])) is not None}
    for name, cls in found.items():
        shared[f"{kind}/{name}"] = _block(name, cls, shared)
    one = {"anyOf": [{"enum": [*found]}, {"type": "string"}]}  # the first for editors, the other for plugins
    forms: list[Schema] = [one, {"type": "null"}, _with_name(one, required=False)]
    each = _by_name(found, kind)
    if kind == "weighter":
        forms.append({"type": "array", "items": {"$ref": "#/$defs/weighter"}})
    if kind == "selector":
        composed = {key: value for key, value in shared["selector/compose"].items() if key != "required"}
        nameless = {"type": "object", "required": ["represent"], "not": {"required": ["name"]}}
        each.append({"if": nameless, "then": composed})
    told = "; ".join(f"{name}: {cls.card.summary}" for name, cls in found.items())
    return {
        "description": f"the name of a method, or a mapping with it and its parameters. {told}",
        "anyOf": forms,
        "allOf": each,
    }


def _block(name: str, cls: type[Method], shared: dict[str, Schema]) -> Schema:
    made = _object(cls.Params, shared)
    cadence = _object(Cadence, shared)["properties"]
    own = {"name": {"const": name}, "targets": _nullable(_TARGETS), **{key: cadence[key] for key in cadence_keys(cls)}}
    told = f"{cls.card.summary} {cls.card.paper}".strip()
    return {
        **made,
        "description": told,
        "properties": {**own, **made["properties"]},
        "required": ["name", *made.get("required", [])],
    }


def _object(cls: type, shared: dict[str, Schema], skip: Iterable[str] = ()) -> Schema:
    """Return the schema of a mapping with a dataclass's keys and no others."""
    hints = field_hints(cls)
    mine = [each for each in fields(cls) if each.init and each.metadata.get("user", True)]
    properties: dict[str, Schema] = {}
    required: list[str] = []
    for field in mine:
        if field.name in skip:
            continue
        needed = not default_of(field)
        if needed:
            required.append(key_of(field))
        properties[key_of(field)] = _key(field, hints[field.name], needed, shared)
    made: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**made, "required": required} if required else made


def _key(field: Field[Any], hint: Any, needed: bool, shared: dict[str, Schema]) -> Schema:
    value = _value(hint, field.metadata, shared)
    described = {"description": str(field.metadata.get("help", ""))}
    if needed:
        return {**described, **value}
    default = default_of(field)
    told = {"description": f"{described['description']} (default: {default})"}
    return {**told, **_nullable(value)}


def _nullable(value: Schema) -> Schema:
    """Return the schema that also takes null, which means the default."""
    described = {key: value[key] for key in ("description",) if key in value}
    rest = {key: each for key, each in value.items() if key not in described}
    forms = rest["anyOf"] if set(rest) == {"anyOf"} else [rest]
    return {**described, "anyOf": [*forms, {"type": "null"}]} if rest else described


def _value(hint: Any, limits: Mapping[str, Any], shared: dict[str, Schema]) -> Schema:
    """Return the schema of a value of a type; ``limits`` hold for every number or text in it."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        forms = [_value(each, limits, shared) for each in args if each is not types.NoneType]
        return forms[0] if len(forms) == 1 else {"anyOf": forms}
    if hint is Any:
        return {}
    if origin is Literal:
        return {"enum": [*args]}
    if hint in _SCALARS:
        return _scalar(hint, limits)
    if origin in (tuple, list):
        one: Schema = {"type": "array", "items": _value(args[0], limits, shared)}
        fixed = origin is tuple and args[-1] is not Ellipsis
        return {**one, "minItems": len(args), "maxItems": len(args)} if fixed else one
    if origin is dict:
        return {"type": "object", "additionalProperties": _value(args[1], limits, shared)}
    if isinstance(hint, type) and issubclass(hint, Part):
        return _part(hint, shared)
    return _object(hint, shared) if is_dataclass(hint) and isinstance(hint, type) else {}


def _scalar(hint: Any, limits: Mapping[str, Any]) -> Schema:
    made: Schema = {"type": _SCALARS[hint]}
    if "choices" in limits:
        made["enum"] = [*limits["choices"]]
    if limits.get("pattern") and hint is str:
        made["format"] = "regex"
    if hint in (int, float):
        made |= {theirs: limits[ours] for ours, theirs in _LIMITS.items() if ours in limits}
    return made


def _part(cls: type[Part], shared: dict[str, Schema]) -> Schema:
    """Return the schema of a named part: a bare name, or a mapping of it and its parameters."""
    known = cls.known()
    for name in known:
        place = f"{cls.__name__}/{name}"
        if place not in shared:
            shared[place] = {}  # a part may hold parts of its own kind
            made = _object(cls.params_of(name), shared)
            own = {"name": {"const": name}, **made["properties"]}
            shared[place] = {**made, "properties": own, "required": ["name", *made.get("required", [])]}
    return {"anyOf": [{"enum": known}, _with_name({"enum": known})], "allOf": _by_name(known, cls.__name__)}


def _of_table(key: Key) -> Schema:
    """Return the schema of a key of LLaMA-Factory's."""
    if not key.types:
        return {}
    forms: list[Schema] = [{"type": _OF_TABLE[each]} for each in key.types]
    if key.choices is not None and "str" in key.types:
        forms = [{"enum": [*key.choices]} if each == {"type": "string"} else each for each in forms]
    forms += [{"type": "null"}] if key.nullable or key.default is None else []
    default = {} if key.default is None else {"default": key.default}
    return {**default, **(forms[0] if len(forms) == 1 else {"anyOf": forms})}
