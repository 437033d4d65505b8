"""Stretches of per-sample gradients as consumers get them, and constants laid out in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

__all__ = ["Block", "Columns", "Segment"]


class Segment(NamedTuple):
    """A range of a parameter's flat index."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Block:
    """Gradients of all samples for a stretch of one parameter, or for several small ones side by side.

    Attributes:
        segments: What the columns are, in order.
        values: fp32 [b, columns]; read only.
    """

    segments: tuple[Segment, ...]
    values: torch.Tensor

    def parts(self) -> Iterator[tuple[Segment, torch.Tensor]]:
        """Yield every segment with its columns [b, stop - start]."""
        at = 0
        for segment in self.segments:
            width = segment.stop - segment.start
            yield segment, self.values[:, at : at + width]
            at += width


class Columns:
    """Constants by parameter, brought into the columns of a block.

    Side-by-side layouts are remembered: small parameters meet in the same blocks in every batch.

    Args:
        flat: Parameter's name to its constants [..., numel].
    """

    def __init__(self, flat: Callable[[str], torch.Tensor]) -> None:
        self._flat = flat
        self._known: dict[tuple[Segment, ...], torch.Tensor] = {}

    def of(self, segments: tuple[Segment, ...], device: torch.device) -> torch.Tensor:
        """Return the constants [..., columns] on ``device``."""
        if len(segments) == 1:
            name, start, stop = segments[0]
            return self._flat(name)[..., start:stop].to(device)
        found = self._known.get(segments)
        if found is None:
            parts = [self._flat(name)[..., start:stop].to(device) for name, start, stop in segments]
            found = self._known[segments] = torch.cat(parts, dim=-1)
        return found
