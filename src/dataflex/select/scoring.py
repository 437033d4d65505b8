"""The bases of selectors that score rows: they do all that comes before and after the score.

A subclass gives ``score``. ``PoolSelector`` sets rows without a finite score aside and gives scores back in the order
of the pool, with the reason for the record; ``ScoringSelector`` also brings targets together (``aggregate``) and lets
a subset rule choose (``rule``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ComponentError, ConfigError, DataError
from dataflex.method import Context, Params, Problem, Rows, RunFacts, Selection, Selector, param
from dataflex.parts import Part
from dataflex.select.choose import ABSENT, Candidates, Uniforms, take_turns
from dataflex.select.neighbours import best_similarity
from dataflex.select.rules import QUERIES, RULES, Rule, choose


@dataclass(frozen=True, kw_only=True)
class Votes(Params):
    """Targets vote for their best rows (ICONS)."""

    vote_percent: float = param(20.0, "share of the pool that a target votes for, in percent", above=0.0, maximum=100.0)


def count_votes(influence: NDArray[np.floating], vote_percent: float) -> NDArray[np.int64]:
    """Return the number of tasks whose (100 - ``vote_percent``)th percentile a row's influence [n, T] reaches: [n]."""
    values = np.asarray(influence, dtype=np.float64)
    return (values >= np.percentile(values, 100.0 - vote_percent, axis=0)).sum(axis=1)


def percentile_ranks(influence: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return each row's percentile rank in (0, 1) [n], averaged over the tasks of influences [n, T].

    In a task it is (rank - 1/2) / n, and equal values share the mean of their ranks.
    """
    from scipy.stats import rankdata

    ranks = rankdata(influence, axis=0)
    return np.asarray((ranks - 0.5).sum(axis=1) / ranks.size)


def _best(scores_TN: NDArray[np.float64], _: Params) -> NDArray[np.float64]:
    return scores_TN.max(axis=0)


def _z_max(scores_TN: NDArray[np.float64], _: Params) -> NDArray[np.float64]:
    spread = scores_TN.std(axis=1, keepdims=True)
    centred = scores_TN - scores_TN.mean(axis=1, keepdims=True)
    return (centred / np.where(spread > 0, spread, 1.0)).max(axis=0)


def _votes(scores_TN: NDArray[np.float64], p: Votes) -> NDArray[np.float64]:
    return count_votes(scores_TN.T, p.vote_percent) + percentile_ranks(scores_TN.T)


AGGREGATES: Final[dict[str, Callable[[NDArray[np.float64], Any], NDArray[np.float64]]]] = {
    "mean": lambda scores, _: scores.mean(axis=0),
    "max": _best,
    "mean_then_max": _best,
    "z_max": _z_max,
    "votes": _votes,
    "ranks": lambda scores, _: percentile_ranks(scores.T),
    "round_robin": _best,  # targets take turns: the number is for the record only
}
_NEAREST = ("max", "round_robin")  # a row's score is its largest similarity with the target's rows, not the mean one


@dataclass(frozen=True)
class Aggregate(Part):
    """An aggregation with its parameters."""

    what = "aggregation"
    table: ClassVar = {name: Votes if name == "votes" else Params for name in AGGREGATES}


def together(scores_TN: NDArray[np.floating], aggregate: Aggregate) -> NDArray[np.float64]:
    """Return one score a row, float64 [N], from finite scores by target [T, N].

    ``mean``: over targets. ``max``, ``mean_then_max``, ``round_robin``: the best target's (they differ in what a score
    for a target is). ``z_max``: the same of scores with mean 0 and standard deviation 1 in each target. ``votes``: of
    targets, ties by mean percentile rank (ICONS, arXiv 2501.00654). ``ranks``: the mean percentile rank.
    """
    return AGGREGATES[aggregate.name](np.asarray(scores_TN, dtype=np.float64), aggregate.params)


Gives = Literal["scores", "tasks", "vectors"]
"""One score a row [N]; scores by target [T, N]; or vectors [N, D], which are compared with those of target rows."""

VECTORS: Final = "rds_plus, embed or gradient"
AGGREGATE: Final = f"how targets come together: {', '.join(Aggregate.known())}"
RULE: Final = "which rows are kept: a subset rule"


@dataclass(frozen=True, kw_only=True)
class ScoringParams(Params):
    """What every scoring selector takes. A subclass may set other defaults of these two."""

    aggregate: Aggregate | None = param(Aggregate.of("max"), AGGREGATE)
    rule: Rule = param(Rule.of("top_k"), RULE)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What is known of the n rows of a pool that can be compared; what is not known is None."""

    places: NDArray[np.int64]  # their places in the pool, ascending [n]
    scores: NDArray[np.floating] = ABSENT  # one score a row [n]; None until vectors or scores by target come together
    wanted: NDArray[np.floating] = ABSENT  # what the rule ranks by where not the scores [n]; NaN: never kept
    tasks: NDArray[np.floating] | None = None  # score for each target [T, n]
    of: tuple[int, ...] | None = None  # the targets that ``tasks`` are of, by place [T]; None: all, in order
    vectors: NDArray[np.float32] = ABSENT  # vectors [n, D]
    queries: tuple[NDArray[np.float32], ...] = ()  # vectors of each target's rows; empty without vectors or targets
    query_rows: tuple[NDArray[np.int64], ...] = ()  # the rows of the targets that these are of
    nearest: NDArray[np.int64] | None = None  # row of each target that is nearest [T, n], for the record
    turns: NDArray[np.floating] | None = None  # for what takes turns under ``round_robin`` [Q, n]; None: target rows
    apart: NDArray[np.float32] | None = None  # vectors by which rows are kept apart [n, D'], where not ``vectors``
    num_dropped: int = 0  # near-duplicates of these rows that were dropped

    def at(self, index: NDArray[np.integer]) -> Found:
        """Return the same of the rows at ``index``, ascending; no copy where that is all."""
        if len(index) == len(self.places):
            return self
        by_row = {name: getattr(self, name) for name in ("places", "vectors", "apart")}
        by_column = {name: getattr(self, name) for name in ("scores", "wanted", "tasks", "turns", "nearest")}
        cut = {name: part[index] for name, part in by_row.items() if part is not None}
        cut |= {name: part[..., index] for name, part in by_column.items() if part is not None}
        return replace(self, **cut)


class NoSignal(DataError):
    """Nothing tells the rows of this decision apart; see ``PoolSelector.without_signal``."""


class PoolSelector(Selector):
    """Scores the rows of a pool and keeps some of them, in its own way (``kept``)."""

    lacking: ClassVar[str] = "no finite score"
    """What is told of rows whose score is NaN: "3 rows have no finite score"."""
    unnamed: ClassVar[tuple[str, ...]] = ("gumbel", "draws")
    """Purposes of random numbers that are drawn from the selector's own stream; others have one each."""

    decides: ClassVar[tuple[str, ...]] = ()
    """Parameters that have no bearing on the score."""

    params: Any
    told: str
    """What the reason says after the number of rows; ``kept`` sets it."""

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.floating]:
        """Return the score of every pool row [N], or of every row for every target [T, N]: larger is better.

        NaN for rows that have none; they are never kept.
        """
        raise NotImplementedError

    def kept(self, found: Found, rows: Rows, budget: int, ctx: Context) -> NDArray[np.int64]:
        """Return the positions among ``found.places`` of at most ``budget`` rows to keep, in order of preference."""
        raise NotImplementedError

    def explain(self, kept: NDArray[np.int64], found: Found, ctx: Context) -> str:
        """Return what the reason says after the number of rows; ``kept`` are positions among ``found.places``."""
        return self.told

    def uniforms(self, ctx: Context, target: str | None = None) -> Uniforms:
        """Return the random numbers of a decision, or of one target's share in it."""
        name = f"selector.{self.name}" + ("" if target is None else f".{target}")
        return Candidates.stream(ctx.seed, name, ctx.interval.index, self.unnamed)

    def select(self, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Keep up to ``budget`` rows; fewer where rows have no score, or where the rule says so. Ties by pool order.

        Rows come in order of preference; scores [len(pool)] after bringing targets together, NaN for rows that have
        none and are never kept, or None where the rule looks at vectors only.

        Raises:
            DataError: No row of a pool that is not empty has a score; or the rule has nothing to draw from.
            ComponentError: Scores do not fit the pool.
            ConfigError: The rule counts tokens and they are not known.
        """
        if len(pool) == 0:
            return Selection(rows=pool, scores=np.empty(0), reason="empty pool")
        try:
            found = self.scored(self.examine(pool, ctx))
        except NoSignal as error:
            return self.without_signal(error, pool, budget, ctx)
        kept = self.kept(found, pool[found.places], budget, ctx)
        reason = f"{len(kept)} of {len(pool)} rows {self.explain(kept, found, ctx)}"
        if lacking := len(pool) - len(found.places) - found.num_dropped:
            reason += f"; {lacking} rows have {self.lacking}"
        if found.num_dropped:
            reason += f"; {found.num_dropped} near-duplicates were dropped"
        rows = pool[found.places[kept]]
        if found.scores is None:
            return Selection(rows=rows, reason=reason)
        scores = np.full(len(pool), np.nan, dtype=found.scores.dtype)
        scores[found.places] = found.scores
        nearest = None
        if found.tasks is not None:
            nearest = np.full(len(pool), -1, dtype=np.int16), np.full(len(pool), -1, dtype=np.int32)
            best = found.tasks.argmax(axis=0)
            nearest[0][found.places] = best if found.of is None else np.array(found.of)[best]
            if found.nearest is not None:
                nearest[1][found.places] = found.nearest[best, np.arange(len(best))]
        return Selection(rows=rows, scores=scores, reason=reason, nearest=nearest)

    def examine(self, pool: Rows, ctx: Context) -> Found:
        """Return what is known of the rows of a pool that is not empty; raises as ``select`` does."""
        scores = np.asarray(self.score(pool, ctx))
        if scores.ndim not in (1, 2) or scores.shape[-1] != len(pool):
            raise ComponentError(
                f"{self.name}: asked for the scores of {len(pool):,} rows, was given shape {scores.shape}; expected "
                "[rows] or [targets, rows]"
            )
        places = self.usable(np.asarray(np.isfinite(scores).reshape(-1, len(pool)).all(axis=0)))
        scores = scores if len(places) == len(pool) else scores[..., places]
        return Found(places=places, scores=scores) if scores.ndim == 1 else Found(places=places, tasks=scores)

    def without_signal(self, error: NoSignal, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Return what is kept where ``examine`` found nothing to tell rows apart by; unless given, that is an error."""
        raise error

    def usable(self, known: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return the places of the pool's rows of which something is known; DataError where there is none."""
        if not known.any():
            raise DataError(
                f"{self.name}: all {len(known):,} rows have {self.lacking} (are their labels all masked?). Check that "
                "rows hold text, that cutoff_len leaves room for the response, and that the model's own loss is finite."
            )
        return np.flatnonzero(known)

    def scored(self, found: Found) -> Found:
        """Return the same with one score a row, where there is something to make it of."""
        return found


class ScoringSelector(PoolSelector):
    """Keeps the rows that a subset rule picks by their scores."""

    decides: ClassVar[tuple[str, ...]] = ("aggregate", "rule")
    targets_take_turns: ClassVar[bool] = False
    """Whether, of several targets, these take turns under ``round_robin`` instead of the rows of all."""

    Params: ClassVar[type[Params]] = ScoringParams

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
        given = self.params.aggregate
        yield from self._combination_problems(self.name, None if given == type(self.params).aggregate else given)

    @property
    def gives_scores(self) -> bool:
        """Not where a rule looks at vectors alone."""
        return self.gives != "vectors" or self.requires().targets

    @property
    def aggregate(self) -> Aggregate:
        """How targets come together."""
        return self.params.aggregate or Aggregate.of("max")

    @property
    def rule(self) -> Rule:
        """Which rows are kept."""
        return self.params.rule

    def preference(self, found: Found, ctx: Context) -> NDArray[np.floating]:
        """Return what the rule ranks the rows by [n]; the scores, unless a subclass says otherwise. NaN: never kept."""
        return found.scores if found.wanted is None else found.wanted

    def explain(self, kept: NDArray[np.int64], found: Found, ctx: Context) -> str:
        """Return the rule, what gave the scores, and the targets."""
        towards = f" towards {', '.join(ctx.targets)}" if ctx.targets else ""
        return f"by {self.rule.name} on {self.name}{towards}"

    def scored(self, found: Found) -> Found:
        """Return the same with one score a row, where there are targets to bring together."""
        if found.tasks is None and found.queries:
            found = self.compared(found)
        tasks = found.tasks
        if tasks is None or found.scores is not None:
            return found
        turns = tasks if self.targets_take_turns and len(found.queries) > 1 else found.turns
        return replace(found, turns=turns, scores=together(tasks, self.aggregate))

    def compared(self, found: Found) -> Found:
        """Return the same with each row's similarity with each target: the mean over its rows, or the largest."""
        if self.aggregate.name not in _NEAREST:
            return replace(found, tasks=self.by_task(found))
        best, which = zip(*(best_similarity(one, found.vectors) for one in found.queries), strict=True)
        nearest = None
        if found.query_rows:
            nearest = np.stack([rows[one] for rows, one in zip(found.query_rows, which, strict=True)])
        return replace(found, tasks=np.stack(best).astype(np.float64), nearest=nearest)

    def by_task(self, found: Found) -> NDArray[np.float64]:
        """Return each row's mean similarity with the rows of each target, float64 [T, n]."""
        return (np.stack([one.mean(axis=0) for one in found.queries]) @ found.vectors.T).astype(np.float64)

    def kept(self, found: Found, rows: Rows, budget: int, ctx: Context) -> NDArray[np.int64]:
        """Return the positions that the rule keeps, in its order; under ``round_robin`` targets take turns with it."""
        if budget == 0:
            return np.empty(0, dtype=np.int64)
        wanted = self.preference(found, ctx)
        stay = np.arange(len(rows))
        if wanted is not None:
            stay = np.flatnonzero(np.isfinite(wanted))
            wanted = wanted[stay]
        found, rows = found.at(stay), rows[stay]
        everything = self.candidates(found, wanted, rows, ctx)
        if self.aggregate.name != "round_robin" or found.tasks is None:
            return stay[choose(self.rule, everything, budget)]
        lists = []
        targets = ctx.targets if found.of is None else [ctx.targets[place] for place in found.of]
        for t, (target, scores) in enumerate(zip(targets, found.tasks, strict=True)):
            by_query, queries = (None, found.queries[t]) if found.queries else (scores[None], ABSENT)
            draws = self.uniforms(ctx, target)
            own = replace(everything, uniforms=draws, scores=scores, by_query=by_query, queries=queries)
            lists.append(choose(self.rule, own, min(budget, len(rows))).tolist())
        return stay[take_turns(lists, budget)]

    def candidates(self, found: Found, wanted: NDArray[np.floating], rows: Rows, ctx: Context) -> Candidates:
        """Return what the rule may look at: rows [n] with what they are ranked by."""
        lengths, rule = ctx.domains.lengths, self.rule
        if "lengths" in rule.needs and lengths is None:
            raise ConfigError(f"dynamic.selector.rule: {rule.name} counts tokens, and the rows' lengths are not known")
        return Candidates(
            rows=rows,
            uniforms=self.uniforms(ctx),
            scores=wanted,
            by_query=found.turns if found.turns is not None or found.queries else found.tasks,
            vectors=found.vectors if found.apart is None or "vectors" not in rule.needs else found.apart,
            queries=np.concatenate(found.queries) if found.queries else ABSENT,
            lengths=ABSENT if lengths is None else lengths[rows],
            groups=ctx.domains.domain_of[rows],
        )

    def _combination_problems(
        self, name: str, aggregate: Aggregate | None, *, apart: bool = False
    ) -> Iterator[Problem]:
        """Yield the reasons why the scores of ``name`` cannot work with the rule, or with an aggregation asked for.

        ``apart`` says whether there are other vectors to keep rows apart by.
        """
        gives, rule, needs = self.gives, self.params.rule, self.params.rule.needs
        if "query_vectors" in needs and gives != "vectors":
            why = f"searches for the neighbours of each target row and needs vectors, which {name} does not give"
            yield Problem("rule", f"{rule.name} {why}; use one of {VECTORS}")
        elif "queries" in needs and gives == "scores":
            why = f"lets target rows take turns, and {name} gives one score a row, without targets"
            yield Problem("rule", f"{rule.name} {why}; use the rule top_k, or scores with targets")
        elif "vectors" in needs and gives != "vectors" and not apart:
            why = f"compares rows with each other and needs vectors, which {name} does not give"
            add = f"add 'vectors: embed' (or another of {VECTORS}) beside 'represent: {name}'"
            yield Problem("rule", f"{rule.name} {why}; {add}")
        if aggregate is None:
            return
        if gives == "scores":
            yield Problem(
                "aggregate", f"{name} gives one score a row, without targets to bring together; remove the key"
            )
        elif aggregate.name == "round_robin":
            if not rule.params.ranks:
                why = f"with round_robin each target ranks the rows by the rule, and {rule.name} does not rank"
                fitting = ", ".join(each for each, spec in RULES.items() if spec.ranks)
                yield Problem("aggregate", f"{why}; use one of {fitting}, or another aggregate")
            elif rule.replacement:
                yield Problem(
                    "aggregate", "with round_robin rows are taken once, so the rule cannot draw with replacement"
                )
        elif not self.targets_take_turns and (needs & QUERIES or "scores" not in needs):
            why, instead = f"{rule.name} looks at no scores", ""
            if needs == {"queries"} and gives == "tasks":
                why = f"the rule {rule.name} lets targets take turns"
            elif needs & QUERIES:
                why = f"{rule.name} looks at each target row by itself"
                instead = ", or set 'aggregate: round_robin' to let targets take turns"
            yield Problem("aggregate", f"{aggregate.name} has no effect, since {why}; remove the key{instead}")
