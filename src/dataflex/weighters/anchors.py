"""The mean embedding of the targets' rows, renewed as the model changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ComponentError, DataError
from dataflex.method import BatchView, Context, State
from dataflex.signals.specs import EmbeddingSpec

if TYPE_CHECKING:
    import torch

__all__ = ["Anchors"]


class Anchors:
    """Rows of the targets, all of which count alike, as one mean vector.

    Args:
        method: Name of the weighter, for messages.
        spec: How a row becomes a vector; the same as for the rows in training.
        refresh_steps: Optimizer steps between two passes over the targets.
    """

    def __init__(self, method: str, spec: EmbeddingSpec, refresh_steps: int) -> None:
        self._method, self.spec, self._every = method, spec, refresh_steps
        self.mean: NDArray[np.float32] | None = None

    def due(self, step: int) -> bool:
        """Whether the vectors are to be computed anew before ``step``."""
        return self.mean is None or step % self._every == 0

    def refresh(self, ctx: Context) -> None:
        """Embed every row of the targets with the model as it is (collective; the ranks share the pass).

        Raises:
            DataError: A target has no row with an embedding.
        """
        total, count = np.zeros(0), 0
        for target in ctx.targets:
            rows = np.arange(ctx.signals.num_rows(target), dtype=np.int64)
            found = ctx.signals.embeddings(rows, self.spec, target=target) if len(rows) else np.zeros((0, 1))
            usable = found[np.isfinite(found).all(axis=1)]
            if not len(usable):
                raise DataError(
                    f"{self._method}: target {target!r} has {len(rows):,} rows, none of which has an embedding. "
                    "Give a target data set with text in it."
                )
            sums = usable.sum(axis=0, dtype=np.float64)
            total, count = sums if count == 0 else total + sums, count + len(usable)
        self.mean = (total / count).astype(np.float32)

    def products(self, batch: BatchView, *, unit: bool = False) -> torch.Tensor:
        """Return each sequence's inner product with the mean vector, fp32 [B].

        Args:
            batch: The micro-batch, with embeddings.
            unit: Whether the mean vector is first divided by its norm.

        Raises:
            ComponentError: There are no embeddings, or ``refresh`` was not called.
        """
        if batch.embeddings_BH is None or self.mean is None:
            what = "no embeddings" if batch.embeddings_BH is None else "anchors that were never embedded"
            raise ComponentError(f"{self._method}: the micro-batch comes with {what}")
        mean = self.mean / max(float(np.linalg.norm(self.mean)), 1e-30) if unit else self.mean
        direction: torch.Tensor = batch.embeddings_BH.new_tensor(mean)
        return batch.embeddings_BH @ direction

    def state_dict(self) -> State:
        """Return the mean vector: a resumed run weighs with the one at hand until the next pass."""
        return {} if self.mean is None else {"anchors": self.mean}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        if set(state) - {"anchors"}:
            raise ValueError(f"{self._method} keeps 'anchors' only, but was given {sorted(state)}")
        self.mean = np.asarray(state["anchors"], dtype=np.float32) if state else None
