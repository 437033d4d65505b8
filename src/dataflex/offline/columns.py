"""Asks selectors about every row once, and turns what they say into columns. No torch."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from dataflex.config.schema import MethodConfig
from dataflex.core.protocols import Context, Rows, Selection, Selector, Signals
from dataflex.errors import ComponentError, DataFlexError
from dataflex.signals.specs import GradientSpec
from dataflex.train.answers import check_selection

__all__ = ["Column", "ask"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column about every row.

    Attributes:
        name: ``METHOD`` (its scores), ``METHOD/TARGET`` (scores for one target) or ``METHOD.rank``.
        values: float [N], NaN where there is none; for ranks int64 [N], -1 where the row was not chosen.
        told: What it holds, in words.
    """

    name: str
    values: NDArray[Any]
    told: str


class _Remembering:
    """Passes questions on; scores towards several targets are remembered by target, so that each costs nothing."""

    def __init__(self, signals: Signals) -> None:
        self._signals = signals
        self._known: dict[tuple[str, GradientSpec, str], NDArray[np.float32]] = {}

    def __getattr__(self, question: str) -> Any:
        return getattr(self._signals, question)

    def gradient_scores(self, rows: Rows, spec: GradientSpec, *, targets: Sequence[str]) -> NDArray[np.float32]:
        """Return scores [len(rows), len(targets)]."""
        digest = hashlib.blake2b(np.ascontiguousarray(rows).tobytes(), digest_size=16).hexdigest()
        if any((digest, spec, target) not in self._known for target in targets):
            scores = self._signals.gradient_scores(rows, spec, targets=targets)
            self._known.update({(digest, spec, target): scores[:, t] for t, target in enumerate(targets)})
        return np.stack([self._known[digest, spec, target] for target in targets], axis=1)


def ask(method: MethodConfig, pool: Rows, budget: int, ctx: Context) -> list[Column]:
    """Return what a selector says about every row of ``pool`` (collective).

    Args:
        method: The selector.
        pool: Row ids [N].
        budget: Rows that it is asked to choose, at most N.
        ctx: Context; its targets are set here.

    Returns:
        Scores where the method gives any, for each target too where there are several; and the order of
        preference.

    Raises:
        ComponentError: The method broke its contract.
    """
    name = method.name
    ctx = replace(ctx, targets=method.targets, signals=cast(Signals, _Remembering(ctx.signals)))
    chosen = _select(method, pool, budget, ctx)
    columns: list[Column] = []
    towards = f" towards {', '.join(method.targets)}" if method.targets else ""
    if chosen.scores is None:
        logger.info("%s gives no scores, only an order: column %s.rank", name, name)
    else:
        columns.append(Column(name=name, values=_floats(chosen.scores), told=f"scores of {name}{towards}"))
        _warn_about(columns[0])
        if len(method.targets) > 1:
            columns += _by_target(method, pool, budget, ctx)
    ranks = np.full(len(pool), -1, dtype=np.int64)
    places = np.searchsorted(pool, chosen.rows)
    # A method that repeats rows counts with the first place.
    ranks[places[::-1]] = np.arange(len(places) - 1, -1, -1)
    told = f"order of preference of {name}{towards}, 0 first, among {budget:,} rows asked for ({chosen.reason})"
    columns.append(Column(name=f"{name}.rank", values=ranks, told=told))
    return columns


def _select(method: MethodConfig, pool: Rows, budget: int, ctx: Context) -> Selection:
    selector = method.build()
    if not isinstance(selector, Selector):
        raise ComponentError(f"{method.name} is no selector")
    selection = selector.select(pool, min(budget, len(pool)), ctx)
    check_selection(selector, selection, pool, budget)
    return selection


def _by_target(method: MethodConfig, pool: Rows, budget: int, ctx: Context) -> list[Column]:
    columns = []
    for target in method.targets:
        try:
            one = _select(replace(method, targets=(target,)), pool, budget, replace(ctx, targets=(target,)))
        except DataFlexError as error:  # a method may need several tasks
            logger.info("%s gives no scores for %s alone: %s", method.name, target, error)
            continue
        if one.scores is not None:
            told = f"scores of {method.name} towards {target}"
            columns.append(Column(name=f"{method.name}/{target}", values=_floats(one.scores), told=told))
    return columns


def _floats(scores: NDArray[Any]) -> NDArray[np.floating]:
    values = np.asarray(scores)
    return values if values.dtype == np.float32 else values.astype(np.float64)


def _warn_about(column: Column) -> None:
    finite = column.values[np.isfinite(column.values)]
    if not len(finite):
        logger.warning("%s: no row has a score", column.name)
    elif len(finite) > 1 and (finite == finite[0]).all():
        logger.warning("%s: all %d scores are equal (%g), so they say nothing", column.name, len(finite), finite[0])
