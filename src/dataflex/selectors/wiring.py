"""Which parts of the composable selector go together: all that is wrong with a combination, in the user's words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dataflex.select.rules import RULES
from dataflex.selectors.represent import REPRESENTATIONS

if TYPE_CHECKING:
    from dataflex.selectors.compose import Compose

__all__ = ["combination_problems"]

_QUERIES = frozenset({"queries", "query_vectors"})


def _vector_names() -> str:
    return ", ".join(name for name, spec in REPRESENTATIONS.items() if spec.kind == "vectors")


def combination_problems(p: Compose.Params) -> list[str]:
    """Return one line per reason why these parts cannot work together, each beginning with the key."""
    return [*_rule(p), *_aggregate(p), *_vectors(p), *_unused(p)]


def _rule(p: Compose.Params) -> Iterator[str]:
    kind, needs, rule, given = p.represent.spec.kind, p.rule.needs, p.rule.name, p.represent.name
    if "query_vectors" in needs and kind != "vectors":
        yield (
            f"rule: {rule} searches for the neighbours of each target row and needs vectors, which {given} does not "
            f"give; use 'represent' with one of {_vector_names()}"
        )
    elif "queries" in needs and kind == "scores":
        yield (
            f"rule: {rule} lets target rows take turns, and {given} gives one score a row, without targets; "
            "use the rule top_k, or a representation with targets"
        )
    elif "vectors" in needs and kind != "vectors" and p.vectors is None:
        yield (
            f"rule: {rule} compares rows with each other and needs vectors, which {given} does not give; add "
            f"'vectors: embed' (or another of {_vector_names()})"
        )


def _aggregate(p: Compose.Params) -> Iterator[str]:
    if p.aggregate is None:
        return
    kind, needs, rule, name = p.represent.spec.kind, p.rule.needs, p.rule.name, p.aggregate.name
    if kind == "scores":
        yield f"aggregate: {p.represent.name} gives one score a row, without targets to bring together; remove the key"
    elif name == "round_robin":
        if not RULES[rule].ranks:
            fitting = ", ".join(each for each, spec in RULES.items() if spec.ranks)
            yield (
                f"aggregate: with round_robin each target ranks the rows by the rule, and {rule} does not rank; use "
                f"one of {fitting}, or another aggregate"
            )
        elif getattr(p.rule.params, "replacement", False):
            yield "aggregate: with round_robin rows are taken once, so the rule cannot draw with replacement"
    elif needs & _QUERIES and not (needs == {"queries"} and kind == "tasks"):
        yield (
            f"aggregate: {name} has no effect, since {rule} looks at each target row by itself; remove the key, or "
            "set 'aggregate: round_robin' to let targets take turns"
        )
    elif needs & _QUERIES:
        yield f"aggregate: {name} has no effect, since the rule {rule} lets targets take turns; remove the key"
    elif "scores" not in needs:
        yield f"aggregate: {name} has no effect, since {rule} looks at no scores; remove the key"


def _vectors(p: Compose.Params) -> Iterator[str]:
    if p.vectors is not None and p.vectors.spec.kind != "vectors":
        yield f"vectors: {p.vectors.name} gives no vectors; use one of {_vector_names()}"
    if p.vectors is not None and "vectors" not in p.rule.needs and p.near_duplicates is None:
        yield f"vectors: has no effect, since {p.rule.name} does not compare rows with each other; remove the key"
    if p.near_duplicates is not None and p.vectors is None and p.represent.spec.kind != "vectors":
        yield (
            f"near_duplicates: needs vectors, which {p.represent.name} does not give; add 'vectors: embed' (or "
            f"another of {_vector_names()})"
        )


def _unused(p: Compose.Params) -> Iterator[str]:
    used = p.rule.needs & ({"scores"} | _QUERIES) or ("vectors" in p.rule.needs and p.vectors is None)
    if not used and p.near_duplicates is None:
        yield (
            f"represent: {p.represent.name} has no effect, since {p.rule.name} looks at no scores"
            + ("; give the vectors as 'represent' and remove 'vectors'" if p.vectors is not None else "")
        )
