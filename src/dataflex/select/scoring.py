"""The base of selectors that score rows: it does all that comes after the score.

A subclass gives ``score``. The base sets rows without a finite score aside, brings targets together (``aggregate``),
lets a subset rule choose (``rule``), and gives scores back in the order of the pool with the reason for the record.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ComponentError, ConfigError, DataError
from dataflex.method import Context, Params, Problem, Rows, RunFacts, Selection, Selector, param
from dataflex.parts import Part
from dataflex.rng import uniforms
from dataflex.select.choose import Candidates, Uniforms, take_turns
from dataflex.select.neighbours import best_similarity
from dataflex.select.rules import RULES, Rule, choose


@dataclass(frozen=True, kw_only=True)
class Plain(Params):
    """An aggregation without parameters."""


@dataclass(frozen=True, kw_only=True)
class Votes(Params):
    """Targets vote for their best rows (ICONS)."""

    vote_percent: float = param(20.0, "share of the pool that a target votes for, in percent", above=0.0, maximum=100.0)


def count_votes(influence: NDArray[np.floating], vote_percent: float) -> NDArray[np.int64]:
    """Return each row's number of votes [n].

    Args:
        influence: Influence of each row on each task [n, T], finite, n >= 1.
        vote_percent: p; a task votes for the rows at or above the (100 - p)th percentile of its influences.
    """
    values = np.asarray(influence, dtype=np.float64)
    return (values >= np.percentile(values, 100.0 - vote_percent, axis=0)).sum(axis=1)


def percentile_ranks(influence: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return each row's percentile rank, averaged over tasks [n], in (0, 1).

    In a task it is (rank - 1/2) / n, and equal values share the mean of their ranks. Rows whose ranks add up
    to the same have the same bits.
    """
    values = np.asarray(influence, dtype=np.float64)
    doubled = np.zeros(len(values), dtype=np.int64)  # twice the ranks: whole numbers, whose sums are exact
    for column in values.T:
        _, place, counts = np.unique(column, return_inverse=True, return_counts=True)
        doubled += (2 * (np.cumsum(counts) - counts) + counts)[place.reshape(-1)]
    return doubled / (2.0 * len(values) * values.shape[1])


def _z_max(scores_TN: NDArray[np.float64], _: Params) -> NDArray[np.float64]:
    spread = scores_TN.std(axis=1, keepdims=True)
    centred = scores_TN - scores_TN.mean(axis=1, keepdims=True)
    return (centred / np.where(spread > 0, spread, 1.0)).max(axis=0)


def _votes(scores_TN: NDArray[np.float64], p: Votes) -> NDArray[np.float64]:
    return count_votes(scores_TN.T, p.vote_percent) + percentile_ranks(scores_TN.T)


@dataclass(frozen=True)
class _Spec:
    params: type[Params]
    nearest: bool
    """Whether a row's score for a target is its largest similarity with the target's rows, not the mean one."""
    call: Callable[[NDArray[np.float64], Any], NDArray[np.float64]]


AGGREGATES: Final[dict[str, _Spec]] = {
    "mean": _Spec(Plain, False, lambda scores, _: scores.mean(axis=0)),
    "max": _Spec(Plain, True, lambda scores, _: scores.max(axis=0)),
    "mean_then_max": _Spec(Plain, False, lambda scores, _: scores.max(axis=0)),
    "z_max": _Spec(Plain, False, _z_max),
    "votes": _Spec(Votes, False, _votes),
    "ranks": _Spec(Plain, False, lambda scores, _: percentile_ranks(scores.T)),
    # Targets take turns: the number is for the record only.
    "round_robin": _Spec(Plain, True, lambda scores, _: scores.max(axis=0)),
}


@dataclass(frozen=True)
class Aggregate(Part):
    """An aggregation with its parameters."""

    what = "aggregation"

    @classmethod
    def known(cls) -> list[str]:
        """Return the names of all aggregations."""
        return list(AGGREGATES)

    @classmethod
    def listed(cls, name: str) -> type[Params]:
        """Return an aggregation's parameters."""
        return AGGREGATES[name].params


def by_task(
    vectors_ND: NDArray[np.float32], queries: Sequence[NDArray[np.float32]], aggregate: Aggregate
) -> NDArray[np.float64]:
    """Return each row's similarity with each target, float64 [T, N]: the mean over its rows, or the largest."""
    if AGGREGATES[aggregate.name].nearest:
        return np.stack([best_similarity(one, vectors_ND) for one in queries]).astype(np.float64)
    return (np.stack([one.mean(axis=0) for one in queries]) @ vectors_ND.T).astype(np.float64)


def together(scores_TN: NDArray[np.floating], aggregate: Aggregate) -> NDArray[np.float64]:
    """Return one score a row, float64 [N], from finite scores by target [T, N].

    ``mean``: over targets. ``max``, ``mean_then_max``: the best target's (they differ in ``by_task``). ``z_max``:
    the best target's, of scores with mean 0 and standard deviation 1 in each target. ``votes``: votes of targets, ties
    by mean percentile rank (ICONS, arXiv 2501.00654). ``ranks``: the mean percentile rank. ``round_robin``: the best
    target's.
    """
    return AGGREGATES[aggregate.name].call(np.asarray(scores_TN, dtype=np.float64), aggregate.params)


Gives = Literal["scores", "tasks", "vectors"]
"""One score a row [N]; scores by target [T, N]; or vectors [N, D], which are compared with those of target rows."""

_CHECK = "Check that cutoff_len leaves room for the response, and that the model's own loss is finite."
_QUERIES = frozenset({"queries", "query_vectors"})
VECTORS: Final = "rds_plus, embed or gradient"


AGGREGATE: Final = f"how targets come together: {', '.join(Aggregate.known())}"
RULE: Final = "which rows are kept: a subset rule"


@dataclass(frozen=True, kw_only=True)
class ScoringParams(Params):
    """What every scoring selector takes. A subclass may set other defaults of these two."""

    aggregate: Aggregate | None = param(Aggregate.of("max"), AGGREGATE)
    rule: Rule = param(Rule.of("top_k"), RULE)


def default_of(params: Params, name: str) -> Any:
    """Return the default of a parameter of these."""
    found = next(each for each in dataclasses.fields(params) if each.name == name)
    return found.default if found.default_factory is dataclasses.MISSING else found.default_factory()


@dataclass(frozen=True, kw_only=True)
class Found:
    """What is known of the n rows of a pool that can be compared.

    Attributes:
        places: Their places in the pool, ascending [n].
        scores: One score a row [n]; None where there are vectors or scores by target, until those come together.
        tasks: Score for each target [T, n], or None.
        vectors: Vectors [n, D], or None.
        queries: Vectors of each target's rows; empty without vectors or targets.
        turns: Scores for what takes turns under ``round_robin`` [Q, n]; None: the rows of all targets, by vectors.
        apart: Vectors by which rows are kept apart [n, D'], where not ``vectors``.
        num_dropped: Near-duplicates of these rows that were dropped.
    """

    places: NDArray[np.int64]
    scores: NDArray[np.floating] | None = None
    tasks: NDArray[np.floating] | None = None
    vectors: NDArray[np.float32] | None = None
    queries: tuple[NDArray[np.float32], ...] = ()
    turns: NDArray[np.floating] | None = None
    apart: NDArray[np.float32] | None = None
    num_dropped: int = 0

    def at(self, index: NDArray[np.integer]) -> Found:
        """Return the same of the rows at ``index``, ascending; no copy where that is all."""
        if len(index) == len(self.places):
            return self
        parts = {name: getattr(self, name) for name in ("places", "vectors", "apart", "scores", "tasks", "turns")}
        cut = {
            name: part[..., index] if name in ("scores", "tasks", "turns") else part[index]
            for name, part in parts.items()
            if part is not None
        }
        return dataclasses.replace(self, **cut)


def scattered(values: NDArray[np.floating], places: NDArray[np.int64], size: int) -> NDArray[np.floating]:
    """Return an array of this size with the values at their places, NaN elsewhere."""
    whole = np.full(size, np.nan, dtype=values.dtype)
    whole[places] = values
    return whole


class ScoringSelector(Selector):
    """Keeps the rows that a subset rule picks by their scores."""

    lacking: ClassVar[str] = "no finite score"
    """What is told of rows whose score is NaN: "3 rows have no finite score"."""
    decides: ClassVar[tuple[str, ...]] = ("aggregate", "rule")
    """Parameters that have no bearing on the score."""
    targets_take_turns: ClassVar[bool] = False
    """Whether, of several targets, these take turns under ``round_robin`` instead of the rows of all."""

    Params: ClassVar[type[Params]] = ScoringParams
    params: Any

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not issubclass(cls.Params, ScoringParams):
            raise TypeError(f"{cls.__qualname__}.Params must be a subclass of dataflex.ScoringParams")

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.rule.require()

    @property
    def gives(self) -> Gives:
        """What rows are compared by."""
        return "tasks" if self.requires().targets else "scores"

    def check(self, run: RunFacts) -> Iterator[Problem]:
        """Yield why the aggregation and the rule cannot work with these scores."""
        p = self.params
        given = None if p.aggregate == default_of(p, "aggregate") else p.aggregate
        yield from combination_problems(self.name, self.gives, p.rule, given, turns=self.targets_take_turns)

    @property
    def aggregate(self) -> Aggregate:
        """How targets come together."""
        given: Aggregate | None = self.params.aggregate
        return given or Aggregate.of("max")

    @property
    def rule(self) -> Rule:
        """Which rows are kept."""
        rule: Rule = self.params.rule
        return rule

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.floating]:
        """Return the score of every pool row [N], or of every row for every target [T, N]: larger is better.

        NaN for rows that have none; they are never kept.
        """
        raise NotImplementedError

    def preference(self, found: Found, ctx: Context) -> NDArray[np.floating]:
        """Return what the rule ranks the rows by [n]; the scores, unless a subclass says otherwise. NaN: never kept."""
        assert found.scores is not None
        return found.scores

    def explain(self, kept: NDArray[np.int64], found: Found, ctx: Context) -> str:
        """Return what the reason says after the number of rows.

        Args:
            kept: Positions in ``found.places`` of the rows kept.
            found: The rows with scores.
            ctx: Context of the decision.
        """
        towards = f" towards {', '.join(ctx.targets)}" if ctx.targets else ""
        return f"by {self.rule.name} on {self.name}{towards}"

    def uniforms(self, ctx: Context, target: str | None = None) -> Uniforms:
        """Return the random numbers of a decision, or of one target's share in it."""
        name = f"selector.{self.name}" + ("" if target is None else f".{target}")

        def draws(purpose: str, ids: NDArray[np.int64]) -> NDArray[np.float64]:
            stream = name if purpose in ("gumbel", "draws") else f"{name}.{purpose}"
            return uniforms(ctx.seed, stream, ctx.interval.index, ids)

        return draws

    def select(self, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Keep up to ``budget`` rows; fewer where rows have no score, or where the rule says so. Ties by pool order.

        Returns:
            Rows in the rule's order; scores [len(pool)] after bringing targets together, NaN for rows that have
            none and are never kept; None where the rule looks at vectors only.

        Raises:
            DataError: No row of a pool that is not empty has a score; or the rule has nothing to draw from.
            ComponentError: Scores do not fit the pool.
            ConfigError: The rule counts tokens and they are not known.
        """
        if len(pool) == 0:
            return Selection(rows=pool, scores=np.empty(0), reason="empty pool")
        found = self.scored(self.examine(pool, ctx))
        kept = self.kept(found, pool[found.places], budget, ctx)
        reason = f"{len(kept)} of {len(pool)} rows {self.explain(kept, found, ctx)}"
        if lacking := len(pool) - len(found.places) - found.num_dropped:
            reason += f"; {lacking} rows have {self.lacking}"
        if found.num_dropped:
            reason += f"; {found.num_dropped} near-duplicates were dropped"
        scores = None if found.scores is None else scattered(found.scores, found.places, len(pool))
        return Selection(rows=pool[found.places[kept]], scores=scores, reason=reason)

    def examine(self, pool: Rows, ctx: Context) -> Found:
        """Return what is known of the rows of a pool that is not empty.

        Raises:
            DataError: No row has a score.
            ComponentError: Scores do not fit the pool.
        """
        scores = np.asarray(self.score(pool, ctx))
        if scores.ndim not in (1, 2) or scores.shape[-1] != len(pool):
            raise ComponentError(
                f"{self.name}: asked for the scores of {len(pool):,} rows, was given shape {scores.shape}; expected "
                "[rows] or [targets, rows]"
            )
        finite = np.isfinite(scores)
        places = np.flatnonzero(finite if scores.ndim == 1 else finite.all(axis=0))
        if not len(places):
            raise DataError(
                f"{self.name}: all {len(pool):,} rows have {self.lacking} (are their labels all masked?). {_CHECK}"
            )
        scores = scores if len(places) == len(pool) else scores[..., places]
        return Found(places=places, scores=scores) if scores.ndim == 1 else Found(places=places, tasks=scores)

    def scored(self, found: Found) -> Found:
        """Return the same with one score a row, where there are targets to bring together."""
        tasks = found.tasks
        if tasks is None and found.queries:
            tasks = self.by_task(found)
        if tasks is None or found.scores is not None:
            return found
        return dataclasses.replace(found, tasks=tasks, scores=together(tasks, self.aggregate))

    def by_task(self, found: Found) -> NDArray[np.float64]:
        """Return each row's similarity with each target [T, n], from vectors."""
        assert found.vectors is not None
        return by_task(found.vectors, found.queries, self.aggregate)

    def kept(self, found: Found, rows: Rows, budget: int, ctx: Context) -> NDArray[np.int64]:
        """Return the positions among ``found.places`` that the rule keeps, in its order.

        Args:
            found: The rows with scores.
            rows: Their row ids [n].
            budget: Rows at most.
            ctx: Context of the decision.
        """
        if budget == 0:
            return np.empty(0, dtype=np.int64)
        wanted = None if found.scores is None else self.preference(found, ctx)
        stay = np.arange(len(rows)) if wanted is None else np.flatnonzero(np.isfinite(wanted))
        if len(stay) < len(rows):
            assert wanted is not None
            found, wanted, rows = found.at(stay), wanted[stay], rows[stay]
        everything = self.candidates(found, wanted, rows, ctx)
        if self.aggregate.name != "round_robin" or found.tasks is None:
            return stay[self.choose(everything, budget, ctx)]
        lists = []
        for t, target in enumerate(ctx.targets[: len(found.tasks)]):
            own = dataclasses.replace(
                everything,
                uniforms=self.uniforms(ctx, target),
                scores=found.tasks[t],
                by_query=None if found.queries else found.tasks[t : t + 1],
                queries=found.queries[t] if found.queries else None,
            )
            lists.append(choose(self.rule, own, min(budget, len(rows))))
        return stay[take_turns(lists, budget)]

    def choose(self, candidates: Candidates, budget: int, ctx: Context) -> NDArray[np.int64]:
        """Return the positions of the candidates that the rule keeps."""
        return choose(self.rule, candidates, budget)

    def candidates(self, found: Found, wanted: NDArray[np.floating] | None, rows: Rows, ctx: Context) -> Candidates:
        """Return what the rule may look at: rows [n] with what they are ranked by."""
        lengths, rule = ctx.domains.lengths, self.rule
        if "lengths" in rule.needs and lengths is None:
            raise ConfigError(f"dynamic.selector.rule: {rule.name} counts tokens, and the rows' lengths are not known")
        apart = found.vectors if found.apart is None or "vectors" not in rule.needs else found.apart
        return Candidates(
            rows=rows,
            uniforms=self.uniforms(ctx),
            scores=wanted,
            by_query=found.turns if found.turns is not None or found.queries else found.tasks,
            vectors=apart,
            queries=np.concatenate(found.queries) if found.queries else None,
            lengths=None if lengths is None else lengths[rows],
            groups=ctx.domains.domain_of[rows],
        )


def combination_problems(
    name: str, gives: Gives, rule: Rule, aggregate: Aggregate | None, *, apart: bool = False, turns: bool = False
) -> list[Problem]:
    """Return the reasons why these parts cannot work together.

    Args:
        name: What gives the scores.
        gives: What they are.
        rule: The subset rule.
        aggregate: How targets come together, where that was asked for.
        apart: Whether there are other vectors to keep rows apart by.
        turns: Whether targets take turns under ``round_robin`` instead of the rows of all targets.
    """
    return [*_rule_problems(name, gives, rule, apart), *_aggregate_problems(name, gives, rule, aggregate, turns)]


def _rule_problems(name: str, gives: Gives, rule: Rule, apart: bool) -> Iterator[Problem]:
    if "query_vectors" in rule.needs and gives != "vectors":
        yield Problem(
            "rule",
            f"{rule.name} searches for the neighbours of each target row and needs vectors, which {name} does "
            f"not give; use one of {VECTORS}",
        )
    elif "queries" in rule.needs and gives == "scores":
        yield Problem(
            "rule",
            f"{rule.name} lets target rows take turns, and {name} gives one score a row, without targets; "
            "use the rule top_k, or scores with targets",
        )
    elif "vectors" in rule.needs and gives != "vectors" and not apart:
        yield Problem(
            "rule",
            f"{rule.name} compares rows with each other and needs vectors, which {name} does not give; add "
            f"'vectors: embed' (or another of {VECTORS}) beside 'represent: {name}'",
        )


def _aggregate_problems(
    name: str, gives: Gives, rule: Rule, aggregate: Aggregate | None, turns: bool
) -> Iterator[Problem]:
    if aggregate is None:
        return
    needs = rule.needs
    if gives == "scores":
        yield Problem("aggregate", f"{name} gives one score a row, without targets to bring together; remove the key")
    elif aggregate.name == "round_robin":
        if not RULES[rule.name].ranks:
            fitting = ", ".join(each for each, spec in RULES.items() if spec.ranks)
            yield Problem(
                "aggregate",
                f"with round_robin each target ranks the rows by the rule, and {rule.name} does not rank; "
                f"use one of {fitting}, or another aggregate",
            )
        elif rule.replacement:
            yield Problem("aggregate", "with round_robin rows are taken once, so the rule cannot draw with replacement")
    elif needs & _QUERIES and not (needs == {"queries"} and gives == "tasks") and not turns:
        yield Problem(
            "aggregate",
            f"{aggregate.name} has no effect, since {rule.name} looks at each target row by itself; remove "
            "the key, or set 'aggregate: round_robin' to let targets take turns",
        )
    elif needs & _QUERIES and not turns:
        yield Problem(
            "aggregate",
            f"{aggregate.name} has no effect, since the rule {rule.name} lets targets take turns; remove the key",
        )
    elif "scores" not in needs and not turns:
        yield Problem(
            "aggregate", f"{aggregate.name} has no effect, since {rule.name} looks at no scores; remove the key"
        )
