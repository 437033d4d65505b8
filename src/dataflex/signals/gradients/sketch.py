"""Sparse sketch of per-sample gradients, for those who must store them (sparse Johnson-Lindenstrauss transform).

Each coordinate goes to ``nonzeros`` of ``size`` buckets, one in each stretch of size / nonzeros, with
a random sign and weight 1 / sqrt(nonzeros). Buckets and signs are an integer hash of (seed,
parameter's name, flat index): nothing is stored, every rank, device and batch size has the same
matrix, and a parameter can be sketched in pieces. E <Su, Sv> = <u, v>, with variance about
(|u|^2 |v|^2 + <u, v>^2) / size. Source: Kane and Nelson 2014 (arXiv 1012.1577).
"""

from __future__ import annotations

import hashlib

import torch

from dataflex.errors import ConfigError
from dataflex.signals.gradients.blocks import Block, Segment
from dataflex.signals.gradients.consume import Consumer, Norms
from dataflex.signals.gradients.pieces import FactorShape
from dataflex.signals.gradients.vectors import TargetVectors

__all__ = ["Sketch", "buckets_and_signs", "sketched"]

# Multipliers of the splitmix64 finalizer, as signed 64-bit numbers.
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_COST_PER_COORDINATE = 40.0
# Hashing costs as much as the sketch itself, so the first so many buckets are remembered for the next batch.
_REMEMBERED = 2**23


def _shift(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift right without sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _mix(values: torch.Tensor) -> torch.Tensor:
    values = (values ^ _shift(values, 30)) * _FIRST
    values = (values ^ _shift(values, 27)) * _SECOND
    return values ^ _shift(values, 31)


def _key(*parts: object) -> int:
    """Return a signed 64-bit number for some names and numbers."""
    digest = hashlib.blake2b("\\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def buckets_and_signs(
    seed: int, name: str, part: slice, *, size: int, nonzeros: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where a stretch of a parameter goes.

    Returns:
        Buckets int64 [nonzeros, n] in [0, size), signs fp32 [nonzeros, n] of +1 and -1.
    """
    index = torch.arange(part.start, part.stop, dtype=torch.int64, device=device) * _GOLDEN
    width = size // nonzeros
    hashes = torch.stack([_mix(index + _key(seed, name, k)) for k in range(nonzeros)])
    signs = 1.0 - 2.0 * (hashes & 1).float()
    starts = torch.arange(nonzeros, device=device).unsqueeze(1) * width
    return _shift(hashes, 1) % width + starts, signs


class Sketch(Consumer):
    """Sketch of each sample's gradient, fp32 [b, size]; ".norms" holds the norms before sketching [b].

    Args:
        size: Numbers kept for each sample; a multiple of ``nonzeros``.
        nonzeros: Buckets for each coordinate.
        seed: Of the hash.
        name: Key of the result.
        raw: As ``Consumer``.

    Raises:
        ConfigError: ``size`` is not a positive multiple of ``nonzeros``.
    """

    def __init__(
        self, *, size: int = 8192, nonzeros: int = 2, seed: int = 0, name: str = "sketch", raw: bool = False
    ) -> None:
        if nonzeros < 1 or size < nonzeros or size % nonzeros:
            raise ConfigError(f"gradients: sketch size {size} is not a positive multiple of its {nonzeros} nonzeros")
        self.size, self.nonzeros, self.seed, self.name, self.raw = size, nonzeros, seed, name, raw
        self._norms = Norms()
        self._maps: dict[tuple[Segment, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self._room = _REMEMBERED

    def begin(self, finite: torch.Tensor) -> None:  # noqa: D102
        self._sums = torch.zeros(self.size, len(finite), dtype=torch.float32, device=finite.device)
        self._norms.begin(finite)

    def dense_cost(self, shape: FactorShape) -> float:  # noqa: D102
        return _COST_PER_COORDINATE * self.nonzeros * shape.m * shape.n

    def add(self, block: Block) -> None:  # noqa: D102
        columns = block.values.t().contiguous()
        buckets, signs = self._map(block.segments, columns.device)
        for where, sign in zip(buckets, signs, strict=True):
            self._sums.index_add_(0, where, columns * sign.unsqueeze(1))
        self._norms.add(block)

    def _map(self, segments: tuple[Segment, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if segments in self._maps:
            return self._maps[segments]
        options = {"size": self.size, "nonzeros": self.nonzeros, "device": device}
        parts = [buckets_and_signs(self.seed, name, slice(start, stop), **options) for name, start, stop in segments]
        found = torch.cat([part[0] for part in parts], dim=1), torch.cat([part[1] for part in parts], dim=1)
        self._room -= found[0].numel()
        if self._room >= 0:
            self._maps[segments] = found
        return found

    def finish(self) -> dict[str, torch.Tensor]:  # noqa: D102
        return {"": self._sums.t() / self.nonzeros**0.5, ".norms": self._norms.finish()[""]}


def sketched(targets: TargetVectors, sketch: Sketch) -> torch.Tensor:
    """Return the sketches of target vectors, fp32 [M, size], by the same hash as the rows'."""
    sums: torch.Tensor | None = None
    for name in targets.tensors:
        flat = targets.flat(name)
        if sums is None:
            sums = torch.zeros(sketch.size, len(flat), device=flat.device)
        buckets, signs = buckets_and_signs(
            sketch.seed,
            name,
            slice(0, flat.shape[1]),
            size=sketch.size,
            nonzeros=sketch.nonzeros,
            device=flat.device,
        )
        for where, sign in zip(buckets, signs, strict=True):
            sums.index_add_(0, where, flat.t() * sign.unsqueeze(1))
    assert sums is not None
    return sums.t() / sketch.nonzeros**0.5
