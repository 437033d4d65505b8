"""Brings the pieces of a parameter to the consumers: factored or formed, preconditioned, in blocks that fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from dataflex.signals.gradients.consume import Block, Consumer
from dataflex.signals.gradients.pieces import Factors, FactorShape, Piece, dense_part
from dataflex.signals.gradients.precondition import Preconditioner

__all__ = ["Assembler"]


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
        step = max(1, self._block_numbers // max(rows * stride, 1))
        for start in range(0, length, step):
            stop = min(start + step, length)
            values = dense_part(pieces, start, stop)
            part = slice(start * stride, stop * stride)
            for consumer in self._plain:
                consumer.add(Block(name=name, part=part, values=values))
            if self._directed:
                assert self._precondition is not None
                directions = self._precondition(name, part, values)
                for consumer in self._directed:
                    consumer.add(Block(name=name, part=part, values=directions))

    def _ghost_is_cheaper(self, factors: list[Factors], shape: torch.Size) -> bool:
        sizes = FactorShape.of(factors, shape)
        forming = sizes.tokens * sizes.n * (1 if sizes.one_hot else sizes.m) + sizes.m * sizes.n
        ghost = sum(consumer.ghost_cost(sizes) for consumer in self._plain)
        return ghost < forming + sum(consumer.dense_cost(sizes) for consumer in self._plain)
