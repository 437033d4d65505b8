"""Keep the rows that a rule of your choice picks, by vectors or scores of your choice.

``represent`` names what gives scores or vectors: sketched gradients (``gradient``), exact influence (``influence``),
plain losses (``loss``), or a selector that scores rows (``less``, ``rds_plus``, ...). ``aggregate`` brings targets
together: by one score a row, ``mean_then_max`` where it is left out, or, as ``round_robin``, by letting targets take
turns, each with its own choice by the rule. ``rule`` is one of the subset rules. The parts are those of a study that
takes representation and rule apart ("A Critical Look at Targeted Instruction Selection", ICML 2026, arXiv 2602.14696).
Each part takes its parameters beside its name: ``rule: {name: knn_kde, sigma: 0.1}``.

Rules that compare rows with each other (``deita``, ``k_center``, ``facility_location``, ``cluster_quota``) need
vectors: those of ``represent``, or, where that gives scores, those named in ``vectors``. ``near_duplicates`` drops a
row whose cosine with a better one is above that number before the rule chooses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ComponentError, ConfigError, DataError
from dataflex.method import Card, Context, Params, Problem, Requires, Rows, RunFacts, Selection, Selector, State, param
from dataflex.parts import Part
from dataflex.registry import find, names
from dataflex.select.choose import top_k
from dataflex.select.rules import QUERIES, Rule
from dataflex.select.scoring import (
    AGGREGATE,
    RULE,
    VECTORS,
    Aggregate,
    Found,
    Gives,
    NoSignal,
    ScoringParams,
    ScoringSelector,
)
from dataflex.select.spread import near_duplicates
from dataflex.selectors._lib import GRADIENTS, RowLosses, VectorSelector, even
from dataflex.selectors.influence import Less
from dataflex.signals import kinds
from dataflex.signals.specs import GradientOptions

_WITHOUT_SCORES = (
    *("all", "random", "random_balanced", "compose", "greats", "opus", "uds"),
    *("infobatch", "pass_band", "pass_schedule", "mopps", "greso"),  # what they go by is observed
    *("delta_loss", "s2l"),  # they draw; their scores are for the record
    "selective_dpo",  # it serves from easy to hard, or a half in random order
)
_ALONE = ("icons", "dsir")  # targets count together there; composed, each is asked for by itself


class TokenLoss(RowLosses):
    """Token-mean loss."""

    name = "loss"

    @dataclass(frozen=True, kw_only=True)
    class Params(ScoringParams):
        prefer: Literal["high", "low"] = param("high", "which losses are preferred")

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.floating]:
        """Return losses, negative where low ones are preferred [N]."""
        found = super().score(pool, ctx)
        return found if self.params.prefer == "high" else -found


class Gradient(VectorSelector):
    """Sketched gradients of length one, as LESS compares; target rows' stay plain."""

    name = "gradient"
    lacking = "no gradient"

    @dataclass(frozen=True, kw_only=True)
    class Params(GradientOptions, ScoringParams):
        precondition: Literal["true_adam", "paper_repo", "sign", "none"] = param(
            "true_adam", "what turns training gradients into directions"
        )
        include_momentum: bool = param(True, "keep Adam's momentum term")
        dim: int = param(4096, "numbers per row, even", minimum=2)

        def __post_init__(self) -> None:
            even("dim", self.dim)

    def requires(self) -> Requires:
        return replace(GRADIENTS, preconditions={"precondition": self.params.precondition})

    def vectors(self, rows: Rows, target: str | None, ctx: Context) -> NDArray[np.floating]:
        """Return sketches of length one [n, dim]."""
        signal = kinds.GradientSketches(dim=self.params.dim, **self.params.options(sketch_seed=ctx.seed))
        return ctx.signals(signal, rows, target=target)


class Asked(ScoringSelector):
    """The scores of a selector that has no rule, or whose targets count together: it is asked target by target."""

    lacking = "no score"

    def __init__(self, name: str, params: Params) -> None:
        self.name = name  # type: ignore[misc]
        self.params = params
        self._selectors: dict[str, Selector] = {}

    def _made(self) -> Selector:
        made: Selector = find("selector", self.name)(self.params)  # type: ignore[assignment]
        return made

    def requires(self) -> Requires:
        """State what the selector requires."""
        return self._made().requires()

    def refused_values(self, name: str, values: NDArray[Any]) -> tuple[NDArray[np.bool_], str] | None:
        """Return what the selector refuses."""
        return self._made().refused_values(name, values)

    def check(self, run: RunFacts) -> Iterator[Problem]:
        """Yield why the selector cannot work."""
        yield from self._made().check(run)

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.floating]:
        """Return the selector's scores [N], or [T, N] where it selects towards targets."""
        if not self.requires().targets:
            return self._scores("", pool, ctx)
        return np.stack([self._scores(target, pool, replace(ctx, targets=(target,))) for target in ctx.targets])

    def _scores(self, target: str, pool: Rows, ctx: Context) -> NDArray[np.float64]:
        selector = self._selectors.setdefault(target, self._made())
        found: Any = selector.select(pool, len(pool), ctx).scores
        if found is None or np.shape(found) != (len(pool),):
            raise ComponentError(f"represent: the {self.name} selector gave no score for each of {len(pool):,} rows")
        return np.asarray(found, dtype=np.float64)

    def state_dict(self) -> State:
        """Return the states of the selectors, by target."""
        states = {target: selector.state_dict() for target, selector in self._selectors.items()}
        return {target: state for target, state in states.items() if state}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave; ValueError where that is not one of ours."""
        if not all(isinstance(each, dict) for each in state.values()):
            raise ValueError(f"compose keeps states of the {self.name} selector, but was given {sorted(state)}")
        self._selectors = {target: self._made() for target in state}
        for target, selector in self._selectors.items():
            selector.load_state_dict(state[target])


_OWN: Final[dict[str, type[ScoringSelector]]] = {"gradient": Gradient, "influence": Less, "loss": TokenLoss}


@dataclass(frozen=True)
class Represent(Part):
    """What gives scores or vectors, with its parameters."""

    what = "representation"

    @classmethod
    def known(cls) -> list[str]:
        """Return the representations of this file, then the selectors that can stand for one."""
        others = [name for name in names("selector") if name not in _OWN and name not in _WITHOUT_SCORES]
        return [*_OWN, *others]

    @classmethod
    def listed(cls, name: str) -> type[Params]:
        """Return a representation's parameters; ComponentError where the registry names something else."""
        return _OWN[name].Params if name in _OWN else find("selector", name).Params

    @classmethod
    def params_of(cls, name: str) -> type[Params]:
        """Return the parameters; raises as any part, and where a selector gives no scores."""
        if name in _WITHOUT_SCORES:
            raise ConfigError(f"the {name} selector gives no scores to choose by (known: {', '.join(cls.known())})")
        return super().params_of(name)

    @property
    def cls(self) -> type[Any]:
        """The selector that scores."""
        return _OWN.get(self.name) or find("selector", self.name)

    @property
    def whole(self) -> bool:
        """Whether its scores by target are used as they are, and its own rule and aggregation are not."""
        return issubclass(self.cls, ScoringSelector) and self.name not in _ALONE

    @property
    def idle(self) -> tuple[str, ...]:
        """Parameters that have no bearing on its scores."""
        keys: tuple[str, ...] = getattr(self.cls, "decides", ())
        return keys if self.whole else tuple(key for key in keys if key != "aggregate")

    def scorer(self) -> ScoringSelector:
        """Return a new instance of what scores."""
        return self.cls(self.params) if self.whole else Asked(self.name, self.params)


class Compose(ScoringSelector):
    """Represent, aggregate, choose."""

    name = "compose"
    lacking = "nothing to be compared by"
    unnamed = ()
    card = Card(
        summary="Keeps the rows that a rule of your choice picks, by vectors or scores of your choice.",
        paper="A Critical Look at Targeted Instruction Selection, ICML 2026, arXiv 2602.14696",
        cost="that of what it is composed of; by default 1 F over the pool and the targets per interval",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(ScoringParams):
        """The parts. Where ``represent`` is given, ``name: compose`` can be left out."""

        represent: Represent = field(
            default_factory=lambda: Represent.of("rds_plus"),
            metadata={"help": "what rows are compared by: rds_plus, embed, gradient, influence, loss, or a selector"},
        )
        aggregate: Aggregate | None = param(None, AGGREGATE)
        rule: Rule = param(Rule.of("top_k"), RULE)
        vectors: Represent | None = param(None, "vectors by which rows are kept apart, where not those of represent")
        near_duplicates: float | None = param(None, "largest cosine with a better row", above=0.0, maximum=1.0)

    params: Params

    @cached_property
    def _scorer(self) -> ScoringSelector:
        return self.params.represent.scorer()

    @cached_property
    def _apart(self) -> ScoringSelector | None:
        return None if self.params.vectors is None else self.params.vectors.scorer()

    def requires(self) -> Requires:
        """State what the parts require together."""
        parts = {"represent": self._scorer.requires()}
        if self._apart is not None:  # asked without targets
            apart = self._apart.requires()
            passes = replace(apart.passes, pool_by_target=(0.0, 0.0), targets=(0.0, 0.0))
            parts["vectors"] = replace(apart, passes=passes)
        merged = Requires.merged(parts)
        forward, backward = merged.passes.over_pool(1)
        each = " + ".join(f"{n:g} {unit}" for n, unit in ((forward, "F"), (backward, "B")) if n) or "no pass"
        passes = replace(merged.passes, told=f"{each} over the pool per interval, and the targets")
        return replace(merged, targets=self._targeted, passes=passes)

    @property
    def gives(self) -> Gives:
        """What ``represent`` gives."""
        return self._scorer.gives

    @property
    def _targeted(self) -> bool:
        """Whether these parts need targets."""
        needs = self.rule.needs & {"scores", *QUERIES}
        return bool(needs) if self.gives == "vectors" else self._scorer.requires().targets

    def check(self, run: RunFacts) -> Iterator[Problem]:
        """Yield why the parts cannot work together."""
        p, apart = self.params, self._apart
        represent, needs, compares = p.represent.name, p.rule.needs, "vectors" in p.rule.needs
        yield from self._combination_problems(represent, p.aggregate, apart=apart is not None)
        if p.vectors is not None and apart is not None and apart.gives != "vectors":
            yield Problem("vectors", f"{p.vectors.name} gives no vectors; use one of {VECTORS}")
        if apart is not None and not compares and p.near_duplicates is None:
            why = f"has no effect, since {p.rule.name} does not compare rows with each other"
            yield Problem("vectors", f"{why}; remove the key")
        if p.near_duplicates is not None and apart is None and self.gives != "vectors":
            why = f"needs vectors, which {represent} does not give"
            yield Problem("near_duplicates", f"{why}; add 'vectors: embed' (or another of {VECTORS})")
        used = needs & {"scores", *QUERIES} or (compares and apart is None)
        if not used and p.near_duplicates is None:
            instead = "" if apart is None else "; give the vectors as 'represent' and remove 'vectors'"
            yield Problem("represent", f"{represent} has no effect, since {p.rule.name} looks at no scores{instead}")
        yield from self._part_problems("represent", p.represent, self._scorer, run)
        if p.vectors is not None and apart is not None:
            yield from self._part_problems("vectors", p.vectors, apart, run)

    @staticmethod
    def _part_problems(place: str, part: Represent, scorer: ScoringSelector, run: RunFacts) -> Iterator[Problem]:
        """Yield why the part at ``place`` cannot work, and its parameters that only its own choice looks at."""
        idle = part.idle
        for problem in scorer.check(run):
            if problem.key.split(".")[0] not in idle:
                yield replace(problem, key=f"{place}.{problem.key}")
        for key in idle:
            if getattr(part.params, key) != getattr(type(part.params), key):
                why = f"has no effect on what rows are compared by; write it beside '{place}'"
                yield Problem(f"{place}.{key}", why)

    def refused_values(self, name: str, values: NDArray[Any]) -> tuple[NDArray[np.bool_], str] | None:
        """Return what the scorer refuses."""
        return self._scorer.refused_values(name, values)

    @property
    def aggregate(self) -> Aggregate:
        """How targets come together; by default by the best target row where a rule looks at each of them."""
        nearest = self.gives == "vectors" and self.rule.needs & QUERIES
        return self.params.aggregate or Aggregate.of("max" if nearest else "mean_then_max")

    def examine(self, pool: Rows, ctx: Context) -> Found:
        """Ask for all that the parts need; near-duplicates are left out. DataError where no row has all of it."""
        p, without = self.params, replace(ctx, targets=())
        found = self._scorer.examine(pool, ctx if self._targeted else without)
        found = replace(self.scored(found), turns=None)
        found = replace(found, wanted=self._scorer.preference(found, ctx))
        if p.vectors is not None and self._apart is not None:
            space = self._apart.examine(pool, without)
            _, ours, theirs = np.intersect1d(found.places, space.places, assume_unique=True, return_indices=True)
            if not len(ours):
                raise DataError(f"compose: none of {len(pool):,} rows has a score and a vector of {p.vectors.name}")
            found = replace(found.at(ours), apart=space.at(theirs).vectors)
        if p.near_duplicates is None:
            return found
        apart = found.vectors if found.apart is None else found.apart
        wanted = np.zeros(len(found.places)) if found.wanted is None else found.wanted
        order = top_k(wanted, len(wanted))  # without those that are never kept
        stays = np.flatnonzero(~(near_duplicates(apart, order, p.near_duplicates) & np.isfinite(wanted)))
        return replace(found.at(stays), num_dropped=len(found.places) - len(stays))

    def without_signal(self, error: NoSignal, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Keep what the scorer keeps."""
        return self._scorer.without_signal(error, pool, budget, ctx)

    def explain(self, kept: NDArray[np.int64], found: Found, ctx: Context) -> str:
        """Return the parts by name."""
        p = self.params
        towards = f" towards {', '.join(ctx.targets)}" if ctx.targets else ""
        together = "" if p.aggregate is None else f" ({p.aggregate.name})"
        return f"by {p.rule.name} on {p.represent.name}{towards}{together}"

    def state_dict(self) -> State:
        """Return the state of what scores."""
        return self._scorer.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave; raises as the scorer does."""
        self._scorer.load_state_dict(state)
