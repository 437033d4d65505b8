"""Brings the pieces of a parameter to the consumers: factored or formed, preconditioned, in blocks that fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from dataflex.signals.gradients.blocks import Block, Segment
from dataflex.signals.gradients.consume import Consumer
from dataflex.signals.gradients.pieces import Factors, FactorShape, Piece, dense_part
from dataflex.signals.gradients.precondition import Preconditioner

__all__ = ["Assembler"]

# Parameters of fewer numbers share a block of at least so many (for each sample): the fixed cost of a block counts.
_SMALL = 2**15


class Assembler:
    """Feeds consumers.

    Args:
        shapes: Shape of every parameter.
        consumers: Who is fed.
        precondition: Turns gradients into directions, or None.
        block_numbers: A block of formed gradients holds about so many numbers at most.
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        consumers: Sequence[Consumer],
        precondition: Preconditioner | None,
        block_numbers: int,
    ) -> None:
        self._shapes, self._precondition, self._block_numbers = shapes, precondition, block_numbers
        self._small = min(_SMALL, block_numbers)
        self._waiting: list[tuple[Segment, torch.Tensor]] = []
        self._plain = [one for one in consumers if one.raw or precondition is None]
        self._directed = [one for one in consumers if not (one.raw or precondition is None)]

    def take(self, name: str, pieces: list[Piece]) -> None:
        """Feed one parameter, all of whose uses are in ``pieces``."""
        shape = self._shapes[name]
        factors = [piece for piece in pieces if isinstance(piece, Factors)]
        if len(factors) == len(pieces) and not self._directed and self._ghost_is_cheaper(factors, shape):
            for consumer in self._plain:
                consumer.add_factors(name, factors, shape)
            return
        rows = len(pieces[0].right) if isinstance(pieces[0], Factors) else len(pieces[0])
        length = shape[0] if shape else 1
        stride = math.prod(shape[1:])
        if length * stride < self._small:
            self._waiting.append((Segment(name, 0, length * stride), dense_part(pieces, 0, length)))
            if sum(segment.stop for segment, _ in self._waiting) >= self._small:
                self.flush()
            return
        step = max(1, self._block_numbers // max(rows * stride, 1))
        for start in range(0, length, step):
            stop = min(start + step, length)
            self._feed((Segment(name, start * stride, stop * stride),), dense_part(pieces, start, stop))

    def flush(self) -> None:
        """Feed the small parameters that wait for others."""
        if self._waiting:
            segments, values = zip(*self._waiting, strict=True)
            self._waiting = []
            self._feed(segments, torch.cat(values, dim=1) if len(values) > 1 else values[0])

    def _feed(self, segments: tuple[Segment, ...], values: torch.Tensor) -> None:
        for consumer in self._plain:
            consumer.add(Block(segments=segments, values=values))
        if self._directed:
            assert self._precondition is not None
            directions = self._precondition(segments, values)
            for consumer in self._directed:
                consumer.add(Block(segments=segments, values=directions))

    def _ghost_is_cheaper(self, factors: list[Factors], shape: torch.Size) -> bool:
        sizes = FactorShape.of(factors, shape)
        forming = sizes.tokens * sizes.n * (1 if sizes.one_hot else sizes.m) + sizes.m * sizes.n
        ghost = sum(consumer.ghost_cost(sizes) for consumer in self._plain)
        return ghost < forming + sum(consumer.dense_cost(sizes) for consumer in self._plain)
