"""Named random streams and counter-based numbers.

Every draw names its stream, so that adding one never shifts another, and every rank gets the same numbers for the same
(seed, name, index): from ``stream`` one after another, from the counter-based functions by row id, whatever the number
of ranks. The global generators are never touched.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

# Constants of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SLICE = 1 << 15  # elements mixed at a time: temporaries stay in the cache


def _digest(seed: int, name: str, index: int) -> bytes:
    """Hash a stream's identity to 16 bytes; the name comes last, so that the text is unambiguous."""
    return hashlib.blake2b(f"{int(seed)}:{int(index)}:{name}".encode(), digest_size=16).digest()


def stream(seed: int, name: str, index: int = 0) -> np.random.Generator:
    """Return the generator (Philox) of the stream ``name`` under the run's seed; ``index``: the interval or epoch."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(seed, name, index), "little")))


def _mix(values: NDArray[np.uint64]) -> None:
    """Apply the SplitMix64 finalizer, a bijection of 64-bit numbers, in place."""
    values ^= values >> np.uint64(30)
    values *= _MIX_1
    values ^= values >> np.uint64(27)
    values *= _MIX_2
    values ^= values >> np.uint64(31)


def keys(seed: int, name: str, index: int, counters: NDArray[np.integer]) -> NDArray[np.uint64]:
    """Return one 64-bit number per counter, a function of (seed, name, index, counter) only.

    Distinct counters give distinct keys, so that every algorithm sorts them into the same permutation.

    Args:
        seed: Seed of the run.
        name: Name of the stream.
        index: Index of the stream.
        counters: Integers of any shape.

    Returns:
        uint64 in the shape of ``counters``.
    """
    digest = _digest(seed, name, index)
    first, second = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    result: NDArray[np.uint64] = np.array(counters, dtype=np.int64, order="C").view(np.uint64)
    flat = result.reshape(-1)
    for start in range(0, flat.size, _SLICE):
        part = flat[start : start + _SLICE]
        part *= _GAMMA
        part += first
        _mix(part)
        # A second round with its own key: otherwise two streams would be shifted copies of each other.
        part ^= second
        _mix(part)
    return result


def uniforms(seed: int, name: str, index: int, ids: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return a uniform number of 52 random bits in (0, 1) for each of the row ids [n]; arguments as for ``keys``.

    A number does not depend on the rank that draws it, nor on the other ids.
    """
    bits = keys(seed, name, index, ids)
    bits >>= np.uint64(12)
    result = bits.astype(np.float64)
    result += 0.5  # exact for 52 bits; keeps 0 and 1 out
    result *= 2.0**-52
    return result


def permutations(seed: int, name: str, first: int, num: int, size: int) -> NDArray[np.int64]:
    """Return permutations number ``first`` to ``first + num - 1`` (as of epochs) of ``range(size)``.

    Returns:
        int64 [num, size], row e the permutation ``first + e``.
    """
    counters = np.arange(first * size, (first + num) * size, dtype=np.int64)
    return np.argsort(keys(seed, name, 0, counters).reshape(num, size), axis=1).astype(np.int64, copy=False)


def rademacher(seed: int, name: str, index: int, size: int) -> NDArray[np.float32]:
    """Return ``size`` signs, +1 or -1 with equal probability, a function of (seed, name, index, place) only.

    Args:
        seed: Seed of the run.
        name: Name of the tensor.
        index: Number of the direction.
        size: Number of signs; a longer answer begins with a shorter one.
    """
    words = keys(seed, f"rademacher {name}", index, np.arange(-(-size // 64), dtype=np.int64))
    bits = np.unpackbits(words.astype("<u8", copy=False).view(np.uint8), bitorder="little", count=size)
    signs = bits.astype(np.float32)
    signs *= 2.0
    signs -= 1.0
    return signs
