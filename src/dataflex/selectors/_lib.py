"""What several selectors share: what they require of a run, and vectors of the pool and the targets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataError
from dataflex.method import Context, Params, Passes, Requires, Rows, param
from dataflex.select.scoring import Found, Gives, PoolSelector, ScoringSelector
from dataflex.signals.kinds import Embedding, TokenLoss
from dataflex.signals.specs import Pooling

ROW_LOSSES = Requires(
    signals=frozenset({"losses"}),
    stages=("pt", "sft", "dpo", "kto"),
    needs_interval=True,
    passes=Passes(pool=(1.0, 0.0)),
)
"""What a selector requires that asks for one forward pass over the pool."""
TOKEN_LOSSES = replace(ROW_LOSSES, stages=("pt", "sft"))
"""The same in stages whose loss is one of tokens."""
GRADIENTS = replace(
    TOKEN_LOSSES,
    stages=("pt", "sft", "dpo"),
    signals=frozenset({"gradients"}),
    targets=True,
    passes=Passes(pool=(1.0, 1.0)),
)
"""What a selector requires that compares gradients of the pool with those of the targets."""
EMBEDDINGS = replace(
    TOKEN_LOSSES, signals=frozenset({"embeddings"}), targets=True, passes=Passes(pool=(1.0, 0.0), targets=(1.0, 0.0))
)
"""What a selector requires that compares embeddings of the pool with those of the targets."""


def even(name: str, number: int) -> None:
    """Raise ValueError unless the parameter is even."""
    if number % 2:
        raise ValueError(f"{name}: must be even, found {number}")


class RowLosses(ScoringSelector):
    """Scores rows by their token-mean losses."""

    lacking = "no finite loss"

    def requires(self) -> Requires:
        return ROW_LOSSES

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.floating]:
        """Return losses [N]."""
        return ctx.signals(TokenLoss(), pool)


@dataclass(frozen=True, kw_only=True)
class EmbeddingParams(Params):
    """Which hidden states rows are compared by."""

    encoder: str | None = param(None, "folder or hub id of another model; null: the model under training")
    layer: int = param(-1, "layer of the hidden states; -1 is the last, after its norm")
    completion_only: bool = param(False, "average the supervised tokens only, not the prompt's")

    def __post_init__(self) -> None:
        if self.completion_only and self.encoder is not None:
            raise ValueError("completion_only: an encoder reads plain text without labels; leave one of them out")


@dataclass(frozen=True, kw_only=True)
class PooledParams(EmbeddingParams):
    """Hidden states and how they become one vector."""

    pooling: Pooling = param("mean", "how tokens become a vector; a sentence-transformers folder has its own way")


class Compares(PoolSelector):
    """Compares vectors of rows with those of the targets' rows."""

    lacking = "no embedding"

    def requires(self) -> Requires:
        return replace(EMBEDDINGS, models={"encoder": self.params.encoder})

    def vectors(self, rows: Rows, target: str | None, ctx: Context) -> NDArray[np.floating]:
        """Return vectors of length one of rows of the training set, or of a target [n, D]; NaN where there is none."""
        p: EmbeddingParams = self.params  # weighted by position as in RDS+ unless a pooling is given
        signal = Embedding(layer=p.layer, completion_only=p.completion_only, encoder=p.encoder)
        if isinstance(p, PooledParams):
            own_pooling = p.encoder is not None and (Path(p.encoder) / "modules.json").is_file()
            signal = Embedding(encoder=p.encoder) if own_pooling else replace(signal, pooling=p.pooling)
        return ctx.signals(signal, rows, target=target)

    def examine(self, pool: Rows, ctx: Context) -> Found:
        """Return vectors of the pool and the targets; DataError where one of them has no row with a vector."""
        queries, query_rows = [], []
        for target in ctx.targets:
            rows = np.arange(ctx.signals.num_rows(target), dtype=np.int64)
            found = self.vectors(rows, target, ctx) if len(rows) else np.empty((0, 0))
            known = _known(found)
            if not known.any():
                raise DataError(
                    f"{self.name}: target {target!r} has {len(rows):,} rows, none of which has an embedding to compare "
                    "with. Give a target data set with text in it."
                )
            query_rows.append(np.flatnonzero(known).astype(np.int64))
            queries.append(_kept(found, query_rows[-1]))
        found = self.vectors(pool, None, ctx)
        places = self.usable(_known(found))
        return Found(places=places, vectors=_kept(found, places), queries=tuple(queries), query_rows=tuple(query_rows))


class VectorSelector(Compares, ScoringSelector):
    """Keeps the rows that a subset rule picks by vectors."""

    @property
    def gives(self) -> Gives:
        """Vectors."""
        return "vectors"


def _known(vectors: NDArray[np.floating]) -> NDArray[np.bool_]:
    return np.isfinite(vectors.sum(axis=1, dtype=np.float32))


def _kept(vectors: NDArray[np.floating], places: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the rows at ``places`` as float32; no copy where all are kept."""
    return np.asarray(vectors if len(places) == len(vectors) else vectors[places], dtype=np.float32)
