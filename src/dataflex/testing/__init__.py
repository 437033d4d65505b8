"""For authors of methods: stand-ins for what a run provides, and slow, obvious oracles.

Nothing here is used while training.
"""

from dataflex.testing.fakes import (
    Call,
    FakeSignals,
    example_batch,
    example_context,
    example_stats,
    global_random_state_untouched,
)
from dataflex.testing.oracles import (
    oracle_bucket_weights,
    oracle_loss_weights,
    oracle_relative_gain,
    oracle_row_gradients,
    oracle_temperature,
    oracle_top_rows,
    oracle_unimax,
)

__all__ = [
    "Call",
    "FakeSignals",
    "example_batch",
    "example_context",
    "example_stats",
    "global_random_state_untouched",
    "oracle_bucket_weights",
    "oracle_loss_weights",
    "oracle_relative_gain",
    "oracle_row_gradients",
    "oracle_temperature",
    "oracle_top_rows",
    "oracle_unimax",
]
