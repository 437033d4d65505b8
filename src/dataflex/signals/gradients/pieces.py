"""Per-sample gradients in the two forms in which layers give them, and exact products of the factored form.

A matrix used on tokens has, for sample i, the gradient G_i = sum_t left_t (outer) right_t. Keeping
the factors apart ("ghost" form) gives norms, inner products and weighted sums without ever forming
G_i: <G, G'> = sum_ts (left_t . left'_s)(right_t . right'_s).

Legend: b samples, T tokens, m rows and n columns of the parameter, M target vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

__all__ = ["FactorShape", "Factors", "Piece", "dense_part", "ghost_dots", "ghost_gram", "ghost_norms", "weighted_sum"]


@dataclass(frozen=True, kw_only=True)
class Factors:
    """Factored per-sample gradients of one use of a matrix parameter [m, n].

    Attributes:
        left: [b, T, m]; or int64 [b, T], the numbers of the rows of one-hot vectors (a lookup table).
        right: [b, T, n].
    """

    left: torch.Tensor
    right: torch.Tensor

    @property
    def one_hot(self) -> bool:
        """Whether ``left`` names rows instead of holding values."""
        return self.left.dim() == 2


Piece: TypeAlias = Factors | torch.Tensor
"""Contribution of one use of a parameter: factors, or per-sample gradients [b, *parameter.shape]."""


@dataclass(frozen=True, kw_only=True)
class FactorShape:
    """Sizes that decide which form is cheaper: samples, tokens (all uses together), rows, columns."""

    rows: int
    tokens: int
    m: int
    n: int
    one_hot: bool

    @classmethod
    def of(cls, factors: list[Factors], shape: torch.Size) -> FactorShape:
        """Return the sizes of a parameter's uses taken together."""
        return cls(
            rows=len(factors[0].right),
            tokens=sum(piece.right.shape[1] for piece in factors),
            m=shape[0],
            n=shape[1],
            one_hot=all(piece.one_hot for piece in factors),
        )


def dense_part(pieces: list[Piece], start: int, stop: int) -> torch.Tensor:
    """Return rows ``start:stop`` (first dimension of the parameter) of the summed per-sample gradients.

    Returns:
        fp32 [b, (stop - start) * rest], contiguous, fresh (may be changed in place).
    """
    total: torch.Tensor | None = None
    for piece in pieces:
        if isinstance(piece, Factors):
            part = _materialize(piece, start, stop).flatten(1)
        else:  # a parameter of no dimension counts as one row
            part = (piece if piece.dim() > 1 else piece.unsqueeze(1))[:, start:stop].float().flatten(1)
        if total is None:
            total = part if isinstance(piece, Factors) else part.clone()
        else:
            total += part
    assert total is not None
    return total


def _materialize(piece: Factors, start: int, stop: int) -> torch.Tensor:
    right = piece.right
    b, _, n = right.shape
    if piece.one_hot:
        out = torch.zeros(b * (stop - start), n, dtype=torch.float32, device=right.device)
        inside = (piece.left >= start) & (piece.left < stop)
        sample, token = inside.nonzero(as_tuple=True)
        out.index_add_(0, sample * (stop - start) + piece.left[sample, token] - start, right[sample, token].float())
        return out.view(b, stop - start, n)
    left = piece.left[..., start:stop]
    # The narrow side goes first: matrix libraries are about twice as fast then for LoRA's shapes.
    if left.shape[2] > n:
        return torch.bmm(right.transpose(1, 2), left).transpose(1, 2).float()
    return torch.bmm(left.transpose(1, 2), right).float()


def _products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """All inner products of the tokens of ``a`` and ``b``: [.., T, S] in fp32; ids stand for one-hot vectors."""
    a_ids, b_ids = not a.is_floating_point(), not b.is_floating_point()
    if a_ids and b_ids:
        return (a.unsqueeze(-1) == b.unsqueeze(-2)).float()
    if a_ids:
        return _products(b, a).transpose(-1, -2)
    if b_ids:
        index = b.unsqueeze(-2).expand(*a.shape[:-1], b.shape[-1])
        return a.gather(-1, index).float()
    return (a @ b.transpose(-1, -2)).float()


def ghost_norms(factors: list[Factors]) -> torch.Tensor:
    """Return squared norms of the per-sample gradients, fp32 [b], without forming them."""
    total = torch.zeros(len(factors[0].right), dtype=torch.float32, device=factors[0].right.device)
    for i, a in enumerate(factors):
        for b in factors[i:]:
            both = (_products(a.left, b.left) * _products(a.right, b.right)).sum(dim=(1, 2))
            total += both if a is b else 2 * both
    return total


def ghost_gram(factors: list[Factors]) -> torch.Tensor:
    """Return inner products of the samples' gradients with one another, fp32 [b, b], without forming them."""
    num = len(factors[0].right)
    gram = torch.zeros(num, num, dtype=torch.float32, device=factors[0].right.device)
    for a in factors:
        for b in factors:
            left_all, right_all = b.left.flatten(0, 1), b.right.flatten(0, 1)
            for i in range(num):  # one sample against all keeps the product at T x bT
                both = _products(a.left[i], left_all) * _products(a.right[i], right_all)
                gram[i] += both.sum(dim=0).view(num, -1).sum(dim=1)
    return gram


def ghost_dots(factors: list[Factors], vectors: torch.Tensor) -> torch.Tensor:
    """Return inner products with ``vectors`` [M, m, n] as fp32 [b, M], without forming the gradients."""
    columns = []
    for vector in vectors:
        column = torch.zeros(len(factors[0].right), dtype=torch.float32, device=vectors.device)
        for piece in factors:
            mapped = vector[piece.left] if piece.one_hot else piece.left @ vector.to(piece.left.dtype)
            column += (mapped * piece.right).sum(dim=(1, 2), dtype=torch.float32)
        columns.append(column)
    return torch.stack(columns, dim=1)


def weighted_sum(factors: list[Factors], weights: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return sum_i weights_i G_i as fp32 ``shape`` [m, n] for weights fp32 [b]; samples of weight 0 cost nothing."""
    kept = weights.nonzero().squeeze(1)
    out = torch.zeros(shape, dtype=torch.float32, device=weights.device)
    for piece in factors:
        right = (piece.right[kept] * weights[kept, None, None].to(piece.right.dtype)).flatten(0, 1)
        left = piece.left[kept].flatten(0, 1)
        if piece.one_hot:
            out.index_add_(0, left, right.float())
        elif left.shape[1] > right.shape[1]:
            out += (right.t() @ left).t().float()
        else:
            out += (left.t() @ right).float()
    return out
