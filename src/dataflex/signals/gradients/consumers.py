"""What is made of per-sample gradients: dot products with targets, norms, weighted sums, sketches, rows as they are.

Consumers are fed parameter by parameter, so nothing of size samples x parameters is ever held (but by ``RowVectors``).
Each says what the factored ("ghost") form and the formed gradients would cost it; the engine takes the cheaper one for
all consumers together. Sums over parameters are taken at the end, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Literal, NamedTuple

import torch

from dataflex import comm
from dataflex.errors import ConfigError
from dataflex.signals.gradients.factors import Factors, FactorShape, ghost_dots, ghost_norms, weighted_sum
from dataflex.state import blake2b

# A number moved through memory costs about as much as this many multiply-adds of a matrix product.
_MEMORY = 8.0
# A matrix product over more numbers than this loses digits in fp32 (5e-5 at a million).
_STRETCH = 2**15
# Multipliers of the splitmix64 finalizer, as signed 64-bit numbers.
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_COST_PER_COORDINATE = 40.0
# Hashing costs as much as the sketch itself, so this many buckets are remembered for the next batch.
_REMEMBERED = 2**23


class Segment(NamedTuple):
    """A range of a parameter's flat index."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Block:
    """Gradients of all samples, fp32 [b, columns], read only, for a stretch of one parameter or several small ones."""

    segments: tuple[Segment, ...]
    values: torch.Tensor

    def parts(self) -> Iterator[tuple[Segment, torch.Tensor]]:
        """Yield every segment with its columns [b, stop - start]."""
        sizes = [segment.stop - segment.start for segment in self.segments]
        yield from zip(self.segments, self.values.split(sizes, dim=1), strict=True)


class Columns:
    """Constants by parameter [..., numel], brought into the columns of a block; layouts of several are remembered."""

    def __init__(self, flat: Callable[[str], torch.Tensor]) -> None:
        self._flat = flat
        self._known: dict[tuple[Segment, ...], torch.Tensor] = {}

    def of(self, segments: tuple[Segment, ...], device: torch.device) -> torch.Tensor:
        """Return the constants [..., columns] on ``device``."""
        found = self._known.get(segments)
        if found is None:
            parts = [self._flat(name)[..., start:stop].to(device) for name, start, stop in segments]
            if len(parts) == 1:
                return parts[0]
            found = self._known[segments] = torch.cat(parts, dim=-1)
        return found


@dataclass(frozen=True, kw_only=True)
class TargetVectors:
    """M vectors, each as large as all differentiated parameters together: fp32 [M, *shape] by parameter name."""

    tensors: dict[str, torch.Tensor]

    @classmethod
    def zeros(cls, num: int, shapes: Mapping[str, torch.Size], device: torch.device | str) -> TargetVectors:
        """Return ``num`` zero vectors."""
        kind = torch.float32
        return cls(tensors={key: torch.zeros(num, *shape, dtype=kind, device=device) for key, shape in shapes.items()})

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def flat(self, name: str) -> torch.Tensor:
        """Return a parameter's part as a view [M, numel]."""
        tensor = self.tensors[name]
        return tensor.view(len(tensor), -1)

    def norms(self) -> torch.Tensor:
        """Return the L2 norms [M], fp32."""
        squares = (self.flat(name).double().square().sum(dim=1) for name in self.tensors)
        return reduce(torch.add, squares).sqrt().float()

    def one(self, index: int) -> dict[str, torch.Tensor]:
        """Return one vector as {parameter name: tensor of its shape}."""
        return {name: tensor[index] for name, tensor in self.tensors.items()}

    def scale_(self, factors: torch.Tensor) -> TargetVectors:
        """Multiply vector k by ``factors[k]`` in place and return self."""
        for name, tensor in self.tensors.items():
            self.flat(name).mul_(factors.to(tensor).unsqueeze(1))
        return self

    def add_up(self) -> None:
        """Replace the vectors by their sums over ranks (collective)."""
        for name, tensor in self.tensors.items():
            self.tensors[name] = comm.gather_sum(tensor)


def inner_products(a: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor]:
    """Return [rows of a, rows of b] inner products as parts to be added up in float64."""
    stretches = zip(a.split(_STRETCH, dim=1), b.split(_STRETCH, dim=1), strict=True)
    return [one @ other.t() for one, other in stretches]


def total(parts: list[torch.Tensor]) -> torch.Tensor:
    """Return the sum of equal-shaped fp32 tensors in float64."""
    return torch.stack(parts).sum(dim=0, dtype=torch.float64)


class Consumer:
    """Base of everything that takes per-sample gradients; ``name`` is the key of its result."""

    name: str

    def begin(self, finite: torch.Tensor) -> None:
        """Start a batch, forgetting the last, even an unfinished one; ``finite`` [b]: which samples have a loss."""
        raise NotImplementedError

    def dense_cost(self, shape: FactorShape) -> float:
        """Return the number of multiply-adds per sample for a formed gradient of this shape."""
        return _MEMORY * shape.m * shape.n

    def ghost_cost(self, shape: FactorShape) -> float:
        """Return the number of multiply-adds per sample for the factored form; infinite where it cannot be used."""
        return math.inf

    def add(self, block: Block) -> None:
        """Take a block of formed gradients."""
        raise NotImplementedError

    def add_factors(self, name: str, uses: list[Factors], shape: torch.Size) -> None:
        """Take a whole parameter in factored form."""
        raise NotImplementedError

    def finish(self) -> dict[str, torch.Tensor]:
        """Return the batch's results: "" for the main one, or a suffix; first dimension b."""
        raise NotImplementedError


class Norms(Consumer):
    """L2 norm of each sample's gradient, fp32 [b] (GraNd, arXiv 2107.07075)."""

    name = "norms"

    def begin(self, finite: torch.Tensor) -> None:
        self._squares = [torch.zeros(len(finite), device=finite.device)]

    def ghost_cost(self, shape: FactorShape) -> float:
        return shape.tokens**2 * (shape.n + shape.left_width + 2 * _MEMORY)

    def add(self, block: Block) -> None:
        self._squares.append(torch.linalg.vecdot(block.values, block.values))

    def add_factors(self, name: str, uses: list[Factors], shape: torch.Size) -> None:
        self._squares.append(ghost_norms(uses))

    def finish(self) -> dict[str, torch.Tensor]:
        return {"": total(self._squares).clamp_min(0).sqrt().float()}


class Dots(Consumer):
    """Exact inner products with M target vectors, fp32 [b, M]; ".norms" holds the samples' norms [b].

    ``normalize`` is "none": plain products; "row": divided by the sample's norm, which with targets that are means of
    unit vectors is LESS's mean of cosines; or "both": cosines.
    """

    name = "dots"

    def __init__(self, targets: TargetVectors, *, normalize: Literal["none", "row", "both"] = "row") -> None:
        self.targets, self.normalize = targets, normalize
        self._norms, self._columns = Norms(), Columns(targets.flat)

    def begin(self, finite: torch.Tensor) -> None:
        self._norms.begin(finite)
        self._products = [torch.zeros(len(finite), len(self.targets), device=finite.device)]

    def dense_cost(self, shape: FactorShape) -> float:
        return (_MEMORY + len(self.targets)) * shape.m * shape.n

    def ghost_cost(self, shape: FactorShape) -> float:
        return self._norms.ghost_cost(shape) + len(self.targets) * shape.tokens * shape.n * shape.left_width

    def add(self, block: Block) -> None:
        self._products += inner_products(block.values, self._columns.of(block.segments, block.values.device))
        self._norms.add(block)

    def add_factors(self, name: str, uses: list[Factors], shape: torch.Size) -> None:
        self._products.append(ghost_dots(uses, self.targets.tensors[name].to(uses[0].right.device)))
        self._norms.add_factors(name, uses, shape)

    def finish(self) -> dict[str, torch.Tensor]:
        norms = self._norms.finish()[""]
        products = total(self._products)
        if self.normalize != "none":
            products = products / norms.double().clamp_min(1e-30).unsqueeze(1)
        if self.normalize == "both":
            products = products / self.targets.norms().double().to(products.device).clamp_min(1e-30)
        return {"": products.float(), ".norms": norms}


class WeightedSums(Consumer):
    """Adds sum_i w_ki G_i to K ``vectors``, over any number of batches; means by target are made of this.

    Set ``weights`` [K, b] before every batch. Samples without a loss count as weight 0; the weights used come back [b,
    K].
    """

    name = "sums"
    weights: torch.Tensor

    def __init__(self, vectors: TargetVectors) -> None:
        self.vectors = vectors

    def begin(self, finite: torch.Tensor) -> None:
        assert self.weights.shape == (len(self.vectors), len(finite)), "weights do not fit the batch"
        self._weights = self.weights.to(finite.device) * finite
        self._batch: dict[str, torch.Tensor] = {}  # added at the end: a batch that is started again counts once

    def dense_cost(self, shape: FactorShape) -> float:
        return len(self.vectors) * shape.m * shape.n

    def ghost_cost(self, shape: FactorShape) -> float:
        return shape.tokens * shape.n * shape.left_width

    def add(self, block: Block) -> None:
        for (name, start, stop), values in block.parts():
            if name not in self._batch:
                self._batch[name] = values.new_zeros(self.vectors.flat(name).shape)
            self._batch[name][:, start:stop] += self._weights @ values

    def add_factors(self, name: str, uses: list[Factors], shape: torch.Size) -> None:
        self._batch[name] = torch.stack([weighted_sum(uses, weights, shape).flatten() for weights in self._weights])

    def finish(self) -> dict[str, torch.Tensor]:
        for name, part in self._batch.items():
            sums = self.vectors.flat(name)
            sums += part.to(sums.device)
        self._batch = {}
        return {"": self._weights.t()}


class RowVectors(Consumer):
    """Writes each sample's gradient into one of ``vectors``; there is no result.

    Set ``places`` [b], the vectors' indices, before every batch; -1 leaves a sample out, as does a loss that is
    missing.
    """

    name = "rows"
    places: torch.Tensor

    def __init__(self, vectors: TargetVectors) -> None:
        self.vectors = vectors

    def begin(self, finite: torch.Tensor) -> None:
        places = self.places.to(finite.device)
        self._samples = (finite & places.ge(0)).nonzero().squeeze(1)
        self._places = places[self._samples]

    def add(self, block: Block) -> None:
        for (name, start, stop), values in block.parts():
            vectors = self.vectors.flat(name)
            vectors[self._places.to(vectors.device), start:stop] = values[self._samples].to(vectors.device)

    def finish(self) -> dict[str, torch.Tensor]:
        return {}


class Sketch(Consumer):
    """Sparse sketch of each sample's gradient, fp32 [b, size]; ".norms" holds the norms before sketching [b].

    A sparse Johnson-Lindenstrauss transform: each coordinate goes to ``nonzeros`` of ``size`` buckets, one in each
    stretch of size / nonzeros, with a random sign and weight 1 / sqrt(nonzeros). Buckets and signs are an integer
    hash of (seed, parameter's name, flat index): nothing is stored, every rank, device and batch size has the same
    matrix, and a parameter can be sketched in parts. E <Su, Sv> = <u, v>, with variance about
    (|u|^2 |v|^2 + <u, v>^2) / size. Source: Kane and Nelson 2014 (arXiv 1012.1577).

    ``weights`` are numbers above 0 by parameter name: a sample's coordinates are multiplied by them before sketching,
    those of vectors divided. Products stay the same in expectation; with the root of the vectors' usual size over that
    of the samples their variance is least.

    Raises:
        ConfigError: ``size`` is not a positive multiple of ``nonzeros``.
    """

    name = "sketch"

    def __init__(
        self, *, size: int = 8192, nonzeros: int = 2, seed: int = 0, weights: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        if nonzeros < 1 or size < nonzeros or size % nonzeros:
            raise ConfigError(f"gradients: sketch size {size} is not a positive multiple of its {nonzeros} nonzeros")
        self.size, self.nonzeros, self.seed = size, nonzeros, seed
        self._weights = weights
        self._columns = None if weights is None else Columns(lambda name: weights[name].flatten())
        self._norms = Norms()
        self._maps: dict[tuple[Segment, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self._room = _REMEMBERED

    def begin(self, finite: torch.Tensor) -> None:
        self._sums = torch.zeros(self.size, len(finite), dtype=torch.float32, device=finite.device)
        self._norms.begin(finite)

    def dense_cost(self, shape: FactorShape) -> float:
        return _COST_PER_COORDINATE * self.nonzeros * shape.m * shape.n

    def add(self, block: Block) -> None:
        found = self._maps.get(block.segments)
        if found is None:
            parts = [self.buckets_and_signs(segment, block.values.device) for segment in block.segments]
            found = torch.cat([part[0] for part in parts], dim=1), torch.cat([part[1] for part in parts], dim=1)
            self._room -= found[0].numel()
            if self._room >= 0:
                self._maps[block.segments] = found
        values = block.values
        if self._columns is not None:
            values = values * self._columns.of(block.segments, values.device)
        _scatter(self._sums, values.t().contiguous(), *found)
        self._norms.add(block)

    def finish(self) -> dict[str, torch.Tensor]:
        return {"": self._sums.t() / self.nonzeros**0.5, ".norms": self._norms.finish()[""]}

    def of(self, vectors: TargetVectors) -> torch.Tensor:
        """Return the sketches of vectors, fp32 [M, size], by the same hash as the samples'."""
        device = next(iter(vectors.tensors.values())).device
        sums = torch.zeros(self.size, len(vectors), dtype=torch.float32, device=device)
        for name in vectors.tensors:
            columns = vectors.flat(name).t()
            if self._weights is not None:
                columns = columns / self._weights[name].to(device).view(-1, 1)
            _scatter(sums, columns, *self.buckets_and_signs(Segment(name, 0, len(columns)), device))
        return sums.t() / self.nonzeros**0.5

    def buckets_and_signs(self, segment: Segment, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return buckets int64 [nonzeros, n] in [0, size) and signs fp32 [nonzeros, n] of a stretch of a parameter."""
        index = torch.arange(segment.start, segment.stop, dtype=torch.int64, device=device) * _GOLDEN
        width = self.size // self.nonzeros
        hashes = torch.stack([_mix(index + _key(self.seed, segment.name, k)) for k in range(self.nonzeros)])
        starts = torch.arange(self.nonzeros, device=device).unsqueeze(1) * width
        return _shift(hashes, 1) % width + starts, 1.0 - 2.0 * (hashes & 1).float()


def _scatter(sums: torch.Tensor, columns: torch.Tensor, buckets: torch.Tensor, signs: torch.Tensor) -> None:
    for where, sign in zip(buckets, signs, strict=True):
        sums.index_add_(0, where, columns * sign.unsqueeze(1))


def _shift(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift right without sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _mix(values: torch.Tensor) -> torch.Tensor:
    values = (values ^ _shift(values, 30)) * _FIRST
    values = (values ^ _shift(values, 27)) * _SECOND
    return values ^ _shift(values, 31)


def _key(*parts: object) -> int:
    """Return a signed 64-bit number for some names and numbers."""
    digest = blake2b("\\0".join(map(str, parts)).encode(), size=8)
    return int.from_bytes(digest, "little", signed=True)
