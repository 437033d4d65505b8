"""A selector put together from parts: what rows are compared by, how targets come together, and which rows are kept.

``represent`` names vectors (``rds_plus``, ``embed``, ``gradient``), scores by target (``influence``), or scores
(``loss``); any other selector that scores rows can be named too. ``aggregate`` brings targets together: ``mean``,
``max``, ``mean_then_max``, ``z_max`` and ``votes`` to one score a row, ``round_robin`` by letting targets take turns,
each with its own choice by the rule. ``rule`` is one of the subset rules. The parts are those of a study that takes
representation and rule apart ("A Critical Look at Targeted Instruction Selection", ICML 2026, arXiv 2602.14696).

Rules that compare rows with each other (``deita``, ``k_center``, ``facility_location``, ``cluster_quota``) need
vectors: those of ``represent``, or, where that gives scores, those named in ``vectors``. ``near_duplicates`` drops a
row whose cosine with a better one is above that number before the rule chooses. Each part takes its parameters beside
its name: ``rule: {name: knn_kde, sigma: 0.1}``. Without ``aggregate``, scores are ``mean_then_max``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ConfigError
from dataflex.method import STAGES, Card, Context, Needs, Rows, Selection, Selector, State
from dataflex.method import Params as BaseParams
from dataflex.select.rules import Rule
from dataflex.selectors.aggregate import Aggregate
from dataflex.selectors.assembled import Assembly, assemble, chosen, targeted
from dataflex.selectors.represent import Represent
from dataflex.selectors.wiring import combination_problems

__all__ = ["Compose"]


class Compose(Selector):
    """Represent, aggregate, choose."""

    name = "compose"
    adaptive: ClassVar[bool] = True
    needs = Needs(signals=frozenset({"embeddings"}), targets=True, stages=("pt", "sft"))
    card = Card(
        summary="Keeps the rows that a rule of your choice picks, by vectors or scores of your choice.",
        paper="A Critical Look at Targeted Instruction Selection, ICML 2026, arXiv 2602.14696",
        cost="that of what it is composed of; by default 1 F over the pool and the targets per interval",
        forward_per_pool_row=1.0,
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        """The parts. Where ``represent`` is given, ``name: compose`` can be left out."""

        represent: Represent = field(
            default_factory=lambda: Represent.of("rds_plus"),
            metadata={"help": "what rows are compared by: rds_plus, embed, gradient, influence, loss, or a selector"},
        )
        aggregate: Aggregate | None = field(
            default=None,
            metadata={"help": "how targets come together: mean, max, mean_then_max, z_max, votes or round_robin"},
        )
        rule: Rule = field(
            default_factory=lambda: Rule.of("top_k"), metadata={"help": "which rows are kept: a subset rule"}
        )
        vectors: Represent | None = field(
            default=None, metadata={"help": "vectors by which rows are kept apart, where not those of represent"}
        )
        near_duplicates: float | None = field(
            default=None,
            metadata={
                "help": "cosine with a better row above which a row is dropped first",
                "above": 0.0,
                "maximum": 1.0,
            },
        )

        def __post_init__(self) -> None:
            problems = combination_problems(self)
            if problems:
                raise ConfigError(problems)

    params: Params

    @classmethod
    def variant(cls, params: Any) -> type[Compose]:
        """Return the class with the needs and costs of these parts."""
        specs = [part.spec for part in (params.represent, params.vectors) if part is not None]
        fixed = Needs(
            signals=frozenset().union(*(spec.needs.signals for spec in specs)),
            targets=targeted(params),
            domains=max(spec.needs.domains for spec in specs),
            stages=tuple(stage for stage in STAGES if all(stage in spec.needs.stages for spec in specs)),
            zero3=all(spec.needs.zero3 for spec in specs),
        )
        forward, backward = (sum(spec.cost[i] for spec in specs) for i in (0, 1))
        each = " + ".join(f"{n:g} {unit}" for n, unit in ((forward, "F"), (backward, "B")) if n) or "no pass"
        card = dataclasses.replace(
            cls.card,
            cost=f"{each} over the pool per interval, and the targets",
            forward_per_pool_row=forward,
            backward_per_pool_row=backward,
            forward_once_per_pool_row=sum(spec.once for spec in specs),
        )
        adaptive = any(spec.adaptive for spec in specs)
        return type(cls.__name__, (cls,), {"needs": fixed, "card": card, "adaptive": adaptive, "__doc__": cls.__doc__})

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        params.rule.require()
        self._scorers: dict[str, Selector] = {}
        self._states: State = {}

    def columns(self) -> tuple[str, ...]:
        """Return the columns that the selectors asked for scores need."""
        scorer = self.params.represent.selector()
        return () if scorer is None else scorer.columns()

    def refused_values(self, name: str, values: NDArray[Any]) -> tuple[NDArray[np.bool_], str] | None:
        """Return what the selector asked for scores refuses."""
        scorer = self.params.represent.selector()
        return None if scorer is None else scorer.refused_values(name, values)

    @property
    def reference(self) -> str | None:
        """The reference model of the selector asked for scores."""
        scorer = self.params.represent.selector()
        return None if scorer is None else scorer.reference

    def select(self, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Keep up to ``budget`` rows; fewer where the rule says so, or where rows lack what they are compared by.

        Returns:
            Rows in the rule's order; scores [len(pool)] after bringing targets together (the largest similarity
            with a target row for rules that look at each of them), NaN for rows that have none and are never kept;
            no scores where nothing is scored.

        Raises:
            DataError: The pool, or a target, has no row to compare; or the rule has nothing to draw from.
            ConfigError: A rule needs the rows' tokens and they were not counted.
        """
        if len(pool) == 0:
            return Selection(rows=pool, scores=np.empty(0), reason="empty pool")
        p = self.params
        parts = assemble(p, pool, ctx, self._scorer)
        kept = chosen(p, parts, pool[parts.places], budget, ctx)
        return Selection(
            rows=pool[parts.places[kept]], scores=_whole(parts, len(pool)), reason=self._reason(parts, kept, pool, ctx)
        )

    def _scorer(self, target: str | None) -> Selector:
        """Return the selector that gives scores, one for each target, with its state."""
        key = target or ""
        if key not in self._scorers:
            scorer = self.params.represent.selector()
            assert scorer is not None
            scorer.load_state_dict(self._states.pop(key, {}))
            self._scorers[key] = scorer
        return self._scorers[key]

    def _reason(self, parts: Assembly, kept: NDArray[np.int64], pool: Rows, ctx: Context) -> str:
        p = self.params
        reason = f"{len(kept)} of {len(pool)} rows by {p.rule.name} on {p.represent.name}"
        if ctx.targets:
            reason += f" towards {', '.join(ctx.targets)}"
        if p.aggregate is not None:
            reason += f" ({p.aggregate.name})"
        if parts.num_lacking:
            reason += f"; {parts.num_lacking} rows have nothing to be compared by"
        if parts.num_dropped:
            reason += f"; {parts.num_dropped} near-duplicates were dropped"
        return reason

    def state_dict(self) -> State:
        """Return the states of the selectors asked for scores, by target."""
        states = {key: scorer.state_dict() for key, scorer in self._scorers.items()}
        return {**self._states, **{key: state for key, state in states.items() if state}}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave.

        Raises:
            ValueError: The state is not one of ours.
        """
        scores = self.params.represent.selector() is not None
        if state and not (scores and all(isinstance(each, dict) for each in state.values())):
            raise ValueError(f"compose keeps states of the selector that it asks, but was given {sorted(state)}")
        self._scorers, self._states = {}, dict(state)


def _whole(parts: Assembly, num_rows: int) -> NDArray[np.float64] | None:
    """Return the scores of the whole pool [num_rows], or None where there are none."""
    if parts.scores is None:
        return None
    whole = np.full(num_rows, np.nan)
    whole[parts.places] = parts.scores
    return whole
