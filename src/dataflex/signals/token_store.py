"""Token losses of a model for many rows, computed once and kept on disk: one half-precision number per token.

The array is flat: the tokens of its i-th row are ``[offsets[i]:offsets[i + 1]]``, padding not counted. A token's
entry is the loss of predicting it; NaN where it is not supervised (the first token of a row never is).
Positions, not supervised tokens, are counted, since some collators decide which labels count only when
they make a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex import comm
from dataflex.errors import DataError
from dataflex.method import Rows
from dataflex.signals.logits import TokenScorer
from dataflex.signals.store import ResumablePass
from dataflex.signals.sweep import Sweep, Turn

__all__ = ["KEPT_DTYPE", "TOLERANCE", "largest_difference", "row_offsets", "stored_token_pass"]

KEPT_DTYPE = np.float16
TOLERANCE = 0.02
"""Most by which a row's tokens may differ from a fresh pass on average, in nats."""

Around = Callable[[], AbstractContextManager[Any]]


def row_offsets(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where each row begins in the flat array, and its end: int64 [n + 1]."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def stored_token_pass(
    sweep: Sweep, scorer: TokenScorer, work: ResumablePass, around: Around = nullcontext
) -> NDArray[Any]:
    """Score rows on all ranks (collective) into a stored flat array, going on where an earlier try stopped.

    Args:
        sweep: The rows, in the order of the array.
        scorer: The model, in eval mode.
        work: Opened with the offsets of ``row_offsets(sweep.lengths)``.
        around: Entered around each forward, as the trainer's autocast.

    Returns:
        The whole array, memory-mapped, on every rank.

    Raises:
        DataError: A loss is not finite.
    """
    for turn in sweep.turns(work.done_at_start):
        values = _scored(sweep, turn, scorer, around)
        if turn.mine:
            work.record(turn.positions, values)
    return work.finish()


def largest_difference(
    sweep: Sweep, scorer: TokenScorer, kept: Callable[[int], NDArray[Any]], around: Around = nullcontext
) -> tuple[float, int]:
    """Score some rows anew (collective) and compare with what was kept.

    Args:
        sweep: The rows to compare.
        scorer: The model, in eval mode.
        kept: Gives what was kept of a row, by its id.
        around: Entered around each forward.

    Returns:
        The largest mean absolute difference of a row's tokens, and that row's id; infinite where
        other tokens are supervised than were then.
    """
    worst, where = 0.0, -1
    for turn in sweep.turns():
        values = _scored(sweep, turn, scorer, around)
        start = 0
        for position in turn.positions:
            row, length = int(sweep.rows[position]), int(sweep.lengths[position])
            fresh = values[start : start + length].astype(np.float64)
            before = np.asarray(kept(row), dtype=np.float64)
            start += length
            difference = _mean_difference(fresh, before)
            if difference > worst:
                worst, where = difference, row
    pairs, _ = comm.gather_rows(torch.tensor([[worst, float(where)]], dtype=torch.float64, device=sweep.device))
    top = pairs[int(pairs[:, 0].argmax())]
    return float(top[0]), int(top[1])


def some_rows(sweep: Sweep, count: int, rng: np.random.Generator) -> Sweep:
    """Return a sweep over ``count`` rows drawn from another one, or over all if there are fewer."""
    size = len(sweep.rows)
    chosen: Rows = np.sort(rng.choice(size, size=min(count, size), replace=False))
    return replace(sweep, rows=sweep.rows[chosen], lengths=sweep.lengths[chosen], what=None)


def _mean_difference(fresh: NDArray[np.float64], kept: NDArray[np.float64]) -> float:
    supervised = ~np.isnan(fresh)
    if len(fresh) != len(kept) or (supervised != ~np.isnan(kept)).any():
        return float("inf")
    return float(np.abs(fresh - kept)[supervised].mean()) if supervised.any() else 0.0


def _scored(sweep: Sweep, turn: Turn, scorer: TokenScorer, around: Around) -> NDArray[np.float32]:
    """Return the entries of a batch's rows, one row after the other, NaN where nothing is supervised."""
    with around():
        tokens = scorer(turn.batch)
    offsets = row_offsets(sweep.lengths[turn.positions])
    out = np.full(int(offsets[-1]), np.nan, dtype=np.float32)
    row, position = tokens.row.cpu().numpy(), tokens.position.cpu().numpy()
    losses = tokens.loss.float().cpu().numpy()
    if not np.isfinite(losses).all():
        bad = sweep.rows[turn.positions[row[~np.isfinite(losses)][0]]]
        raise DataError(f"reference: the loss of row {int(bad)} is not finite; the model is broken or overflows")
    inside = position < np.diff(offsets)[row]
    if not inside.all():
        bad = sweep.rows[turn.positions[row[~inside][0]]]
        raise DataError(f"reference: row {int(bad)} has more tokens in its batch than in the data set")
    out[offsets[row] + position] = losses
    return out
