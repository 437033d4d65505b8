"""For authors of methods: stand-ins for what a run provides. Nothing here is used while training."""

from dataflex.testing.fakes import (
    Call,
    FakeSignals,
    example_batch,
    example_context,
    example_stats,
    global_random_state_untouched,
)
from dataflex.testing.oracles import oracle_row_gradients

__all__ = [
    "Call",
    "FakeSignals",
    "example_batch",
    "example_context",
    "example_stats",
    "global_random_state_untouched",
    "oracle_row_gradients",
]
