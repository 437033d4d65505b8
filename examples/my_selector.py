"""A selector in 30 lines: rows of middling loss, neither known by heart nor out of reach."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dataflex import Card, Context, Passes, Requires, Rows, ScoringParams, ScoringSelector
from dataflex.signals.kinds import TokenLoss


class NearQuantile(ScoringSelector):
    """Keep the rows whose loss lies nearest to a quantile of the pool's losses."""

    name = "near_quantile"
    card = Card(summary="Keeps the rows of middling loss.", paper="baseline", cost="1 F over the pool per interval")

    @dataclass(frozen=True, kw_only=True)
    class Params(ScoringParams):
        """Parameters, checked and converted before anything is loaded; ``aggregate`` and ``rule`` are among them."""

        quantile: float = field(default=0.5, metadata={"help": "quantile of losses", "minimum": 0.0, "maximum": 1.0})

    def requires(self) -> Requires:
        """State what the run must have: checked before a model is loaded."""
        return Requires(
            signals=frozenset({"losses"}),
            stages=("pt", "sft"),
            needs_interval=True,  # decides from the model as it is, so dynamic.interval_steps must be given
            passes=Passes(pool=(1.0, 0.0)),  # a forward pass of each row of the pool; dataflex plan adds them up
        )

    def score(self, pool: Rows, ctx: Context) -> np.ndarray:
        """Return the score of every row of the pool [N], larger is better; NaN for a row that has none."""
        losses = ctx.signals(TokenLoss(), pool)  # float32 [N]; NaN for rows without supervised tokens
        return -np.abs(losses - np.nanquantile(losses, self.params.quantile))
