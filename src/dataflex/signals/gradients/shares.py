"""What each domain's rows put into a training step's gradient, and each row's product with some vectors.

A layer with inputs a and output gradients g has, for row i, the weight gradient G_i = sum_t g_it a_it'. Hooks form it
in the training's own backward pass, a few rows at a time, add it to the share of the row's domain and take its products
with the vectors, so that shares add up to what the backward pass puts into ``.grad``, loss scale and weights included.

Legend: B rows of the micro-batch, T positions, K domains, M vectors.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from dataflex.sequences import Joined
from dataflex.signals.gradients.consumers import TargetVectors, inner_products, total
from dataflex.signals.gradients.factors import Factors, SampleGradients, formed
from dataflex.signals.gradients.in_run import StepHooks
from dataflex.signals.gradients.parameters import Unit

logger = logging.getLogger(__name__)

_FORMED = 2**24
"""Numbers of rows' gradients that are formed together at most: 64 MiB in fp32."""


class StepShares(StepHooks):
    """Hooks that split a step's gradient by domain.

    Args:
        layers: From ``capturable`` with ``whole``.
        shares: Takes the domains' gradients in its first K vectors; it has the layers' parameters.
    """

    def __init__(self, layers: Sequence[Unit], shares: TargetVectors) -> None:
        super().__init__(layers)
        self.shares = shares
        self._vectors: TargetVectors | None = None
        self._domains: torch.Tensor | None = None
        self._products: list[torch.Tensor] = []

    def begin(
        self, shape: tuple[int, int], domains_B: torch.Tensor, vectors: TargetVectors, joined: Joined | None = None
    ) -> None:
        """Listen to a micro-batch of ``shape`` (B, T), whose rows are of ``domains_B`` int64 [B].

        ``joined`` says where they lie in one sequence [1, T], where they do.
        """
        self._listen(shape, joined)
        self._domains, self._vectors, self._products = domains_B, vectors, []

    def take(self) -> torch.Tensor:
        """Return the products of the rows' gradients with the vectors, float64 [B, M], and listen no more."""
        assert self._domains is not None
        assert self._vectors is not None
        rows, self._listening = len(self._domains), False
        products, self._products = self._products, []
        if not products:
            return torch.zeros(rows, len(self._vectors), dtype=torch.float64, device=self._domains.device)
        return total(products)

    def _miss(self, unit: Unit) -> None:
        if str(unit) not in self._odd:
            self._odd.add(str(unit))
            logger.info("a step's gradient is not split by domain in %s, which sees other than the rows' tokens", unit)

    def _see(self, unit: Unit, kept: Any, gradient: torch.Tensor) -> None:
        assert unit.kind is not None
        found = unit.kind.sample(unit.module, kept, gradient, frozenset(unit.parameters))
        for local, name in unit.parameters.items():
            self._add(name, found[local])

    def _add(self, name: str, use: SampleGradients) -> None:
        """Add one use of a parameter."""
        assert self._domains is not None
        assert self._vectors is not None
        shares, vectors = self.shares.flat(name), self._vectors.flat(name)
        if isinstance(use, Factors) and use.one_hot:
            self._add_lookups(use, shares, vectors)
            return
        shape = self.shares.tensors[name].shape[1:]
        length, products = shape[0] if shape else 1, []
        for part in torch.arange(len(self._domains)).split(max(1, _FORMED // shares.shape[1])):
            of = slice(int(part[0]), int(part[-1]) + 1)
            some = Factors(left=use.left[of], right=use.right[of]) if isinstance(use, Factors) else use[of]
            rows = formed([some], 0, length)
            shares.index_add_(0, self._domains[of], rows)
            products.append(total(inner_products(rows, vectors)))
        self._products.append(torch.cat(products))

    def _add_lookups(self, use: Factors, shares: torch.Tensor, vectors: torch.Tensor) -> None:
        """Add a lookup table's use, whose gradient by row is one vector a token."""
        assert self._domains is not None
        right, width = use.right.float(), use.right.shape[-1]
        table = shares.view(len(shares), -1, width)
        index = self._domains[:, None] * table.shape[1] + use.left
        table.view(-1, width).index_add_(0, index.flatten(), right.flatten(0, 1))
        looked_up = vectors.view(len(vectors), -1, width)[:, use.left]  # [M, B, T, n]
        self._products.append((looked_up * right).sum(dim=-1).sum(dim=-1, dtype=torch.float64).T)
