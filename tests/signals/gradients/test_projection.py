"""Projections of sketches, and rows in 8 and 16 bits, against plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dataflex.signals.gradients.consumers import Block, Segment, Sketch, TargetVectors
from dataflex.signals.gradients.projection import fitted, packed, products, row_type

RNG = np.random.default_rng(5)
WIDE, SIZE = 200, 16


def rows_of(count):
    """Rows of twelve strong directions, in lengths that differ a thousandfold."""
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(WIDE, 12)))[0]
    rows = RNG.normal(size=(count, 12)) @ axes.T * 10.0 ** RNG.uniform(-3, 0, size=(count, 1))
    return rows.astype(np.float32)


def test_the_main_directions_are_kept_and_spread():
    sample = rows_of(60)
    sample[3], sample[4] = 0.0, np.nan
    matrix = fitted(sample, SIZE, seed=1)
    assert matrix.shape == (WIDE, SIZE)
    assert matrix.dtype == np.float32
    others, aims = rows_of(40), RNG.normal(size=(5, WIDE)).astype(np.float32)
    lengths = np.linalg.norm(others, axis=1)[:, None] * np.linalg.norm(aims, axis=1)  # what rounding is relative to
    assert (np.abs((others @ matrix) @ (aims @ matrix).T - others @ aims.T) < 3e-5 * lengths).all()
    # The 12 dimensions of the sample fill all 16 numbers alike.
    energy = np.square((others / np.linalg.norm(others, axis=1, keepdims=True)) @ matrix).sum(axis=0)
    assert energy.max() < 4 * energy.mean()
    np.testing.assert_array_equal(matrix, fitted(sample, SIZE, seed=1))
    assert (fitted(sample, SIZE, seed=2) != matrix).any()


@pytest.mark.parametrize(("precision", "error"), [("int8", 1 / 254), ("fp16", 2.0**-11)])
def test_rows_are_rounded_to_the_nearest_step(precision, error):
    wide, matrix = rows_of(50), np.eye(WIDE, SIZE, dtype=np.float32)
    norms = np.linalg.norm(wide, axis=1).astype(np.float32) * 2
    wide[6], norms[6] = 0.0, 0.0
    wide[7], norms[7] = np.nan, np.nan
    kept = packed(torch.from_numpy(wide), torch.from_numpy(norms), torch.from_numpy(matrix), row_type(SIZE, precision))
    assert kept.dtype.itemsize == 8 + SIZE * (1 if precision == "int8" else 2)
    there = np.setdiff1d(np.arange(50), [6, 7])
    wanted = wide[there, :SIZE] / norms[there, None]
    found = kept["values"][there].astype(np.float64) * kept["scale"][there, None]
    assert (np.abs(found - wanted) <= 1.001 * error * np.abs(wanted).max(axis=1, keepdims=True)).all()
    aims = RNG.normal(size=(3, SIZE)).astype(np.float32)
    cosines = products(kept, aims, normalize=True, block_rows=7)
    np.testing.assert_allclose(cosines[there], found @ aims.T, rtol=1e-4, atol=1e-6)
    assert (cosines[6] == 0).all()
    assert np.isnan(cosines[7]).all()
    plain = products(kept, aims, normalize=False)
    np.testing.assert_allclose(plain[there], found @ aims.T * norms[there, None], rtol=1e-4, atol=1e-6)


def sketched(rows, aims, size, seed, weights):
    sketch = Sketch(size=size, seed=seed, weights=weights and {"a": torch.from_numpy(weights["a"])})
    sketch.begin(torch.ones(len(rows), dtype=torch.bool))
    sketch.add(Block(segments=(Segment("a", 0, rows.shape[1]),), values=torch.from_numpy(rows)))
    found = sketch.finish()
    np.testing.assert_allclose(found[".norms"].numpy(), np.linalg.norm(rows, axis=1), rtol=1e-5)
    return (found[""] @ sketch.of(TargetVectors(tensors={"a": torch.from_numpy(aims)})).t()).numpy()


def test_weights_of_coordinates_keep_products_and_lessen_their_error():
    """Coordinates of samples are alike and those of vectors differ, as of Adam's directions and plain gradients."""
    rng = np.random.default_rng(3)
    usual = np.exp(rng.normal(0, 2, size=3000)).astype(np.float32)
    rows = rng.normal(size=(6, 3000)).astype(np.float32)
    aims = (rng.normal(size=(4, 3000)) * usual).astype(np.float32)
    exact, weights = rows @ aims.T, {"a": np.sqrt(usual)}
    scale = np.linalg.norm(rows, axis=1)[:, None] * np.linalg.norm(aims, axis=1)
    errors = {
        name: np.sqrt(np.mean([((sketched(rows, aims, 256, seed, w) - exact) / scale) ** 2 for seed in range(6)]))
        for name, w in (("plain", None), ("weighted", weights))
    }
    expected = np.sqrt((usual.sum() ** 2) / (3000 * (usual**2).sum()))  # what theory says of their ratio
    assert errors["plain"] == pytest.approx(1 / np.sqrt(256), rel=0.4)
    assert errors["weighted"] / errors["plain"] == pytest.approx(expected, rel=0.6)
    assert expected < 0.4
