"""Types that every room shares: row ids, numbers by domain or row, and what a method saves."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Floats", "Rows", "State"]

Rows = NDArray[np.int64]
"""Positions in the training row space, 0 <= r < N."""

Floats = NDArray[np.float64]

State = dict[str, Any]
"""JSON values and numpy arrays only; saved without pickle."""
