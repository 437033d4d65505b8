"""How far apart rounding may put two ways of computing the same number.

What a processor's kernels or the number of threads decide is the order in which products are added up, and
whether a product is rounded before it is added. Exact by construction, and compared exactly, are integers, orders
of numbers further apart than this, and one computation done twice: the same shapes and threads on one machine.
"""

from __future__ import annotations

import numpy as np

__all__ = ["sums_apart"]


def sums_apart(terms: int, size: float = 1.0, dtype: type = np.float32) -> float:
    """Bound the difference of a sum of products in two orders.

    Each lies within terms x (half a spacing of the type) x (sum of the absolute products) of the true value.

    Args:
        terms: Products added up; in a chain of sums, those of all of them.
        size: Sum of the absolute products, or a bound on it.
        dtype: What is computed in.
    """
    return terms * float(np.finfo(dtype).eps) * size
