"""Random directions that are made anew whenever they are needed, never stored."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dataflex.core.rng import keys

__all__ = ["rademacher"]


def rademacher(seed: int, name: str, index: int, size: int) -> NDArray[np.float32]:
    """Return ``size`` signs, +1 or -1 with equal probability, a function of (seed, name, index, place) only.

    Args:
        seed: Seed of the run.
        name: Name of the tensor.
        index: Number of the direction.
        size: How many; a longer answer begins with a shorter one.
    """
    words = keys(seed, f"rademacher {name}", index, np.arange(-(-size // 64), dtype=np.int64))
    bits = np.unpackbits(words.astype("<u8", copy=False).view(np.uint8), bitorder="little", count=size)
    signs = bits.astype(np.float32)
    signs *= 2.0
    signs -= 1.0
    return signs
