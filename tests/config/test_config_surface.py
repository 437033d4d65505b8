"""The golden list of configuration keys: a key added, renamed or removed is a decision, not an accident.

After such a decision: DATAFLEX_WRITE_GOLDEN=1 python -m pytest tests/config/test_config_surface.py
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from dataflex.commands.methods import requirements
from dataflex.config.schema import FLAT_KEYS
from dataflex.registry import KINDS, find, names
from tests.config.keys import user_keys

GOLDEN = Path(__file__).parent.parent / "golden" / "config_keys.txt"

OURS = ("dataflex.selectors.", "dataflex.mixers.", "dataflex.orderers.", "dataflex.weighters.")


def keys() -> list[str]:
    listed = [f"dynamic.{key}" for key in user_keys()]
    for kind in KINDS:
        for name in names(kind):
            cls = find(kind, name)
            if not cls.__module__.startswith(OURS):
                continue  # a plugin of another test
            listed.append(f"dynamic.{kind}: {name}")
            if requirements(cls).targets:
                listed.append(f"dynamic.{kind}: {name}, targets")
            listed += [f"dynamic.{kind}: {name}, {field.name}" for field in dataclasses.fields(cls.Params)]
    return listed + [f"{key} (flat)" for key in FLAT_KEYS]


def test_keys_are_the_golden_ones() -> None:
    text = "\n".join(keys()) + "\n"
    if os.environ.get("DATAFLEX_WRITE_GOLDEN") == "1":
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_no_key_means_two_things() -> None:
    assert len(set(keys())) == len(keys())
    assert not set(user_keys()) & (set(FLAT_KEYS) - {"freeze_gate", "early_stopping_min_delta"})
