"""The keys of the ``dynamic`` block, for tests that go through all of them."""

from __future__ import annotations

from dataclasses import fields

from dataflex.config.schema import AverageConfig, LedgerConfig, SignalsConfig, block_keys


def user_keys() -> list[str]:
    """Return the keys of the block and those one level below, as dotted paths."""
    below = {"ledger": LedgerConfig, "average_weights": AverageConfig, "signals": SignalsConfig}
    return block_keys() + [f"{key}.{field.name}" for key, cls in below.items() for field in fields(cls)]
