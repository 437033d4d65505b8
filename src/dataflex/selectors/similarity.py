"""What selectors by embedding start from: vectors of the pool and of the targets, those without any set aside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ComponentError, DataError
from dataflex.method import Context, Rows, Selection
from dataflex.signals.specs import EmbeddingSpec

__all__ = ["Embedded", "compared", "embedded", "selection"]


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """Vectors to compare.

    Attributes:
        places: Places in the pool of the rows that have a vector, ascending [n].
        vectors: Their vectors, float32 [n, D].
        queries: Vectors of each target's rows, float32 [M_t, D], in the order of the targets.
    """

    places: NDArray[np.int64]
    vectors: NDArray[np.float32]
    queries: tuple[NDArray[np.float32], ...]


def _usable(vectors: NDArray[np.floating], num_rows: int, method: str) -> NDArray[np.int64]:
    if vectors.ndim != 2 or len(vectors) != num_rows:
        raise ComponentError(f"{method}: asked for embeddings of {num_rows:,} rows, was given shape {vectors.shape}")
    return np.flatnonzero(np.isfinite(vectors.sum(axis=1, dtype=np.float32)))


def _kept(vectors: NDArray[np.floating], places: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the rows at ``places`` as float32; no copy where all are kept."""
    return np.asarray(vectors if len(places) == len(vectors) else vectors[places], dtype=np.float32)


def embedded(method: str, pool: Rows, ctx: Context, spec: EmbeddingSpec, encoder: str | None) -> Embedded:
    """Embed a pool that is not empty, and the rows of every target.

    Args:
        method: Name of the selector, for messages.
        pool: Row ids [N], N >= 1.
        ctx: Context of the decision.
        spec: How hidden states become a vector.
        encoder: Folder or hub id of another model; None: the model under training.

    Raises:
        DataError: A target, or the pool, has no row with an embedding.
        ComponentError: Embeddings do not fit the rows asked for.
    """

    def ask(rows: Rows, target: str | None) -> NDArray[np.floating]:
        return ctx.signals.embeddings(rows, spec, target=target, encoder=encoder)

    more = " with supervised tokens, which completion_only asks for" if spec.completion_only else ""
    return compared(method, pool, ctx, ask, f"an embedding. Check that the rows hold text{more}.")


def compared(
    method: str,
    pool: Rows,
    ctx: Context,
    ask: Callable[[Rows, str | None], NDArray[np.floating]],
    lacking: str = "a vector. Check that the rows hold text, with supervised tokens where those are asked for.",
) -> Embedded:
    """Ask for the vectors of a pool that is not empty, and of the rows of every target.

    Args:
        method: Name of the selector, for messages.
        pool: Row ids [N], N >= 1.
        ctx: Context of the decision.
        ask: Gives vectors [n, D] of rows of the training set, or of the named target.
        lacking: What none of the pool's rows has, and what to do; for the message.

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
        raise DataError(f"{method}: none of {len(pool):,} rows has {lacking}")
    return Embedded(places=places, vectors=_kept(found, places), queries=tuple(queries))


def selection(
    pool: Rows, space: Embedded, kept: NDArray[np.int64], scores: NDArray[np.floating], how: str
) -> Selection:
    """Return a decision from positions among the embedded rows.

    Args:
        pool: Row ids [N].
        space: The embedded rows.
        kept: Positions in ``space.places`` of the rows kept.
        scores: Score of every embedded row [n].
        how: What the reason says after the number of rows.
    """
    whole = np.full(len(pool), np.nan, dtype=scores.dtype)
    whole[space.places] = scores
    reason = f"{len(kept)} of {len(pool)} rows {how}"
    if len(space.places) < len(pool):
        reason += f"; {len(pool) - len(space.places)} rows have no embedding"
    return Selection(rows=pool[space.places[kept]], scores=whole, reason=reason)
