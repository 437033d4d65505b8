"""Held-out losses by token: of each evaluation set, and over all of them.

The Trainer's own evaluation loss is a mean over batches. Here token losses are added up over batches and
ranks, so that the perplexity of a set is what its name says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from datasets import concatenate_datasets

from dataflex import comm

__all__ = ["EvaluationSums", "HeldOut", "perplexity", "totals", "undivided"]

_IGNORE = -100


def perplexity(loss: float) -> float:
    """Return exp(loss), infinite where it is too large."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


class HeldOut(dict[str, Any]):
    """Evaluation rows by domain.

    Args:
        parts: A data set for each domain.
        whole: All the rows as one data set, in the order in which LLaMA-Factory has them.
    """

    def __init__(self, parts: Mapping[str, Any], whole: Any) -> None:
        super().__init__(parts)
        self.whole = whole


def undivided(dataset: Any) -> Any:
    """Return one data set where several are evaluated by name; whatever else is given as it is."""
    if isinstance(dataset, HeldOut):
        return dataset.whole
    return concatenate_datasets([*dataset.values()]) if isinstance(dataset, dict) else dataset


class EvaluationSums:
    """Sums over the batches of one evaluation loop."""

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None

    def add(self, loss: torch.Tensor, labels: torch.Tensor, num_items: Any) -> None:
        """Take in one batch.

        Args:
            loss: Sum of this rank's token losses divided by ``num_items``; a token mean where it is None.
            labels: [B, T].
            num_items: Tokens that the Trainer divided by, or None.
        """
        tokens = labels[:, 1:].ne(_IGNORE).sum().double()
        over = tokens if num_items is None else torch.as_tensor(num_items, device=loss.device).double()
        pair = torch.stack([loss.detach().double() * over, tokens.to(loss.device)])
        self._sums = pair if self._sums is None else self._sums + pair

    def take(self, device: torch.device) -> tuple[float, float]:
        """Return the sum of token losses and the tokens over all ranks, and start anew (collective)."""
        sums = torch.zeros(2, dtype=torch.float64, device=device) if self._sums is None else self._sums
        self._sums = None
        loss, tokens = comm.gather_sum(sums).tolist()
        return loss, tokens


def totals(found: dict[str, tuple[float, float]], prefix: str) -> dict[str, float]:
    """Return the losses over all sets: micro (every token counts alike) and macro (every set does).

    Args:
        found: Sum of token losses and tokens of each set that has any.
        prefix: What names begin with.
    """
    if not found:
        return {}
    micro = sum(loss for loss, _ in found.values()) / sum(tokens for _, tokens in found.values())
    macro = sum(loss / tokens for loss, tokens in found.values()) / len(found)
    return {
        f"{prefix}_loss": micro,
        f"{prefix}_micro_loss": micro,
        f"{prefix}_macro_loss": macro,
        f"{prefix}_micro_perplexity": perplexity(micro),
        f"{prefix}_macro_perplexity": perplexity(macro),
    }
