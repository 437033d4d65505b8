"""Gradients of single rows, held for as long as other rows are compared with each of them.

Everything else here compares with a few vectors; pairs of rows need every row's own. What is held is
rows x parameters, so callers take at most ``rows_at_once`` rows at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex import comm
from dataflex.signals.gradients.blocks import Block
from dataflex.signals.gradients.consume import Consumer, Dots, inner_products
from dataflex.signals.gradients.engine import GradientEngine
from dataflex.signals.gradients.pieces import FactorShape
from dataflex.signals.gradients.precondition import Preconditioner
from dataflex.signals.gradients.vectors import TargetVectors
from dataflex.signals.sweep import Sweep, vector_pass

__all__ = ["RowVectors", "held_rows", "products_of", "row_products", "rows_at_once"]

_HELD_NUMBERS = 2**28
"""Numbers of all held gradients together: 1 GiB in fp32."""


class RowVectors(Consumer):
    """Writes each sample's gradient into a vector of its own.

    Set ``places`` [b], the vectors' indices, before every batch; -1 leaves a sample out. Vectors of samples
    without a loss stay as they were. There is no result.

    Args:
        vectors: Where gradients go.
        name: As ``Consumer``.
        raw: As ``Consumer``.
    """

    places: torch.Tensor

    def __init__(self, vectors: TargetVectors, *, name: str = "rows", raw: bool = False) -> None:
        self.vectors, self.name, self.raw = vectors, name, raw

    def begin(self, finite: torch.Tensor) -> None:  # noqa: D102
        places = self.places.to(finite.device)
        self._samples = (finite & places.ge(0)).nonzero().squeeze(1)
        self._places = places[self._samples]

    def dense_cost(self, shape: FactorShape) -> float:  # noqa: D102
        return 8.0 * shape.m * shape.n

    def add(self, block: Block) -> None:  # noqa: D102
        for (name, start, stop), values in block.parts():
            vectors = self.vectors.flat(name)
            vectors[self._places.to(vectors.device), start:stop] = values[self._samples].to(vectors.device)

    def finish(self) -> dict[str, torch.Tensor]:  # noqa: D102
        return {}


def rows_at_once(shapes: Mapping[str, torch.Size]) -> int:
    """Return how many rows' gradients of these parameters are held together; at least one."""
    return max(1, _HELD_NUMBERS // max(1, sum(shape.numel() for shape in shapes.values())))


def held_rows(
    engine: GradientEngine, sweep: Sweep, precondition: Preconditioner | None = None
) -> tuple[TargetVectors, torch.Tensor]:
    """Return every row's gradient (collective), equal on every rank.

    Args:
        engine: Of the model.
        sweep: The rows [n]; n x parameters numbers must fit.
        precondition: Turns gradients into directions, or None.

    Returns:
        One vector per row, zero for rows without a loss; and which rows have one, bool [n].
    """
    device = next(iter(engine.parameters.values())).device
    vectors = TargetVectors.zeros(len(sweep.rows), engine.shapes, device)
    consumer = RowVectors(vectors)
    known = torch.zeros(len(sweep.rows), dtype=torch.int64, device=device)
    with engine.observing():
        for turn in sweep.turns():
            places = torch.from_numpy(turn.positions)
            # A rank that only keeps step with the others keeps nothing.
            consumer.places = places if turn.mine else torch.full_like(places, -1)
            losses = engine.run(turn.batch, [consumer], precondition=precondition)["losses"]
            if turn.mine:
                known[places.to(device)] = torch.isfinite(losses).to(device, torch.int64)
    for name, tensor in vectors.tensors.items():  # each row is zero on all ranks but one
        vectors.tensors[name] = comm.gather_sum(tensor)
    return vectors, comm.gather_sum(known).bool()


def products_of(a: TargetVectors, b: TargetVectors) -> torch.Tensor:
    """Return all inner products of two sets of vectors, float64 [len(a), len(b)]."""
    device = next(iter(a.tensors.values())).device
    out = torch.zeros(len(a), len(b), dtype=torch.float64, device=device)
    for name in a.tensors:
        for part in inner_products(a.flat(name), b.flat(name).to(device)):
            out += part
    return out


def row_products(
    engine: GradientEngine, sweep: Sweep, aims: TargetVectors | None, precondition: Preconditioner | None = None
) -> NDArray[np.float32]:
    """Return inner products of rows' gradients with some vectors and with one another (collective).

    More than ``rows_at_once`` rows take a further pass over the rest for each so many.

    Args:
        engine: Of the model.
        sweep: The rows [n], few.
        aims: The vectors [m], or None for none.
        precondition: Turns the rows' gradients into directions, or None.

    Returns:
        float32 [n, m + n], equal on every rank; NaN in the rows and columns of rows without a loss.
    """
    num, num_aims, at_once = len(sweep.rows), 0 if aims is None else len(aims), rows_at_once(engine.shapes)
    out, known = np.full((num, num_aims + num), np.nan, dtype=np.float32), np.zeros(num, dtype=bool)
    gram = out[:, num_aims:]
    for start in range(0, num, at_once):
        block = slice(start, min(start + at_once, num))
        vectors, finite = held_rows(engine, _part(sweep, block), precondition)
        known[block] = finite.cpu().numpy()
        if aims is not None:
            out[block, :num_aims] = products_of(vectors, aims).cpu().numpy()
        gram[block, block] = products_of(vectors, vectors).cpu().numpy()
        rest = slice(block.stop, num)
        if block.stop < num:
            dots = Dots(vectors, normalize="none")

            def score(batch: dict[str, Any], dots: Dots = dots) -> torch.Tensor:
                return engine.run(batch, [dots], precondition=precondition)["dots"]

            with engine.observing():
                gram[rest, block] = vector_pass(_part(sweep, rest), score, (len(vectors),))
            gram[block, rest] = gram[rest, block].T
    out[~known] = np.nan
    gram[:, ~known] = np.nan
    return out


def _part(sweep: Sweep, which: slice) -> Sweep:
    return replace(sweep, rows=sweep.rows[which], lengths=sweep.lengths[which])
