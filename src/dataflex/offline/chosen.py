"""From a column of scores and a subset rule to the rows of a subset."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.config.collect import collect
from dataflex.config.load import merged
from dataflex.errors import ConfigError, DataError, did_you_mean
from dataflex.method import Rows
from dataflex.offline.table import ScoreTable
from dataflex.select.choose import Candidates, token_budget
from dataflex.select.rules import RULES, Rule, choose

__all__ = ["Budget", "chosen_rows", "rule_of", "score_column"]

_FORM = re.compile(r"(?P<number>\d[\d_]*(\.\d*)?|\.\d+)\s*(?P<unit>[a-z]*)", re.IGNORECASE)
_EXPECTED = "expected a share of the rows (0.1), a number of rows (500) or a number of tokens (200000tokens)"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What was asked for, one of the two.

    Attributes:
        rows: Number of rows.
        tokens: Tokens of the chosen rows together, at most.
    """

    rows: int | None = None
    tokens: int | None = None

    @classmethod
    def read(cls, text: str, num_rows: int) -> Budget:
        """Read a budget; a number with a point is a share of ``num_rows``.

        Raises:
            ConfigError: Not of such a form, or nothing at all.
        """
        match = _FORM.fullmatch(text.strip())
        if match is None or match["unit"].lower() not in ("", "row", "rows", "token", "tokens"):
            raise ConfigError(f"--budget: {text!r}: {_EXPECTED}")
        number, unit = match["number"].replace("_", ""), match["unit"].lower()
        if "." in number:
            share = float(number)
            if unit or not 0.0 < share <= 1.0:
                raise ConfigError(f"--budget: {text!r}: a share lies above 0 and is at most 1.0; {_EXPECTED}")
            return cls(rows=max(1, round(share * num_rows)))
        if int(number) == 0:
            raise ConfigError(f"--budget: {text!r} is nothing; {_EXPECTED}")
        return cls(tokens=int(number)) if unit.startswith("token") else cls(rows=int(number))


_AT_HAND = frozenset({"scores", "lengths", "groups", "queries"})
RANK = ".rank"


def score_column(table: ScoreTable, asked: str | None) -> str:
    """Return the column to select by: the one asked for, or that of the only method.

    Raises:
        ConfigError: No such column, or several to choose from.
    """
    known = list(table.columns)
    if asked is not None:
        if asked not in known:
            raise ConfigError(f"--score: no column {asked!r}{did_you_mean(asked, known)} (columns: {', '.join(known)})")
        return asked
    methods = table.provenance["methods"]
    if len(methods) > 1:
        raise ConfigError(f"--score: name the column to select by (columns: {', '.join(known)})")
    name = str(methods[0]["name"])
    return name if name in known else name + RANK


def rule_of(name: str, settings: Sequence[str], budget: Budget) -> Rule:
    """Return the rule with its parameters; a budget of tokens makes the best rows those that it holds.

    Raises:
        ConfigError: Unknown rule or parameter, or a rule that needs more than scores.
    """
    given: dict[str, Any] = merged({}, settings)
    if name == "top_k" and budget.tokens is not None:
        name = "token_budget"
    if name == "token_budget":
        if budget.tokens is None:
            raise ConfigError("--budget: the rule token_budget wants a number of tokens, such as 200000tokens")
        given.setdefault("tokens", budget.tokens)
    if name not in RULES:
        raise ConfigError(f"--rule: unknown rule {name!r}{did_you_mean(name, list(RULES))} (known: {', '.join(RULES)})")
    problems: list[str] = []
    params = collect(RULES[name].params, given, "", problems, subject=f"rule {name}")
    if params is None:
        raise ConfigError([f"--rule {name}: {problem.removeprefix(': ')}" for problem in problems])
    rule = Rule(name=name, params=params)
    missing = sorted(rule.needs - _AT_HAND)
    if missing:
        fitting = [other for other, spec in RULES.items() if not callable(spec.needs) and spec.needs <= _AT_HAND]
        raise ConfigError(
            f"--rule: {name} needs {', '.join(missing).replace('query_vectors', 'vectors of target rows')}, which "
            f"scores do not hold; let it choose while scoring ('dataflex score DATA --method compose --budget ROWS "
            f"compose.rule={name}'), and select by the column compose.rank "
            f"(rules for scores: {', '.join([*fitting, 'water_filling'])})"
        )
    if budget.tokens is not None and name != "token_budget" and not RULES[name].ranks:
        raise ConfigError(f"--budget: the rule {name} wants a number of rows or a share, not tokens")
    return rule


def chosen_rows(table: ScoreTable, column: str, budget: Budget, rule: Rule, *, prefer: str | None, seed: int) -> Rows:
    """Return the rows of the subset, in order of preference.

    Args:
        table: The scores.
        column: Whose values count; rows without one are left out.
        budget: How much.
        rule: How they are chosen.
        prefer: "high" or "low"; by default high, and low for ranks.
        seed: Of rules that draw; draws are keyed by row.

    Raises:
        DataError: More rows are wanted than have a score.
        ConfigError: Turns over targets without columns by target.
    """
    values = table.columns[column]
    sign = -1.0 if (prefer or ("low" if column.endswith(RANK) else "high")) == "low" else 1.0
    by_target = {name: found for name, found in table.columns.items() if name.startswith(f"{column}/")}
    usable = np.isfinite(values)
    if "queries" in rule.needs:
        if not by_target:
            raise ConfigError(
                f"--rule: {rule.name} lets targets take turns, and {column} has no columns by target; score with "
                "several targets, or use another rule"
            )
        usable &= np.isfinite(np.stack(list(by_target.values()))).all(axis=0)
    rows = np.flatnonzero(usable).astype(np.int64)
    wanted = len(rows) if budget.rows is None else budget.rows
    if wanted > len(rows) or not len(rows):
        raise DataError(
            f"--budget: {wanted:,} rows are wanted, and {len(rows):,} of {table.num_rows:,} have a value in {column}"
        )
    candidates = Candidates(
        rows=rows,
        uniforms=Candidates.stream(seed, "select", 0),
        scores=sign * values[rows],
        by_query=_stacked(by_target, rows, sign) if "queries" in rule.needs else None,
        lengths=table.tokens[rows],
        groups=table.domain_of[rows],
    )
    chosen = choose(rule, candidates, wanted)
    if budget.tokens is not None and rule.name != "token_budget":
        order = -np.arange(len(chosen), dtype=np.float64)
        chosen = chosen[token_budget(order, table.tokens[rows[chosen]], budget.tokens, len(chosen))]
    if not len(chosen):
        raise DataError(f"--budget: no row fits ({rule.name} chose none of {len(rows):,})")
    return rows[chosen]


def _stacked(columns: Mapping[str, NDArray[Any]], rows: Rows, sign: float) -> NDArray[np.floating]:
    return np.stack([sign * values[rows] for values in columns.values()])
