"""Weights that are known from the rows alone: a column of the data, or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.method import Card, Requires, Rows, Weighter, WeighterParams, param
from dataflex.method import Params as BaseParams


class Column(Weighter):
    """Weigh each row by a numeric column of the data set.

    It refuses to guess: a row without a weight, a negative one, or text in the column is told before the first step.
    """

    name = "column"
    card = Card(
        summary="Weighs each row by a numeric column of the data set.",
        paper="baseline (importance weights)",
        cost="none",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(WeighterParams):
        column: str = param("sample_weight", "name of the column that holds the weights")
        normalizer: Literal["weight_sum", "num_tokens"] = param(
            "weight_sum", "weight_sum: weighted mean, only ratios matter; num_tokens: size matters too"
        )

        def __post_init__(self) -> None:
            if not self.column:
                raise ValueError("column: must name a column of the data set")

    params: Params

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.normalizer = params.normalizer

    def requires(self) -> Requires:
        return Requires(stages=("pt", "sft"), columns=(self.params.column,))

    def refused_values(self, name: str, values: NDArray[Any]) -> tuple[NDArray[np.bool_], str]:
        """Return which values are no weights: missing, not finite, negative, or text."""
        weights = _weights(values)
        return ~np.isfinite(weights) | (weights < 0), "weights must be finite numbers, 0 or more"

    def static_weights(self, rows: Rows, columns: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        return _weights(columns[self.params.column][rows])


def _weights(values: NDArray[Any]) -> NDArray[np.float32]:
    """Return weights in fp32; what is missing or text becomes NaN, what is too large for fp32 infinite."""
    if values.dtype.kind not in "biuf":
        values = np.array([value if isinstance(value, int | float) else np.nan for value in values.tolist()], float)
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


class NoWeights(Weighter):
    """Every token counts the same, as without DataFlex.

    The stock loss is left alone.
    """

    name = "none"
    neutral: ClassVar[bool] = True
    Params: ClassVar[type[BaseParams]] = BaseParams
    card = Card(summary="Leaves the stock loss alone.", paper="baseline", cost="none")

    def requires(self) -> Requires:
        return Requires()

    def static_weights(self, rows: Rows, columns: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        return np.ones(len(rows), dtype=np.float32)
