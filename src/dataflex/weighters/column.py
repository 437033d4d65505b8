"""Weights that are known from the rows alone: a column of the data, or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ComponentError, DataError, did_you_mean
from dataflex.method import BatchView, Card, Requires, Rows, Weighter, WeighterParams, param
from dataflex.method import Params as BaseParams

if TYPE_CHECKING:
    import torch

_WANTED = "weights must be finite numbers, 0 or more"


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
        """Parameters of the column weighter."""

        column: str = param("sample_weight", "name of the column that holds the weights")
        normalizer: Literal["weight_sum", "num_tokens"] = param(
            "weight_sum", "weight_sum: weighted mean, only ratios matter; num_tokens: size matters too"
        )

        def __post_init__(self) -> None:
            if not self.column:
                raise ValueError("column: must name a column of the data set")

    params: Params

    def requires(self) -> Requires:
        """State what the run must have."""
        return Requires(stages=("pt", "sft"), columns=(self.params.column,))

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.normalizer = params.normalizer

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
        weights, bad = _weights(np.asarray(columns[name])[rows])
        if bad.any():
            raise _refusal(name, rows, np.asarray(columns[name])[rows], bad)
        return weights

    def refused_values(self, name: str, values: NDArray[Any]) -> tuple[NDArray[np.bool_], str] | None:
        """Return which values are no weights."""
        return _weights(values)[1], _WANTED

    def weigh(self, batch: BatchView) -> torch.Tensor:
        """Refuse: these weights are known from the rows alone, see ``static_weights``."""
        raise ComponentError("column: weights are read from the data before the forward pass, not from a micro-batch")


def _refusal(name: str, rows: Rows, values: NDArray[Any], bad: NDArray[np.bool_]) -> DataError:
    where = int(np.flatnonzero(bad)[0])
    value = np.nan if values[where] is None else values[where]
    shown = repr(value.item() if isinstance(value, np.generic) else value)
    others = f" (and {int(bad.sum()) - 1} more rows)" if bad.sum() > 1 else ""
    return DataError(f"dynamic.weighter.column: row {int(rows[where]):,} has {name} = {shown}{others}; {_WANTED}")


def _weights(values: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return weights in fp32 and which of them are none: missing, not finite, negative, or text."""
    if values.dtype.kind not in "biuf":
        given = values.tolist()
        plain = [isinstance(value, int | float) for value in given]
        values = np.array([value if good else np.nan for value, good in zip(given, plain, strict=True)], np.float64)
    with np.errstate(over="ignore"):  # a number too large for fp32 becomes inf, which is refused
        weights = values.astype(np.float32)
    return weights, ~np.isfinite(weights) | (weights < 0)


class NoWeights(Weighter):
    """Every token counts the same, as without DataFlex.

    The stock loss is left alone.
    """

    name = "none"
    neutral: ClassVar[bool] = True
    Params: ClassVar[type[BaseParams]] = BaseParams
    card = Card(summary="Leaves the stock loss alone.", paper="baseline", cost="none")

    def static_weights(self, rows: Rows, columns: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Return ones [len(rows)]."""
        return np.ones(len(rows), dtype=np.float32)

    def weigh(self, batch: BatchView) -> torch.Tensor:
        """Return ones [B]."""
        return batch.loss_B.new_ones(batch.loss_B.shape)
