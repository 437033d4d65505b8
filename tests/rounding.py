"""How far apart rounding may put two ways of computing the same number.

What a processor's kernels or the number of threads decide is the order in which products are added up, and
whether a product is rounded before it is added. Exact by construction, and compared exactly, are integers, orders
of numbers further apart than this, and one computation done twice: the same shapes and threads on one machine.
"""

from __future__ import annotations

import numpy as np

__all__ = ["layers_apart", "printed", "sums_apart"]


def sums_apart(terms: int, size: float = 1.0, dtype: type = np.float32) -> float:
    """Bound the difference of a sum of products in two orders.

    Each lies within terms x (half a spacing of the type) x (sum of the absolute products) of the true value.

    Args:
        terms: Products added up; in a chain of sums, those of all of them.
        size: Sum of the absolute products, or a bound on it.
        dtype: What is computed in.
    """
    return terms * float(np.finfo(dtype).eps) * size


def layers_apart(layers: int, width: int, size: float = 1.0, dtype: type = np.float32) -> float:
    """Bound the difference of two forward passes: each layer is a chain of some six sums of ``width`` products.

    Args:
        layers: How many.
        width: The widest sum in a layer.
        size: Of what comes out.
        dtype: What is computed in.
    """
    return sums_apart(6 * layers * width, size, dtype)


def printed(digits: int, terms: int = 0, size: float = 1.0) -> float:
    """Bound the difference of a float32 result from a number printed with so many digits after the point.

    Args:
        digits: After the point.
        terms: Roundings on the way to the result.
        size: Of the result.
    """
    return 0.5 * 10.0**-digits + sums_apart(terms, size)
