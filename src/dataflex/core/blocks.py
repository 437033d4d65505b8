"""Whole numbers of sequences per domain and block, by residual carry, and their order in the block.

Levanter gives the whole rounding remainder of a block to the largest domain, which starves small
ones; rounding the cumulative counts instead can ask for a negative block. Carrying the residual
from block to block does neither.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.core.rng import keys

__all__ = ["Interleave", "block_counts", "block_labels", "evenly"]

Interleave = Literal["shuffled", "even"]

_SCALAR_DOMAINS = 16  # up to here a plain Python loop beats numpy calls on tiny arrays


def _carry_scalar(shares: list[float], rest: list[float], block: int, num: int) -> tuple[list[int], list[float]]:
    """Run the loop of ``block_counts`` in plain Python; both outputs flat."""
    counts: list[int] = []
    rests: list[float] = list(rest)
    for _ in range(num):
        need = [share + left for share, left in zip(shares, rest, strict=True)]
        base = [int(value) if value > 0.0 else 0 for value in need]
        rest = [value - whole for value, whole in zip(need, base, strict=True)]
        _settle(base, rest, block - sum(base))
        counts += base
        rests += rest
    return counts, rests


def _settle(base: list[int], rest: list[float], short: int) -> None:
    """Hand out (or take back) one sequence at a time where the remainder is largest (smallest)."""
    for _ in range(short):
        k = rest.index(max(rest))
        base[k] += 1
        rest[k] -= 1.0
    for _ in range(-short):
        k = min((k for k in range(len(base)) if base[k] > 0), key=rest.__getitem__)
        base[k] -= 1
        rest[k] += 1.0


def _carry_vector(
    shares: NDArray[np.float64], rest: NDArray[np.float64], block: int, num: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Run the loop of ``block_counts`` with one numpy pass per block; bit for bit the scalar loop."""
    counts = np.empty((num, shares.size), dtype=np.int64)
    rests = np.empty((num + 1, shares.size), dtype=np.float64)
    rests[0] = rest
    for b in range(num):
        need = shares + rests[b]
        base = np.maximum(np.floor(need), 0.0)
        left = need - base
        short = block - int(base.sum())
        if short < 0:
            base_list, left_list = base.astype(np.int64).tolist(), left.tolist()
            _settle(base_list, left_list, short)
            counts[b], rests[b + 1] = base_list, left_list
            continue
        # The remainders sum to `short` and each is below 1: at least `short` of them are positive, so
        # that handing out one at a time would pick none twice.
        order = np.argsort(-left, kind="stable")[:short]
        left[order] -= 1.0
        base[order] += 1.0
        counts[b], rests[b + 1] = base, left
    return counts, rests


def block_counts(
    proportions: NDArray[np.float64], block: int, residual: NDArray[np.float64], num: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Count the sequences of each domain in consecutive blocks by residual carry.

    need = proportions * block + residual; every domain gets floor(need), clipped at 0; what is
    missing goes to the largest remainders, ties by index; residual = need - count. The cumulative
    count of a domain so stays within about one sequence of its share, whatever its size.

    Args:
        proportions: Proportions of sequences [K], sum 1; a domain of proportion 0 must have residual 0
            and gets nothing.
        block: Sequences in a block.
        residual: Residual before the first block [K], sum 0.
        num: Number of blocks.

    Returns:
        Counts int64 [num, K], and residuals float64 [num + 1, K], row b before block b.
    """
    active = np.flatnonzero(proportions > 0)
    shares = proportions[active] * block
    counts = np.zeros((num, proportions.size), dtype=np.int64)
    residuals = np.zeros((num + 1, proportions.size), dtype=np.float64)
    if active.size <= _SCALAR_DOMAINS:
        flat, rests = _carry_scalar(shares.tolist(), residual[active].tolist(), block, num)
        counts[:, active] = np.array(flat, dtype=np.int64).reshape(num, active.size)
        residuals[:, active] = np.array(rests).reshape(num + 1, active.size)
    else:
        counts[:, active], residuals[:, active] = _carry_vector(shares, residual[active], block, num)
    return counts, residuals


def evenly(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the domains of one block [sum(counts)] as evenly spread as whole sequences allow.

    Place n goes to the domain that is furthest behind, argmax of share x max(n, 1) - given so far, the first
    of equal ones, as Megatron-Core's blending has it.

    Args:
        counts: Sequences of each domain in the block [K].
    """
    block = int(counts.sum())
    shares, given = counts / max(block, 1), np.zeros(counts.size)
    labels = np.empty(block, dtype=np.int64)
    for place in range(block):
        behind = np.where(given < counts, shares * max(place, 1) - given, -np.inf)
        labels[place] = k = int(np.argmax(behind))
        given[k] += 1
    return labels


def block_labels(
    proportions: NDArray[np.float64],
    block: int,
    residual: NDArray[np.float64],
    seed: int,
    segment: int,
    first: int,
    num: int,
    interleave: Interleave = "shuffled",
) -> tuple[NDArray[np.unsignedinteger], NDArray[np.float64]]:
    """Return the domain of every sequence of consecutive blocks.

    The order within a block is a permutation that depends on (seed, segment, block number) only, or ``evenly``.

    Args:
        proportions: Proportions of sequences [K], sum 1.
        block: Sequences in a block.
        residual: Residual before the first of these blocks [K].
        seed: Seed of the run.
        segment: Number of the segment in the log.
        first: Number of the first block within the segment.
        num: Number of blocks.
        interleave: How sequences lie within a block.

    Returns:
        Domain indices [num * block], and the residuals of ``block_counts`` [num + 1, K].
    """
    counts, rests = block_counts(proportions, block, residual, num)
    # 16-bit labels make numpy's stable sort a radix sort, here and for whoever groups by label.
    small = proportions.size <= 1 << 16
    numbers: NDArray[np.unsignedinteger] = np.arange(proportions.size, dtype=np.uint16 if small else np.uint64)
    if interleave == "even":
        return np.concatenate([evenly(row) for row in counts]).astype(numbers.dtype), rests
    in_order: NDArray[np.unsignedinteger] = np.repeat(np.tile(numbers, num), counts.ravel()).reshape(num, block)
    places = np.arange(first * block, (first + num) * block, dtype=np.int64).reshape(num, block)
    order = np.argsort(keys(seed, "mixture", segment, places), axis=1)
    labels: NDArray[np.unsignedinteger] = np.take_along_axis(in_order, order, axis=1).reshape(-1)
    return labels, rests
