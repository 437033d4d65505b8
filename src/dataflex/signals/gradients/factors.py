"""Per-sample gradients in the two forms in which layers give them, and exact products of the factored form.

A matrix used on tokens has, for sample i, the gradient G_i = sum_t left_t (outer) right_t. Keeping the factors apart
("ghost" form) gives norms, inner products and weighted sums without ever forming G_i:
<G, G'> = sum_ts (left_t . left'_s)(right_t . right'_s).

Legend: b samples, T tokens, m rows and n columns of the parameter, M target vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch


@dataclass(frozen=True, kw_only=True)
class Factors:
    """Factored per-sample gradients of one use of a matrix parameter [m, n]: ``right`` is [b, T, n].

    ``left`` is [b, T, m], or int64 [b, T], the numbers of the rows of one-hot vectors (a lookup table).
    """

    left: torch.Tensor
    right: torch.Tensor

    @property
    def one_hot(self) -> bool:
        """Whether ``left`` names rows instead of holding values."""
        return self.left.dim() == 2


SampleGradients: TypeAlias = Factors | torch.Tensor
"""Per-sample gradients by one use of a parameter: factors, or formed as [b, *parameter.shape]."""


class FactorShape(NamedTuple):
    """Sizes that decide which form is cheaper: tokens (all uses together), rows, columns, numbers of a left factor."""

    tokens: int
    m: int
    n: int
    left_width: int


def filled(values: torch.Tensor, finite: torch.Tensor | None, value: float) -> torch.Tensor:
    """Return [b, ...] with ``value`` for the samples that are not ``finite`` [b]; None: all are."""
    return values if finite is None else values.masked_fill(~finite.view(-1, *([1] * (values.dim() - 1))), value)


def together(gradients: SampleGradients, rows: int) -> SampleGradients:
    """Return the gradients of samples that are ``rows`` rows each, one after the other: [b, ...] to [b / rows, ...]."""
    if isinstance(gradients, Factors):
        left, right = gradients.left, gradients.right
        return Factors(
            left=left.reshape(len(left) // rows, -1, *left.shape[2:]),
            right=right.reshape(len(right) // rows, -1, *right.shape[2:]),
        )
    return gradients.view(len(gradients) // rows, rows, *gradients.shape[1:]).sum(dim=1)


def mapped(
    gradients: SampleGradients, left: torch.Tensor | None, right: torch.Tensor | None, scale: float = 1.0
) -> SampleGradients:
    """Return ``scale`` left G_i right for the per-sample gradients G_i of a matrix, in the form that they have.

    ``left`` is [m', m] and ``right`` [n, n'], each None for the identity.
    """
    if isinstance(gradients, Factors):
        before, behind = gradients.left, gradients.right
        if left is not None:
            turned = left.T.to(behind)
            before = turned[before] if gradients.one_hot else before @ turned
        if right is not None:
            behind = behind @ right.to(behind)
        return Factors(left=before, right=behind * scale)
    found = gradients.float() * scale
    found = found if left is None else left @ found
    return found if right is None else found @ right


def formed(uses: list[SampleGradients], start: int, stop: int) -> torch.Tensor:
    """Return rows ``start:stop`` (first dimension of the parameter) of the summed per-sample gradients.

    The result is fp32 [b, (stop - start) * rest], contiguous, and may be changed in place.
    """
    total: torch.Tensor | None = None
    for use in uses:
        if isinstance(use, Factors):
            part = _materialize(use, start, stop).flatten(1)
        else:  # a parameter of no dimension counts as one row
            part = (use if use.dim() > 1 else use.unsqueeze(1))[:, start:stop].float().flatten(1)
        if total is None:
            total = part if isinstance(use, Factors) else part.clone()
        else:
            total += part
    assert total is not None
    return total


def _materialize(factors: Factors, start: int, stop: int) -> torch.Tensor:
    right = factors.right
    b, _, n = right.shape
    if factors.one_hot:
        out = torch.zeros(b * (stop - start), n, dtype=torch.float32, device=right.device)
        inside = (factors.left >= start) & (factors.left < stop)
        sample, token = inside.nonzero(as_tuple=True)
        out.index_add_(0, sample * (stop - start) + factors.left[sample, token] - start, right[sample, token].float())
        return out.view(b, stop - start, n)
    left = factors.left[..., start:stop]
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


def ghost_norms(uses: list[Factors]) -> torch.Tensor:
    """Return squared norms of the per-sample gradients, fp32 [b], without forming them."""
    total = torch.zeros(len(uses[0].right), dtype=torch.float32, device=uses[0].right.device)
    for i, a in enumerate(uses):
        for b in uses[i:]:
            both = (_products(a.left, b.left) * _products(a.right, b.right)).sum(dim=(1, 2))
            total += both if a is b else 2 * both
    return total


def ghost_dots(uses: list[Factors], vectors: torch.Tensor) -> torch.Tensor:
    """Return inner products with ``vectors`` [M, m, n] as fp32 [b, M], without forming the gradients."""
    columns = []
    for vector in vectors:
        column = torch.zeros(len(uses[0].right), dtype=torch.float32, device=vectors.device)
        for factors in uses:
            mapped = vector[factors.left] if factors.one_hot else factors.left @ vector.to(factors.left.dtype)
            column += (mapped * factors.right).sum(dim=(1, 2), dtype=torch.float32)
        columns.append(column)
    return torch.stack(columns, dim=1)


def weighted_sum(uses: list[Factors], weights: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return sum_i weights_i G_i as fp32 ``shape`` [m, n] for weights fp32 [b]; samples of weight 0 cost nothing."""
    kept = weights.nonzero().squeeze(1)
    out = torch.zeros(shape, dtype=torch.float32, device=weights.device)
    for factors in uses:
        right = (factors.right[kept] * weights[kept, None, None].to(factors.right.dtype)).flatten(0, 1)
        left = factors.left[kept].flatten(0, 1)
        if factors.one_hot:
            out.index_add_(0, left, right.float())
        elif left.shape[1] > right.shape[1]:
            out += (right.t() @ left).t().float()
        else:
            out += (left.t() @ right).float()
    return out
