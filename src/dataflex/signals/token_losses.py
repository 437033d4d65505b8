"""Cross-entropy of every supervised token, with EL2N and entropy from the same pass.

The output layer is applied to chunks of supervised tokens inside the model's own forward (``signals.head``), so
that logits of the whole batch never exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from dataflex.signals.cross_entropy import chunk_tokens, entropies
from dataflex.signals.head import LogitReader, LogitsOf
from dataflex.signals.packing import document_ids, real_tokens

__all__ = ["BatchTokens", "TokenLosses", "TokenScorer"]

_IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class BatchTokens:
    """Supervised tokens of one batch, on the device, row by row [S].

    Attributes:
        num_rows: Rows of the batch B.
        row: Row of each token in the batch, ascending.
        position: Position of the predicted token in its row, padding not counted.
        document: Document of the predicted token in its row; -1 where the token before it belongs to
            another document, so that its loss says nothing about either.
        loss: Cross-entropy, fp32.
        el2n: ||softmax(z) - onehot(y)||_2, or None if not asked for.
        entropy: Entropy of the prediction in nats, or None if not asked for.
    """

    num_rows: int
    row: torch.Tensor
    position: torch.Tensor
    document: torch.Tensor
    loss: torch.Tensor
    el2n: torch.Tensor | None = None
    entropy: torch.Tensor | None = None

    def means(self, what: str = "loss") -> torch.Tensor:
        """Return the mean of ``loss``, ``el2n`` or ``entropy`` over each row's tokens [B]; NaN without any."""
        values = getattr(self, what)
        sums = values.new_zeros(self.num_rows).index_add_(0, self.row, values)
        return sums / torch.bincount(self.row, minlength=self.num_rows)


@dataclass(frozen=True, kw_only=True)
class TokenLosses:
    """Supervised tokens of many rows: those of row i are ``[offsets[i]:offsets[i + 1]]``.

    Attributes:
        offsets: int64 [n + 1].
        loss: float32 [total].
        position: int32 [total]; see ``BatchTokens``.
        document: int32 [total]; see ``BatchTokens``.
        el2n: float32 [total], or None if not asked for.
        entropy: float32 [total], or None if not asked for.
    """

    offsets: NDArray[np.int64]
    loss: NDArray[np.float32]
    position: NDArray[np.int32]
    document: NDArray[np.int32]
    el2n: NDArray[np.float32] | None = None
    entropy: NDArray[np.float32] | None = None

    def means(self, what: str = "loss") -> NDArray[np.float32]:
        """Return the mean of ``loss``, ``el2n`` or ``entropy`` over each row's tokens [n]; NaN without any."""
        values = getattr(self, what)
        counts = np.diff(self.offsets)
        row = np.repeat(np.arange(len(counts)), counts)
        sums = np.bincount(row, weights=values, minlength=len(counts))
        return np.divide(sums, counts, out=np.full(len(counts), np.nan), where=counts > 0).astype(np.float32)

    def documents(self) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
        """Return what is known of each document with supervised tokens, by row and document.

        Returns:
            keys: (row, document) pairs int64 [m, 2]; rows count from 0 in the order asked for.
            losses: Token-mean loss float32 [m].
            tokens: Supervised tokens int64 [m].
        """
        counts = np.diff(self.offsets)
        keys = np.stack([np.repeat(np.arange(len(counts)), counts), self.document], axis=1).astype(np.int64)
        inside = self.document >= 0
        distinct, which, tokens = np.unique(keys[inside], axis=0, return_inverse=True, return_counts=True)
        sums = np.bincount(which.reshape(-1), weights=self.loss[inside], minlength=len(distinct))
        return distinct, (sums / np.maximum(tokens, 1)).astype(np.float32), tokens.astype(np.int64)


class TokenScorer:
    """Turns collated batches into ``BatchTokens``; call it without gradient, in eval mode, in autocast.

    Collective in its first call: all ranks settle on the same way.

    Args:
        model: The outermost module to call, not the DDP or DeepSpeed engine.
        el2n: Also compute EL2N (Deep Learning on a Data Diet, arXiv 2107.07075) per token.
        entropy: Also compute the entropy per token.

    Raises:
        UnsupportedError: No transformers model inside.
    """

    def __init__(self, model: nn.Module, *, el2n: bool = False, entropy: bool = False) -> None:
        self._reader = LogitReader(model)
        self._el2n, self._entropy = el2n, entropy
        self.values: tuple[str, ...] = ("loss", *["el2n"] * el2n, *["entropy"] * entropy)
        """Names of what is computed per token."""

    @property
    def through_head(self) -> bool | None:
        """Whether the head is applied in chunks; None until the first batch has been seen."""
        return self._reader.through_head

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> BatchTokens:
        """Score the supervised tokens of a batch with ``labels`` [B, T]."""
        labels, real = batch["labels"], real_tokens(batch)
        # What follows left padding is predicted from nothing: without padding it would have no loss either.
        supervised = labels[:, 1:].ne(_IGNORE) & real[:, :-1]
        row, before = supervised.nonzero(as_tuple=True)
        targets = labels[row, before + 1]

        def score(logits_of: LogitsOf, width: int) -> dict[str, torch.Tensor]:
            return self._chunks(lambda part: logits_of(row[part], before[part]), targets, width)

        columns = self._reader(batch, score)
        documents = document_ids(batch)
        document = documents[row, before + 1]
        first = real.long().argmax(dim=1)
        return BatchTokens(
            num_rows=len(labels),
            row=row,
            position=before + 1 - first[row],
            document=torch.where(document.eq(documents[row, before]), document, -1),
            **columns,
        )

    def _chunks(
        self, logits_of: Callable[[slice], torch.Tensor], targets: torch.Tensor, vocabulary: int
    ) -> dict[str, torch.Tensor]:
        size = chunk_tokens(vocabulary, targets.device)
        parts: list[dict[str, torch.Tensor]] = []
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            parts.append(self._score(logits_of(part).float(), targets[part]))
        if not parts:
            return {name: torch.zeros(0, device=targets.device) for name in self.values}
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _score(self, logits_SV: torch.Tensor, targets_S: torch.Tensor) -> dict[str, torch.Tensor]:
        loss_S = F.cross_entropy(logits_SV, targets_S, reduction="none")
        out = {"loss": loss_S}
        if not (self._el2n or self._entropy):
            return out
        log_p_SV = torch.log_softmax(logits_SV, dim=-1)
        p_SV = log_p_SV.exp()
        if self._entropy:
            out["entropy"] = entropies(log_p_SV)
        if self._el2n:
            # 1 - p_y as the sum of the others: sum p^2 - 2 p_y + 1 would cancel for confident predictions.
            others_SV = p_SV.scatter(1, targets_S[:, None], 0.0)
            out["el2n"] = torch.hypot(others_SV.sum(dim=-1), others_SV.norm(dim=-1))
        return out
