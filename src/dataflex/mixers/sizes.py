"""Sizes of the domains in the unit of the run, as the mixers by size need them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataError
from dataflex.method import Context

__all__ = ["sizes"]


def sizes(ctx: Context, method: str) -> NDArray[np.float64]:
    """Return the size of each domain in ``ctx.unit``, float64 [K], at least one of them above 0.

    Raises:
        DataError: No domain has a token (or, unit ``tokens``, tokens were not counted).
    """
    sizes_K = ctx.domains.sizes(ctx.unit)
    if not sizes_K.any():
        raise DataError(f"{method}: none of the domains {', '.join(ctx.domains.names)} has any {ctx.unit}")
    return sizes_K
