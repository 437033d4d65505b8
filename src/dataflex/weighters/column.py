"""Weights that come with the data: a numeric column says how much each row counts.

It refuses to guess: a row without a weight, a negative one, or text in the column ends the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.core.protocols import BatchView, Card, Needs, Normaliser, Rows, Weighter, WeighterParams
from dataflex.errors import ComponentError, DataError, did_you_mean

if TYPE_CHECKING:
    import torch

__all__ = ["Column"]


class Column(Weighter):
    """Weigh each row by a column of the data set."""

    name = "column"
    needs = Needs(stages=("pt", "sft"))
    card = Card(
        summary="Weighs each row by a numeric column of the data set.",
        paper="baseline (importance weights)",
        cost="none",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(WeighterParams):
        """Parameters of the column weighter."""

        column: str = field(default="sample_weight", metadata={"help": "name of the column that holds the weights"})
        normaliser: Literal["token", "count"] = field(
            default="token",
            metadata={
                "help": "token: weighted mean, only ratios matter; count: divided by the tokens, size matters too"
            },
        )

        def __post_init__(self) -> None:
            if not self.column:
                raise ValueError("column: must name a column of the data set")

    params: Params

    @property
    def normaliser(self) -> Normaliser:
        """The denominator asked for."""
        return self.params.normaliser

    def columns(self) -> tuple[str, ...]:
        """Return the name of the weight column."""
        return (self.params.column,)

    def static_weights(self, rows: Rows, columns: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Return the weights of ``rows`` [len(rows)], finite and >= 0.

        Args:
            rows: Row ids.
            columns: Whole columns of the training set, by name, each [N].

        Raises:
            DataError: The column is missing, or a weight is not a finite number >= 0.
        """
        name = self.params.column
        if name not in columns:
            raise DataError(
                f"dynamic.weighter.column: the data has no column {name!r}{did_you_mean(name, list(columns))} "
                f"(columns carried along: {', '.join(sorted(columns)) or 'none'})"
            )
        values = np.asarray(columns[name])[rows]
        if values.dtype.kind not in "biuf":
            values = _numbers(values, rows, name)
        with np.errstate(over="ignore"):  # a number too large for fp32 becomes inf, which is refused by name below
            weights = values.astype(np.float32)
        bad = ~np.isfinite(weights) | (weights < 0)
        if bad.any():
            raise _refusal(name, rows, values, bad)
        return weights

    def weigh(self, batch: BatchView) -> torch.Tensor:
        """Refuse: these weights are known from the rows alone, see ``static_weights``."""
        raise ComponentError("column: weights are read from the data before the forward pass, not from a micro-batch")


def _numbers(values: NDArray[Any], rows: Rows, name: str) -> NDArray[np.float64]:
    """Turn an object column of Python numbers into float64; None becomes NaN, anything else is refused."""
    numeric = np.fromiter((value is None or isinstance(value, int | float | np.number) for value in values), np.bool_)
    if not numeric.all():
        raise _refusal(name, rows, values, ~numeric)
    return np.asarray([np.nan if value is None else float(value) for value in values], dtype=np.float64)


def _refusal(name: str, rows: Rows, values: NDArray[Any], bad: NDArray[np.bool_]) -> DataError:
    where = int(np.flatnonzero(bad)[0])
    value = values[where]
    shown = repr(value.item() if isinstance(value, np.generic) else value)
    others = f" (and {int(bad.sum()) - 1} more rows)" if bad.sum() > 1 else ""
    return DataError(
        f"dynamic.weighter.column: row {int(rows[where]):,} has {name} = {shown}{others}; "
        "weights must be finite numbers, 0 or more"
    )
