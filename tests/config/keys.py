"""The keys of the ``dynamic`` block, for tests that go through all of them."""

from __future__ import annotations

from dataclasses import fields

from dataflex.config.schema import SignalsConfig, block_keys


def user_keys() -> list[str]:
    """Return the keys of the block and those one level below, as dotted paths."""
    return block_keys() + [f"signals.{field.name}" for field in fields(SignalsConfig)]
