"""The weights of domains in the loss of one optimizer step, as a mixer gives them.

A mixer's weights are ratios. What they are multiplied by depends on the denominator of the step: nothing for
a weighted mean, which any factor leaves as it is; a factor that makes their token mean over the step one where the
denominator is the number of tokens; and tokens over those of the domain for a sum over domains of mean losses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex import comm
from dataflex.method import DomainWeighter, Normalizer, Rows
from dataflex.plan.domains import Domains
from dataflex.sequences import Sequences
from dataflex.train.answers import check_loss_weights
from dataflex.train.weighting import IGNORE_INDEX

__all__ = ["DomainWeights", "counted_tokens"]

Floats = NDArray[np.float64]


class DomainWeights:
    """How much the domains count in the loss.

    Args:
        mixer: A mixer that weighs the loss.
        domains: Domains of the training rows.
        over_ranks: Whether the step's denominator counts tokens over all ranks.
    """

    def __init__(self, mixer: DomainWeighter, domains: Domains, *, over_ranks: bool) -> None:
        self._mixer, self._domains, self._over_ranks = mixer, domains, over_ranks
        self._by_domain: Floats | None = None

    def given(self) -> Floats:
        """Return the mixer's weights as they are now [K].

        Raises:
            ComponentError: They are no numbers >= 0 by domain.
        """
        return check_loss_weights(self._mixer, len(self._domains.names))

    @property
    def by_domain_means(self) -> bool:
        """Whether the loss is the sum over domains of their weights times their mean losses."""
        return self._mixer.loss_normalizer == "domain"

    def begin_step(
        self, batches: list[Any], rows: list[Rows], num_items: Any, device: torch.device, normalizer: Normalizer
    ) -> None:
        """Take the weights of the coming step from the mixer (collective).

        Args:
            batches: Collated micro-batches of this rank, with ``labels``.
            rows: Row ids of each micro-batch.
            num_items: Supervised tokens of the step, as the Trainer counts them.
            device: Where collectives work.
            normalizer: The denominator of the step.
        """
        alpha = self.given()
        if self.by_domain_means:  # a_d N / n_d: the sum over tokens divided by N is sum_d a_d (mean loss of d)
            tokens_K = self._tokens(batches, rows, device, predicted_tokens)
            alpha = np.divide(alpha * float(num_items), tokens_K, out=np.zeros_like(alpha), where=tokens_K > 0)
        elif normalizer == "num_tokens":  # the mixer's weights must not change the size of the step
            weighted = float(alpha @ self._tokens(batches, rows, device, counted_tokens))
            alpha = alpha * (float(num_items) / weighted if weighted > 0 else 0.0)
        self._by_domain = alpha

    def _tokens(
        self,
        batches: list[Any],
        rows: list[Rows],
        device: torch.device,
        count: Callable[[torch.Tensor], torch.Tensor],
    ) -> Floats:
        """Return the step's tokens of each domain [K] (collective)."""
        counts = torch.zeros(len(self._domains.names), dtype=torch.float64)
        for batch, ids in zip(batches, rows, strict=True):
            which = torch.from_numpy(self._domains.domain_of[ids].astype(np.int64))
            counts.index_add_(0, which, count(batch["labels"]).cpu())
        if self._over_ranks:
            counts = comm.gather_sum(counts.to(device)).cpu()
        found: Floats = counts.numpy()
        return found

    def of(self, rows: Rows) -> Floats:
        """Return the weights of rows in this step [len(rows)]."""
        assert self._by_domain is not None
        return np.asarray(self._by_domain[self._domains.domain_of[rows]])

    def times(self, weights: torch.Tensor, sequences: Sequences, normalizer: Normalizer) -> torch.Tensor:
        """Multiply weights [B, 1] or [R, T] by the domains' (collective under ``num_sequences``).

        Under ``num_sequences`` the sum over the micro-batch of all ranks stays as it was.
        """
        factor = torch.from_numpy(self.of(sequences.rows_B)).to(weights)
        by_sequence = len(weights) == len(sequences.rows_B) and weights.shape[1] == 1
        product = weights * (factor[:, None] if by_sequence else sequences.spread(factor))
        if normalizer != "num_sequences":
            return product
        return product * comm.ratio_of_sums(weights.double().sum(), product.double().sum()).to(product)


def counted_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Return tokens per row [R] as the stock denominator counts them (a label in the first place included)."""
    return labels.ne(IGNORE_INDEX).sum(dim=1).double()


def predicted_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Return tokens per row [R] that have a loss (the first place has none)."""
    return labels[:, 1:].ne(IGNORE_INDEX).sum(dim=1).double()
