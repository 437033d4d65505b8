"""RHO-LOSS: rows that the model has not learnt yet and that a reference model finds easy.

"Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet Learnt", ICML 2022, arXiv 2206.07137.
A row's score is its loss minus its irreducible loss, that of a reference model trained on held-out or clean data; the
highest are kept. Noise has a high loss under both, and what is known a low one. Irreducible losses are computed once
for each row; they are part of the checkpoint.

The paper picks the best tenth of a large batch at every step: ``candidate_batches: 10`` with ``interval_steps: 1``. In
general the batch is the pool of an interval, scored when it begins. Losses are means over tokens, so the reference must
have the run's tokenizer; a model whose context is shorter than the rows gives the loss of what fits into it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataError
from dataflex.method import Card, Context, Needs, Rows, State
from dataflex.select.scoring import Found, ScoringParams, ScoringSelector

__all__ = ["RhoLoss", "excess_losses"]


def excess_losses(losses: NDArray[np.floating], irreducible: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return losses minus irreducible ones [n]; NaN where either is not finite."""
    usable = np.isfinite(losses) & np.isfinite(irreducible)
    found = np.full(len(losses), np.nan)
    found[usable] = losses[usable].astype(np.float64) - irreducible[usable].astype(np.float64)
    return found


class RhoLoss(ScoringSelector):
    """Keep the rows of largest reducible loss."""

    name = "rho_loss"
    lacking = "no finite loss"
    adaptive: ClassVar[bool] = True
    needs = Needs(signals=frozenset({"losses"}), stages=("pt", "sft"), zero3=False)
    card = Card(
        summary="Keeps the rows whose loss is farthest above that of a reference model.",
        paper="Prioritized Training on Points that are Learnable, ICML 2022, arXiv 2206.07137 (RHO-LOSS)",
        cost="1 F over the pool per interval, and 1 F of the reference model over each row once",
        forward_per_pool_row=1.0,
        forward_once_per_pool_row=1.0,
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(ScoringParams):
        """Parameters of RHO-LOSS."""

        reference: str = field(
            metadata={"help": "folder or hub id of a causal model trained on held-out or clean data", "model": True}
        )

    params: Params

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self._irreducible = np.zeros(0, dtype=np.float32)
        self._known = np.zeros(0, dtype=np.bool_)

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.float64]:
        """Return losses minus irreducible ones [N], nats per token.

        Raises:
            DataError: The data set is not the one that the irreducible losses belong to.
        """
        irreducible = self._reference_losses(pool, ctx)
        return excess_losses(ctx.signals.losses(pool), irreducible)

    def explain(self, kept: NDArray[np.int64], found: Found, ctx: Context) -> str:
        """Return the mean excess of the rows kept and of all."""
        assert found.scores is not None
        how = f"of largest excess over {self.params.reference}"
        if len(kept):
            how += f", mean {found.scores[kept].mean():.3f} against {found.scores.mean():.3f}"
        return how

    def _reference_losses(self, pool: Rows, ctx: Context) -> NDArray[np.float32]:
        num_rows = ctx.signals.num_rows()
        if not len(self._known):
            self._irreducible = np.full(num_rows, np.nan, dtype=np.float32)
            self._known = np.zeros(num_rows, dtype=np.bool_)
        if len(self._known) != num_rows:
            raise DataError(
                f"rho_loss: the irreducible losses are those of {len(self._known):,} rows, but the training set has "
                f"{num_rows:,}. Resume with the data set that the run began with."
            )
        new = np.sort(pool[~self._known[pool]])
        if len(new):
            self._irreducible[new] = ctx.signals.losses(new, model=self.params.reference, same_tokens=True)
            self._known[new] = True
        return self._irreducible[pool]

    def state_dict(self) -> State:
        """Return the irreducible losses and for which rows they are known."""
        if not len(self._known):
            return {}
        return {"irreducible": self._irreducible.copy(), "known": self._known.copy()}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave.

        Raises:
            ValueError: The state is not one of ours.
        """
        if state and set(state) != {"irreducible", "known"}:
            raise ValueError(f"rho_loss keeps irreducible and known, but was given {sorted(state)}")
        self._irreducible = np.array(state["irreducible"] if state else [], dtype=np.float32)
        self._known = np.array(state["known"] if state else [], dtype=np.bool_)
