"""Rows' gradients in a few hundred numbers each: a wide sparse sketch, then the main directions of a sample of rows.

A random projection to k numbers errs by about 1 / sqrt(k) in every cosine, 0.04 at k = 512. Rows of one data set lie
near a space of far fewer dimensions than parameters, so a sample of their wide sketches gives the k directions that
hold most of them; a random rotation then spreads each row evenly over the k numbers, so that one scale a row is enough
for 8 bits.

Whitening turns what is kept by R^(-1/2), R being the second moment of projected gradients, so that directions which
most rows share count for little (TrackStar, arXiv 2410.17413, section 3; damped by the target's own rows).

Legend: b rows, F rows of the sample, W numbers of a wide sketch, k numbers kept, M target vectors, n rows of a target.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex.rng import stream
from dataflex.signals.specs import Precision

_STEPS = 127
_LEAST = 1e-12
"""Share of the largest eigenvalue below which a direction is rounding only."""


def row_type(size: int, precision: Precision) -> np.dtype[np.void]:
    """Return how a row is kept: its gradient's exact norm, and ``size`` numbers times a scale (all little-endian)."""
    return np.dtype([("norm", "<f4"), ("scale", "<f4"), ("values", "i1" if precision == "int8" else "<f2", (size,))])


def fitted(sketches: NDArray[np.float32], size: int, seed: int) -> NDArray[np.float32]:
    """Return the matrix [W, size] that keeps the ``size`` main directions of wide sketches [F, W], rotated.

    Each row counts alike, whatever its length. A sample of fewer dimensions than ``size`` is kept whole.
    """
    lengths = np.linalg.norm(sketches, axis=1)
    known = sketches[np.isfinite(lengths) & (lengths > 0)]
    units = known / np.linalg.norm(known, axis=1, keepdims=True)
    values, vectors = np.linalg.eigh((units @ units.T).astype(np.float64))
    values, vectors = values[::-1][:size], vectors[:, ::-1][:, :size]
    there = values > _LEAST * max(float(values.max(initial=0.0)), _LEAST)
    rotation = np.linalg.qr(stream(seed, "index rotation").standard_normal((size, size)))[0]
    mixed = (vectors[:, there] / np.sqrt(values[there])) @ rotation[: int(there.sum())]
    return np.ascontiguousarray(units.T @ mixed.astype(np.float32))


def packed(
    sketches: torch.Tensor, norms: torch.Tensor, matrix: torch.Tensor, kind: np.dtype[np.void]
) -> NDArray[np.void]:
    """Return rows as they are kept [b], of wide sketches [b, W] and exact norms [b]; NaN norms for rows without a loss.

    ``scale`` times ``values`` is the projected direction of length at most about 1. Numbers are rounded to the nearest
    of 255 steps between -1 and 1 times the row's largest, or to half precision.
    """
    found = (sketches.float() @ matrix).div_(norms.float().clamp_min(1e-30).unsqueeze(1)).cpu()
    out = np.zeros(len(found), dtype=kind)
    out["norm"] = norms.float().cpu().numpy()
    out["scale"] = found.abs().amax(dim=1).numpy()
    parts = (found / found.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)).nan_to_num_(0.0)
    if kind["values"].base == np.int8:
        out["scale"] /= _STEPS
        parts = parts.mul_(_STEPS).round_()
    out["values"] = parts.numpy().astype(kind["values"].base)
    return out


def products(
    rows: NDArray[np.void], aims: NDArray[np.float32], *, normalize: bool, block_rows: int = 8192
) -> NDArray[np.float32]:
    """Return what rows [N] and projected target vectors [M, k] have in common, float32 [N, M]; NaN as in ``packed``.

    Cosines where the target vectors are of length one (means of cosines where they are means of such), or with
    ``normalize`` off inner products.
    """
    out = np.empty((len(rows), len(aims)), dtype=np.float32)
    wanted = np.ascontiguousarray(aims.T, dtype=np.float32)
    for start in range(0, len(rows), block_rows):
        block = rows[start : start + block_rows]
        factor = block["scale"] if normalize else block["scale"] * block["norm"]
        part = out[start : start + block_rows]
        np.matmul(block["values"].astype(np.float32), wanted, out=part)
        part *= factor[:, None]
    return out


def gradients(rows: NDArray[np.void], *, normalize: bool, block_rows: int = 8192) -> Iterator[NDArray[np.float32]]:
    """Yield what ``products`` compares of rows, block by block [b, k]; zeros for rows without a loss."""
    for start in range(0, len(rows), block_rows):
        block = rows[start : start + block_rows]
        factor = block["scale"] if normalize else block["scale"] * block["norm"]
        yield block["values"] * np.nan_to_num(factor).astype(np.float32)[:, None]


def second_moment(rows: NDArray[np.void], block_rows: int = 8192) -> tuple[NDArray[np.float64], float]:
    """Return the mean outer product of rows' projected gradients [k, k], and the most that rounding makes of it.

    The latter is the largest eigenvalue of a matrix of rounding errors alone (Marchenko and Pastur), twice for safety.
    Rows without a loss are left out.
    """
    known = np.flatnonzero(np.isfinite(rows["norm"]))
    size = rows.dtype["values"].shape[0]
    total, squares = np.zeros((size, size)), 0.0
    for start in range(0, len(known), block_rows):
        block = rows[known[start : start + block_rows]]
        factor = block["scale"] * block["norm"]
        values = block["values"].astype(np.float32) * factor[:, None]
        total += values.T @ values
        squares += float(np.square(factor, dtype=np.float64).sum())
    count = max(1, len(known))
    step = 1.0 if rows.dtype["values"].base == np.int8 else float(np.finfo(np.float16).eps)
    return total / count, 2 * (1 + (size / count) ** 0.5) ** 2 * step**2 / 12 * squares / count


def whitening(moment: NDArray[np.float64], least: float) -> NDArray[np.float32]:
    """Return what turns projected gradients so that their second moment [k, k] is one [k, r].

    Directions whose eigenvalue is at most ``least`` are left out: rounding is all that rows have of them.
    """
    values, vectors = np.linalg.eigh(moment)
    there = values > max(least, _LEAST * float(values.max(initial=0.0)))
    return np.ascontiguousarray(vectors[:, there] / np.sqrt(values[there]), dtype=np.float32)


def whitened_cosines(
    rows: NDArray[np.void], target: NDArray[np.float32], turn: NDArray[np.float32], block_rows: int = 8192
) -> NDArray[np.float32]:
    """Return rows' mean cosines [N] with a target's projected rows [n, k] after ``turn`` [k, r]; NaN without a loss."""
    turned = target @ turn
    aim = (turned / np.maximum(np.linalg.norm(turned, axis=1, keepdims=True), 1e-30)).mean(axis=0)
    out = np.full(len(rows), np.nan, dtype=np.float32)
    for start in range(0, len(rows), block_rows):
        block = rows[start : start + block_rows]
        values = block["values"].astype(np.float32) @ turn
        part = values @ aim / np.maximum(np.linalg.norm(values, axis=1), 1e-30)
        out[start : start + block_rows] = np.where(np.isfinite(block["norm"]), part, np.nan)
    return out
