"""What is made of per-sample gradients: dot products with targets, norms, products within a batch, weighted sums.

Consumers are fed parameter by parameter, so nothing of size samples x parameters is ever held. Each
says what the factored ("ghost") form and the formed gradients would cost it; the engine takes the
cheaper one for all consumers together. Sums over parameters are taken at the end, in float64.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from dataflex.signals.gradients.blocks import Block, Columns
from dataflex.signals.gradients.pieces import (
    Factors,
    FactorShape,
    ghost_dots,
    ghost_gram,
    ghost_norms,
    weighted_sum,
)
from dataflex.signals.gradients.vectors import TargetVectors

__all__ = ["Consumer", "Dots", "Gram", "Norms", "WeightedSums"]

# A number moved through memory costs about as much as this many multiply-adds of a matrix product.
_MEMORY = 8.0
# A matrix product over more numbers than this loses digits in fp32 (5e-5 at a million).
_STRETCH = 2**15


def inner_products(a: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor]:
    """Return [rows of a, rows of b] inner products as parts to be added up in float64."""
    stretches = zip(a.split(_STRETCH, dim=1), b.split(_STRETCH, dim=1), strict=True)
    return [one @ other.t() for one, other in stretches]


def total(parts: list[torch.Tensor]) -> torch.Tensor:
    """Return the sum of equal-shaped fp32 tensors in float64."""
    return torch.stack(parts).sum(dim=0, dtype=torch.float64)


class Consumer:
    """Base of everything that eats per-sample gradients.

    Attributes:
        name: Key of the result.
        raw: Take gradients as they are, even where the pass preconditions them.
    """

    name: str
    raw: bool = False

    def begin(self, finite: torch.Tensor) -> None:
        """Start a batch, forgetting the last one; ``finite`` [b] says which samples have a loss.

        A batch may be started again before it is finished.
        """
        raise NotImplementedError

    def dense_cost(self, shape: FactorShape) -> float:
        """Return multiply-adds per sample for a formed gradient of this shape."""
        raise NotImplementedError

    def ghost_cost(self, shape: FactorShape) -> float:
        """Return multiply-adds per sample for the factored form; infinite where it cannot be used."""
        return math.inf

    def add(self, block: Block) -> None:
        """Take a block of formed gradients."""
        raise NotImplementedError

    def add_factors(self, name: str, factors: list[Factors], shape: torch.Size) -> None:
        """Take a whole parameter in factored form."""
        raise NotImplementedError

    def finish(self) -> dict[str, torch.Tensor]:
        """Return the batch's results: "" for the main one, or a suffix; first dimension b."""
        raise NotImplementedError


class Norms(Consumer):
    """L2 norm of each sample's gradient, fp32 [b] (GraNd, arXiv 2107.07075)."""

    def __init__(self, *, name: str = "norms", raw: bool = False) -> None:
        self.name, self.raw = name, raw

    def begin(self, finite: torch.Tensor) -> None:  # noqa: D102
        self._squares = [torch.zeros(len(finite), device=finite.device)]

    def dense_cost(self, shape: FactorShape) -> float:  # noqa: D102
        return _MEMORY * shape.m * shape.n

    def ghost_cost(self, shape: FactorShape) -> float:  # noqa: D102
        return shape.tokens**2 * (shape.n + (1 if shape.one_hot else shape.m) + 2 * _MEMORY)

    def add(self, block: Block) -> None:  # noqa: D102
        self._squares.append(torch.linalg.vecdot(block.values, block.values))

    def add_factors(self, name: str, factors: list[Factors], shape: torch.Size) -> None:  # noqa: D102
        self._squares.append(ghost_norms(factors))

    def finish(self) -> dict[str, torch.Tensor]:  # noqa: D102
        return {"": total(self._squares).clamp_min(0).sqrt().float()}


class Dots(Consumer):
    """Exact inner products with target vectors, fp32 [b, M]; ".norms" holds the samples' norms [b].

    Args:
        targets: M vectors of the size of the parameters.
        normalize: "none": plain products. "row": divided by the sample's norm; with targets that are
            means of unit vectors this is LESS's mean of cosines. "both": cosines.
        name: Key of the result.
        raw: As ``Consumer``.
    """

    def __init__(
        self,
        targets: TargetVectors,
        *,
        normalize: Literal["none", "row", "both"] = "row",
        name: str = "dots",
        raw: bool = False,
    ) -> None:
        self.targets, self.normalize, self.name, self.raw = targets, normalize, name, raw
        self._norms = Norms()
        self._columns = Columns(targets.flat)

    def begin(self, finite: torch.Tensor) -> None:  # noqa: D102
        self._norms.begin(finite)
        self._products = [torch.zeros(len(finite), len(self.targets), device=finite.device)]

    def dense_cost(self, shape: FactorShape) -> float:  # noqa: D102
        return (_MEMORY + len(self.targets)) * shape.m * shape.n

    def ghost_cost(self, shape: FactorShape) -> float:  # noqa: D102
        each = shape.tokens * shape.n * (1 if shape.one_hot else shape.m)
        return self._norms.ghost_cost(shape) + len(self.targets) * each

    def add(self, block: Block) -> None:  # noqa: D102
        vectors = self._columns.of(block.segments, block.values.device)
        self._products += inner_products(block.values, vectors)
        self._norms.add(block)

    def add_factors(self, name: str, factors: list[Factors], shape: torch.Size) -> None:  # noqa: D102
        self._products.append(ghost_dots(factors, self.targets.tensors[name].to(factors[0].right.device)))
        self._norms.add_factors(name, factors, shape)

    def finish(self) -> dict[str, torch.Tensor]:  # noqa: D102
        norms = self._norms.finish()[""]
        products = total(self._products)
        if self.normalize != "none":
            products = products / norms.double().clamp_min(1e-30).unsqueeze(1)
        if self.normalize == "both":
            products = products / self.targets.norms().double().to(products.device).clamp_min(1e-30)
        return {"": products.float(), ".norms": norms}


class Gram(Consumer):
    """Inner products of the batch's samples with one another, fp32 [b, b]."""

    def __init__(self, *, name: str = "gram", raw: bool = False) -> None:
        self.name, self.raw = name, raw

    def begin(self, finite: torch.Tensor) -> None:  # noqa: D102
        self._finite = finite
        self._products = [torch.zeros(len(finite), len(finite), device=finite.device)]

    def dense_cost(self, shape: FactorShape) -> float:  # noqa: D102
        return shape.rows * shape.m * shape.n

    def ghost_cost(self, shape: FactorShape) -> float:  # noqa: D102
        return shape.rows * shape.tokens**2 * (shape.n + (1 if shape.one_hot else shape.m) + 2 * _MEMORY)

    def add(self, block: Block) -> None:  # noqa: D102
        self._products += inner_products(block.values, block.values)

    def add_factors(self, name: str, factors: list[Factors], shape: torch.Size) -> None:  # noqa: D102
        self._products.append(ghost_gram(factors))

    def finish(self) -> dict[str, torch.Tensor]:  # noqa: D102
        return {"": total(self._products).float().masked_fill(~self._finite, torch.nan)}


class WeightedSums(Consumer):
    """Adds sum_i w_ki G_i to ``vectors``, over as many batches as wanted; per-task means are made of this.

    Set ``weights`` [K, b] before every batch. Samples without a loss count as weight 0; the weights
    that were used come back [b, K].

    Args:
        vectors: K running sums, changed when a batch is finished.
        name: Key of the result.
        raw: As ``Consumer``.
    """

    weights: torch.Tensor

    def __init__(self, vectors: TargetVectors, *, name: str = "sums", raw: bool = False) -> None:
        self.vectors, self.name, self.raw = vectors, name, raw

    def begin(self, finite: torch.Tensor) -> None:  # noqa: D102
        assert self.weights.shape == (len(self.vectors), len(finite)), "weights do not fit the batch"
        self._weights = self.weights.to(finite.device) * finite
        self._batch: dict[str, torch.Tensor] = {}  # added at the end: a batch that is started again counts once

    def dense_cost(self, shape: FactorShape) -> float:  # noqa: D102
        return len(self.vectors) * shape.m * shape.n

    def ghost_cost(self, shape: FactorShape) -> float:  # noqa: D102
        return shape.tokens * shape.n * (1 if shape.one_hot else shape.m)

    def add(self, block: Block) -> None:  # noqa: D102
        for (name, start, stop), values in block.parts():
            if name not in self._batch:
                self._batch[name] = values.new_zeros(self.vectors.flat(name).shape)
            self._batch[name][:, start:stop] += self._weights @ values

    def add_factors(self, name: str, factors: list[Factors], shape: torch.Size) -> None:  # noqa: D102
        sums = [weighted_sum(factors, weights, shape).flatten() for weights in self._weights]
        self._batch[name] = torch.stack(sums)

    def finish(self) -> dict[str, torch.Tensor]:  # noqa: D102
        for name, part in self._batch.items():
            sums = self.vectors.flat(name)
            sums += part.to(sums.device)
        self._batch = {}
        return {"": self._weights.t()}
