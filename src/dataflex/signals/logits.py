"""What a row's logits span: their nuclear norm, and a sketch that tells rows apart (UDS, arXiv 2510.16882).

The nuclear norm, the sum of the singular values of the positions x vocabulary matrix, comes from the eigenvalues of
its smaller Gram matrix: far cheaper than a singular value decomposition. The Gram matrix squares the condition number,
so it is summed in float64, where nothing of float32 logits is lost.

The sketch is a two-sided subsampled Fourier transform: random signs on the vocabulary, transform, real part, a few
columns drawn with replacement; then the same over positions, padded with zeros to the longest row. Transforms are not
normalized; what is drawn is scaled by sqrt(size / drawn).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from dataflex.rng import stream
from dataflex.signals.cross_entropy import chunk_tokens
from dataflex.signals.head import LogitReader, LogitsOf
from dataflex.signals.packing import real_tokens
from dataflex.signals.specs import LogitSpec

__all__ = ["LogitScorer", "LogitSketch", "nuclear_norm"]

_IGNORE = -100


def nuclear_norm(matrix: torch.Tensor, chunk: int = 8192) -> torch.Tensor:
    """Return the sum of the singular values of a matrix [T, V], float64 scalar; 0 for an empty one.

    Args:
        matrix: Any floating type.
        chunk: Elements of the longer side that are looked at together.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
    gram = torch.zeros(wide.shape[0], wide.shape[0], dtype=torch.float64, device=matrix.device)
    for part in wide.split(chunk, dim=1):
        part = part.double()
        gram.addmm_(part, part.t())
    return torch.linalg.eigvalsh(gram).clamp_min_(0).sqrt_().sum()


class LogitSketch:
    """Two-sided subsampled randomized Fourier transform of matrices of up to ``length`` rows.

    Args:
        length: Most rows of a matrix; the transform over rows has this size.
        rows: Rows that are drawn.
        columns: Columns that are drawn.
        seed: Seed of signs and draws.
    """

    def __init__(self, length: int, rows: int, columns: int, seed: int) -> None:
        self._shape, self._seed, self._length = (rows, columns), seed, length
        signs, drawn = self._draws("positions", length, rows)
        angles = np.outer(drawn, np.arange(length)) % length * (2.0 * math.pi / length)
        self._over_rows = torch.from_numpy(np.cos(angles) * signs * math.sqrt(length / rows)).float()
        self._signs, self._drawn = torch.zeros(0), torch.zeros(0, dtype=torch.int64)

    @property
    def size(self) -> int:
        """Numbers of a sketch."""
        return self._shape[0] * self._shape[1]

    def _draws(self, side: str, size: int, count: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        random = stream(self._seed, f"logit sketch of {side}", size)
        return random.integers(0, 2, size) * 2.0 - 1.0, random.integers(0, size, count)

    def __call__(self, matrix: torch.Tensor, chunk: int = 4096) -> torch.Tensor:
        """Return the sketch of a matrix [T, V], fp32 [rows * columns], T at most ``length``."""
        width, columns = matrix.shape[1], self._shape[1]
        if len(self._signs) != width:
            signs, drawn = self._draws("vocabulary", width, columns)
            # The real part of a real vector's transform is the same at k and V - k: half of it is enough.
            folded = np.minimum(drawn, width - drawn)
            self._signs = torch.from_numpy(signs).float().to(matrix.device)
            self._drawn = torch.from_numpy(folded).to(matrix.device)
        self._over_rows = self._over_rows.to(matrix.device)
        parts = [
            torch.fft.rfft(part.float() * self._signs, dim=1).real.index_select(1, self._drawn)
            for part in matrix.split(chunk)
        ]
        picked = torch.cat(parts) * math.sqrt(width / columns)
        return (self._over_rows[:, : len(matrix)] @ picked).flatten()


class LogitScorer:
    """Turns collated batches into nuclear norms and sketches; call it without gradient, in eval mode, in autocast.

    Args:
        reader: Of the model.
        spec: Which positions, and what becomes of them.
        length: Tokens of the longest row.
    """

    def __init__(self, reader: LogitReader, spec: LogitSpec, length: int) -> None:
        self._reader, self._spec = reader, spec
        self._sketch = LogitSketch(length, spec.rows, spec.columns, spec.seed)

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> torch.Tensor:
        """Return the norm and the sketch of each row of a batch with ``labels``, fp32 [B, 1 + rows * columns].

        NaN for rows without a supervised token.
        """
        labels, real = batch["labels"], real_tokens(batch)
        # As for losses: what follows left padding is predicted from nothing.
        predicts = torch.zeros_like(real)
        predicts[:, :-1] = labels[:, 1:].ne(_IGNORE) & real[:, :-1]
        taken = predicts if self._spec.tokens == "completion" else real
        out = torch.full((len(labels), 1 + self._sketch.size), torch.nan, device=labels.device)

        def use(logits_of: LogitsOf, width: int) -> torch.Tensor:
            chunk = chunk_tokens(width, labels.device)
            for row in predicts.any(dim=1).nonzero().flatten().tolist():
                positions = taken[row].nonzero().flatten()
                logits = torch.cat([logits_of(torch.full_like(part, row), part) for part in positions.split(chunk)])
                out[row, 0] = nuclear_norm(logits)
                out[row, 1:] = self._sketch(logits, chunk)
                if self._spec.per_length:  # both are linear in the logits
                    out[row] /= math.sqrt(len(positions))
            return out

        return self._reader(batch, use)
