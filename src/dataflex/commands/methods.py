"""``dataflex methods``: the gallery in the terminal, rendered from the classes themselves."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable
from typing import Any

from dataflex.config.build import half_read, method_class
from dataflex.config.mappings import as_yaml, describe, field_hints, key_of, plain, shown
from dataflex.errors import ConfigError, did_you_mean
from dataflex.method import SIGNALS, STAGES, Method, Requires
from dataflex.printable import Answer
from dataflex.record.text import columns, rows_of
from dataflex.registry import KINDS, names

_EXAMPLE_PARAMS: dict[tuple[str, str], dict[str, Any]] = {
    ("selector", "limr"): {"column": "rewards_by_epoch"},
    ("selector", "nice"): {"reward": "rougeL"},
    ("selector", "delta_loss"): {"updates": 10},
    ("selector", "compose"): {"represent": "rds_plus", "aggregate": "round_robin", "rule": "knn_kde"},
    ("selector", "rho_loss"): {"reference": "runs/reference"},
    ("selector", "bees"): {"column": "rating"},
    ("selector", "selective_dpo"): {"half": "first"},
    ("mixer", "static"): {"proportions": [0.7, 0.3]},
    ("mixer", "sheared"): {"target_losses": [1.9, 2.1]},
    ("mixer", "velocity"): {"target_losses": [1.9, 2.1]},
    ("mixer", "skill_it"): {"graph": [[1.0, 0.5], [0.0, 1.0]]},
    ("mixer", "doremi"): {"reference": "runs/reference"},
    **{("orderer", name): {"by": "length"} for name in "sorting folding zigzag segment stair saw pacing".split()},
    ("weighter", "slm"): {"reference": "runs/reference"},
    ("weighter", "rho"): {"reference": "runs/reference"},
    ("weighter", "ss_token"): {"reference": "runs/base"},
    ("weighter", "pear"): {"reference": "runs/author"},
    ("weighter", "product"): {"of": ["column", {"name": "slm", "reference": "runs/reference"}]},
    ("mixer", "staged"): {
        "stages": [{"start_step": 0, "proportions": [0.9, 0.1]}, {"start_step": 500, "proportions": [0.5, 0.5]}]
    },
}

_WIDTH = 110


_WORDS: dict[str, Callable[[Requires], Any]] = {
    "targets": lambda needs: needs.targets,
    "domains": lambda needs: needs.domains > 1,
    "reference": lambda needs: needs.reference is not None,
    "columns": lambda needs: bool(needs.columns),
    "interval": lambda needs: needs.needs_interval,
    "ledger": lambda needs: needs.ledger,
    **{signal: lambda needs, signal=signal: signal in needs.signals for signal in SIGNALS},  # type: ignore[misc]
}
"""What ``--needs`` may ask for."""


def methods(
    name: str | None = None, *, family: str | None = None, stage: str | None = None, needs: str | None = None
) -> Answer:
    """Return a table of all methods, or everything about those called ``name``.

    Args:
        name: "loss" for every method of that name, "selector/loss" for one, or "selector" for a table of that kind.
        family: Kind that the table is of; None: all.
        stage: LLaMA-Factory's stage in which the table's methods work; None: any.
        needs: What the table's methods all need, with commas between, or "nothing"; None: whatever they need.

    Raises:
        ConfigError: There is no such method, kind, stage or need, with the nearest spelling.
    """
    known = [(kind, each) for kind in KINDS for each in names(kind)]
    only = "" if name is None else name.removesuffix("s").removesuffix("/")
    if (family, stage, needs) != (None, None, None):
        if name is not None and only not in KINDS:
            near = did_you_mean(name, KINDS)
            told = f"{name!r} is no kind{near}; beside --family, --stage and --needs only a kind may be named"
            raise ConfigError(f"methods: {told} (kinds: {', '.join(KINDS)})")
        if name is not None and family is not None and family.removesuffix("s") != only:
            raise ConfigError(f"methods: {name!r} and --family {family} are two kinds; give one")
        return _table(_filtered(known, family or only or None, stage, needs))
    if name is None:
        return _table(known)
    if only in KINDS:
        return _table([each for each in known if each[0] == only])
    kind, wanted = name.split("/", 1) if "/" in name else (None, name)
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"methods: {kind!r} is not a kind{did_you_mean(kind, KINDS)} (kinds: {', '.join(KINDS)})")
    among = [each for each in known if kind in (None, each[0])]
    found = [each for each in among if each[1] == wanted]
    if not found:
        spellings = [each for _, each in among] + (list(KINDS) if kind is None else [])
        listed = ", ".join(dict.fromkeys(spellings))
        raise ConfigError(f"methods: there is no {wanted!r}{did_you_mean(wanted, spellings)} (known: {listed})")
    problems: list[str] = []
    classes = [method_class(*each, "/".join(each), problems) for each in found]
    if problems:
        raise ConfigError(problems)
    shown = [cls for cls in classes if cls is not None]
    return Answer("\n\n".join("\n".join(_page(cls)) for cls in shown), {"methods": [_values(cls) for cls in shown]})


def _filtered(
    known: list[tuple[str, str]], family: str | None, stage: str | None, needs: str | None
) -> list[tuple[str, str]]:
    """Return the methods of a kind, that work in a stage and need certain things."""
    family = None if family is None else family.removesuffix("s")
    asked = [] if needs is None else [word.strip() for word in needs.split(",")]
    possible = (*_WORDS, "nothing")
    for flag, word, words in (
        ("--family", family, KINDS),
        ("--stage", stage, STAGES),
        *(("--needs", word, possible) for word in asked),
    ):
        if word is not None and word not in words:
            near = did_you_mean(word, words)
            raise ConfigError(f"methods: {flag}: {word!r} is not known{near} (known: {', '.join(words)})")

    def fits(kind: str, name: str) -> bool:
        cls = method_class(kind, name, "", []) if family in (None, kind) else None
        if cls is None:
            return False
        of = requirements(cls)
        without = not _needs(cls, of)
        rewards = frozenset({"rollouts"})  # all that stage rl gives, and no other stage does
        if stage is not None and (of.signals - rewards if stage == "rl" else of.signals & rewards):
            return False
        return (stage is None or stage in of.stages) and all(
            without if word == "nothing" else (word == "domains" and kind == "mixer") or _WORDS[word](of)
            for word in asked
        )

    found = [each for each in known if fits(*each)]
    if not found:
        raise ConfigError("methods: none is all of that")
    return found


def _table(known: list[tuple[str, str]]) -> Answer:
    lines: list[str] = []
    every: list[dict[str, Any]] = []
    broken: list[str] = []
    for kind in dict.fromkeys(kind for kind, _ in known):
        classes = [method_class(kind, name, f"{kind}/{name}", broken) for k, name in known if k == kind]
        there = [cls for cls in classes if cls is not None]
        rows = [[cls.name, cls.card.summary, _needs(cls, requirements(cls)) or "-", cls.card.cost] for cls in there]
        every += [_values(cls) for cls in there]
        lines += [*([""] if lines else []), f"{kind}s", *columns([["name", "what it does", "needs", "cost"], *rows])]
    lines += ["", "F, B: forward and backward passes. 'dataflex methods NAME' tells more about one."]
    told = lines + [f"not available: {problem}" for problem in broken]
    return Answer("\n".join(told), {"methods": every, "not_available": broken})


def _values(cls: type[Method]) -> dict[str, Any]:
    """Return what there is to know of a method, for JSON."""
    hints, needs = field_hints(cls.Params), requirements(cls)
    return {
        "kind": cls.kind,
        "name": cls.name,
        **{key: getattr(cls.card, key) for key in ("summary", "paper", "cost", "note")},
        "needs": _needs(cls, needs),
        "targets": needs.targets,
        "parameters": [
            {
                "name": key_of(field),
                "type": describe(hints[field.name]),
                "required": not default_of(field),
                "default": default_of(field),
                "help": meaning(field),
            }
            for field in dataclasses.fields(cls.Params)
        ],
        "example": example(cls),
    }


def requirements(cls: type[Method]) -> Requires:
    """Return what a method requires under its defaults, and the parameters of its example."""
    return half_read(cls, _EXAMPLE_PARAMS.get((cls.kind, cls.name), {})) or Requires()


def _needs(cls: type[Method], needs: Requires) -> str:
    domains = max(2, needs.domains) if cls.kind == "mixer" else needs.domains
    told = [f"{signal} signal" for signal in sorted(needs.signals)]
    if needs.targets:
        told.append("targets")
    if domains > 1:
        told.append(f"at least {domains} domains")
    if needs.stages != STAGES:
        told.append(f"stage {' or '.join(needs.stages)}")
    if needs.whole_parameters:
        told.append("whole parameters (no ZeRO-3, no FSDP)")
    return ", ".join(told)


def _page(cls: type[Method]) -> list[str]:
    needs = requirements(cls)
    decides = "in every step" if cls.kind == "weighter" else "the same in every interval; interval_steps is not needed"
    facts = [
        ("paper", cls.card.paper),
        ("cost", cls.card.cost),
        ("needs", _needs(cls, needs) or "nothing"),
        ("decides", "anew in every interval (interval_steps)" if needs.needs_interval else decides),
        *([("note", cls.card.note)] if cls.card.note else []),
    ]
    hints = field_hints(cls.Params)
    rows = [["targets", "a list of texts", "required", "data sets of dataset_info.json to select towards"]]
    rows = rows if needs.targets else []
    rows += [
        [key_of(field), describe(hints[field.name]), default_of(field) or "required", meaning(field)]
        for field in dataclasses.fields(cls.Params)
    ]
    return [
        f"{cls.kind}/{cls.name}",
        *textwrap.wrap(cls.card.summary, _WIDTH, initial_indent="  "),
        *rows_of(facts, width=10),
        *("", "  parameters", *(columns(rows, indent=4) or ["    none"])),
        *("", "  example", *as_yaml(example(cls), indent=4).splitlines()),
    ]


def default_of(field: dataclasses.Field[Any]) -> str:
    """Return a parameter's default as it is written in a configuration; empty where it has none."""
    if field.default is not dataclasses.MISSING:
        return shown(plain(field.default))
    return "" if field.default_factory is dataclasses.MISSING else shown(plain(field.default_factory()))


def meaning(field: dataclasses.Field[Any]) -> str:
    """Return a parameter's help and its limits."""
    words = {"minimum": "at least", "above": "above", "maximum": "at most"}
    limits = [f"{word} {field.metadata[key]:g}" for key, word in words.items() if key in field.metadata]
    return str(field.metadata.get("help", "")) + (f" ({', '.join(limits)})" if limits else "")


def example(cls: type[Method]) -> dict[str, Any]:
    """Return a configuration block that uses a method, defaults left out."""
    block: dict[str, Any] = {"name": cls.name}
    if requirements(cls).targets:
        block["targets"] = ["my_target"]
    block.update(_EXAMPLE_PARAMS.get((cls.kind, cls.name), {}))
    head = {"interval_steps": 100} if requirements(cls).needs_interval else {}
    if "rollouts" in requirements(cls).signals:
        head = {"interval_steps": 1}
    if "preference_logps" in requirements(cls).signals:
        head = {"warmup_steps": 100, **head}
    if requirements(cls).within_batch:
        head = {"interval_steps": 1, "candidate_batches": 2}
    return {"dynamic": {**head, cls.kind: block if len(block) > 1 else cls.name}}
