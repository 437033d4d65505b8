"""What several selectors share: vectors of pool and targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ComponentError, DataError
from dataflex.method import Context, Params, Passes, Requires, Rows, param
from dataflex.select.scoring import Found, Gives, ScoringSelector
from dataflex.signals.kinds import Embedding
from dataflex.signals.specs import Pooling

ROW_LOSSES = Requires(
    signals=frozenset({"losses"}),
    stages=("pt", "sft", "dpo", "kto"),
    needs_interval=True,
    passes=Passes(pool=(1.0, 0.0)),
)
"""What a selector requires that asks for one forward pass over the pool."""

# ---------------------------------------------------------------- vectors


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


def embeddings(rows: Rows, target: str | None, ctx: Context, p: EmbeddingParams) -> NDArray[np.float32]:
    """Return vectors of length one [n, D]: weighted by position as in RDS+, unless a pooling is given."""
    signal = Embedding(layer=p.layer, completion_only=p.completion_only, encoder=p.encoder)
    if isinstance(p, PooledParams):
        own_pooling = p.encoder is not None and (Path(p.encoder) / "modules.json").is_file()
        signal = Embedding(encoder=p.encoder) if own_pooling else dataclasses.replace(signal, pooling=p.pooling)
    return ctx.signals(signal, rows, target=target)


def embeddings_required(p: EmbeddingParams) -> Requires:
    """Return what a comparison of rows' vectors with those of the targets requires."""
    return Requires(
        signals=frozenset({"embeddings"}),
        targets=True,
        stages=("pt", "sft"),
        needs_interval=True,
        models={"encoder": p.encoder},
        passes=Passes(pool=(1.0, 0.0), targets=(1.0, 0.0)),
    )


class VectorSelector(ScoringSelector):
    """Compares vectors of rows with those of the targets' rows."""

    lacking = "no embedding"

    def requires(self) -> Requires:
        """State what the run must have."""
        return embeddings_required(self.params)

    @property
    def gives(self) -> Gives:
        """Vectors."""
        return "vectors"

    def vectors(self, rows: Rows, target: str | None, ctx: Context) -> NDArray[np.floating]:
        """Return vectors of rows of the training set, or of the named target [n, D]; NaN where there is none."""
        return embeddings(rows, target, ctx, self.params)

    def examine(self, pool: Rows, ctx: Context) -> Found:
        """Return vectors of the pool and the targets.

        Raises:
            DataError: The pool, or a target, has no row with a vector.
            ComponentError: Vectors do not fit the rows asked for.
        """
        return compared(self.name, pool, ctx, lambda rows, target: self.vectors(rows, target, ctx), self.lacking)

    def scored(self, found: Found) -> Found:
        """Return the same with the similarities to the targets."""
        found = super().scored(found)
        several = self.targets_take_turns and len(found.queries) > 1
        return dataclasses.replace(found, turns=found.tasks) if several else found

    def explain(self, kept: NDArray[np.int64], found: Found, ctx: Context) -> str:
        """Return which targets the rows are near to, and by which rule."""
        return f"nearest to {', '.join(ctx.targets)} ({self.rule.name})"


def _usable(vectors: NDArray[np.floating], num_rows: int, method: str) -> NDArray[np.int64]:
    if vectors.ndim != 2 or len(vectors) != num_rows:
        raise ComponentError(f"{method}: asked for embeddings of {num_rows:,} rows, was given shape {vectors.shape}")
    return np.flatnonzero(np.isfinite(vectors.sum(axis=1, dtype=np.float32)))


def _kept(vectors: NDArray[np.floating], places: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the rows at ``places`` as float32; no copy where all are kept."""
    return np.asarray(vectors if len(places) == len(vectors) else vectors[places], dtype=np.float32)


def compared(
    method: str,
    pool: Rows,
    ctx: Context,
    ask: Callable[[Rows, str | None], NDArray[np.floating]],
    lacking: str = "no embedding",
) -> Found:
    """Ask for the vectors of a pool that is not empty, and of the rows of every target.

    Args:
        method: Name of the selector, for messages.
        pool: Row ids [N], N >= 1.
        ctx: Context of the decision.
        ask: Gives vectors [n, D] of rows of the training set, or of the named target.
        lacking: What is told of rows without a vector.

    Raises:
        DataError: A target, or the pool, has no row with a vector.
        ComponentError: Vectors do not fit the rows asked for.
    """
    queries = []
    for target in ctx.targets:
        rows = np.arange(ctx.signals.num_rows(target), dtype=np.int64)
        found = ask(rows, target) if len(rows) else np.empty((0, 0))
        usable = _usable(found, len(rows), method)
        if not len(usable):
            raise DataError(
                f"{method}: target {target!r} has {len(rows):,} rows, none of which has an embedding to compare "
                "with. Give a target data set with text in it."
            )
        queries.append(_kept(found, usable))
    found = ask(pool, None)
    places = _usable(found, len(pool), method)
    if not len(places):
        raise DataError(
            f"{method}: all {len(pool):,} rows have {lacking}. Check that the rows hold text, with supervised tokens "
            "where those are asked for."
        )
    return Found(places=places, vectors=_kept(found, places), queries=tuple(queries))
