"""Rows that have no loss or no gradient: set aside, or refused when there are no others."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ComponentError, DataError

__all__ = ["finite_rows", "no_gradients"]

_CHECK = "Check that cutoff_len leaves room for the response, and that the model's own loss is finite."


def finite_rows(method: str, losses: NDArray[Any], num_rows: int) -> NDArray[np.bool_]:
    """Return which rows have a finite loss [num_rows].

    Args:
        method: Name of the selector, for the message.
        losses: Loss of each pool row [num_rows]; NaN for rows without supervised tokens.
        num_rows: Length of the pool, at least 1.

    Raises:
        ComponentError: ``losses`` is not aligned with the pool.
        DataError: No row has a finite loss.
    """
    if losses.shape != (num_rows,):
        raise ComponentError(f"{method}: asked for the losses of {num_rows:,} rows, was given shape {losses.shape}")
    finite = np.isfinite(losses)
    if not finite.any():
        raise DataError(f"{method}: all {num_rows:,} rows have no finite loss (are their labels all masked?). {_CHECK}")
    return finite


def no_gradients(method: str, num_rows: int) -> DataError:
    """Return the error of a selector none of whose ``num_rows`` rows has a gradient."""
    return DataError(
        f"{method}: none of {num_rows:,} rows has a gradient to compare (are their labels all masked?). {_CHECK}"
    )
