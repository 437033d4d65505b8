"""What the composable selector hands to its rule: rows that can be compared, their vectors, queries and scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ComponentError, ConfigError, DataError
from dataflex.method import Context, Rows, Selector
from dataflex.select.candidates import Candidates
from dataflex.select.choose import take_turns
from dataflex.select.ranked import ranking
from dataflex.select.rules import choose
from dataflex.select.spread import near_duplicates
from dataflex.selectors.aggregate import Aggregate, by_task, together
from dataflex.selectors.represent import Represent, selector_scores
from dataflex.selectors.similarity import Embedded, compared

if TYPE_CHECKING:
    from dataflex.selectors.compose import Compose

__all__ = ["Assembly", "assemble", "chosen", "targeted"]

_LOOKS_AT_TARGETS = frozenset({"scores", "queries", "query_vectors"})


def targeted(p: Compose.Params) -> bool:
    """Return whether these parts need targets."""
    spec = p.represent.spec
    return spec.needs.targets or (spec.kind == "vectors" and bool(p.rule.needs & _LOOKS_AT_TARGETS))


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """Everything about the rows that can be compared, n of the pool's.

    Attributes:
        places: Their places in the pool, ascending [n].
        vectors: What ``represent`` gives [n, D], or None.
        queries: Vectors of each target's rows; empty without vectors or targets.
        apart: Vectors by which rows are kept apart [n, D'], or None.
        tasks: Score for each target [T, n], or None.
        scores: One score a row [n], or None.
        num_lacking: Rows of the pool that lack a vector or a score.
        num_dropped: Near-duplicates that were dropped.
    """

    places: NDArray[np.int64]
    vectors: NDArray[np.float32] | None = None
    queries: tuple[NDArray[np.float32], ...] = ()
    apart: NDArray[np.float32] | None = None
    tasks: NDArray[np.float64] | None = None
    scores: NDArray[np.float64] | None = None
    num_lacking: int = 0
    num_dropped: int = 0

    def at(self, index: NDArray[np.integer]) -> Assembly:
        """Return the same of the rows at ``index``; no copy where that is all."""
        if len(index) == len(self.places):
            return self
        same = self.apart is self.vectors
        vectors = None if self.vectors is None else self.vectors[index]
        return dataclasses.replace(
            self,
            places=self.places[index],
            vectors=vectors,
            apart=vectors if same else None if self.apart is None else self.apart[index],
            tasks=None if self.tasks is None else self.tasks[:, index],
            scores=None if self.scores is None else self.scores[index],
        )


def assemble(p: Compose.Params, pool: Rows, ctx: Context, scorer: Callable[[str | None], Selector]) -> Assembly:
    """Ask for everything that the parts need of a pool that is not empty.

    Args:
        p: The parts.
        pool: Row ids [N].
        ctx: Context of the decision.
        scorer: Gives the selector that scores rows for a target, or without one.

    Raises:
        DataError: No row, or no row of a target, has what is asked for.
        ComponentError: Answers do not fit the rows asked for.
    """
    parts = _vectors(p, pool, ctx) if p.represent.spec.kind == "vectors" else _scores(p, pool, ctx, scorer)
    if p.vectors is not None:
        space = _space(p.vectors, pool, dataclasses.replace(ctx, targets=()))
        _, ours, theirs = np.intersect1d(parts.places, space.places, assume_unique=True, return_indices=True)
        if not len(ours):
            raise DataError(f"compose: none of {len(pool):,} rows has both a score and a vector of {p.vectors.name}")
        apart = space.vectors if len(theirs) == len(space.places) else space.vectors[theirs]
        parts = dataclasses.replace(parts.at(ours), apart=apart)
    parts = dataclasses.replace(parts, num_lacking=len(pool) - len(parts.places))
    if p.near_duplicates is None:
        return parts
    assert parts.apart is not None
    order = np.arange(len(parts.places)) if parts.scores is None else ranking(parts.scores)
    stays = np.flatnonzero(~near_duplicates(parts.apart, order, p.near_duplicates))
    return dataclasses.replace(parts.at(stays), num_dropped=len(parts.places) - len(stays))


def _space(represent: Represent, pool: Rows, ctx: Context) -> Embedded:
    call = represent.spec.call
    assert call is not None
    return compared("compose", pool, ctx, lambda rows, target: call(rows, target, ctx, represent.params))


def _vectors(p: Compose.Params, pool: Rows, ctx: Context) -> Assembly:
    space = _space(p.represent, pool, ctx if targeted(p) else dataclasses.replace(ctx, targets=()))
    parts = Assembly(places=space.places, vectors=space.vectors, queries=space.queries, apart=space.vectors)
    if not space.queries:
        return parts
    aggregate = p.aggregate or Aggregate.of("max" if p.rule.needs & {"queries", "query_vectors"} else "mean_then_max")
    tasks = by_task(space.vectors, space.queries, aggregate)
    return dataclasses.replace(parts, tasks=tasks, scores=together(tasks, aggregate))


def _scores(p: Compose.Params, pool: Rows, ctx: Context, scorer: Callable[[str | None], Selector]) -> Assembly:
    spec, count = p.represent.spec, len(ctx.targets)
    shape = (count, len(pool)) if spec.kind == "tasks" else (len(pool),)
    if spec.call is not None:
        found = np.asarray(spec.call(pool, ctx, p.represent.params), dtype=np.float64)
    elif spec.kind == "scores":
        found = selector_scores(scorer(None), pool, ctx)
    else:
        each = (dataclasses.replace(ctx, targets=(target,)) for target in ctx.targets)
        found = np.stack([selector_scores(scorer(one.targets[0]), pool, one) for one in each])
    if found.shape != shape:
        raise ComponentError(f"compose: {p.represent.name} gave scores of shape {found.shape}, expected {shape}")
    finite = np.isfinite(found) if found.ndim == 1 else np.isfinite(found).all(axis=0)
    places = np.flatnonzero(finite)
    if not len(places):
        raise DataError(
            f"compose: {p.represent.name} scores none of {len(pool):,} rows (are their labels all masked?). "
            "Check that cutoff_len leaves room for the response, and that the model's own loss is finite."
        )
    found = found[..., places]
    if found.ndim == 1:
        return Assembly(places=places, scores=found)
    return Assembly(places=places, tasks=found, scores=together(found, p.aggregate or Aggregate.of("mean_then_max")))


def chosen(p: Compose.Params, parts: Assembly, rows: Rows, budget: int, ctx: Context) -> NDArray[np.int64]:
    """Return the positions among ``parts.places`` that the rule keeps, in its order.

    Args:
        p: The parts.
        parts: What they gave.
        rows: Row ids of those rows [n].
        budget: Rows at most.
        ctx: Context of the decision.

    Raises:
        ConfigError: The rule counts tokens and they are not known.
        DataError: The rule has nothing to draw from.
    """
    lengths = ctx.domains.lengths
    if "lengths" in p.rule.needs and lengths is None:
        raise ConfigError(f"dynamic.selector.rule: {p.rule.name} counts tokens, and the rows' lengths are not known")
    everything = Candidates(
        rows=rows,
        uniforms=Candidates.stream(ctx.seed, "selector.compose", ctx.interval.index),
        scores=parts.scores,
        by_query=parts.tasks,
        vectors=parts.apart if "vectors" in p.rule.needs else parts.vectors,
        queries=np.concatenate(parts.queries) if parts.queries else None,
        lengths=None if lengths is None else lengths[rows],
        groups=ctx.domains.domain_of[rows],
    )
    if p.aggregate is None or p.aggregate.name != "round_robin":
        return choose(p.rule, everything, budget)
    assert parts.tasks is not None
    lists = []
    for t, target in enumerate(ctx.targets):
        own = dataclasses.replace(
            everything,
            uniforms=Candidates.stream(ctx.seed, f"selector.compose.{target}", ctx.interval.index),
            scores=parts.tasks[t],
            by_query=parts.tasks[t : t + 1],
            queries=parts.queries[t] if parts.queries else None,
        )
        lists.append(choose(p.rule, own, min(budget, len(rows))))
    return take_turns(lists, budget)
