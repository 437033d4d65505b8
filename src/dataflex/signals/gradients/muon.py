"""What Muon would make of a gradient: its orthogonalization, held fixed at the momentum.

Muon moves a matrix [m, n] by 0.2 sqrt(max(m, n)) NS(G), where G = (1 + mu) g + mu^2 M for the next gradient g and the
buffer M (under nesterov; else g + mu M). NS is an odd polynomial in the singular values of G / |G|, five times
a s + b s^3 + c s^5, so NS(G) = P(G G') G / |G| with a symmetric matrix P. With P and |G| as they are at M, where the
momentum is most of G, the update is linear in g. Sources: Jordan et al. 2024, arXiv 2502.16982 (its scale and
LLaMA-Factory's Muon), arXiv 2602.05400 (rows' gradients through the polynomial).

Not exact: NS turns as g turns G, which a row's own gradient does little; the optimizer rounds to bfloat16, P is fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from dataflex.signals.gradients.factors import SampleGradients, mapped

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_TINY = 1e-7


@dataclass(frozen=True, kw_only=True)
class Momentum:
    """Muon's state of one matrix."""

    buffer: torch.Tensor | None  # sum of gradients, each step times ``decay``, fp32 [m, n]; None before the first step
    decay: float = 0.95
    nesterov: bool = True
    steps: int = 5  # of the Newton-Schulz iteration

    @cached_property
    def polynomial(self) -> torch.Tensor | None:
        """Return P times 0.2 sqrt(max(m, n)) / |M|, fp32, as large as the narrow side; zeros where M is zero.

        It goes before a wide gradient and behind a tall one. None before the first step: gradients stay as they are.
        """
        if self.buffer is None:
            return None
        m, n = self.buffer.shape
        length = float(self.buffer.norm()) + _TINY
        wide = (self.buffer if m <= n else self.buffer.T) / length
        gram = wide @ wide.T
        identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        a, b, c = COEFFICIENTS
        product = identity * (0.2 * max(m, n) ** 0.5 / length if self.buffer.any() else 0.0)
        for _ in range(self.steps):  # all of these are polynomials of one matrix, so their order is of no account
            factor = a * identity + b * gram + c * gram @ gram
            product, gram = factor @ product, factor @ gram @ factor
        return product

    def sides(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return what goes before a gradient, and what behind it."""
        assert self.buffer is not None
        m, n = self.buffer.shape
        return (self.polynomial, None) if m <= n else (None, self.polynomial)

    def directions(self, uses: list[SampleGradients], *, include_momentum: bool) -> list[SampleGradients]:
        """Return what the next update would be for each sample's gradient alone, without the learning rate.

        Args:
            uses: Of the parameter; the same number comes back, and one more for the momentum.
            include_momentum: Whether the term of the momentum, which all samples share, is kept.
        """
        if self.buffer is None:
            return uses
        mu, (left, right) = self.decay, self.sides()
        own, shared = (1 + mu, mu**2) if self.nesterov else (1.0, mu)
        found = [mapped(use, left, right, own) for use in uses]
        if include_momentum:
            rows = len(found[0] if isinstance(found[0], torch.Tensor) else found[0].right)
            term = mapped(self.buffer.unsqueeze(0), left, right, shared)
            assert isinstance(term, torch.Tensor)
            found.append(term.expand(rows, -1, -1))
        return found

    def scaled(self, gradients: torch.Tensor) -> torch.Tensor:
        """Return what gradients [K, m, n] move the matrix by in all later steps, as Adam's 1 / sqrt(v) says it."""
        if self.buffer is None:
            return gradients
        left, right = (side if side is None else side.to(gradients.device) for side in self.sides())
        found = mapped(gradients, left, right, 1 / (1 - self.decay))
        assert isinstance(found, torch.Tensor)
        return found
